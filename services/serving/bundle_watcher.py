"""Watches for the next bundle and loads it next to the current one.

A process without peers serves the newest bundle in its directory. A process with peers serves the newest
bundle that all of them serve. Part of the composition root.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from services.catalog.bundle import Bundle, manifest_of, published, version_of
from services.core.errors import FailedPrecondition, Unavailable
from services.rpc.peers import Peers
from services.serving.loaded_bundle import (
    EMBEDDING,
    LoadedBundle,
    ProcessResources,
    load_encoders,
    vector_blocks,
)
from services.serving.settings import Settings
from services.serving.version_manager import (
    SERVED_FILE,
    BundleVersionManager,
    Task,
    cancel_tasks,
    start_tasks,
)

if TYPE_CHECKING:
    from services.embedding.catalog.backfill import Backfill
    from services.embedding.encoders.encoder_pool import EncoderPool

PEER_POLL_SECONDS = 5.0
"""Seconds between two requests that tell the peers which bundles this process serves."""
_MAX_PAUSE = 600.0
_log = logging.getLogger(__name__)

ReportReady = Callable[[bool], Awaitable[None]]


class BundleWatcher:
    """Loads the next bundle for `manager`; `backfill` is the encoding for it that runs, if any."""

    def __init__(self, resources: ProcessResources, manager: BundleVersionManager) -> None:
        self._resources, self._settings, self._manager = resources, resources.settings, manager
        self.backfill: Backfill | None = None
        self._next_version = ""  # while it is loaded
        self._tasks: list[Task] = []

    def start(self, report_ready: ReportReady) -> None:
        """Start watching; `report_ready` receives whether the next bundle is ready."""
        self._tasks = start_tasks([self._poll_peers])
        if self._settings.bundle_poll_seconds:
            self._tasks += start_tasks([partial(self._watch, report_ready)])

    async def stop(self) -> None:
        """Stop watching, and give up the bundle that is being loaded."""
        await cancel_tasks(self._tasks)

    async def _poll_peers(self) -> None:
        """Tell peers over and over which bundles this process serves, so that they keep them loaded."""
        while True:
            await self._update_peers()
            await asyncio.sleep(PEER_POLL_SECONDS)

    async def _update_peers(self) -> None:
        versions = [loaded.bundle.version for loaded in self._manager.loaded]
        if self._next_version:
            versions.append(self._next_version)
        await self._resources.peers.update(versions)

    def _target(self) -> Path | None:
        """The bundle to serve: the newest one that all peers serve; None while a peer does not answer.

        A process with --hot-swap=false keeps its bundle as long as its peers have it.
        """
        peers, bundles = self._resources.peers, published(self._settings.bundle)
        if not peers.names:
            return bundles[-1]
        if peers.unanswered:
            return None
        current = self._manager.current.bundle
        if not self._settings.hot_swap and not peers.any_lacks(current.version):
            return current.directory
        common = [bundle for bundle in bundles if peers.all_serve(version_of(bundle))]
        return common[-1] if common else current.directory

    async def _watch(self, report_ready: ReportReady) -> None:
        """Prepare the target bundle whenever it is not the current one."""
        last_target, preparing, failures, retry_time = "", None, 0, 0.0
        try:
            while True:
                await asyncio.sleep(self._settings.bundle_poll_seconds)
                try:
                    directory = await asyncio.to_thread(self._target)
                except (FailedPrecondition, OSError):  # the directories are being moved
                    continue
                if directory is None:
                    continue
                target, current = directory.name, self._manager.current.bundle.directory.name
                same = target == last_target and target != current
                if same and preparing and (not preparing.done() or time.monotonic() < retry_time):
                    continue
                failures = failures + 1 if same else 0
                if preparing:  # its models leave the encoders' threads before others come
                    preparing.cancel()
                    await asyncio.gather(preparing, return_exceptions=True)
                last_target, preparing = target, None
                if target != current:
                    pause = min(self._settings.bundle_poll_seconds * 2**failures, _MAX_PAUSE)
                    retry_time = time.monotonic() + pause
                    preparing = asyncio.ensure_future(self._prepare(directory, report_ready))
        finally:
            if preparing:
                preparing.cancel()
                await asyncio.gather(preparing, return_exceptions=True)

    async def _prepare(self, directory: Path, report_ready: ReportReady) -> None:
        """Load a bundle, then serve it, or keep it ready for the next start."""
        await report_ready(False)
        encoders: EncoderPool | None = None
        try:
            bundle = await asyncio.to_thread(Bundle, directory)
            if bundle.version == self._manager.current.bundle.version:  # in another directory
                await report_ready(True)
                return
            self._next_version = bundle.version
            swappable, sequence = self._swappable(bundle), 0
            if EMBEDDING in self._resources.hosted:
                encoders = await self._load_encoders(bundle)
                backfill, sequence = await self._encode_items(bundle, encoders)
                if not swappable:
                    await self._keep_ready(bundle, backfill, sequence, report_ready)
            elif not swappable:
                return
            new = await self._load(bundle, encoders, sequence)
            encoders = None  # the new bundle owns them
            self._manager.swap_to(new)
            await report_ready(True)
        except Exception:  # the current bundle stays; the watcher tries again
            _log.exception("the bundle in %s cannot be prepared", directory)
            await report_ready(False)
        finally:
            self._next_version, self.backfill = "", None
            if encoders is not None:
                self._manager.stop_encoding_for(encoders)
                await asyncio.shield(asyncio.to_thread(encoders.close))

    async def _load_encoders(self, bundle: Bundle) -> "EncoderPool":
        """The encoders of a bundle, on the same threads as the current ones."""
        from services.embedding.encoders import encoder_pool

        text, image = await asyncio.to_thread(load_encoders, bundle, self._settings.device)
        return encoder_pool.EncoderPool(text, image, self._manager.current.catalog.encoders)

    async def _encode_items(self, bundle: Bundle, encoders: "EncoderPool") -> "tuple[Backfill, int]":
        """Encode the vectors that the catalog lacks; the backfill, and the last change that it covers."""
        from services.embedding.catalog import backfill

        contents = await asyncio.to_thread(bundle.catalog)
        self.backfill = backfill.Backfill(self._manager.current.view, encoders, bundle.version)
        await self.backfill.import_vectors(contents.items, vector_blocks(contents, encoders.digests))
        return self.backfill, await self.backfill.run_once()

    async def _keep_ready(
        self, bundle: Bundle, backfill: "Backfill", sequence: int, report_ready: ReportReady
    ) -> None:
        """Encode every write for a bundle that the next start serves; does not end."""
        sequence = await backfill.run(sequence)
        await report_ready(True)
        _log.info("bundle %s is ready: restart to serve it", bundle.version)
        while True:
            await self._manager.current.view.wait_for_commit_after(sequence)
            sequence = await backfill.run(sequence)

    def _swappable(self, bundle: Bundle) -> bool:
        """Whether a bundle can be served without a restart; other event types need another event store."""
        settings, event_store = self._settings, self._resources.event_store
        if settings.candidate_bundles or not (settings.hot_swap or self._resources.peers.names):
            return False
        same_types = event_store is None or event_store.types == set(bundle.profile.event_types)
        if not same_types:
            _log.warning("bundle %s has other event types: restart to serve it", bundle.version)
        return same_types

    async def _load(self, bundle: Bundle, encoders: "EncoderPool | None", sequence: int) -> LoadedBundle:
        """Load a bundle next to the current one, and let it catch up; undo everything if that fails."""
        old, loading = self._manager.current, None
        start = old.view.table_sequence if encoders is not None else 0
        try:
            if encoders is not None:
                await self._encode_for_both(encoders, sequence)
                self._manager.save_served(bundle.version)
            loading = asyncio.ensure_future(
                asyncio.to_thread(LoadedBundle, self._resources, bundle, encoders)
            )
            new = await asyncio.shield(loading)
            if encoders is not None:
                await new.tidy()
                await self._encode_bundle_items(bundle)
                await asyncio.to_thread(new.import_items)
            else:
                self._manager.follow_writes(new)
                await new.ready.wait()
            if self._resources.peers.names:
                await self._update_peers()
                if not self._resources.peers.all_serve(bundle.version):
                    raise Unavailable(f"a peer has stopped serving bundle {bundle.version}")
            await new.catch_up(old)
            if encoders is not None and encoders.has_missed_writes:
                raise RuntimeError(f"the encoders of bundle {bundle.version} failed on a write")
        except BaseException:
            self._manager.save_served()
            if loading is not None:  # a thread cannot be canceled
                closing = self._manager.track(self._discard(loading))
                closing.add_done_callback(lambda _: self._manager.collect_garbage_later())
                await asyncio.shield(closing)
                if encoders is not None:
                    # It may have put older vectors into an engine's index that both bundles use.
                    await asyncio.shield(self._manager.track(old.view.repeat(start)))
            raise
        return new

    async def _encode_for_both(self, encoders: "EncoderPool", sequence: int) -> None:
        """Encode every write by these encoders too, and now everything written since `sequence`."""
        assert self.backfill is not None  # noqa: S101 - `_encode_items` ran
        view = self._manager.current.view
        self._manager.also_encode_for(encoders)
        await asyncio.wrap_future(view.items.flush())
        await view.follow()
        await self.backfill.run_once(sequence)

    async def _encode_bundle_items(self, bundle: Bundle) -> None:
        """Encode the bundle's items by the encoders of the loaded bundles, so that these can find them."""
        from services.embedding.catalog import backfill

        view = self._manager.current.view
        if not await view.read(partial(view.items.imported, bundle.version)):
            contents = await asyncio.to_thread(bundle.catalog)
            for loaded in self._manager.loaded:
                older = backfill.Backfill(loaded.view, loaded.catalog.encoders, loaded.bundle.version)
                await older.encode_texts_of(contents.items)

    async def _discard(self, loading: "asyncio.Future[LoadedBundle]") -> None:
        """Wait until a bundle that is not needed anymore is loaded, and close it."""
        try:
            loaded = await loading
        except Exception:  # `_load` raises it
            return
        try:
            await self._manager.discard(loaded)
        except Exception:
            _log.exception("bundle %s is not served, and did not close", loaded.bundle.version)


async def choose_first(settings: Settings, peers: Peers) -> Path:
    """The bundle to start with: the newest of those that the peers serve, if they say which.

    Without peers it is the bundle that was served last, if the newest can replace it later: what the newest
    one lacks is then encoded while calls are answered, not before.
    """
    bundles = published(settings.bundle)
    if peers.names:
        await peers.update()
        served = [bundle for bundle in bundles if not peers.any_lacks(version_of(bundle))]
        return (served or bundles)[-1]
    if settings.hot_swap and settings.bundle_poll_seconds and not settings.candidate_bundles:
        return _last_served(settings.state / SERVED_FILE, bundles) or bundles[-1]
    return bundles[-1]


def _last_served(file: Path, bundles: Sequence[Path]) -> Path | None:
    """The bundle that was served last, if it can be served now and the newest can replace it."""
    if not file.is_file():  # the first start on this state
        return None
    try:
        state = json.loads(file.read_text())
        if state["coming"]:
            _log.warning(
                "this process ended while it loaded bundle %s next to another: it starts with the newest",
                state["coming"],
            )
            return None
        if not (matches := [bundle for bundle in bundles if version_of(bundle) == state["served"]]):
            return None
        last = matches[-1]
        types = [manifest_of(bundle)["profile"]["event_types"] for bundle in (last, bundles[-1])]
        return Bundle(last).directory if types[0] == types[1] else None
    except (OSError, ValueError, KeyError, TypeError, FailedPrecondition) as error:
        _log.warning("the bundle that was served last cannot be served, the newest is: %s", error)
        return None
