"""The bundles that a process serves: the newest, older ones by which others still serve, and how it moves on.

A process without neighbours goes over to the newest bundle in its directory; one that has neighbours, to the
newest that they serve. With `wiring.py` and `generation.py` the composition root.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.bundle import Bundle, manifest_of, published, version_of
from services.companions import led
from services.errors import FailedPrecondition, Unavailable
from services.generation import EMBEDDING, Generation, Shared, blocks_of, encoders_of
from services.neighbours import Neighbours
from services.server import Current
from services.settings import Settings

if TYPE_CHECKING:
    from services.embedding.encoding import Encoding
    from services.embedding.preparing import Preparation

KEEP = 60.0
"""Seconds for which a bundle is served after a call named it last."""
ASK_EVERY = 5.0
_SERVED = "served-bundle"
_PAUSE, _LONGEST_PAUSE, _PATIENCE = 5.0, 600.0, 1.0
_log = logging.getLogger(__name__)

Say = Callable[[bool], Awaitable[None]]
Task = asyncio.Task[None]


class Exchange:
    """Serves a generation, then those of newer bundles, each once it lacks nothing (docs/decisions/0018).

    `currents` is what a server hosts, by service; `say` is told whether the next bundle is ready.
    """

    def __init__(self, shared: Shared, first: Generation) -> None:
        self.now, self._shared, self._settings = first, shared, shared.settings
        self.ready = asyncio.Event()
        """Set once what is served knows the items."""
        version = first.bundle.version
        self.currents = {name: Current(version, servicer) for name, servicer in first.servicers.items()}
        self.preparation: Preparation | None = None
        self._held = [first]  # calls may name their bundles; the current one last
        self._draining: list[Generation] = []  # with calls that go on
        self._coming: Encoding | None = None  # what is written has vectors by it already
        self._next = ""  # the version of what is being made
        self._upkeep: dict[Generation, list[Task]] = {}
        self._work: list[Task] = []
        self._leading: list[Task] = []
        self._looking: list[Task] = []
        self._retiring: set[asyncio.Future[None]] = set()
        self._stopping = asyncio.Event()

    @property
    def alive(self) -> list[Generation]:
        """The generations that calls are on, or may be; the current one last."""
        return [*self._draining, *self._held]

    def begin(self) -> None:
        """Keep up what is served from the start."""
        self._remember()
        self._upkeep[self.now] = _running([*self.now.upkeep, self._first_ready])
        self._work = _running(self.now.background)

    def look(self, say: Say) -> None:
        """Look out for newer bundles from now on."""
        self._looking = _running([self._ask])
        if self._settings.look_every:
            self._looking += _running([partial(self._look_for_the_next, say)])

    async def stop(self) -> None:
        """End all that goes on, when no call does."""
        self._stopping.set()
        await ended(self._looking)
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await ended([*self._work, *self._leading, *(task for of in self._upkeep.values() for task in of)])

    def close(self) -> None:
        """Close the generations, the last first."""
        for generation in reversed(self.alive):
            generation.close()

    async def _first_ready(self) -> None:
        await self.now.ready.wait()
        self.ready.set()
        self._tell()

    async def _ask(self) -> None:
        """Tell neighbours which bundles are served here, so that they serve them on, without end."""
        while True:
            await self._ask_once()
            await asyncio.sleep(ASK_EVERY)

    async def _ask_once(self) -> None:
        coming = [self._next] if self._next else []
        await self._shared.neighbours.ask([*(held.bundle.version for held in self._held), *coming])

    def _newest(self) -> Path | None:
        """The bundle to serve: the newest, of those that all neighbours serve; None if that is not known.

        A process that was told not to exchange stays with its own while its neighbours have that.
        """
        neighbours, found = self._shared.neighbours, published(self._settings.bundle)
        if not neighbours.names:
            return found[-1]
        if neighbours.silent:
            return None
        if not self._settings.exchange and not neighbours.lack(self.now.bundle.version):
            return self.now.bundle.directory
        both = [one for one in found if neighbours.serve(version_of(one))]
        return both[-1] if both else self.now.bundle.directory

    async def _look_for_the_next(self, say: Say) -> None:
        """Prepare the bundle that is the next, where that is not the served one."""
        seen, preparing, failed, again_at = "", None, 0, 0.0
        try:
            while True:
                await asyncio.sleep(self._settings.look_every)
                try:
                    directory = await asyncio.to_thread(self._newest)
                except (FailedPrecondition, OSError):  # they are being moved
                    continue
                if directory is None:
                    continue
                name, served = directory.name, self.now.bundle.directory.name
                same = name == seen and name != served
                if same and preparing and (not preparing.done() or time.monotonic() < again_at):
                    continue
                failed = failed + 1 if same else 0
                if preparing:  # its models leave the encoders' thread before others come
                    preparing.cancel()
                    await asyncio.gather(preparing, return_exceptions=True)
                seen, preparing = name, None
                if name != served:
                    pause = min(self._settings.look_every * 2**failed, _LONGEST_PAUSE)
                    again_at = time.monotonic() + pause
                    preparing = asyncio.ensure_future(self._prepare(directory, say))
        finally:
            if preparing:
                preparing.cancel()
                await asyncio.gather(preparing, return_exceptions=True)

    async def _prepare(self, directory: Path, say: Say) -> None:
        """Make a bundle ready, then serve it, or keep it ready until a start on it."""
        await say(False)
        work: Encoding | None = None
        try:
            bundle = await asyncio.to_thread(Bundle, directory)
            if bundle.version == self.now.bundle.version:  # by another name
                await say(True)
                return
            self._next = bundle.version
            exchangeable, done = self._exchangeable(bundle), 0
            if EMBEDDING in self._shared.hosted:
                work = await self._encoders(bundle)
                preparation, done = await self._encoded(bundle, work)
                if not exchangeable:
                    await self._keep_ready(bundle, preparation, done, say)
            elif not exchangeable:
                return
            new = await self._second(bundle, work, done)
            work = None  # the new generation's
            self._exchange(new)
            await say(True)
        except Exception:  # the one that is served goes on; it is tried again at the next look
            _log.exception("the bundle in %s cannot be prepared", directory)
            await say(False)
        finally:
            self._next = ""
            if work is not None:
                if self._coming is work:
                    self._coming = None
                    self._join()
                await asyncio.shield(asyncio.to_thread(work.close))

    async def _encoders(self, bundle: Bundle) -> "Encoding":
        """The encoders of a bundle at work beside those that are served."""
        from services.embedding import encoding

        text, image = await asyncio.to_thread(encoders_of, bundle, self._settings.device)
        return encoding.Encoding(text, image, self.now.catalogue.encoding)

    async def _encoded(self, bundle: Bundle, work: "Encoding") -> "tuple[Preparation, int]":
        """What made the vectors that the catalogue lacked, and up to which change it did."""
        from services.embedding import preparing

        brought = await asyncio.to_thread(bundle.catalogue)
        self.preparation = preparing.Preparation(self.now.view, work, bundle.version)
        await self.preparation.bring(brought.items, blocks_of(brought, work.digests))
        return self.preparation, await self.preparation.once()

    async def _keep_ready(self, bundle: Bundle, preparation: "Preparation", done: int, say: Say) -> None:
        """Encode what is written for a bundle that a start shall serve, without end."""
        done = await preparation.run(done)
        await say(True)
        _log.info("bundle %s is prepared: start again to serve it", bundle.version)
        while True:
            await self.now.view.moved(done)
            done = await preparation.run(done)

    def _exchangeable(self, bundle: Bundle) -> bool:
        """Whether a bundle can be served without a start; other types of events want another store."""
        if self._settings.beside or not (self._settings.exchange or self._shared.neighbours.names):
            return False
        events = self._shared.events
        same = events is None or events.types == set(bundle.profile.event_types)
        if not same:
            _log.warning("bundle %s has other types of events", bundle.version)
        return same

    async def _second(self, bundle: Bundle, work: "Encoding | None", done: int) -> Generation:
        """A generation beside the served one that lacks nothing; as it was before if that fails."""
        old, making = self.now, None
        since = old.view.written if old.view is not None else 0
        try:
            if work is not None:
                await self._encoded_for_both(work, done)
                self._remember(bundle.version)
            making = asyncio.ensure_future(asyncio.to_thread(Generation, self._shared, bundle, work))
            new = await asyncio.shield(making)
            if work is not None:
                await new.tidy()
                await self._foresee(bundle)
                await asyncio.to_thread(new.load_items)
            else:
                self._upkeep[new] = _running(new.upkeep)
                await new.ready.wait()
            if self._shared.neighbours.names:
                await self._ask_once()
                if not self._shared.neighbours.serve(bundle.version):
                    raise Unavailable(f"bundle {bundle.version} is not served by all neighbours any more")
            await new.catch_up(old)
            if work is not None and work.missed:
                raise RuntimeError("its encoders failed beside the served ones")
        except BaseException:
            self._remember()
            if making is not None:  # a thread cannot be cancelled
                await asyncio.shield(self._kept(self._closed(making)))
                if work is not None:
                    # It may have put older vectors into an engine's index that both use.
                    await asyncio.shield(self._kept(old.view.repeat(since)))
            raise
        return new

    async def _encoded_for_both(self, work: "Encoding", done: int) -> None:
        """Let what is written have vectors by these encoders as well; what was before gets them now."""
        assert self.preparation is not None  # noqa: S101 - its encoders were prepared
        self._coming = work
        self._join()
        await asyncio.wrap_future(self.now.view.items.settled())
        await self.now.view.follow()
        await self.preparation.once(done)

    async def _foresee(self, bundle: Bundle) -> None:
        """Let what a bundle brings be found by older ones, of whose encoders it has no vectors."""
        from services.embedding import preparing

        if not await self.now.view.read(partial(self.now.view.items.imported, bundle.version)):
            brought = await asyncio.to_thread(bundle.catalogue)
            for held in self._held:
                by = preparing.Preparation(held.view, held.catalogue.encoding, held.bundle.version)
                await by.foresee(brought.items)

    def _exchange(self, new: Generation) -> None:
        """Let calls go to another generation from now on; each ends on the one that it began on."""
        old, work = self.now, self._work
        # On a way back there may be one of the same bundle, which others still serve by.
        same = [held for held in self._held if held.bundle.version == new.bundle.version]
        left = [current.release(new.bundle.version) for current in self.currents.values()] if same else []
        for name, current in self.currents.items():
            current.exchange(new.bundle.version, new.servicers[name])
        if new.catalogue is not None:
            new.succeed(old)
        self.now, self._coming, self.preparation = new, None, None
        self.ready.set()
        self._held = [*(held for held in self._held if held not in same), new]
        self._draining += same
        self._join()
        self._work = _running(new.background)
        if new not in self._upkeep:
            self._upkeep[new] = _running(new.upkeep)
        _log.info("bundle %s is served", new.bundle.version)
        self._kept(ended(work))
        for one in same:
            self._kept(self._close(one, left))
        self._kept(self._retire(old))
        self._remember()

    def _remember(self, coming: str = "") -> None:
        """Let a start begin with the bundle that is served, for which every item is encoded.

        `coming` is made beside it, which takes twice the memory: who dies of that begins with the newest.
        """
        if EMBEDDING not in self._shared.hosted:
            return
        try:
            self._settings.state.mkdir(parents=True, exist_ok=True)
            written = self._settings.state / f"{_SERVED}.new"
            written.write_text(json.dumps({"served": self.now.bundle.version, "coming": coming}) + "\n")
            written.replace(self._settings.state / _SERVED)
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
        self._leading = _running([partial(led, leader, view) for view in views])

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
        _log.info("bundle %s is closed", old.bundle.version)

    def _named(self, version: str) -> float:
        return max(current.named(version) for current in self.currents.values())

    def _kept(self, work: Coroutine[Any, Any, None]) -> "asyncio.Future[None]":
        """A task that `stop` waits for."""
        task = asyncio.ensure_future(work)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def _closed(self, making: "asyncio.Future[Generation]") -> None:
        """Wait for a generation that nobody wants any more, and close it."""
        try:
            made = await making
        except Exception:  # whoever waited for it was told
            return
        await ended(self._upkeep.pop(made, []))
        try:
            await asyncio.to_thread(made.close)
        except Exception:
            _log.exception("bundle %s is not served, and did not close", made.bundle.version)


async def first(settings: Settings, neighbours: Neighbours) -> Path:
    """The bundle to begin with: the newest of those that the neighbours serve, where they say so.

    Without neighbours it is the one that was served last, if it can be exchanged for the newest meanwhile:
    what that one lacks is then encoded beside calls, and not before them.
    """
    found = published(settings.bundle)
    if neighbours.names:
        await neighbours.ask()
        served = [one for one in found if not neighbours.lack(version_of(one))]
        return (served or found)[-1]
    if settings.exchange and settings.look_every and not settings.beside:
        return _before(settings.state / _SERVED, found) or found[-1]
    return found[-1]


def _before(noted: Path, found: Sequence[Path]) -> Path | None:
    """The bundle that was served last, if it can be served now and exchanged for the newest."""
    try:
        told = json.loads(noted.read_text())
        if told["coming"]:
            return None
        [last] = [one for one in found if version_of(one) == told["served"]]
        types = [manifest_of(one)["profile"]["event_types"] for one in (last, found[-1])]
        return Bundle(last).directory if types[0] == types[1] else None
    except (OSError, ValueError, KeyError, TypeError, FailedPrecondition):
        return None


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


def _running(these: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> list[Task]:
    return [asyncio.ensure_future(kept_up(run)) for run in these]
