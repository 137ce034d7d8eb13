"""`EmbeddingService` over a catalogue: decodes, calls, encodes. Raises the domain's errors."""

import asyncio
import base64
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as pb_grpc

from services import status, wire
from services.catalog import identifier_problem
from services.embedding.catalogue import Catalogue, Upserted, numbers_of
from services.embedding.index import Neighbours, centre
from services.embedding.item_rows import Record
from services.embedding.item_writes import Outcome
from services.errors import FailedPrecondition, InvalidArgument, VitrineError
from services.filters import Filter

MAX_ITEMS = 1000
MAX_TEXTS = 4096
MAX_IMAGES = 256
MAX_GROUPS = 32
MAX_VECTORS = 256
MAX_LIMIT = 2000
MAX_EXCLUDED = 100_000
MAX_CHUNK_BYTES = 32 << 20
MAX_TEXT_BYTES = 2 << 20
_MOST_BYTES = 4  # of a character of UTF-8
_TOKEN_BYTES = 8
_CHUNKS = 3
_VALUES = bytes([pb.Vectors.VALUES_FIELD_NUMBER << 3 | 2])  # the tag of a field that says its length
_SPACES = {item_pb2.SPACE_TEXT: "text", item_pb2.SPACE_IMAGE: "image"}
_NUMBER_OF_SPACE = {name: number for number, name in _SPACES.items()}


@dataclass(frozen=True)
class _Chunk:
    """A chunk of items on its way: their ids, and what it will be answered with."""

    ids: set[str]
    answer: asyncio.Future[pb.UpsertItemsResponse]


class EmbeddingServicer(pb_grpc.EmbeddingServiceServicer):
    """The service over one catalogue, answering for one bundle; `bundles` are those that calls may name."""

    def __init__(self, catalogue: Catalogue, bundle: str, bundles: Sequence[str]) -> None:
        self._catalogue, self._view, self._bundle, self._bundles = catalogue, catalogue.view, bundle, bundles

    async def EmbedTexts(self, request: pb.EmbedTextsRequest, context: Any) -> pb.EmbedTextsResponse:
        """Encode texts; one that is too long has an error in its row."""
        self._check_bundle(request.bundle)
        texts = list(request.texts)
        _check_count(len(texts), MAX_TEXTS, "texts")
        problems = [_text_problem(text, "texts[{}]", row) for row, text in enumerate(texts)]
        good = [row for row, problem in enumerate(problems) if problem is None]
        encoded = await self._catalogue.encoding.texts([texts[row] for row in good])
        vectors = encoded.vectors
        if len(good) < len(texts):
            vectors = np.zeros((len(texts), vectors.shape[1]), np.float32)
            vectors[good] = encoded.vectors
        return pb.EmbedTextsResponse(
            vectors=_block(vectors),
            truncated_rows=[good[n] for n in np.flatnonzero(encoded.truncated)],
            errors=_row_errors(problems),
            encoder_digest=self._catalogue.encoding.text.digest,
        )

    async def EmbedImages(self, request: pb.EmbedImagesRequest, context: Any) -> pb.EmbedImagesResponse:
        """Encode photographs; one that cannot be read has an error in its row."""
        self._check_bundle(request.bundle)
        _check_count(len(request.images), MAX_IMAGES, "images")
        rows = await self._catalogue.encoding.photographs(request.images, "images[{}]")
        vectors = np.zeros((len(rows), self._catalogue.encoding.image.dimension), np.float32)
        for row, vector in enumerate(rows):
            if not isinstance(vector, InvalidArgument):
                vectors[row] = vector
        return pb.EmbedImagesResponse(
            vectors=_block(vectors),
            errors=_row_errors([row if isinstance(row, InvalidArgument) else None for row in rows]),
            encoder_digest=self._catalogue.encoding.image.digest,
        )

    async def UpsertItems(
        self, requests: AsyncIterator[pb.UpsertItemsRequest], context: Any
    ) -> AsyncIterator[pb.UpsertItemsResponse]:
        """Write chunks of items, each answered in its turn once committed and searchable.

        A few chunks are on their way at once, so that encoders do not wait for commits.
        """
        chunks: deque[_Chunk] = deque()
        incoming: asyncio.Future[pb.UpsertItemsRequest | None] | None = asyncio.ensure_future(
            anext(requests, None)
        )
        try:
            while chunks or incoming:
                awaited: list[asyncio.Future[Any]] = [chunks[0].answer] if chunks else []
                if incoming and len(chunks) < _CHUNKS:
                    awaited.append(incoming)
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if incoming in awaited and incoming.done():
                    request = incoming.result()
                    incoming = None if request is None else asyncio.ensure_future(anext(requests, None))
                    if request is not None:
                        chunks.append(self._begin(request, chunks))
                if chunks and chunks[0].answer.done():
                    yield chunks.popleft().answer.result()
        finally:
            for left in (incoming, *(chunk.answer for chunk in chunks)):
                if left is not None:
                    left.cancel()

    def _begin(self, request: pb.UpsertItemsRequest, others: Iterable["_Chunk"]) -> "_Chunk":
        """Write a chunk after those of `others` that share an id with it, so that its last write wins."""
        ids = {message.id for message in request.items}
        before = [other.answer for other in others if ids & other.ids]

        async def write() -> pb.UpsertItemsResponse:
            if before:
                await asyncio.wait(before)
            return await self.upsert_chunk(request)

        return _Chunk(ids, asyncio.ensure_future(write()))

    async def upsert_chunk(self, request: pb.UpsertItemsRequest) -> pb.UpsertItemsResponse:
        """Write one chunk."""
        _check_count(len(request.items), MAX_ITEMS, "items")
        if request.ByteSize() > MAX_CHUNK_BYTES:
            raise InvalidArgument.of("items", f"exceed {MAX_CHUNK_BYTES} bytes in all")
        mask = wire.mask_from(request.update_mask.paths)
        outcomes = await self._catalogue.upsert([_item(message) for message in request.items], mask)
        ids = [message.id for message in request.items]
        return pb.UpsertItemsResponse(outcomes=_outcomes(ids, outcomes, "items"))

    async def DeleteItems(self, request: pb.DeleteItemsRequest, context: Any) -> pb.DeleteItemsResponse:
        """Delete items."""
        _check_count(len(request.item_ids), MAX_ITEMS, "item_ids")
        outcomes = await self._catalogue.delete(request.item_ids)
        return pb.DeleteItemsResponse(outcomes=_outcomes(request.item_ids, outcomes, "item_ids"))

    async def GetItems(self, request: pb.GetItemsRequest, context: Any) -> pb.GetItemsResponse:
        """Read items by id, or a page of all."""
        items = self._view.items
        if request.item_ids:
            _check_count(len(request.item_ids), MAX_ITEMS, "item_ids")
            ids = list(request.item_ids)
            found = await self._view.read(lambda: items.get(i for i in ids if not identifier_problem(i)))
            return pb.GetItemsResponse(
                items=[_record(found[i]) for i in ids if i in found],
                missing_item_ids=[i for i in ids if i not in found],
            )
        size = wire.check_limit(request.page_size, MAX_ITEMS, "page_size", default=100)
        after = _after(request.page_token)
        page = await self._view.read(lambda: items.page(after, size))
        token = _token(page[-1].number) if len(page) == size else ""
        return pb.GetItemsResponse(items=[_record(record) for record in page], next_page_token=token)

    async def Search(self, request: pb.SearchRequest, context: Any) -> pb.SearchResponse:
        """Find the items nearest to each query, in each space that it fits."""
        self._check_bundle(request.bundle)
        limit = wire.check_limit(request.limit, MAX_LIMIT, "limit")
        if len(request.exclude_item_numbers) > MAX_EXCLUDED:
            raise InvalidArgument.of("exclude_item_numbers", f"has more than {MAX_EXCLUDED}")
        condition = wire.filter_from(request.filter) if request.HasField("filter") else None
        await self._view.wait_for(request.min_sequence)
        sequence = self._view.sequence
        results = []
        for space, queries in (await self._queries(request)).items():
            results += await self._search(space, queries, limit, condition, request)
        results.sort(key=lambda result: (result.query, result.space))
        return pb.SearchResponse(results=results, sequence=sequence, bundle=self._bundle)

    async def WatchItems(
        self, request: pb.WatchItemsRequest, context: Any
    ) -> AsyncIterator[pb.WatchItemsResponse]:
        """Send what changed after a position, then follow."""
        self._check_bundle(request.bundle)
        feed = self._view.changes(request.after_sequence, until_current=request.until_current)
        async for records, vectors, sequence in feed:
            yield _changes(records, vectors, sequence)

    async def ListBundles(self, request: pb.ListBundlesRequest, context: Any) -> pb.ListBundlesResponse:
        """The bundles that calls may name."""
        return pb.ListBundlesResponse(bundles=self._bundles)

    def _check_bundle(self, bundle: str) -> None:
        if bundle and bundle != self._bundle:
            raise FailedPrecondition(f"bundle {bundle!r} is not loaded; this server has {self._bundle!r}")

    async def _queries(self, request: pb.SearchRequest) -> dict[str, list[tuple[int, np.ndarray]]]:
        """Space to (query number, vector) of what the request asks for."""
        asked = [_space(s) for s in request.spaces] or list(self._view.spaces)
        if missing := [space for space in asked if space not in self._view.spaces]:
            raise FailedPrecondition(f"this bundle has no {missing[0]} space")
        queries: dict[str, list[tuple[int, np.ndarray]]] = {space: [] for space in asked}
        at = self._add_groups(request, queries)
        at = self._add_vectors(request, queries, at)
        if request.text:
            if problem := _text_problem(request.text, "text"):
                raise problem
            if "text" in queries:
                queries["text"].append(
                    (at, (await self._catalogue.encoding.texts([request.text])).vectors[0])
                )
            if "image" in queries:
                vectors = await self._catalogue.encoding.captions([request.text])
                queries["image"].append((at, vectors[0]))
            at += 1
        if request.image and not request.spaces:
            _ = self._catalogue.encoding.image  # a photograph cannot be searched for without its encoder
        if request.image and "image" in queries:
            vector = (await self._catalogue.encoding.photographs([request.image], "image"))[0]
            if isinstance(vector, InvalidArgument):
                raise vector
            queries["image"].append((at, vector))
            at += 1
        if not at:
            raise InvalidArgument.of("groups", "one of groups, vectors, text and image is required")
        return {space: found for space, found in queries.items() if found}

    def _add_groups(
        self, request: pb.SearchRequest, queries: Mapping[str, list[tuple[int, np.ndarray]]]
    ) -> int:
        _check_most(len(request.groups), MAX_GROUPS, "groups")
        for at, group in enumerate(request.groups):
            numbers = numbers_of(group.item_numbers, group.item_ids)
            weights = (
                np.fromiter(group.weights, np.float32) if group.weights else np.ones(len(numbers), np.float32)
            )
            if len(weights) != len(numbers) or not np.isfinite(weights).all():
                raise InvalidArgument.of(f"groups[{at}].weights", "needs one finite weight per item")
            for space, found in queries.items():
                known, vectors = self._view.spaces[space].vectors(numbers)
                if len(known):
                    found.append((at, centre(vectors, weights[known])))
        return len(request.groups)

    def _add_vectors(
        self, request: pb.SearchRequest, queries: Mapping[str, list[tuple[int, np.ndarray]]], at: int
    ) -> int:
        if not request.vectors.values:
            return at
        rows = wire.rows_of(request.vectors.values, request.vectors.dimension, "vectors.values")
        _check_most(len(rows), MAX_VECTORS, "vectors")
        fitting = [s for s in queries if self._view.spaces[s].dimension == rows.shape[1]]
        if not fitting:
            raise InvalidArgument.of("vectors.dimension", f"{rows.shape[1]} is no searched space's dimension")
        for space in fitting:
            queries[space].extend((at + n, row) for n, row in enumerate(rows))
        return at + len(rows)

    async def _search(
        self,
        space: str,
        queries: Sequence[tuple[int, np.ndarray]],
        limit: int,
        condition: Filter | None,
        request: pb.SearchRequest,
    ) -> list[pb.SearchResult]:
        vectors = np.stack([vector for _, vector in queries])
        as_of = wire.time_from(request.as_of, "as_of") if request.HasField("as_of") else None
        found = await self._view.search(space, vectors, limit, condition, request.exclude_item_numbers, as_of)
        readable = request.view == item_pb2.VIEW_READABLE
        return [self._result(at, space, near, readable) for (at, _), near in zip(queries, found, strict=True)]

    def _result(self, query: int, space: str, near: Neighbours, readable: bool) -> pb.SearchResult:
        result = pb.SearchResult(query=query, space=_NUMBER_OF_SPACE[space])
        if not readable:
            result.item_numbers.extend(near.numbers.tolist())
            result.scores.extend(near.scores.tolist())
            return result
        table = self._view.table
        for item_id, score in zip(table.ids(table.rows(near.numbers)), near.scores.tolist(), strict=True):
            result.hits.add(item_id=item_id, score=score)
        return result


def _item(message: item_pb2.Item) -> Any:
    try:
        return wire.item_from(message)
    except VitrineError as error:
        return error


def _check_count(count: int, most: int, field: str) -> None:
    if not 1 <= count <= most:
        raise InvalidArgument.of(field, f"has {count}, 1 to {most} are allowed")


def _check_most(count: int, most: int, field: str) -> None:
    if count > most:
        raise InvalidArgument.of(field, f"has {count}, at most {most} are allowed")


def _text_problem(text: str, field: str, row: int = 0) -> InvalidArgument | None:
    if len(text) * _MOST_BYTES <= MAX_TEXT_BYTES:
        return None
    size = len(text.encode())
    if size <= MAX_TEXT_BYTES:
        return None
    return InvalidArgument.of(field.format(row), f"has {size} bytes, at most {MAX_TEXT_BYTES} are allowed")


def _space(value: int) -> str:
    if value not in _SPACES:
        raise InvalidArgument.of("spaces", "holds an unknown space")
    return _SPACES[value]  # type: ignore[index]


def _block(vectors: np.ndarray) -> pb.Vectors:
    block = pb.Vectors(dimension=vectors.shape[1])
    floats = vectors.astype("<f4", copy=False).tobytes()
    if floats:
        # On the wire a packed field is its floats' bytes; made one by one they take twenty times as long.
        block.MergeFromString(_VALUES + _varint(len(floats)) + floats)
    return block


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first (the encoding guide of Protocol Buffers)."""
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def _row_errors(problems: Sequence[VitrineError | None]) -> list[pb.RowError]:
    return [
        pb.RowError(row=row, error=status.to_status(problem))
        for row, problem in enumerate(problems)
        if problem is not None
    ]


def _outcomes(ids: Sequence[str], outcomes: Sequence[Upserted], field: str) -> list[item_pb2.ItemOutcome]:
    messages = []
    for at, (item_id, outcome) in enumerate(zip(ids, outcomes, strict=True)):
        if outcome.error is not None:
            error = outcome.error
            if isinstance(error, InvalidArgument):
                error = error.under(f"{field}[{at}]")
            messages.append(
                item_pb2.ItemOutcome(
                    item_id=item_id,
                    code=item_pb2.ITEM_OUTCOME_CODE_FAILED,
                    error=status.to_status(error),
                )
            )
            continue
        written = outcome.outcome or Outcome.UNCHANGED
        messages.append(
            item_pb2.ItemOutcome(
                item_id=item_id,
                code=int(written),  # type: ignore[arg-type]
                sequence=outcome.sequence,
                text_state=int(outcome.text_state),  # type: ignore[arg-type]
                image_state=int(outcome.image_state),  # type: ignore[arg-type]
                text_truncated=outcome.truncated,
            )
        )
    return messages


def _record(record: Record) -> item_pb2.ItemRecord:
    return item_pb2.ItemRecord(
        item=wire.item_to(record.item),
        number=record.number,
        sequence=record.sequence,
        text_state=int(record.text_state),  # type: ignore[arg-type]
        image_state=int(record.image_state),  # type: ignore[arg-type]
        image_error=record.image_error,
        create_time=wire.time_to(record.created),
        update_time=wire.time_to(record.updated),
    )


def _changes(
    records: Sequence[Record], vectors: Mapping[str, Mapping[int, np.ndarray]], sequence: int
) -> pb.WatchItemsResponse:
    live = [record for record in records if not record.deleted]
    message = pb.WatchItemsResponse(
        items=[_record(record) for record in live],
        deleted_item_numbers=[record.number for record in records if record.deleted],
        sequence=sequence,
        caught_up=not records,
    )
    for space, rows, block in (
        ("text", message.text_rows, message.text_vectors),
        ("image", message.image_rows, message.image_vectors),
    ):
        found = [
            (row, vectors[space][r.number])
            for row, r in enumerate(live)
            if r.number in vectors.get(space, {})
        ]
        if found:
            rows.extend(row for row, _ in found)
            block.CopyFrom(_block(np.stack([vector for _, vector in found])))
    return message


def _token(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes(_TOKEN_BYTES, "big")).decode().rstrip("=")


def _after(token: str) -> int:
    if not token:
        return -1
    try:
        data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except ValueError:
        data = b""
    if len(data) != _TOKEN_BYTES or data[0] & 0x80:
        raise InvalidArgument.of("page_token", "is not one of this service")
    return int.from_bytes(data, "big")
