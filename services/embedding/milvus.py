"""Nearest items by Milvus, for catalogues past one machine: a collection for each space of a store.

A row has an item's number, its vector, and the sequence of a change up to which it is known to be right, so
that a start sends only what changed since. Milvus keeps what it acknowledged; SQL remains the truth.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import grpc
import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from services.embedding.index import TIES, Held, Neighbours, Selection, best
from services.errors import Unavailable

_SECONDS, _PAUSE = 30.0, 0.5
_SOON = 5.0
"""Seconds for what somebody waits for."""
_LINKS, _BUILD_WIDTH, _LEAST_WIDTH = 32, 80, 400
_ROWS_AT_ONCE = 1000
_NOT_LOADED = 101
# What Milvus lets one search answer, and how many numbers one filter names here: 200 kB of text.
_MOST_FOUND = 16_384
_NAMED = 10_000

P = ParamSpec("P")
T = TypeVar("T")


def connect(address: str, token: str = "") -> MilvusClient:
    """A client of the Milvus at `address`, http://HOST:PORT, which may still be starting.

    Raises:
        Unavailable: it does not answer for half a minute.
    """
    return _patient(_answered(MilvusClient))(address, token=token, timeout=_SECONDS)


def _answered(ask: Callable[P, T]) -> Callable[P, T]:
    """The same function, but Milvus' errors are of this package."""

    @wraps(ask)
    def asked(*arguments: P.args, **more: P.kwargs) -> T:
        try:
            return ask(*arguments, **more)
        except MilvusException as error:
            raise Unavailable(f"Milvus: {error.message}") from error
        except grpc.RpcError as error:  # of a deadline, for one, pymilvus makes no error of its own
            raise Unavailable(f"Milvus: {error}") from error

    return asked


def _patient(ask: Callable[P, T]) -> Callable[P, T]:
    """The same function, but asked again for a while where Milvus does not answer."""

    @wraps(ask)
    def asked(*arguments: P.args, **more: P.kwargs) -> T:
        end = time.monotonic() + _SECONDS
        while True:
            try:
                return ask(*arguments, **more)
            except Unavailable:
                if time.monotonic() > end:
                    raise
                time.sleep(_PAUSE)

    return asked


class MilvusIndex:
    """A `VectorIndex`: the collection of `space`, `dimension` floats as `digest` encodes them, of a store.

    Components are kept as float32: Milvus' local build has no float16.

    Raises:
        Unavailable: Milvus does not answer.
    """

    def __init__(self, client: MilvusClient, store: str, space: str, digest: str, dimension: int) -> None:
        self.dimension, self._client = dimension, client
        self._collection = re.sub(r"\W", "_", f"vitrine_{store}_{space}_{digest}")

    @_patient
    @_answered
    def open(self) -> Held:
        """See `VectorIndex`; makes the collection when there is none."""
        client, name = self._client, self._collection
        if not client.has_collection(name, timeout=_SECONDS):
            schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("number", DataType.INT64, is_primary=True)
            schema.add_field("sequence", DataType.INT64)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.dimension)
            graph = client.prepare_index_params()
            width = {"M": _LINKS, "efConstruction": _BUILD_WIDTH}
            graph.add_index("vector", index_type="HNSW", metric_type="IP", params=width)
            # Strong: a search sees what was acknowledged before it.
            client.create_collection(
                name, schema=schema, index_params=graph, consistency_level="Strong", timeout=_SECONDS
            )
        client.load_collection(name, timeout=_SECONDS)
        rows = list(self._everything())
        return Held(
            np.fromiter((row["number"] for row in rows), np.int64),
            np.fromiter((row["sequence"] for row in rows), np.int64),
        )

    def _everything(self) -> Iterator[Mapping[str, int]]:
        fields = ["number", "sequence"]
        pages = self._client.query_iterator(
            self._collection, batch_size=_NAMED, output_fields=fields, timeout=_SECONDS
        )
        while page := pages.next():
            yield from page
        pages.close()

    @_answered
    def hold(self, gone: np.ndarray, numbers: np.ndarray, vectors: np.ndarray, sequence: int) -> None:
        """See `VectorIndex`."""
        self._put(numbers.tolist(), vectors, sequence)
        self._drop(gone[~np.isin(gone, numbers)].tolist())

    @_answered
    def change(self, upserts: Mapping[int, np.ndarray], deletions: Sequence[int], sequence: int) -> None:
        """See `VectorIndex`."""
        self._put(list(upserts), list(upserts.values()), sequence)
        self._drop(list(deletions))

    def _put(self, numbers: Sequence[int], vectors: Sequence[np.ndarray] | np.ndarray, sequence: int) -> None:
        for some in _pages(len(numbers), _ROWS_AT_ONCE):
            rows = [
                {"number": number, "sequence": sequence, "vector": vector.astype(np.float16).tolist()}
                for number, vector in zip(numbers[some], vectors[some], strict=True)
            ]
            self._ask(self._client.upsert, data=rows)

    def _drop(self, numbers: Sequence[int]) -> None:
        for some in _pages(len(numbers), _NAMED):
            self._ask(self._client.delete, ids=list(numbers[some]))

    @_answered
    def vectors(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """See `VectorIndex`."""
        wanted, known = list(numbers), dict[int, np.ndarray]()
        for some in _pages(len(wanted), _ROWS_AT_ONCE):
            found = self._ask(
                self._client.query, filter=_named(wanted[some]), output_fields=["number", "vector"]
            )
            known |= {row["number"]: np.array(row["vector"], np.float32) for row in found}
        at = [place for place, number in enumerate(wanted) if number in known]
        values = [known[wanted[place]] for place in at]
        return np.array(at, np.int64), np.array(values, np.float32).reshape(len(at), self.dimension)

    @_answered
    def search(self, queries: np.ndarray, limit: int, selection: Selection | None = None) -> list[Neighbours]:
        """See `VectorIndex`.

        Few permitted items are named to Milvus; of many, more are asked for until enough are permitted.
        """
        if not limit or not len(queries):
            return [best([], 0)] * len(queries)
        if selection is None:
            return [best([found], limit) for found in self._found(queries, limit + TIES)]
        permitted = selection.numbers[selection.mask]
        if len(permitted) > _NAMED:
            count = (limit + TIES) * len(selection.numbers) // len(permitted)
            while (count := 2 * count) <= _MOST_FOUND:
                found = self._found(queries, count)
                kept = [
                    (numbers[ok], scores[ok])
                    for numbers, scores in found
                    for ok in [selection.permits(numbers)]
                ]
                # Enough, or all there are.
                if all(
                    len(mine) >= limit + TIES or len(all_) < count
                    for (mine, _), (all_, _) in zip(kept, found, strict=True)
                ):
                    return [best([mine], limit) for mine in kept]
        pages = [
            self._found(queries, limit + TIES, _named(permitted[some].tolist()))
            for some in _pages(len(permitted), _NAMED)
        ]
        return [best([page[at] for page in pages], limit) for at in range(len(queries))]

    def _ask(self, call: Callable[..., Any], **what: Any) -> Any:
        """What Milvus answers; after a start of its own it may have to be told to load the collection."""
        try:
            return call(self._collection, timeout=_SOON, **what)
        except MilvusException as error:
            if error.code != _NOT_LOADED:
                raise
            self._client.load_collection(self._collection, timeout=_SECONDS)
            return call(self._collection, timeout=_SOON, **what)

    def _found(
        self, queries: np.ndarray, count: int, condition: str = ""
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        count = min(count, _MOST_FOUND)
        answers = self._ask(
            self._client.search,
            data=queries.astype(np.float32).tolist(),
            limit=count,
            filter=condition,
            anns_field="vector",
            output_fields=["number"],
            search_params={"metric_type": "IP", "params": {"ef": max(_LEAST_WIDTH, 2 * count)}},
        )
        return [_columns(answer) for answer in answers]

    def tidy(self, sequence: int) -> None:
        """Milvus compacts by itself."""

    def close(self) -> None:
        """The client is closed by whoever made it."""

    @_answered
    def __len__(self) -> int:
        counted = self._ask(self._client.query, filter="", output_fields=["count(*)"])
        return int(counted[0]["count(*)"])


def _columns(answer: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.fromiter((hit["number"] for hit in answer), np.int64),
        np.fromiter((hit["distance"] for hit in answer), np.float32),
    )


def _named(numbers: Sequence[int]) -> str:
    return f"number in {list(numbers)}"


def _pages(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))
