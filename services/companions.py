"""Bundles that are served beside the newest one, for the arms of experiments that name them.

Each has encoders, indexes, models and a view of the same items and events; writes go through the newest
bundle's services, which encode for all. With `wiring.py` a part of the composition root.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.bundle import Bundle
from services.errors import FailedPrecondition
from services.generation import Generation, Shared, blocks_of, encoders_of

if TYPE_CHECKING:
    from services.embedding.encoding import Encoding
    from services.embedding.view import CatalogueView


class Companions:
    """The bundles beside the newest, added one by one, closed together."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._others: list[tuple[Generation, Encoding]] = []
        self.background: list[Callable[[], Coroutine[Any, Any, None]]] = []
        """What has to run for them without end."""

    async def add(self, directory: Path, main: Generation) -> None:
        """Serve a bundle beside `main` as well, once it lacks nothing.

        Raises:
            FailedPrecondition: it is no bundle, is served already, or has other types of events.
        """
        from services.embedding import encoding, preparing

        bundle = await asyncio.to_thread(Bundle, directory)
        versions = [main.bundle.version, *(other.bundle.version for other, _ in self._others)]
        if bundle.version in versions:
            raise FailedPrecondition(f"bundle {bundle.version} in {directory} is served already")
        assert self._shared.events is not None  # noqa: S101 - all services are hosted
        if self._shared.events.types != set(bundle.profile.event_types):
            raise FailedPrecondition(f"bundle {bundle.version} has other types of events")
        encoders = await asyncio.to_thread(encoders_of, bundle, self._shared.settings.device)
        brought = await asyncio.to_thread(bundle.catalogue)
        work = encoding.Encoding(*encoders, main.catalogue.encoding)
        preparation = preparing.Preparation(main.view, work, bundle.version)
        await preparation.bring(brought.items, blocks_of(brought, work.digests))
        await preparation.run()
        other = await asyncio.to_thread(Generation, self._shared, bundle, work)
        self._others.append((other, work))
        await asyncio.to_thread(other.load_items)
        # From now on what is written has vectors by these encoders too, and is seen there at once.
        main.catalogue.beside = (*main.catalogue.beside, work)
        main.ranking.heirs.append(other.ranking)
        await main.view.follow()
        await other.catch_up(main)
        await other.tidy()
        assert main.gateway is not None  # noqa: S101
        assert other.gateway is not None  # noqa: S101
        main.gateway.recommending.pipelines[bundle.version] = other.gateway.pipeline
        self.background += [partial(led, main.view, other.view), other.view.maintain]

    async def close(self) -> None:
        """Close them, the last first."""
        for other, work in reversed(self._others):
            await asyncio.to_thread(other.close)
            await asyncio.to_thread(work.close)


async def led(leader: "CatalogueView", follower: "CatalogueView") -> None:
    """Let a view follow at once what another one has seen written."""
    while True:
        await leader.moved(follower.written)
        await follower.follow()
