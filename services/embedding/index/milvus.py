"""Vector search by Milvus, for catalogs larger than one machine: one collection per space of a store.

A row has the item hash, the vector, and the sequence up to which the row is current, so that a start sends
only later changes. Milvus keeps acknowledged rows; SQL remains the source of truth.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import grpc
import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from services.core.errors import Unavailable
from services.embedding.index.vector_index import TIES, SearchHits, Selection, StoredRows, top_hits

_TIMEOUT_SECONDS, _RETRY_SECONDS = 30.0, 0.5
_CALL_TIMEOUT_SECONDS = 5.0
"""Timeout of calls that a user waits for."""
_LINKS, _BUILD_WIDTH, _MIN_SEARCH_WIDTH = 32, 80, 400
_BATCH_ROWS = 1000
_NOT_LOADED = 101
# The most hits that Milvus returns for a search, and the most hashes in one filter here: 200 kB of text.
_MAX_HITS = 16_384
_FILTER_ITEMS = 10_000

_log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


def connect(address: str, token: str = "") -> MilvusClient:
    """A client of the Milvus at `address`, http://HOST:PORT, which may still be starting.

    Raises:
        Unavailable: Milvus does not answer for half a minute.
    """
    # Like Vitrine's own connections, this one ignores http_proxy.
    options = {"grpc.enable_http_proxy": 0}
    return _retried(_translate_errors(MilvusClient))(
        address, token=token, timeout=_TIMEOUT_SECONDS, grpc_options=options
    )


def _translate_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function: an error of Milvus becomes Unavailable."""

    @wraps(function)
    def wrapper(*arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            return function(*arguments, **keywords)
        except MilvusException as error:
            _log.info("Milvus: %s", error.message)  # the message has the address
        except grpc.RpcError as error:  # pymilvus does not wrap a deadline error, for example
            _log.info("Milvus: %s", error)
        raise Unavailable("Milvus, which searches, does not answer")

    return wrapper


def _retried(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function: retry for a while if Milvus does not answer."""

    @wraps(function)
    def wrapper(*arguments: P.args, **keywords: P.kwargs) -> T:
        end = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            try:
                return function(*arguments, **keywords)
            except Unavailable:
                if time.monotonic() > end:
                    raise
                time.sleep(_RETRY_SECONDS)

    return wrapper


class MilvusIndex:
    """A `VectorIndex` on one Milvus collection, for a `store`, a `space` and an encoder `digest`.

    Components are stored as float32, because Milvus Lite has no float16. The recall is not measured.

    Raises:
        Unavailable: Milvus does not answer.
    """

    recall = None

    def __init__(self, client: MilvusClient, store: str, space: str, digest: str, dimension: int) -> None:
        self.dimension, self._client = dimension, client
        self._collection = re.sub(r"\W", "_", f"vitrine_{store}_{space}_{digest}")

    @_retried
    @_translate_errors
    def open(self) -> StoredRows:
        """See `VectorIndex`; creates the collection if it does not exist."""
        client, name = self._client, self._collection
        if not client.has_collection(name, timeout=_TIMEOUT_SECONDS):
            schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("number", DataType.INT64, is_primary=True)
            schema.add_field("sequence", DataType.INT64)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.dimension)
            graph = client.prepare_index_params()
            width = {"M": _LINKS, "efConstruction": _BUILD_WIDTH}
            graph.add_index("vector", index_type="HNSW", metric_type="IP", params=width)
            # Strong: a search sees all writes acknowledged before it.
            client.create_collection(
                name, schema=schema, index_params=graph, consistency_level="Strong", timeout=_TIMEOUT_SECONDS
            )
        client.load_collection(name, timeout=_TIMEOUT_SECONDS)
        rows = list(self._all_rows())
        return StoredRows(
            np.fromiter((row["number"] for row in rows), np.int64),
            np.fromiter((row["sequence"] for row in rows), np.int64),
        )

    def _all_rows(self) -> Iterator[Mapping[str, int]]:
        fields = ["number", "sequence"]
        pages = self._client.query_iterator(
            self._collection, batch_size=_FILTER_ITEMS, output_fields=fields, timeout=_TIMEOUT_SECONDS
        )
        while page := pages.next():
            yield from page
        pages.close()

    @_translate_errors
    def reconcile(self, deleted: np.ndarray, hashes: np.ndarray, vectors: np.ndarray, sequence: int) -> None:
        """See `VectorIndex`."""
        self._put(hashes.tolist(), vectors, sequence)
        self._drop(deleted[~np.isin(deleted, hashes)].tolist())

    @_translate_errors
    def change(self, upserts: Mapping[int, np.ndarray], deletions: Sequence[int], sequence: int) -> None:
        """See `VectorIndex`."""
        self._put(list(upserts), list(upserts.values()), sequence)
        self._drop(list(deletions))

    def _put(self, hashes: Sequence[int], vectors: Sequence[np.ndarray] | np.ndarray, sequence: int) -> None:
        for page in _pages(len(hashes), _BATCH_ROWS):
            rows = [
                {"number": item_hash, "sequence": sequence, "vector": vector.astype(np.float16).tolist()}
                for item_hash, vector in zip(hashes[page], vectors[page], strict=True)
            ]
            self._call(self._client.upsert, data=rows)

    def _drop(self, hashes: Sequence[int]) -> None:
        for page in _pages(len(hashes), _FILTER_ITEMS):
            self._call(self._client.delete, ids=list(hashes[page]))

    @_translate_errors
    def vectors(self, hashes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """See `VectorIndex`."""
        requested, vectors = list(hashes), dict[int, np.ndarray]()
        for page in _pages(len(requested), _BATCH_ROWS):
            rows = self._call(
                self._client.query, filter=_filter(requested[page]), output_fields=["number", "vector"]
            )
            vectors |= {row["number"]: np.array(row["vector"], np.float32) for row in rows}
        positions = [position for position, item_hash in enumerate(requested) if item_hash in vectors]
        values = [vectors[requested[position]] for position in positions]
        matrix = np.array(values, np.float32).reshape(len(positions), self.dimension)
        return np.array(positions, np.int64), matrix

    @_translate_errors
    def search(self, queries: np.ndarray, limit: int, selection: Selection | None = None) -> list[SearchHits]:
        """See `VectorIndex`.

        A filter names the permitted items if they are few. Otherwise the search is repeated with a larger
        count until enough of the hits are permitted.
        """
        if not limit or not len(queries):
            return [top_hits([], 0)] * len(queries)
        if selection is None:
            return [top_hits([hits], limit) for hits in self._hits(queries, limit + TIES)]
        permitted = selection.hashes[selection.mask]
        if len(permitted) > _FILTER_ITEMS:
            count = (limit + TIES) * len(selection.hashes) // len(permitted)
            while (count := 2 * count) <= _MAX_HITS:
                results = self._hits(queries, count)
                selected = [
                    (hashes[mask], scores[mask])
                    for hashes, scores in results
                    for mask in [selection.permits(hashes)]
                ]
                # Each query has enough hits, or Milvus has no more.
                if all(
                    len(some) >= limit + TIES or len(every) < count
                    for (some, _), (every, _) in zip(selected, results, strict=True)
                ):
                    return [top_hits([hits], limit) for hits in selected]
        pages = [
            self._hits(queries, limit + TIES, _filter(permitted[page].tolist()))
            for page in _pages(len(permitted), _FILTER_ITEMS)
        ]
        return [top_hits([page[query] for page in pages], limit) for query in range(len(queries))]

    def _call(self, method: Callable[..., Any], **arguments: Any) -> Any:
        """Call Milvus; load the collection first if Milvus has been restarted."""
        try:
            return method(self._collection, timeout=_CALL_TIMEOUT_SECONDS, **arguments)
        except MilvusException as error:
            if error.code != _NOT_LOADED:
                raise
            self._client.load_collection(self._collection, timeout=_TIMEOUT_SECONDS)
            return method(self._collection, timeout=_CALL_TIMEOUT_SECONDS, **arguments)

    def _hits(
        self, queries: np.ndarray, count: int, condition: str = ""
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        count = min(count, _MAX_HITS)
        results = self._call(
            self._client.search,
            data=queries.astype(np.float32).tolist(),
            limit=count,
            filter=condition,
            anns_field="vector",
            output_fields=["number"],
            search_params={"metric_type": "IP", "params": {"ef": max(_MIN_SEARCH_WIDTH, 2 * count)}},
        )
        return [_columns(result) for result in results]

    def maintain(self, sequence: int) -> None:
        """Milvus compacts by itself."""

    def close(self) -> None:
        """Does nothing: the caller owns the client."""

    @_translate_errors
    def __len__(self) -> int:
        rows = self._call(self._client.query, filter="", output_fields=["count(*)"])
        return int(rows[0]["count(*)"])


def _columns(result: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.fromiter((hit["number"] for hit in result), np.int64),
        np.fromiter((hit["distance"] for hit in result), np.float32),
    )


def _filter(hashes: Sequence[int]) -> str:
    return f"number in {list(hashes)}"


def _pages(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))
