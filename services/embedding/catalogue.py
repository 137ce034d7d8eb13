"""The catalogue at work: items in, vectors made, searchable once acknowledged.

A write is acknowledged after its commit and after the view has followed it. Knows domain values alone,
no messages.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from services import catalog
from services.catalog import Item, item_number, item_text
from services.embedding.batching import Lane
from services.embedding.contents import Vector
from services.embedding.encoding import Encoding
from services.embedding.item_rows import Record, State, hashes_of
from services.embedding.item_writes import Conflict, Outcome, Written
from services.embedding.view import CatalogueView
from services.errors import InvalidArgument, NotFound, Unavailable, VitrineError

_AT_ONCE = 64  # their photographs are in memory together
_ATTEMPTS = 5
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


_Encoded = dict[Encoding, tuple[_Made, _Made]]
"""Texts and photographs of some drafts by each bundle's encoders."""


class Catalogue:
    """Writes items, with their vectors by a bundle's encoders; `view` follows what was written.

    A shop without photographs has no image encoder: its catalogue has the text space alone.
    """

    def __init__(self, view: CatalogueView, encoding: Encoding) -> None:
        self.view, self.encoding, self._items = view, encoding, view.items
        self.beside: tuple[Encoding, ...] = ()
        """Encoders of other bundles: what is written from now on has vectors by them as well."""

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
        await self.view.follow()
        return [outcome for outcome in outcomes if outcome is not None]

    async def attach(self, record: Record, photograph: bytes, error: str = "") -> None:
        """Give an item the photograph that was fetched for it, or the reason why there is none.

        Nothing happens when the item was changed since `record` was read.
        """
        item = replace(record.item, image=photograph)
        draft = _Draft(0, item, record, hashes_of(item))
        encoded = await self._encoded([draft], Lane.BULK, "image.uri")
        if refused := encoded[self.encoding][1].refused.get(draft.hashes["image"]):
            draft, error = replace(draft, item=record.item), str(refused)
        written = self._submit(draft, _vectors_of(draft, encoded), error)
        if isinstance(written, VitrineError):
            raise written
        with contextlib.suppress(Conflict):
            await asyncio.wrap_future(written)
            await self.view.follow()

    async def delete(self, item_ids: Sequence[str]) -> list[Upserted]:
        """Delete items; the outcome of an unknown one is NotFound."""
        futures = [(item_id, self._deletion(item_id)) for item_id in item_ids]
        outcomes = []
        for item_id, future in futures:
            try:
                if isinstance(future, VitrineError):
                    raise future
                written = await asyncio.wrap_future(future)
                outcomes.append(Upserted(item_id, outcome=written.outcome, sequence=written.sequence))
            except VitrineError as error:
                outcomes.append(Upserted(item_id, error=error))
        await self.view.follow()
        return outcomes

    def _deletion(self, item_id: str) -> "Future[Written] | VitrineError":
        try:
            return self._items.delete(item_id)
        except VitrineError as error:
            return error

    async def reencode(self) -> int:
        """Make the vectors that the loaded encoders lack; how many items had any missing."""
        ids = await self.view.read(lambda: sorted(set(self._items.lacking(self.encoding.digests))))
        for start in range(0, len(ids), _AT_ONCE):
            records = await self.view.read(partial(self._items.get, ids[start : start + _AT_ONCE]))
            await self.upsert([record.item for record in records.values()], lane=Lane.BACKGROUND)
        return len(ids)

    async def _write(
        self, wave: Sequence[tuple[int, Item]], mask: frozenset[str], lane: Lane | None
    ) -> list[tuple[int, Upserted]]:
        done: list[tuple[int, Upserted]] = []
        for _ in range(_ATTEMPTS):
            drafts, refused = await self.view.read(partial(self._draft, wave, mask))
            written, wave = await self._encode_and_commit(drafts, lane)
            done += refused + written
            if not wave:
                return done
        busy = Unavailable("the item is being changed by others; try again")
        return done + [(at, Upserted(item.id, error=busy)) for at, item in wave]

    def _draft(
        self, wave: Sequence[tuple[int, Item]], mask: frozenset[str]
    ) -> tuple[list[_Draft], list[tuple[int, Upserted]]]:
        stored = self._items.get(item.id for _, item in wave if not catalog.identifier_problem(item.id))
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
        encoded = await self._encoded(drafts, lane)
        texts, pictures = encoded[self.encoding]
        futures: list[tuple[_Draft, list[Vector], Future[Written] | VitrineError]] = []
        for draft in drafts:
            made = _vectors_of(draft, encoded)
            refused = pictures.refused.get(draft.hashes["image"])
            futures.append((draft, made, refused or self._submit(draft, made)))
        return await self._settle(futures, texts.truncated)

    async def _encoded(
        self, drafts: Sequence[_Draft], lane: Lane | None, field: str = "image.data"
    ) -> "_Encoded":
        """Texts and photographs by all encoders there are, those that come meanwhile as well."""
        done: _Encoded = {}
        while missing := [e for e in (self.encoding, *self.beside) if e not in done]:
            for encoding in missing:
                texts = self._texts_of(encoding, drafts, lane)
                pictures = self._photographs_of(encoding, drafts, lane, field)
                try:
                    done[encoding] = await asyncio.gather(texts, pictures)
                except Exception:
                    if encoding is self.encoding:
                        raise
                    if not encoding.missed:  # said once; another bundle must not spoil a write
                        _log.exception("the encoders of another bundle fail")
                    encoding.missed, done[encoding] = True, (_Made({}), _Made({}))
        return done

    async def _texts_of(self, encoding: Encoding, drafts: Sequence[_Draft], lane: Lane | None) -> _Made:
        wanted = {d.hashes["text"]: item_text(d.item) for d in drafts if d.hashes["text"]}
        made = _Made(await self._known(wanted, "text", encoding))
        missing = [content for content in wanted if content not in made.vectors]
        encoded = await encoding.texts([wanted[content] for content in missing], lane)
        made.vectors |= zip(missing, encoded.vectors, strict=True)
        made.truncated |= {c for c, cut in zip(missing, encoded.truncated, strict=True) if cut}
        return made

    async def _photographs_of(
        self, encoding: Encoding, drafts: Sequence[_Draft], lane: Lane | None, field: str
    ) -> _Made:
        if "image" not in encoding.digests:
            return _Made({})
        wanted = {d.hashes["image"]: d.item for d in drafts if d.hashes["image"]}
        made = _Made(await self._known(wanted, "image", encoding))
        missing = [content for content in wanted if content not in made.vectors]
        files = await self.view.read(lambda: {c: file for c in missing if (file := self._file(wanted[c]))})
        found = await encoding.photographs(list(files.values()), field, lane)
        for content, vector in zip(files, found, strict=True):
            if isinstance(vector, InvalidArgument):
                made.refused[content] = vector
            else:
                made.vectors[content] = vector
        return made

    async def _known(self, hashes: Iterable[bytes], space: str, by: Encoding) -> dict[bytes, np.ndarray]:
        return await self.view.read(lambda: self._items.known(hashes, space, by.digests[space]))

    def _submit(
        self, draft: _Draft, made: Sequence[Vector], image_error: str = ""
    ) -> "Future[Written] | VitrineError":
        try:
            expected = draft.stored.sequence if draft.stored else 0
            return self._items.write(draft.item, made, image_error=image_error, expected_sequence=expected)
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
            return item.image or self._items.image(item.image_hash)
        except NotFound:  # it came with a bundle, which carries vectors and no files
            return b""


def _vectors_of(draft: _Draft, encoded: _Encoded) -> list[Vector]:
    return [
        Vector(space, encoding.digests[space], found[content])
        for encoding, (texts, pictures) in encoded.items()
        for space, found in (("text", texts.vectors), ("image", pictures.vectors))
        if (content := draft.hashes[space]) in found
    ]


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


def numbers_of(item_numbers: Sequence[int], item_ids: Sequence[str]) -> list[int]:
    """The numbers, or, when there are none, those of the ids."""
    return list(item_numbers) or [item_number(item_id) for item_id in item_ids]
