"""The catalogue at work: items in, vectors made, searchable once acknowledged.

Joins the truth (`items`) with what is derived from it, the vector index of each space and
the item table. A write is acknowledged after its commit and after both have followed it.
Knows domain values alone, no messages.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from services import catalog, deadline, filters
from services.catalog import Item, item_number, item_text
from services.embedding.batching import Lane
from services.embedding.contents import Vector
from services.embedding.encoding import Encoding
from services.embedding.index import Neighbours, Places, Selection, SpaceIndex
from services.embedding.items import (
    Conflict,
    ItemStore,
    Outcome,
    Record,
    State,
    Written,
    hashes_of,
)
from services.embedding.segments import Builder, BuilderStopped, Segment, load, save, scanned
from services.errors import InvalidArgument, NotFound, Unavailable, VitrineError
from services.item_table import Change, ItemTable

T = TypeVar("T")
_BATCH = 2000
_ATTEMPTS = 5
_LONGEST_WAIT = 30.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upserted:
    """What became of one item of a batch: an error, or an outcome with the states it left."""

    item_id: str
    error: VitrineError | None = None
    outcome: Outcome | None = None
    sequence: int = 0
    text_state: State = State.ABSENT
    image_state: State = State.ABSENT
    truncated: bool = False


@dataclass(frozen=True)
class _Draft:
    """An item on its way in: what is stored, what it shall be, and the hashes of its contents by space."""

    at: int
    item: Item
    stored: Record | None
    hashes: Mapping[str, bytes]


@dataclass
class _Made:
    """Vectors by content, why others have none, and of which texts only the beginning was read."""

    vectors: dict[bytes, np.ndarray]
    refused: dict[bytes, InvalidArgument] = field(default_factory=dict)
    truncated: set[bytes] = field(default_factory=set)


class Catalogue:
    """Items, their vectors by a bundle's encoders, and search over them.

    SQL and search run on a few threads. A shop without photographs has no image encoder: its catalogue
    has the text space alone. Compacted segments are kept in `directory`, from one start to the next.
    """

    def __init__(
        self, items: ItemStore, encoding: Encoding, directory: Path | None = None, graph_rows: int = 0
    ) -> None:
        self.items, self.encoding, self._directory = items, encoding, directory
        self._builder = Builder()
        self.spaces = {
            space: SpaceIndex(dimension, graph_rows, self._builder)
            for space, dimension in encoding.dimensions.items()
        }
        self._places = Places()
        self.table = ItemTable()
        self._advancing = threading.Lock()
        self._pool = ThreadPoolExecutor(4, "catalogue")
        self._moved = asyncio.Event()
        self._follow_from_the_beginning()

    def close(self) -> None:
        """Finish what was accepted and stop."""
        self._builder.stop()
        self.encoding.close()
        self._pool.shutdown()
        self.items.close()

    @property
    def sequence(self) -> int:
        """The last change that search and table reflect."""
        return self.table.sequence

    async def wait_for(self, sequence: int) -> None:
        """Wait until a change is searchable; DeadlineExceeded when the caller's time ends first."""
        if self.sequence < sequence:
            await deadline.wait(self.moved(sequence - 1), _LONGEST_WAIT)

    async def upsert(
        self,
        items: Sequence[Item | VitrineError],
        mask: frozenset[str] = frozenset(),
        lane: Lane | None = None,
    ) -> list[Upserted]:
        """Write items in their order; one that is an error already stays one.

        `mask` names the fields to change, none means the whole item; `lane` whose turn their
        contents take at the encoders, none means by their number. An outcome's error is
        relative to the item: InvalidArgument, NotFound, AlreadyExists or ResourceExhausted.
        """
        outcomes: list[Upserted | None] = [
            Upserted("", error=item) if isinstance(item, VitrineError) else None for item in items
        ]
        waiting = [(at, item) for at, item in enumerate(items) if isinstance(item, Item)]
        while waiting:
            # An id that comes again waits for its turn, so that its last write wins.
            wave, later, seen = list[tuple[int, Item]](), list[tuple[int, Item]](), set[str]()
            for at, item in waiting:
                (later if item.id in seen else wave).append((at, item))
                seen.add(item.id)
            for at, outcome in await self._write(wave, mask, lane):
                outcomes[at] = outcome
            waiting = later
        await self._follow()
        return [outcome for outcome in outcomes if outcome is not None]

    async def attach(self, record: Record, photograph: bytes, error: str = "") -> None:
        """Give an item the photograph that was fetched for it, or the reason why there is none.

        Nothing happens when the item was changed since `record` was read.
        """
        item = replace(record.item, image=photograph)
        draft = _Draft(0, item, record, hashes_of(item))
        texts, pictures = await asyncio.gather(
            self._texts_of([draft], Lane.BULK), self._photographs_of([draft], Lane.BULK, "image.uri")
        )
        if refused := pictures.refused.get(draft.hashes["image"]):
            draft, error = replace(draft, item=record.item), str(refused)
        written = self._submit(draft, self._vectors_of(draft, texts, pictures), error)
        if isinstance(written, VitrineError):
            raise written
        with contextlib.suppress(Conflict):
            await asyncio.wrap_future(written)
            await self._follow()

    async def delete(self, item_ids: Sequence[str]) -> list[Upserted]:
        """Delete items; the outcome of an unknown one is NotFound."""
        futures = [(item_id, self.items.delete(item_id)) for item_id in item_ids]
        outcomes = []
        for item_id, future in futures:
            try:
                written = await asyncio.wrap_future(future)
                outcomes.append(Upserted(item_id, outcome=written.outcome, sequence=written.sequence))
            except VitrineError as error:
                outcomes.append(Upserted(item_id, error=error))
        await self._follow()
        return outcomes

    async def read(self, function: Callable[[], T]) -> T:
        """Run a read of the store off the event loop."""
        return await self._on(self._pool, function)

    async def search(
        self,
        space: str,
        queries: np.ndarray,
        limit: int,
        condition: filters.Filter | None,
        excluded: Sequence[int] = (),
        as_of: datetime | None = None,
    ) -> list[Neighbours]:
        """The nearest live items of each query, float32 (Q, D), that meet `condition`.

        With `as_of`, only those available at that time.
        """

        def run() -> list[Neighbours]:
            index = self.spaces[space]
            mask = np.ones(self.table.length, bool) if as_of is None else self.table.available(as_of)
            if condition is not None:
                qualifying = filters.evaluate(condition, self.table)
                mask = mask & qualifying[: len(mask)]
            numbers = self.table.item_numbers[: len(mask)]
            selection = None if mask.all() else Selection(numbers, mask, self._places)
            found = index.search(queries, limit + len(excluded), selection)
            return [_without(near, excluded, limit) for near in found]

        return await self._on(self._pool, run)

    async def changes(
        self, after: int, *, until_current: bool
    ) -> AsyncIterator[tuple[list[Record], dict[str, dict[int, np.ndarray]], int]]:
        """Records after a position with their vectors by space and number, and the position then reached.

        The position is the last sequence of the batch. An empty batch says that all
        that was committed has been sent; then the feed waits for more, unless `until_current`.
        """
        while True:
            moved = self._moved
            batch = await self.read(partial(self._batch, after))
            if batch[0]:
                after = batch[0][-1].sequence
                yield *batch, after
                continue
            yield [], {}, after
            if until_current:
                return
            await moved.wait()

    async def moved(self, sequence: int) -> None:
        """Wait until something was committed after a position."""
        while self.sequence <= sequence:
            moved = self._moved
            if self.sequence <= sequence:
                await moved.wait()

    async def reencode(self) -> int:
        """Make the vectors that the loaded encoders lack; how many items had any missing."""
        ids = await self.read(lambda: sorted(set(self.items.lacking(self.encoding.digests))))
        for start in range(0, len(ids), _BATCH):
            records = await self.read(partial(self.items.get, ids[start : start + _BATCH]))
            await self.upsert([record.item for record in records.values()], lane=Lane.BACKGROUND)
        return len(ids)

    async def _follow(self) -> None:
        """Let search and table follow what was committed, and wake who waits for that."""
        await self._on(self._pool, self._advance)
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    @staticmethod
    async def _on(pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, function)
        except RuntimeError as error:
            if "shutdown" in str(error):
                raise Unavailable("the service is shutting down") from None
            raise

    async def _write(
        self, wave: Sequence[tuple[int, Item]], mask: frozenset[str], lane: Lane | None
    ) -> list[tuple[int, Upserted]]:
        done: list[tuple[int, Upserted]] = []
        for _ in range(_ATTEMPTS):
            drafts, refused = await self.read(partial(self._draft, wave, mask))
            written, wave = await self._encode_and_commit(drafts, lane)
            done += refused + written
            if not wave:
                return done
        busy = Unavailable("the item is being changed by others; try again")
        return done + [(at, Upserted(item.id, error=busy)) for at, item in wave]

    def _draft(
        self, wave: Sequence[tuple[int, Item]], mask: frozenset[str]
    ) -> tuple[list[_Draft], list[tuple[int, Upserted]]]:
        stored = self.items.get(item.id for _, item in wave if not catalog.identifier_problem(item.id))
        drafts, refused = [], []
        for at, sent in wave:
            record = stored.get(sent.id)
            try:
                item = _merged(sent, record, mask)
                catalog.validate(item)
                item = _as_fetched(item, record)
                drafts.append(_Draft(at, item, record, hashes_of(item)))
            except VitrineError as error:
                refused.append((at, Upserted(sent.id, error=error)))
        return drafts, refused

    async def _encode_and_commit(
        self, drafts: Sequence[_Draft], lane: Lane | None
    ) -> tuple[list[tuple[int, Upserted]], list[tuple[int, Item]]]:
        texts, pictures = await asyncio.gather(
            self._texts_of(drafts, lane), self._photographs_of(drafts, lane)
        )
        futures: list[tuple[_Draft, list[Vector], Future[Written] | VitrineError]] = []
        for draft in drafts:
            made = self._vectors_of(draft, texts, pictures)
            refused = pictures.refused.get(draft.hashes["image"])
            futures.append((draft, made, refused or self._submit(draft, made)))
        return await self._settle(futures, texts.truncated)

    def _vectors_of(self, draft: _Draft, texts: _Made, pictures: _Made) -> list[Vector]:
        return [
            Vector(space, self.encoding.digests[space], found[content])
            for space, found in (("text", texts.vectors), ("image", pictures.vectors))
            if (content := draft.hashes[space]) in found
        ]

    async def _texts_of(self, drafts: Sequence[_Draft], lane: Lane | None) -> _Made:
        wanted = {d.hashes["text"]: item_text(d.item) for d in drafts if d.hashes["text"]}
        made = _Made(await self._known("text", wanted))
        missing = [content for content in wanted if content not in made.vectors]
        encoded = await self.encoding.texts([wanted[content] for content in missing], lane)
        made.vectors |= zip(missing, encoded.vectors, strict=True)
        made.truncated |= {c for c, cut in zip(missing, encoded.truncated, strict=True) if cut}
        return made

    async def _photographs_of(
        self, drafts: Sequence[_Draft], lane: Lane | None, field: str = "image.data"
    ) -> _Made:
        if "image" not in self.encoding.digests:
            return _Made({})
        wanted = {d.hashes["image"]: d.item for d in drafts if d.hashes["image"]}
        made = _Made(await self._known("image", wanted))
        missing = [content for content in wanted if content not in made.vectors]
        files = await self.read(lambda: {c: file for c in missing if (file := self._file(wanted[c]))})
        found = await self.encoding.photographs(list(files.values()), field, lane)
        for content, vector in zip(files, found, strict=True):
            if isinstance(vector, InvalidArgument):
                made.refused[content] = vector
            else:
                made.vectors[content] = vector
        return made

    async def _known(self, space: str, hashes: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        return await self.read(lambda: self.items.known(hashes, space, self.encoding.digests[space]))

    def _submit(
        self, draft: _Draft, made: Sequence[Vector], image_error: str = ""
    ) -> "Future[Written] | VitrineError":
        try:
            expected = draft.stored.sequence if draft.stored else 0
            return self.items.write(draft.item, made, image_error=image_error, expected_sequence=expected)
        except VitrineError as error:
            return error

    async def _settle(
        self,
        futures: Sequence[tuple[_Draft, list[Vector], "Future[Written] | VitrineError"]],
        truncated: set[bytes],
    ) -> tuple[list[tuple[int, Upserted]], list[tuple[int, Item]]]:
        done, again = [], []
        for draft, made, future in futures:
            try:
                if isinstance(future, VitrineError):
                    raise future
                written = await asyncio.wrap_future(future)
            except Conflict:
                again.append((draft.at, draft.item))
                continue
            except VitrineError as error:
                done.append((draft.at, Upserted(draft.item.id, error=error)))
                continue
            spaces = {vector.space for vector in made}
            outcome = Upserted(
                draft.item.id,
                outcome=written.outcome,
                sequence=written.sequence,
                text_state=State.READY if "text" in spaces else State.ABSENT,
                image_state=_image_state(draft.item, spaces),
                truncated=draft.hashes["text"] in truncated,
            )
            done.append((draft.at, outcome))
        return done, again

    def _file(self, item: Item) -> bytes:
        try:
            return item.image or self.items.image(item.image_hash)
        except NotFound:  # it came with a bundle, which carries vectors and no files
            return b""

    def _batch(self, after: int) -> tuple[list[Record], dict[str, dict[int, np.ndarray]]]:
        records = self.items.changes(after, _BATCH)
        numbers = [record.number for record in records if not record.deleted]
        return records, {
            s: self.items.vectors(numbers, s, digest) for s, digest in self.encoding.digests.items()
        }

    def _advance(self) -> None:
        """Let index and table follow what was committed."""
        with self._advancing:
            while True:
                records, vectors = self._batch(self.table.sequence)
                if not records:
                    return
                for space, index in self.spaces.items():
                    gone = [r.number for r in records if r.number not in vectors[space]]
                    index.change(vectors[space], gone)
                self.table.apply(_change(record, vectors) for record in records)

    def _follow_from_the_beginning(self) -> None:
        """Read the whole store; what a kept segment holds unchanged is not indexed again."""
        kept = {space: self._kept(space) for space in self.spaces}
        fresh = {space: (list[int](), list[np.ndarray]()) for space in self.spaces}
        live = {space: np.zeros(len(segment), bool) for space, (segment, _) in kept.items()}
        while True:
            records, vectors = self._batch(self.table.sequence)
            if not records:
                break
            changed = {record.number: record.sequence for record in records}
            for space, (numbers, values) in fresh.items():
                segment, until = kept[space]
                mine = np.fromiter(vectors[space], np.int64)
                rows = segment.rows(mine)
                for number, row in zip(mine.tolist(), rows.tolist(), strict=True):
                    if row >= 0 and changed[number] <= until:
                        live[space][row] = True
                    else:
                        numbers.append(number)
                        values.append(vectors[space][number].astype(np.float16))
            self.table.apply(_change(record, vectors) for record in records)
        for space, (numbers, values) in fresh.items():
            segment, index = kept[space][0], self.spaces[space]
            more = [scanned(np.array(numbers, np.int64), np.stack(values))] if numbers else []
            index.replace_all(segment, more, segment.numbers[~live[space]])

    def _kept(self, space: str) -> tuple[Segment, int]:
        """The segment that was kept for a space, and up to which change; an empty one if there is none."""
        dimension = self.spaces[space].dimension
        found = load(self._folder(space), dimension) if self._directory else None
        return found or (scanned(np.empty(0, np.int64), np.empty((0, dimension), np.float32)), 0)

    def _folder(self, space: str) -> Path:
        return (self._directory or Path()) / f"{space}-{self.encoding.digests[space]}"

    async def maintain(self) -> None:
        """Compact the indexes when they are worn, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            sequence = self.sequence
            for space, index in self.spaces.items():
                if index.worn:
                    await loop.run_in_executor(None, partial(self._compact, space))
            await self.moved(sequence)

    def _compact(self, space: str) -> None:
        until, began = self.table.sequence, time.monotonic()
        try:
            segment = self.spaces[space].compact()
        except BuilderStopped:
            return
        except (OSError, RuntimeError):  # the next change tries again; until then it is searched as it is
            _log.exception("the %s index was not compacted", space)
            return
        if self._directory and segment.has_graph:
            save(segment, until, self._folder(space))
        seconds = time.monotonic() - began
        _log.info("the %s index was compacted: %d items in %.1f s", space, len(segment), seconds)


def _image_state(item: Item, spaces: set[str]) -> State:
    if "image" in spaces:
        return State.READY
    return State.PENDING if catalog.has_image(item) else State.ABSENT


def _merged(sent: Item, record: Record | None, mask: frozenset[str]) -> Item:
    if not mask:
        return sent
    if problem := catalog.identifier_problem(sent.id):
        raise InvalidArgument.of("id", problem)
    if record is None:
        raise NotFound("item", sent.id)
    fields = set(mask)
    if "image" in fields:
        fields = (fields - {"image"}) | {"image", "image_uri", "image_hash"}
    return replace(record.item, **{name: getattr(sent, name) for name in fields})


def _as_fetched(item: Item, record: Record | None) -> Item:
    """The item with the photograph that was fetched from the same address before."""
    if record is None or not item.image_uri or item.image_uri != record.item.image_uri:
        return item
    return replace(item, image_hash=record.item.image_hash)


def _change(record: Record, vectors: Mapping[str, Mapping[int, np.ndarray]]) -> Change:
    mine = {space: of[record.number] for space, of in vectors.items() if record.number in of}
    return Change(
        record.number, record.sequence, None if record.deleted else record.item, record.created, mine
    )


def _without(near: Neighbours, excluded: Sequence[int], limit: int) -> Neighbours:
    if not len(excluded):
        return near
    keep = np.flatnonzero(~np.isin(near.numbers, np.asarray(excluded, np.int64)))[:limit]
    return Neighbours(near.numbers[keep], near.scores[keep])


def numbers_of(item_numbers: Sequence[int], item_ids: Sequence[str]) -> list[int]:
    """The numbers, or, when there are none, those of the ids."""
    return list(item_numbers) or [item_number(item_id) for item_id in item_ids]
