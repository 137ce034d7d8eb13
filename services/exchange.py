"""The bundles that a process serves: the current one, and older ones by which others still serve.

`next_bundle.py` brings the one to come. With `wiring.py` and `generation.py` the composition root.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from services import heap
from services.companions import led
from services.generation import EMBEDDING, Generation, Shared
from services.server import Current

if TYPE_CHECKING:
    from services.embedding.encoding import Encoding

KEEP = 60.0
"""Seconds for which a bundle is served after a call named it last."""
SERVED = "served-bundle"
"""In the state directory: which bundle is served, and which is being made beside it."""
_PAUSE, _PATIENCE, _UNUSED = 5.0, 1.0, 1.0
_log = logging.getLogger(__name__)

Task = asyncio.Task[None]


class Exchange:
    """Serves a generation, then those that are exchanged for it (docs/decisions/0018, 0032).

    `currents` is what a server hosts, by service.
    """

    def __init__(self, shared: Shared, first: Generation) -> None:
        self.now, self._shared = first, shared
        self.ready = asyncio.Event()
        """Set once what is served knows the items."""
        version = first.bundle.version
        self.currents = {name: Current(version, servicer) for name, servicer in first.servicers.items()}
        self._held = [first]  # calls may name their bundles; the current one last
        self._draining: list[Generation] = []  # with calls that go on
        self._coming: Encoding | None = None  # what is written has vectors by it already
        self._upkeep: dict[Generation, list[Task]] = {}
        self._work: list[Task] = []
        self._leading: list[Task] = []
        self._retiring: set[asyncio.Future[None]] = set()
        self._stopping = asyncio.Event()

    @property
    def held(self) -> list[Generation]:
        """The generations whose bundles calls may name, the current one last."""
        return list(self._held)

    @property
    def alive(self) -> list[Generation]:
        """Those, and before them the ones that calls are still on."""
        return [*self._draining, *self._held]

    def begin(self) -> None:
        """Keep up what is served from the start."""
        self.remember()
        self._upkeep[self.now] = running([*self.now.upkeep, self._first_ready])
        self._work = running(self.now.background)

    async def stop(self) -> None:
        """End all that goes on, when no call does."""
        self._stopping.set()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await ended([*self._work, *self._leading, *(task for of in self._upkeep.values() for task in of)])

    def close(self) -> None:
        """Close the generations, the last first."""
        for generation in reversed(self.alive):
            generation.close()

    def encode_for(self, coming: "Encoding") -> None:
        """Let what is written from now on have vectors by the encoders of a bundle to come as well."""
        self._coming = coming
        self._join()

    def encode_no_more(self, gone: "Encoding") -> None:
        """The end of that, where it began."""
        if self._coming is gone:
            self._coming = None
            self._join()

    def keep_up(self, generation: Generation) -> None:
        """Let a generation that is not served yet follow what is written."""
        self._upkeep[generation] = running(generation.upkeep)

    async def let_go(self, generation: Generation) -> None:
        """Close a generation that is never served."""
        await ended(self._upkeep.pop(generation, []))
        await asyncio.to_thread(generation.close)

    def free_soon(self) -> None:
        """Let the memory of what was closed be free, when no thread or frame refers to it any more."""
        asyncio.get_running_loop().call_later(_UNUSED, self._free)

    def _free(self) -> None:
        if not self._stopping.is_set():
            heap.settle()

    def kept(self, work: Coroutine[Any, Any, None]) -> "asyncio.Future[None]":
        """A task that `stop` waits for."""
        task = asyncio.ensure_future(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    def exchange(self, new: Generation) -> None:
        """Let calls go to another generation from now on; each ends on the one that it began on."""
        old, work = self.now, self._work
        # On a way back there may be one of the same bundle, which others still serve by.
        same = [held for held in self._held if held.bundle.version == new.bundle.version]
        left = [current.release(new.bundle.version) for current in self.currents.values()] if same else []
        for name, current in self.currents.items():
            current.exchange(new.bundle.version, new.servicers[name])
        if new.catalogue is not None:
            new.succeed(old)
        self.now, self._coming = new, None
        self.ready.set()
        self._held = [*(held for held in self._held if held not in same), new]
        self._draining += same
        self._join()
        self._work = running(new.background)
        if new not in self._upkeep:
            self._upkeep[new] = running(new.upkeep)
        _log.info("bundle %s is served", new.bundle.version)
        self.kept(ended(work))
        for one in same:
            self.kept(self._close(one, left))
        self.kept(self._retire(old))
        self.remember()

    def remember(self, coming: str = "") -> None:
        """Let a start begin with the bundle that is served, for which every item is encoded.

        `coming` is made beside it, which takes twice the memory: who dies of that begins with the newest.
        """
        if EMBEDDING not in self._shared.hosted:
            return
        state = self._shared.settings.state
        try:
            state.mkdir(parents=True, exist_ok=True)
            written = state / f"{SERVED}.new"
            written.write_text(json.dumps({"served": self.now.bundle.version, "coming": coming}) + "\n")
            written.replace(state / SERVED)
        except OSError:
            _log.exception("what is served is not noted: a start begins with another bundle")

    def _join(self) -> None:
        """Let writes, wherever they began, be encoded for and seen by all bundles that calls may name."""
        self._tell()
        for one in self.alive:
            others = [held for held in self._held if held is not one]
            if one.catalogue is not None:
                one.catalogue.view = self.now.view
                coming = [self._coming] if self._coming else []
                one.catalogue.beside = (*(other.catalogue.encoding for other in others), *coming)
            if one.ranking is not None:
                one.ranking.heirs = [other.ranking for other in others]
        for task in self._leading:
            task.cancel()
        leader = self.now.view
        views = [held.view for held in self._held if held is not self.now and leader is not None]
        self._leading = running([partial(led, leader, view) for view in views])

    def _tell(self) -> None:
        self._shared.bundles[:] = [held.bundle.version for held in reversed(self._held)]

    async def _retire(self, old: Generation) -> None:
        """Close a generation once no call names its bundle any more, and none is on it."""
        version = old.bundle.version
        while old in self._held:
            left = self._named(version) + KEEP - time.monotonic()
            if left <= 0 or self._stopping.is_set():
                drained = [current.release(version) for current in self.currents.values()]
                self._held.remove(old)
                self._draining.append(old)
                self._join()
                await self._close(old, drained)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._stopping.wait()

    async def _close(self, old: Generation, drained: Sequence[Awaitable[None]]) -> None:
        """Close a generation that no call goes to when none is on it."""
        if old.view is not None:
            old.view.end_feeds()
            try:
                await self.now.view.follow()
                await old.view.follow()  # for who waits there
            except Exception:  # `maintain` tries again
                _log.exception("the store cannot be followed")
        await asyncio.gather(*drained)
        self._draining.remove(old)
        await ended(self._upkeep.pop(old))
        await asyncio.to_thread(old.close)
        self.free_soon()
        _log.info("bundle %s is closed", old.bundle.version)

    def _named(self, version: str) -> float:
        return max(current.named(version) for current in self.currents.values())

    async def _first_ready(self) -> None:
        await self.now.ready.wait()
        heap.settle()
        self.ready.set()
        self._tell()


async def kept_up(run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run what never ends; should it fail, begin again."""
    while True:
        try:
            await run()
            return
        except Exception:  # the store may be away for a while
            _log.exception("%s failed and begins again", getattr(run, "__qualname__", run))
            await asyncio.sleep(_PAUSE)


async def ended(tasks: Collection[Task]) -> None:
    """Cancel tasks and wait for them."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_PATIENCE)  # one may have lost a cancellation


def running(these: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> list[Task]:
    """Tasks of what never ends."""
    return [asyncio.ensure_future(kept_up(run)) for run in these]
