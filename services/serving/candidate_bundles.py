"""Candidate bundles: bundles loaded next to the current one, for the experiment arms that name them.

Each has its own encoders, indexes, models and view of the same items and events. Writes go through the
current bundle's services, which encode for all. Part of the composition root.
"""

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from services.catalog.bundle import Bundle
from services.core.errors import FailedPrecondition
from services.serving.loaded_bundle import LoadedBundle, Loop, ProcessResources, load_encoders, vector_blocks

if TYPE_CHECKING:
    from services.embedding.catalog.search_view import SearchView
    from services.embedding.encoders.encoder_pool import EncoderPool


class CandidateBundles:
    """The candidate bundles of a process: added one by one, closed together."""

    def __init__(self, resources: ProcessResources) -> None:
        self._resources = resources
        self._candidates: list[tuple[LoadedBundle, EncoderPool]] = []
        self.loops: list[Loop] = []
        """The loops that keep the candidates up to date."""

    async def add(self, directory: Path, main: LoadedBundle) -> None:
        """Load a bundle next to `main`, encode what it lacks, and serve it.

        Raises:
            FailedPrecondition: the bundle is invalid, is served already, or has other event types.
        """
        from services.embedding.catalog import backfill
        from services.embedding.encoders import encoder_pool

        bundle = await asyncio.to_thread(Bundle, directory)
        versions = [main.bundle.version, *(candidate.bundle.version for candidate, _ in self._candidates)]
        if bundle.version in versions:
            raise FailedPrecondition(f"bundle {bundle.version} in {directory} is served already")
        assert self._resources.event_store is not None  # noqa: S101 - all services are hosted
        if self._resources.event_store.types != set(bundle.profile.event_types):
            raise FailedPrecondition(f"bundle {bundle.version} has other event types")
        text, image = await asyncio.to_thread(load_encoders, bundle, self._resources.settings.device)
        contents = await asyncio.to_thread(bundle.catalog)
        encoders = encoder_pool.EncoderPool(text, image, main.catalog.encoders)
        preparation = backfill.Backfill(main.view, encoders, bundle.version)
        await preparation.import_vectors(contents.items, vector_blocks(contents, encoders.digests))
        await preparation.run()
        candidate = await asyncio.to_thread(LoadedBundle, self._resources, bundle, encoders)
        self._candidates.append((candidate, encoders))
        await asyncio.to_thread(candidate.import_items)
        # From here on these encoders encode every write too, and the candidate shows it at once.
        writer = main.catalog
        writer.retarget(view=writer.view, also_encode_for=[*writer.other_encoders, encoders])
        assert self._resources.event_followers is not None  # noqa: S101 - all services are hosted
        self._resources.event_followers.register(candidate.ranking)
        await main.view.follow()
        await candidate.catch_up(main)
        await candidate.tidy()
        assert main.gateway is not None  # noqa: S101 - all services are hosted
        assert candidate.gateway is not None  # noqa: S101 - all services are hosted
        main.gateway.add_pipeline(candidate.gateway.pipeline)
        self.loops += [partial(follow_leader, main.view, candidate.view), candidate.view.maintain]

    async def close(self) -> None:
        """Close the candidates in reverse order."""
        for candidate, encoders in reversed(self._candidates):
            await asyncio.to_thread(candidate.close)
            await asyncio.to_thread(encoders.close)


async def follow_leader(leader: "SearchView", follower: "SearchView") -> None:
    """Let a view follow each write at once after another view has seen it."""
    while True:
        await leader.wait_for_commit_after(follower.table_sequence)
        await follower.follow()
