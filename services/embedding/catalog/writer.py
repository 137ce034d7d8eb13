"""Writes items: encodes their contents, commits them and waits until they are searchable.

A write is acknowledged after its commit and after the view has followed it. The module uses domain values
only, no messages.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from services.catalog import items as catalog
from services.catalog.items import Item, item_hash, item_text
from services.core.errors import InvalidArgument, NotFound, StorageFull, Unavailable, VitrineError
from services.embedding.catalog.search_view import SearchView
from services.embedding.encoders.encoder_pool import EncoderPool
from services.embedding.runtime.batching import Lane
from services.embedding.store.content_addressed import Vector
from services.embedding.store.mutations import WriteConflict, WriteOutcome, WriteResult
from services.embedding.store.schema import ModalityState, StoredItem, content_hashes

_REENCODE_BATCH = 64  # the images of a batch are in memory together
_ATTEMPTS = 1000  # per turn: at most one for each writer that started on the item earlier
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UpsertResult:
    """The result of writing one item of a batch: an error, or an outcome with the resulting states."""

    item_id: str
    error: VitrineError | None = None
    outcome: WriteOutcome | None = None
    sequence: int = 0
    text_state: ModalityState = ModalityState.ABSENT
    image_state: ModalityState = ModalityState.ABSENT
    truncated: bool = False


@dataclass(frozen=True)
class _Draft:
    """An item to write: its batch position, new value, stored value, and content hashes by space."""

    position: int
    item: Item
    stored: StoredItem | None
    hashes: Mapping[str, bytes]


@dataclass
class _EncodedContents:
    """Vectors by content hash, errors of contents that cannot be encoded, and hashes of truncated texts."""

    vectors: dict[bytes, np.ndarray]
    errors: dict[bytes, InvalidArgument] = field(default_factory=dict)
    truncated: set[bytes] = field(default_factory=set)


_Encoded = dict[EncoderPool, tuple[_EncodedContents, _EncodedContents]]
"""Encoded texts and images of some drafts, by each bundle's encoders."""


class CatalogWriter:
    """Writes items with their vectors by a bundle's encoders, and lets `view` follow each write.

    A shop without images has no image encoder: its catalog has the text space only.
    """

    def __init__(self, view: SearchView, encoders: EncoderPool) -> None:
        self.encoders, self._items = encoders, view.items
        self._view = view
        self._other_encoders: tuple[EncoderPool, ...] = ()

    @property
    def view(self) -> SearchView:
        """The view that has followed a write when the write is acknowledged."""
        return self._view

    @property
    def other_encoders(self) -> tuple[EncoderPool, ...]:
        """Encoders of other bundles, which encode every write too."""
        return self._other_encoders

    def retarget(self, *, view: SearchView, also_encode_for: Iterable[EncoderPool]) -> None:
        """Set which view follows a write and which other bundles' encoders encode it.

        Call it when the set of loaded bundles changes. Writes in progress use the new encoders and the new
        view too. The writer's own encoders always encode.
        """
        self._view, self._other_encoders = view, tuple(also_encode_for)

    async def upsert(
        self,
        items: Sequence[Item | VitrineError],
        mask: frozenset[str] = frozenset(),
        lane: Lane | None = None,
    ) -> list[UpsertResult]:
        """Write items in their order. An entry that is an error becomes an outcome with that error.

        `mask` names the fields to change; an empty mask replaces the whole item. `lane` is the encoders'
        queue; None chooses it by the number of contents. An outcome's error refers to the item:
        InvalidArgument, NotFound, AlreadyExists, ResourceExhausted or Unavailable.
        """
        if refusal := self._items.health.refusal:  # do not encode what cannot be stored
            return [_rejection(item, refusal) for item in items]
        outcomes: list[UpsertResult | None] = [
            UpsertResult("", error=item) if isinstance(item, VitrineError) else None for item in items
        ]
        remaining = [(position, item) for position, item in enumerate(items) if isinstance(item, Item)]
        while remaining:
            # A repeated id goes into a later batch, so that its last write wins.
            batch, later, ids = list[tuple[int, Item]](), list[tuple[int, Item]](), set[str]()
            for position, item in remaining:
                (later if item.id in ids else batch).append((position, item))
                ids.add(item.id)
            for position, outcome in await self._write(batch, mask, lane):
                outcomes[position] = outcome
            remaining = later
        await self._follow()
        return [outcome for outcome in outcomes if outcome is not None]

    async def _follow(self) -> None:
        """Let the view that is current on return follow the writes so far; a swap may change it meanwhile."""
        followed = None
        while followed is not self._view:
            followed = self._view
            await followed.follow()

    async def attach_image(self, record: StoredItem, image: bytes, error: str = "") -> None:
        """Store the image that was fetched for an item, or the `error` that prevented it.

        Does nothing if the item has changed since `record` was read.

        Raises:
            StorageFull: the disk takes no more writes.
            Unavailable: the database does not answer.
        """
        if refusal := self._items.health.refusal:
            raise refusal
        item = replace(record.item, image=image)
        draft = _Draft(0, item, record, content_hashes(item))
        encoded = await self._encode([draft], Lane.BULK, "image.uri")
        if image_error := encoded[self.encoders][1].errors.get(draft.hashes["image"]):
            draft, error = replace(draft, item=record.item), str(image_error)
        result = self._submit(draft, _vectors_of(draft, encoded), error)
        if isinstance(result, VitrineError):
            raise result
        with contextlib.suppress(WriteConflict):
            await asyncio.wrap_future(result)
            await self._follow()

    async def delete(self, item_ids: Sequence[str]) -> list[UpsertResult]:
        """Delete items; the outcome of an unknown id is NotFound."""
        outcomes = []
        async with self._items.turns.of({i for i in item_ids if self._items.turns.busy(i)}):
            futures = [(item_id, self._submit_deletion(item_id)) for item_id in item_ids]
            for item_id, future in futures:
                try:
                    if isinstance(future, VitrineError):
                        raise future
                    result = await asyncio.wrap_future(future)
                    outcomes.append(UpsertResult(item_id, outcome=result.outcome, sequence=result.sequence))
                except VitrineError as error:
                    outcomes.append(UpsertResult(item_id, error=error))
        await self._follow()
        return outcomes

    def _submit_deletion(self, item_id: str) -> "Future[WriteResult] | VitrineError":
        try:
            return self._items.delete(item_id)
        except VitrineError as error:
            return error

    async def reencode(self) -> int:
        """Encode contents that have no vector by the loaded encoders; returns the number of such items.

        Raises:
            StorageFull: the disk takes no more writes.
            Unavailable: the database does not answer.
        """
        ids = await self.view.read(
            lambda: sorted(set(self._items.ids_without_vectors(self.encoders.digests)))
        )
        for start in range(0, len(ids), _REENCODE_BATCH):
            records = await self.view.read(partial(self._items.get, ids[start : start + _REENCODE_BATCH]))
            outcomes = await self.upsert([r.item for r in records.values()], lane=Lane.BACKGROUND)
            for outcome in outcomes:
                if isinstance(outcome.error, StorageFull | Unavailable):
                    raise outcome.error
        return len(ids)

    async def _write(
        self, batch: Sequence[tuple[int, Item]], mask: frozenset[str], lane: Lane | None
    ) -> list[tuple[int, UpsertResult]]:
        """Write items of different ids: immediately where no other writer is active, the others in turn.

        If another writer has changed an item meanwhile, the item is merged with the new state in its turn.
        """
        turns = self._items.turns
        waiting = [(position, item) for position, item in batch if turns.busy(item.id)]
        free = [(position, item) for position, item in batch if not turns.busy(item.id)]
        done, conflicts = await self._try(free, mask, lane)
        rest = waiting + conflicts
        if not rest:
            return done
        async with turns.of({item.id for _, item in rest}):
            # Only writers that started before the turn can still interfere.
            for _ in range(_ATTEMPTS):
                outcomes, rest = await self._try(rest, mask, lane)
                done += outcomes
                if not rest:
                    return done
        busy = Unavailable("the item is being changed by others; try again")
        return done + [(position, UpsertResult(item.id, error=busy)) for position, item in rest]

    async def _try(
        self, batch: Sequence[tuple[int, Item]], mask: frozenset[str], lane: Lane | None
    ) -> tuple[list[tuple[int, UpsertResult]], list[tuple[int, Item]]]:
        """Write items; returns outcomes, and the items that another writer changed in between."""
        if not batch:
            return [], []
        drafts, rejected = await self.view.read(partial(self._drafts, batch, mask))
        outcomes, conflicts = await self._encode_and_commit(drafts, lane)
        return rejected + outcomes, [(position, item) for position, item in batch if position in conflicts]

    def _drafts(
        self, batch: Sequence[tuple[int, Item]], mask: frozenset[str]
    ) -> tuple[list[_Draft], list[tuple[int, UpsertResult]]]:
        stored = self._items.get(item.id for _, item in batch if not catalog.identifier_problem(item.id))
        drafts, rejected = [], []
        for position, update in batch:
            record = stored.get(update.id)
            try:
                item = _merge(update, record, mask)
                catalog.validate(item)
                item = _with_fetched_image(item, record)
                drafts.append(_Draft(position, item, record, content_hashes(item)))
            except VitrineError as error:
                rejected.append((position, UpsertResult(update.id, error=error)))
        return drafts, rejected

    async def _encode_and_commit(
        self, drafts: Sequence[_Draft], lane: Lane | None
    ) -> tuple[list[tuple[int, UpsertResult]], set[int]]:
        encoded = await self._encode(drafts, lane)
        texts, images = encoded[self.encoders]
        futures: list[tuple[_Draft, list[Vector], Future[WriteResult] | VitrineError]] = []
        for draft in drafts:
            vectors = _vectors_of(draft, encoded)
            error = images.errors.get(draft.hashes["image"])
            result = error or self._submit(draft, vectors, by_api=lane is not Lane.BACKGROUND)
            futures.append((draft, vectors, result))
        return await self._collect(futures, texts.truncated)

    async def _encode(
        self, drafts: Sequence[_Draft], lane: Lane | None, field: str = "image.data"
    ) -> "_Encoded":
        """Encode texts and images by all encoders, including encoders that are added meanwhile."""
        done: _Encoded = {}
        while missing := [e for e in (self.encoders, *self._other_encoders) if e not in done]:
            for encoders in missing:
                texts = self._encode_texts(encoders, drafts, lane)
                images = self._encode_images(encoders, drafts, lane, field)
                try:
                    done[encoders] = await asyncio.gather(texts, images)
                except Exception:
                    if encoders is self.encoders:
                        raise
                    # Another bundle must not spoil a write. Log its failure once.
                    if not encoders.has_missed_writes:
                        _log.exception("the encoders of another bundle fail")
                    encoders.note_missed_write()
                    done[encoders] = _EncodedContents({}), _EncodedContents({})
        return done

    async def _encode_texts(
        self, encoders: EncoderPool, drafts: Sequence[_Draft], lane: Lane | None
    ) -> _EncodedContents:
        texts = {d.hashes["text"]: item_text(d.item) for d in drafts if d.hashes["text"]}
        contents = _EncodedContents(await self._stored_vectors(texts, "text", encoders))
        missing = [content for content in texts if content not in contents.vectors]
        encoded = await encoders.texts([texts[content] for content in missing], lane)
        contents.vectors |= zip(missing, encoded.vectors, strict=True)
        contents.truncated |= {
            c for c, truncated in zip(missing, encoded.truncated, strict=True) if truncated
        }
        return contents

    async def _encode_images(
        self, encoders: EncoderPool, drafts: Sequence[_Draft], lane: Lane | None, field: str
    ) -> _EncodedContents:
        if "image" not in encoders.digests:
            return _EncodedContents({})
        items = {d.hashes["image"]: d.item for d in drafts if d.hashes["image"]}
        contents = _EncodedContents(await self._stored_vectors(items, "image", encoders))
        missing = [content for content in items if content not in contents.vectors]
        files = await self.view.read(lambda: {c: file for c in missing if (file := self._file(items[c]))})
        results = await encoders.images(list(files.values()), field, lane)
        for content, result in zip(files, results, strict=True):
            if isinstance(result, InvalidArgument):
                contents.errors[content] = result
            else:
                contents.vectors[content] = result
        return contents

    async def _stored_vectors(
        self, hashes: Iterable[bytes], space: str, encoders: EncoderPool
    ) -> dict[bytes, np.ndarray]:
        return await self.view.read(
            lambda: self._items.stored_vectors(hashes, space, encoders.digests[space])
        )

    def _submit(
        self, draft: _Draft, vectors: Sequence[Vector], image_error: str = "", *, by_api: bool = True
    ) -> "Future[WriteResult] | VitrineError":
        try:
            expected = draft.stored.sequence if draft.stored else 0
            return self._items.write(
                draft.item, vectors, image_error=image_error, expected_sequence=expected, by_api=by_api
            )
        except VitrineError as error:
            return error

    async def _collect(
        self,
        futures: Sequence[tuple[_Draft, list[Vector], "Future[WriteResult] | VitrineError"]],
        truncated: set[bytes],
    ) -> tuple[list[tuple[int, UpsertResult]], set[int]]:
        """Wait for the writes; returns outcomes, and the positions of items that another writer changed."""
        done, conflicts = [], set()
        for draft, vectors, future in futures:
            try:
                if isinstance(future, VitrineError):
                    raise future
                result = await asyncio.wrap_future(future)
            except WriteConflict:
                conflicts.add(draft.position)
                continue
            except VitrineError as error:
                done.append((draft.position, UpsertResult(draft.item.id, error=error)))
                continue
            spaces = {vector.space for vector in vectors}
            outcome = UpsertResult(
                draft.item.id,
                outcome=result.outcome,
                sequence=result.sequence,
                text_state=ModalityState.READY if "text" in spaces else ModalityState.ABSENT,
                image_state=_image_state(draft.item, spaces),
                truncated=draft.hashes["text"] in truncated,
            )
            done.append((draft.position, outcome))
        return done, conflicts

    def _file(self, item: Item) -> bytes:
        try:
            return item.image or self._items.image(item.image_hash)
        except NotFound:  # the item came with a bundle, which has vectors but no files
            return b""


def _rejection(item: Item | VitrineError, refusal: VitrineError) -> UpsertResult:
    return (
        UpsertResult("", error=item)
        if isinstance(item, VitrineError)
        else UpsertResult(item.id, error=refusal)
    )


def _vectors_of(draft: _Draft, encoded: _Encoded) -> list[Vector]:
    return [
        Vector(space, encoders.digests[space], vectors[content])
        for encoders, (texts, images) in encoded.items()
        for space, vectors in (("text", texts.vectors), ("image", images.vectors))
        if (content := draft.hashes[space]) in vectors
    ]


def _image_state(item: Item, spaces: set[str]) -> ModalityState:
    if "image" in spaces:
        return ModalityState.READY
    return ModalityState.PENDING if catalog.has_image(item) else ModalityState.ABSENT


def _merge(update: Item, record: StoredItem | None, mask: frozenset[str]) -> Item:
    if not mask:
        return update
    if problem := catalog.identifier_problem(update.id):
        raise InvalidArgument.of("id", problem)
    if record is None:
        raise NotFound("item", update.id)
    fields = set(mask)
    if "image" in fields:
        fields = (fields - {"image"}) | {"image", "image_uri", "image_hash"}
    return replace(record.item, **{name: getattr(update, name) for name in fields})


def _with_fetched_image(item: Item, record: StoredItem | None) -> Item:
    """The item with the image that was fetched from the same address earlier."""
    if record is None or not item.image_uri or item.image_uri != record.item.image_uri:
        return item
    return replace(item, image_hash=record.item.image_hash)


def resolve_item_hashes(item_hashes: Sequence[int], item_ids: Sequence[str]) -> list[int]:
    """`item_hashes`, or the hashes of `item_ids` if there are none."""
    return list(item_hashes) or [item_hash(item_id) for item_id in item_ids]
