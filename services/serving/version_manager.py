"""The bundles that a process serves: the current one, and older ones that calls still name.

`bundle_watcher.py` loads the next one. Part of the composition root.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

from services.core import gc_tuning
from services.core.errors import VitrineError
from services.rpc.server import VersionRouter
from services.serving.candidate_bundles import follow_leader
from services.serving.loaded_bundle import EMBEDDING, RANKING, LoadedBundle, Loop, ProcessResources

if TYPE_CHECKING:
    from services.embedding.encoders.encoder_pool import EncoderPool

KEEP_SECONDS = 60.0
"""An older bundle stays loaded for so many seconds after the last call that named it."""
SERVED_FILE = "served-bundle"
"""A file in the state directory: which bundle is served, and which one is loaded next to it."""
_RESTART_SECONDS, _CANCEL_SECONDS, _COLLECT_SECONDS = 5.0, 1.0, 1.0
_log = logging.getLogger(__name__)

Task = asyncio.Task[None]


class BundleVersionManager:
    """Serves a bundle, then those that replace it (docs/decisions/0018, 0032).

    `routers` has a router for each hosted service; a server hosts the routers.
    """

    def __init__(self, resources: ProcessResources, first: LoadedBundle) -> None:
        self.current, self._resources = first, resources
        self.ready = asyncio.Event()
        """Set once the current bundle has the items."""
        version = first.bundle.version
        self.routers = {name: VersionRouter(version, servicer) for name, servicer in first.servicers.items()}
        self._loaded = [first]  # calls may name these; the current one last
        self._draining: list[LoadedBundle] = []  # no new calls; some calls are running
        self._next_encoders: EncoderPool | None = None  # they encode every write already
        self._loaded_tasks: dict[LoadedBundle, list[Task]] = {}
        self._current_tasks: list[Task] = []
        self._follow_tasks: list[Task] = []
        self._retiring: set[asyncio.Future[None]] = set()
        self._stopping = asyncio.Event()
        self._follow_events(first)

    @property
    def loaded(self) -> list[LoadedBundle]:
        """The bundles that calls may name, the current one last."""
        return list(self._loaded)

    @property
    def open_bundles(self) -> list[LoadedBundle]:
        """All bundles that are not closed: the draining ones, then the loaded ones."""
        return [*self._draining, *self._loaded]

    def start(self) -> None:
        """Start the tasks of the first bundle."""
        self.save_served()
        self._loaded_tasks[self.current] = start_tasks([*self.current.loaded_loops, self._wait_for_items])
        self._current_tasks = start_tasks(self.current.current_loops)

    def end_feeds(self) -> None:
        """End the change feeds of all bundles, and refuse new ones."""
        for loaded in self.open_bundles:
            if loaded.hosts(EMBEDDING):
                loaded.view.end_feeds()

    async def stop(self) -> None:
        """End all tasks, once no call runs."""
        self._stopping.set()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        loaded_tasks = [task for tasks in self._loaded_tasks.values() for task in tasks]
        await cancel_tasks([*self._current_tasks, *self._follow_tasks, *loaded_tasks])

    def close(self) -> None:
        """Close the bundles in reverse order."""
        for loaded in reversed(self.open_bundles):
            loaded.close()

    def also_encode_for(self, encoders: "EncoderPool") -> None:
        """Encode every write by the encoders of the next bundle too, from now on."""
        self._next_encoders = encoders
        self._connect()

    def stop_encoding_for(self, encoders: "EncoderPool") -> None:
        """Undo `also_encode_for`."""
        if self._next_encoders is encoders:
            self._next_encoders = None
            self._connect()

    def follow_writes(self, loaded: LoadedBundle) -> None:
        """Let a bundle that is not served yet follow the writes."""
        self._loaded_tasks[loaded] = start_tasks(loaded.loaded_loops)

    async def discard(self, loaded: LoadedBundle) -> None:
        """Close a bundle that is not served."""
        await cancel_tasks(self._loaded_tasks.pop(loaded, []))
        await asyncio.to_thread(loaded.close)

    def collect_garbage_later(self) -> None:
        """Free the memory of a closed bundle, a second later: no thread or frame refers to it then."""
        asyncio.get_running_loop().call_later(_COLLECT_SECONDS, self._collect_garbage)

    def _collect_garbage(self) -> None:
        if not self._stopping.is_set():
            gc_tuning.collect_and_freeze()

    def track(self, work: Awaitable[None]) -> "asyncio.Future[None]":
        """Run `work` as a task that `stop` waits for."""
        task = asyncio.ensure_future(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    def swap_to(self, new: LoadedBundle) -> None:
        """Make another bundle the current one; running calls end on the bundle that they started on."""
        old, tasks = self.current, self._current_tasks
        # After a rollback the same bundle may be loaded already, because peers still name it.
        same = [loaded for loaded in self._loaded if loaded.bundle.version == new.bundle.version]
        drained = [router.release(new.bundle.version) for router in self.routers.values()] if same else []
        for name, router in self.routers.items():
            router.swap(new.bundle.version, new.servicers[name])
        if new.hosts(EMBEDDING):
            new.take_encoder_threads(old)
        self.current, self._next_encoders = new, None
        self.ready.set()
        self._loaded = [*(loaded for loaded in self._loaded if loaded not in same), new]
        self._draining += same
        self._follow_events(new)
        self._ignore_events(*same)
        self._connect()
        self._current_tasks = start_tasks(new.current_loops)
        if new not in self._loaded_tasks:
            self._loaded_tasks[new] = start_tasks(new.loaded_loops)
        _log.info("bundle %s is served", new.bundle.version)
        self.track(cancel_tasks(tasks))
        for loaded in same:
            self.track(self._close(loaded, drained))
        self.track(self._retire(old))
        self.save_served()

    def save_served(self, preparing: str = "") -> None:
        """Save the version of the current bundle, for which every item is encoded: the next start serves it.

        `preparing` is the version that is loaded next to it, which takes twice the memory. If the process
        dies of that, the next start serves the newest bundle instead.
        """
        if EMBEDDING not in self._resources.hosted:
            return
        state = self._resources.settings.state
        try:
            state.mkdir(parents=True, exist_ok=True)
            written = state / f"{SERVED_FILE}.new"
            written.write_text(
                json.dumps({"served": self.current.bundle.version, "coming": preparing}) + "\n"
            )
            written.replace(state / SERVED_FILE)
        except OSError as error:
            _log.warning(
                "the served bundle cannot be saved, so the next start may serve another one: %s", error
            )

    def _connect(self) -> None:
        """Let all loaded bundles encode and see every write, whichever bundle's services take it."""
        self._publish_versions()
        for one in self.open_bundles:
            others = [loaded for loaded in self._loaded if loaded is not one]
            if one.hosts(EMBEDDING):
                coming = [self._next_encoders] if self._next_encoders else []
                also = [*(other.catalog.encoders for other in others), *coming]
                one.catalog.retarget(view=self.current.view, also_encode_for=also)
        for task in self._follow_tasks:
            task.cancel()
        followers = [loaded for loaded in self._loaded if loaded is not self.current]
        self._follow_tasks = start_tasks(
            [
                partial(follow_leader, self.current.view, follower.view)
                for follower in followers
                if follower.hosts(EMBEDDING)
            ]
        )

    def _follow_events(self, loaded: LoadedBundle) -> None:
        """Let a write return only when the ranking service of a bundle reflects it."""
        if loaded.hosts(RANKING) and self._resources.event_followers is not None:
            self._resources.event_followers.register(loaded.ranking)

    def _ignore_events(self, *bundles: LoadedBundle) -> None:
        """Stop writes from waiting for bundles that calls cannot name."""
        for loaded in bundles:
            if loaded.hosts(RANKING) and self._resources.event_followers is not None:
                self._resources.event_followers.unregister(loaded.ranking)

    def _publish_versions(self) -> None:
        self._resources.bundle_versions[:] = [loaded.bundle.version for loaded in reversed(self._loaded)]

    async def _retire(self, old: LoadedBundle) -> None:
        """Close a bundle once calls have stopped naming it and none runs on it."""
        version = old.bundle.version
        while old in self._loaded:
            seconds = self._last_use(version) + KEEP_SECONDS - time.monotonic()
            if seconds <= 0 or self._stopping.is_set():
                drained = [router.release(version) for router in self.routers.values()]
                self._loaded.remove(old)
                self._draining.append(old)
                self._ignore_events(old)
                self._connect()
                await self._close(old, drained)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopping.wait()

    async def _close(self, old: LoadedBundle, drained: Sequence[Awaitable[None]]) -> None:
        """Close a bundle that gets no new calls, once no call runs on it."""
        if old.hosts(EMBEDDING):
            old.view.end_feeds()
            try:
                await self.current.view.follow()
                await old.view.follow()  # for the calls that wait for a sequence there
            except Exception:  # `maintain` tries again
                _log.exception("the item store cannot be followed")
        await asyncio.gather(*drained)
        self._draining.remove(old)
        await cancel_tasks(self._loaded_tasks.pop(old))
        await asyncio.to_thread(old.close)
        self.collect_garbage_later()
        _log.info("bundle %s is closed", old.bundle.version)

    def _last_use(self, version: str) -> float:
        return max(router.last_use(version) for router in self.routers.values())

    async def _wait_for_items(self) -> None:
        await self.current.ready.wait()
        gc_tuning.collect_and_freeze()
        self.ready.set()
        self._publish_versions()


async def restart_on_failure(loop: Loop) -> None:
    """Run a loop; if it fails, start it again after a pause."""
    while True:
        try:
            await loop()
            return
        except VitrineError as error:  # the store may be unavailable, or full, for a while
            _log.warning("%s failed and starts again: %s", getattr(loop, "__qualname__", loop), error)
            await asyncio.sleep(_RESTART_SECONDS)
        except Exception:
            _log.exception("%s failed and starts again", getattr(loop, "__qualname__", loop))
            await asyncio.sleep(_RESTART_SECONDS)


async def cancel_tasks(tasks: Collection[Task]) -> None:
    """Cancel tasks and wait for them."""
    running = set(tasks)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=_CANCEL_SECONDS)  # a task may lose a cancellation


def start_tasks(loops: Sequence[Loop]) -> list[Task]:
    """A task for each loop, which starts it again when it fails."""
    return [asyncio.ensure_future(restart_on_failure(loop)) for loop in loops]
