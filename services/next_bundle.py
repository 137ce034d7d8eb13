"""Looks out for the bundle that a process is to serve next, and makes it ready beside the one that is served.

A process without neighbours goes over to the newest bundle in its directory; one that has neighbours, to the
newest that they serve. With `exchange.py` a part of the composition root.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from services.bundle import Bundle, manifest_of, published, version_of
from services.errors import FailedPrecondition, Unavailable
from services.exchange import SERVED, Exchange, Task, ended, running
from services.generation import EMBEDDING, Generation, Shared, blocks_of, encoders_of
from services.neighbours import Neighbours
from services.settings import Settings

if TYPE_CHECKING:
    from services.embedding.encoding import Encoding
    from services.embedding.preparing import Preparation

ASK_EVERY = 5.0
"""Seconds between two times that neighbours are told which bundles are served here."""
_LONGEST_PAUSE = 600.0
_log = logging.getLogger(__name__)

Say = Callable[[bool], Awaitable[None]]


class NextBundle:
    """Of the process whose bundles `exchange` serves; `preparation` tells of what it encodes now."""

    def __init__(self, shared: Shared, exchange: Exchange) -> None:
        self._shared, self._settings, self._exchange = shared, shared.settings, exchange
        self.preparation: Preparation | None = None
        self._making = ""  # the version of what is being made
        self._looking: list[Task] = []

    def look(self, say: Say) -> None:
        """Look out from now on; `say` is told whether the next bundle is ready."""
        self._looking = running([self._ask])
        if self._settings.look_every:
            self._looking += running([partial(self._look, say)])

    async def stop(self) -> None:
        """Look no more; what is being made is given up."""
        await ended(self._looking)

    async def _ask(self) -> None:
        """Tell neighbours which bundles are served here, so that they serve them on, without end."""
        while True:
            await self._ask_once()
            await asyncio.sleep(ASK_EVERY)

    async def _ask_once(self) -> None:
        coming = [self._making] if self._making else []
        await self._shared.neighbours.ask([*(held.bundle.version for held in self._exchange.held), *coming])

    def _newest(self) -> Path | None:
        """The bundle to serve: the newest, of those that all neighbours serve; None if that is not known.

        A process that was told not to exchange stays with its own while its neighbours have that.
        """
        neighbours, found = self._shared.neighbours, published(self._settings.bundle)
        if not neighbours.names:
            return found[-1]
        if neighbours.silent:
            return None
        if not self._settings.exchange and not neighbours.lack(self._exchange.now.bundle.version):
            return self._exchange.now.bundle.directory
        both = [one for one in found if neighbours.serve(version_of(one))]
        return both[-1] if both else self._exchange.now.bundle.directory

    async def _look(self, say: Say) -> None:
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
                name, served = directory.name, self._exchange.now.bundle.directory.name
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
            if bundle.version == self._exchange.now.bundle.version:  # by another name
                await say(True)
                return
            self._making = bundle.version
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
            self._exchange.exchange(new)
            await say(True)
        except Exception:  # the one that is served goes on; it is tried again at the next look
            _log.exception("the bundle in %s cannot be prepared", directory)
            await say(False)
        finally:
            self._making, self.preparation = "", None
            if work is not None:
                self._exchange.encode_no_more(work)
                await asyncio.shield(asyncio.to_thread(work.close))

    async def _encoders(self, bundle: Bundle) -> "Encoding":
        """The encoders of a bundle at work beside those that are served."""
        from services.embedding import encoding

        text, image = await asyncio.to_thread(encoders_of, bundle, self._settings.device)
        return encoding.Encoding(text, image, self._exchange.now.catalogue.encoding)

    async def _encoded(self, bundle: Bundle, work: "Encoding") -> "tuple[Preparation, int]":
        """What made the vectors that the catalogue lacked, and up to which change it did."""
        from services.embedding import preparing

        brought = await asyncio.to_thread(bundle.catalogue)
        self.preparation = preparing.Preparation(self._exchange.now.view, work, bundle.version)
        await self.preparation.bring(brought.items, blocks_of(brought, work.digests))
        return self.preparation, await self.preparation.once()

    async def _keep_ready(self, bundle: Bundle, preparation: "Preparation", done: int, say: Say) -> None:
        """Encode what is written for a bundle that a start shall serve, without end."""
        done = await preparation.run(done)
        await say(True)
        _log.info("bundle %s is prepared: start again to serve it", bundle.version)
        while True:
            await self._exchange.now.view.moved(done)
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
        old, making = self._exchange.now, None
        since = old.view.written if old.view is not None else 0
        try:
            if work is not None:
                await self._encoded_for_both(work, done)
                self._exchange.remember(bundle.version)
            making = asyncio.ensure_future(asyncio.to_thread(Generation, self._shared, bundle, work))
            new = await asyncio.shield(making)
            if work is not None:
                await new.tidy()
                await self._foresee(bundle)
                await asyncio.to_thread(new.load_items)
            else:
                self._exchange.keep_up(new)
                await new.ready.wait()
            if self._shared.neighbours.names:
                await self._ask_once()
                if not self._shared.neighbours.serve(bundle.version):
                    raise Unavailable(f"bundle {bundle.version} is not served by all neighbours any more")
            await new.catch_up(old)
            if work is not None and work.missed:
                raise RuntimeError("its encoders failed beside the served ones")
        except BaseException:
            self._exchange.remember()
            if making is not None:  # a thread cannot be cancelled
                closing = self._exchange.kept(self._closed(making))
                closing.add_done_callback(lambda _: self._exchange.free_soon())
                await asyncio.shield(closing)
                if work is not None:
                    # It may have put older vectors into an engine's index that both use.
                    await asyncio.shield(self._exchange.kept(old.view.repeat(since)))
            raise
        return new

    async def _encoded_for_both(self, work: "Encoding", done: int) -> None:
        """Let what is written have vectors by these encoders as well; what was before gets them now."""
        assert self.preparation is not None  # noqa: S101 - its encoders were prepared
        self._exchange.encode_for(work)
        await asyncio.wrap_future(self._exchange.now.view.items.settled())
        await self._exchange.now.view.follow()
        await self.preparation.once(done)

    async def _foresee(self, bundle: Bundle) -> None:
        """Let what a bundle brings be found by older ones, of whose encoders it has no vectors."""
        from services.embedding import preparing

        if not await self._exchange.now.view.read(
            partial(self._exchange.now.view.items.imported, bundle.version)
        ):
            brought = await asyncio.to_thread(bundle.catalogue)
            for held in self._exchange.held:
                by = preparing.Preparation(held.view, held.catalogue.encoding, held.bundle.version)
                await by.foresee(brought.items)

    async def _closed(self, making: "asyncio.Future[Generation]") -> None:
        """Wait for a generation that nobody wants any more, and close it."""
        try:
            made = await making
        except Exception:  # whoever waited for it was told
            return
        try:
            await self._exchange.let_go(made)
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
        return _before(settings.state / SERVED, found) or found[-1]
    return found[-1]


def _before(noted: Path, found: Sequence[Path]) -> Path | None:
    """The bundle that was served last, if it can be served now and exchanged for the newest."""
    if not noted.is_file():  # nothing was served here yet
        return None
    try:
        told = json.loads(noted.read_text())
        if told["coming"]:
            _log.warning("this process ended while bundle %s was made beside: it begins anew", told["coming"])
            return None
        if not (before := [one for one in found if version_of(one) == told["served"]]):
            return None
        last = before[-1]
        types = [manifest_of(one)["profile"]["event_types"] for one in (last, found[-1])]
        return Bundle(last).directory if types[0] == types[1] else None
    except (OSError, ValueError, KeyError, TypeError, FailedPrecondition) as error:
        _log.warning("what was served last cannot be served, the newest bundle is: %s", error)
        return None
