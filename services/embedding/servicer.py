"""gRPC servicer of `EmbeddingService`: converts messages and calls the catalog. Raises domain errors."""

import asyncio
import base64
import math
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as pb_grpc

from services.catalog.filters import Filter
from services.catalog.items import identifier_problem
from services.catalog.query_vectors import QueryGroup
from services.core import slices
from services.core.errors import FailedPrecondition, InvalidArgument, VitrineError, quoted, storage_refusal
from services.embedding.catalog.writer import CatalogWriter, UpsertResult, resolve_item_hashes
from services.embedding.index.vector_index import SearchHits, weighted_centroid
from services.embedding.store.mutations import WriteOutcome
from services.embedding.store.schema import StoredItem
from services.rpc import packed_fields, proto_conversions, status
from services.rpc.request_limits import check, checked

MAX_ITEMS = 1000
MAX_TEXTS = 4096
MAX_IMAGES = 256
MAX_GROUPS = 32
MAX_VECTORS = 256
MAX_LIMIT = 2000
MAX_EXCLUDED = 100_000
MAX_CHUNK_BYTES = 32 << 20
MAX_TEXT_BYTES = 2 << 20
_FEED_BYTES = 2 << 20
_MAX_CHARACTER_BYTES = 4  # of UTF-8
_TOKEN_BYTES = 8
_MAX_CHUNKS = 3
_SPACES = {item_pb2.SPACE_TEXT: "text", item_pb2.SPACE_IMAGE: "image"}
_SPACE_ENUM = {name: number for number, name in _SPACES.items()}


@dataclass(frozen=True)
class _Chunk:
    """A chunk of items in progress: their ids and the future response."""

    ids: set[str]
    response: asyncio.Future[pb.UpsertItemsResponse]


@checked(pb.DESCRIPTOR.services_by_name["EmbeddingService"])
class EmbeddingServicer(pb_grpc.EmbeddingServiceServicer):
    """The service over one catalog and one bundle; `bundles` are the ones that `ListBundles` returns."""

    def __init__(self, writer: CatalogWriter, bundle: str, bundles: Sequence[str]) -> None:
        self._writer, self._view, self._bundle, self._bundles = writer, writer.view, bundle, bundles

    async def EmbedTexts(self, request: pb.EmbedTextsRequest, context: Any) -> pb.EmbedTextsResponse:
        """Encode texts; a text that is too long gets an error for its row."""
        self._check_bundle(request.bundle)
        texts = list(request.texts)
        _check_count(len(texts), MAX_TEXTS, "texts")
        problems = [_text_problem(text, "texts[{}]", row) for row, text in enumerate(texts)]
        valid = [row for row, problem in enumerate(problems) if problem is None]
        encoded = await self._writer.encoders.texts([texts[row] for row in valid])
        vectors = encoded.vectors
        if len(valid) < len(texts):
            vectors = np.zeros((len(texts), vectors.shape[1]), np.float32)
            vectors[valid] = encoded.vectors
        return pb.EmbedTextsResponse(
            vectors=vectors_message(vectors),
            truncated_rows=[valid[n] for n in np.flatnonzero(encoded.truncated)],
            errors=_row_errors(problems),
            encoder_digest=self._writer.encoders.text.digest,
        )

    async def EmbedImages(self, request: pb.EmbedImagesRequest, context: Any) -> pb.EmbedImagesResponse:
        """Encode images; an image that cannot be read gets an error for its row."""
        self._check_bundle(request.bundle)
        _check_count(len(request.images), MAX_IMAGES, "images")
        rows = await self._writer.encoders.images(request.images, "images[{}]")
        vectors = np.zeros((len(rows), self._writer.encoders.image.dimension), np.float32)
        for row, vector in enumerate(rows):
            if not isinstance(vector, InvalidArgument):
                vectors[row] = vector
        return pb.EmbedImagesResponse(
            vectors=vectors_message(vectors),
            errors=_row_errors([row if isinstance(row, InvalidArgument) else None for row in rows]),
            encoder_digest=self._writer.encoders.image.digest,
        )

    async def UpsertItems(
        self, requests: AsyncIterator[pb.UpsertItemsRequest], context: Any
    ) -> AsyncIterator[pb.UpsertItemsResponse]:
        """Write chunks of items; each is answered in order once it is committed and searchable.

        A few chunks are in progress at once, so that encoders do not wait for commits.
        """
        chunks: deque[_Chunk] = deque()
        incoming: asyncio.Future[pb.UpsertItemsRequest | None] | None = asyncio.ensure_future(
            anext(requests, None)
        )
        try:
            while chunks or incoming:
                awaited: list[asyncio.Future[Any]] = [chunks[0].response] if chunks else []
                if incoming and len(chunks) < _MAX_CHUNKS:
                    awaited.append(incoming)
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if incoming in awaited and incoming.done():
                    if isinstance(error := incoming.exception(), VitrineError):
                        chunks.append(_failed_chunk(error))  # answered after the earlier chunks
                        incoming = None
                        continue
                    request = incoming.result()
                    incoming = None if request is None else asyncio.ensure_future(anext(requests, None))
                    if request is not None:
                        chunks.append(self._start_chunk(request, chunks))
                if chunks and chunks[0].response.done():
                    yield chunks.popleft().response.result()
        finally:
            for future in (incoming, *(chunk.response for chunk in chunks)):
                if future is not None:
                    future.cancel()

    def _start_chunk(self, request: pb.UpsertItemsRequest, others: Iterable["_Chunk"]) -> "_Chunk":
        """Write a chunk after the `others` that share an id with it, so that the last write wins."""
        try:
            check(request)
        except InvalidArgument as error:
            return _failed_chunk(error)
        ids = {message.id for message in request.items}
        before = [other.response for other in others if ids & other.ids]

        async def write() -> pb.UpsertItemsResponse:
            if before:
                await asyncio.wait(before)
            return await self.upsert_chunk(request)

        return _Chunk(ids, asyncio.ensure_future(write()))

    async def upsert_chunk(self, request: pb.UpsertItemsRequest) -> pb.UpsertItemsResponse:
        """Write one chunk."""
        check(request)
        _check_count(len(request.items), MAX_ITEMS, "items")
        if request.ByteSize() > MAX_CHUNK_BYTES:
            raise InvalidArgument.of("items", f"exceed {MAX_CHUNK_BYTES} bytes in all")
        mask = proto_conversions.mask_from(request.update_mask.paths)
        outcomes = await self._writer.upsert(await slices.convert(_item, request.items), mask)
        if refusal := storage_refusal([outcome.error for outcome in outcomes]):
            raise refusal
        ids = [message.id for message in request.items]
        return pb.UpsertItemsResponse(outcomes=_outcomes(ids, outcomes, "items"))

    async def DeleteItems(self, request: pb.DeleteItemsRequest, context: Any) -> pb.DeleteItemsResponse:
        """Delete items."""
        _check_count(len(request.item_ids), MAX_ITEMS, "item_ids")
        outcomes = await self._writer.delete(request.item_ids)
        if refusal := storage_refusal([outcome.error for outcome in outcomes]):
            raise refusal
        return pb.DeleteItemsResponse(outcomes=_outcomes(request.item_ids, outcomes, "item_ids"))

    async def GetItems(self, request: pb.GetItemsRequest, context: Any) -> pb.GetItemsResponse:
        """Read items by id, or a page of all."""
        items = self._view.items
        if request.item_ids:
            _check_count(len(request.item_ids), MAX_ITEMS, "item_ids")
            ids = list(request.item_ids)
            records = await self._view.read(lambda: items.get(i for i in ids if not identifier_problem(i)))
            return pb.GetItemsResponse(
                items=[_record(records[i]) for i in ids if i in records],
                missing_item_ids=[i for i in ids if i not in records],
            )
        size = proto_conversions.check_limit(request.page_size, MAX_ITEMS, "page_size", default=100)
        after = _after(request.page_token)
        page = await self._view.read(lambda: items.page(after, size))
        token = _token(page[-1].item_hash) if len(page) == size else ""
        return pb.GetItemsResponse(items=[_record(record) for record in page], next_page_token=token)

    async def Search(self, request: pb.SearchRequest, context: Any) -> pb.SearchResponse:
        """Find the items nearest to each query, in each space that applies to it."""
        self._check_bundle(request.bundle)
        limit = proto_conversions.check_limit(request.limit, MAX_LIMIT, "limit")
        if len(request.exclude_item_hashes) > MAX_EXCLUDED:
            raise InvalidArgument.of("exclude_item_hashes", f"has more than {MAX_EXCLUDED}")
        condition = proto_conversions.filter_from(request.filter) if request.HasField("filter") else None
        await self._view.wait_for(request.min_sequence)
        sequence = self._view.sequence
        if request.merge_groups:
            results = await self._search_groups(request, limit, condition)
            return pb.SearchResponse(results=results, sequence=sequence, bundle=self._bundle)
        results = []
        for space, queries in (await self._queries(request)).items():
            results += await self._search(space, queries, limit, condition, request)
        results.sort(key=lambda result: (result.query, result.space))
        return pb.SearchResponse(results=results, sequence=sequence, bundle=self._bundle)

    async def WatchItems(
        self, request: pb.WatchItemsRequest, context: Any
    ) -> AsyncIterator[pb.WatchItemsResponse]:
        """Send the changes after a position, then follow new ones."""
        self._check_bundle(request.bundle)
        feed = self._view.changes(request.after_sequence, until_current=request.until_current)
        async for records, vectors, sequence in feed:
            for message in _messages(records, vectors, sequence):
                yield message

    async def ListBundles(self, request: pb.ListBundlesRequest, context: Any) -> pb.ListBundlesResponse:
        """List the bundles that a request may name."""
        return pb.ListBundlesResponse(bundles=self._bundles)

    def _check_bundle(self, bundle: str) -> None:
        if bundle and bundle != self._bundle:
            raise FailedPrecondition(
                f"bundle {quoted(bundle)} is not loaded; this server has {self._bundle!r}"
            )

    async def _queries(self, request: pb.SearchRequest) -> dict[str, list[tuple[int, np.ndarray]]]:
        """The queries of the request by space: (query index, vector)."""
        spaces = self._spaces(request)
        queries: dict[str, list[tuple[int, np.ndarray]]] = {space: [] for space in spaces}
        count = self._add_groups(request, queries)
        count = self._add_vectors(request, queries, count)
        if request.text:
            if problem := _text_problem(request.text, "text"):
                raise problem
            if "text" in queries:
                queries["text"].append(
                    (count, (await self._writer.encoders.texts([request.text])).vectors[0])
                )
            if "image" in queries:
                vectors = await self._writer.encoders.captions([request.text])
                queries["image"].append((count, vectors[0]))
            count += 1
        if request.image and not request.spaces:
            _ = self._writer.encoders.image  # raises if there is no image encoder
        if request.image and "image" in queries:
            vector = (await self._writer.encoders.images([request.image], "image"))[0]
            if isinstance(vector, InvalidArgument):
                raise vector
            queries["image"].append((count, vector))
            count += 1
        if not count:
            raise InvalidArgument.of("groups", "one of groups, vectors, text and image is required")
        return {space: vectors for space, vectors in queries.items() if vectors}

    def _add_groups(
        self, request: pb.SearchRequest, queries: Mapping[str, list[tuple[int, np.ndarray]]]
    ) -> int:
        for index, (hashes, weight_list) in enumerate(self._groups(request)):
            weights = np.array(weight_list, np.float32)
            for space, space_queries in queries.items():
                positions, vectors = self._view.spaces[space].vectors(hashes)
                if len(positions):
                    space_queries.append((index, weighted_centroid(vectors, weights[positions])))
        return len(request.groups)

    def _add_vectors(
        self, request: pb.SearchRequest, queries: Mapping[str, list[tuple[int, np.ndarray]]], first: int
    ) -> int:
        if not request.vectors.values:
            return first
        rows = proto_conversions.rows_of(request.vectors.values, request.vectors.dimension, "vectors.values")
        _check_max(len(rows), MAX_VECTORS, "vectors")
        matching = [s for s in queries if self._view.spaces[s].dimension == rows.shape[1]]
        if not matching:
            raise InvalidArgument.of("vectors.dimension", f"{rows.shape[1]} is no searched space's dimension")
        for space in matching:
            queries[space].extend((first + n, row) for n, row in enumerate(rows))
        return first + len(rows)

    async def _search_groups(
        self, request: pb.SearchRequest, limit: int, condition: Filter | None
    ) -> list[pb.SearchResult]:
        """The merged hits of the groups of items, one result per space."""
        if request.text or request.image or request.vectors.values:
            raise InvalidArgument.of("merge_groups", "merges groups; vectors, text and image must be empty")
        groups = [QueryGroup(*group) for group in self._groups(request)]
        if not groups:
            raise InvalidArgument.of("groups", "is required")
        as_of = proto_conversions.time_from(request.as_of, "as_of") if request.HasField("as_of") else None
        excluded = np.asarray(request.exclude_item_hashes, np.int64)
        hits = await self._view.search_groups(
            groups, self._spaces(request), limit, condition, excluded, as_of
        )
        readable = request.view == item_pb2.VIEW_READABLE
        return [self._result(0, space, hits[space], readable) for space in sorted(hits)]

    def _spaces(self, request: pb.SearchRequest) -> list[str]:
        """The spaces that a request names, or all."""
        spaces = [_space(s) for s in request.spaces] or list(self._view.spaces)
        if missing := [space for space in spaces if space not in self._view.spaces]:
            raise FailedPrecondition(f"this bundle has no {missing[0]} space")
        return spaces

    def _groups(self, request: pb.SearchRequest) -> Iterator[tuple[list[int], list[float]]]:
        """The item hashes and weights of each group."""
        _check_max(len(request.groups), MAX_GROUPS, "groups")
        for index, group in enumerate(request.groups):
            hashes, weights = resolve_item_hashes(group.item_hashes, group.item_ids), list(group.weights)
            if weights and (len(weights) != len(hashes) or not all(map(math.isfinite, weights))):
                raise InvalidArgument.of(f"groups[{index}].weights", "needs one finite weight per item")
            yield hashes, weights or [1.0] * len(hashes)

    async def _search(
        self,
        space: str,
        queries: Sequence[tuple[int, np.ndarray]],
        limit: int,
        condition: Filter | None,
        request: pb.SearchRequest,
    ) -> list[pb.SearchResult]:
        vectors = np.stack([vector for _, vector in queries])
        as_of = proto_conversions.time_from(request.as_of, "as_of") if request.HasField("as_of") else None
        results = await self._view.search(
            space, vectors, limit, condition, request.exclude_item_hashes, as_of
        )
        readable = request.view == item_pb2.VIEW_READABLE
        return [
            self._result(query, space, hits, readable)
            for (query, _), hits in zip(queries, results, strict=True)
        ]

    def _result(self, query: int, space: str, hits: SearchHits, readable: bool) -> pb.SearchResult:
        result = pb.SearchResult(query=query, space=_SPACE_ENUM[space])
        if not readable:
            packed_fields.extend(result, "item_hashes", hits.hashes)
            packed_fields.extend(result, "scores", hits.scores)
            return result
        table = self._view.table
        for item_id, score in zip(table.ids(table.rows(hits.hashes)), hits.scores.tolist(), strict=True):
            result.hits.add(item_id=item_id, score=score)
        return result


def _failed_chunk(error: VitrineError) -> _Chunk:
    """A chunk that cannot be read; its error ends the stream when its turn comes."""
    response: asyncio.Future[pb.UpsertItemsResponse] = asyncio.get_running_loop().create_future()
    response.set_exception(error)
    return _Chunk(set(), response)


def _item(message: item_pb2.Item) -> Any:
    try:
        return proto_conversions.item_from(message)
    except VitrineError as error:
        return error


def _check_count(count: int, limit: int, field: str) -> None:
    if not 1 <= count <= limit:
        raise InvalidArgument.of(field, f"has {count}, 1 to {limit} are allowed")


def _check_max(count: int, limit: int, field: str) -> None:
    if count > limit:
        raise InvalidArgument.of(field, f"has {count}, at most {limit} are allowed")


def _text_problem(text: str, field: str, row: int = 0) -> InvalidArgument | None:
    if len(text) * _MAX_CHARACTER_BYTES <= MAX_TEXT_BYTES:
        return None
    size = len(text.encode())
    if size <= MAX_TEXT_BYTES:
        return None
    return InvalidArgument.of(field.format(row), f"has {size} bytes, at most {MAX_TEXT_BYTES} are allowed")


def _space(value: int) -> str:
    if value not in _SPACES:
        raise InvalidArgument.of("spaces", "holds an unknown space")
    return _SPACES[value]  # type: ignore[index]


def vectors_message(vectors: np.ndarray) -> pb.Vectors:
    """The message that carries the rows of a matrix of vectors."""
    block = pb.Vectors(dimension=vectors.shape[1])
    packed_fields.extend(block, "values", vectors.ravel())
    return block


def _row_errors(problems: Sequence[VitrineError | None]) -> list[pb.RowError]:
    return [
        pb.RowError(row=row, error=status.to_status(problem))
        for row, problem in enumerate(problems)
        if problem is not None
    ]


def _outcomes(ids: Sequence[str], outcomes: Sequence[UpsertResult], field: str) -> list[item_pb2.ItemOutcome]:
    messages = []
    for index, (item_id, outcome) in enumerate(zip(ids, outcomes, strict=True)):
        if outcome.error is not None:
            error = outcome.error
            if isinstance(error, InvalidArgument):
                error = error.under(f"{field}[{index}]")
            messages.append(
                item_pb2.ItemOutcome(
                    item_id=item_id,
                    code=item_pb2.ITEM_OUTCOME_CODE_FAILED,
                    error=status.to_status(error),
                )
            )
            continue
        code = outcome.outcome or WriteOutcome.UNCHANGED
        messages.append(
            item_pb2.ItemOutcome(
                item_id=item_id,
                code=int(code),  # type: ignore[arg-type]
                sequence=outcome.sequence,
                text_state=int(outcome.text_state),  # type: ignore[arg-type]
                image_state=int(outcome.image_state),  # type: ignore[arg-type]
                text_truncated=outcome.truncated,
            )
        )
    return messages


def _record(record: StoredItem) -> item_pb2.ItemRecord:
    return item_pb2.ItemRecord(
        item=proto_conversions.item_to(record.item),
        item_hash=record.item_hash,
        sequence=record.sequence,
        text_state=int(record.text_state),  # type: ignore[arg-type]
        image_state=int(record.image_state),  # type: ignore[arg-type]
        image_error=record.image_error,
        image_hash=record.item.image_hash,
        create_time=proto_conversions.time_to(record.created),
        update_time=proto_conversions.time_to(record.updated),
    )


def _messages(
    records: Sequence[StoredItem], vectors: Mapping[str, Mapping[int, np.ndarray]], sequence: int
) -> Iterator[pb.WatchItemsResponse]:
    """Changes in messages of at most 2 MiB, except a single item that is larger."""
    message = _changes(records, vectors, sequence)
    if len(records) > 1 and message.ByteSize() > _FEED_BYTES:
        half = len(records) // 2
        yield from _messages(records[:half], vectors, records[half - 1].sequence)
        yield from _messages(records[half:], vectors, sequence)
    else:
        yield message


def _changes(
    records: Sequence[StoredItem], vectors: Mapping[str, Mapping[int, np.ndarray]], sequence: int
) -> pb.WatchItemsResponse:
    live = [record for record in records if not record.deleted]
    message = pb.WatchItemsResponse(
        items=[_record(record) for record in live],
        deleted_item_hashes=[record.item_hash for record in records if record.deleted],
        sequence=sequence,
        caught_up=not records,
    )
    for space, rows, block in (
        ("text", message.text_rows, message.text_vectors),
        ("image", message.image_rows, message.image_vectors),
    ):
        space_vectors = vectors.get(space, {})
        present = [row for row, record in enumerate(live) if record.item_hash in space_vectors]
        if present:
            rows.extend(present)
            block.CopyFrom(vectors_message(np.stack([space_vectors[live[row].item_hash] for row in present])))
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
