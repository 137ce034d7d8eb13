"""Every `VectorIndex` equals brute force: FAISS and torch in the process, and Milvus."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.core.errors import Unavailable
from services.embedding.index import milvus
from services.embedding.index.gpu_flat import GpuBuilder
from services.embedding.index.id_map import IdMap
from services.embedding.index.milvus import MilvusIndex, connect
from services.embedding.index.vector_index import PositionCache, Selection, VectorIndex
from tests.support.catalogs import item, nearest, serve_app, upsert
from tests.support.index_backends import IN_PROCESS, make_index
from tests.support.milvus_server import Milvus, running_milvus
from tests.support.shops import make_bundle

D = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Milvus]:
    with running_milvus(tmp_path_factory.mktemp("milvus")) as milvus:
        yield milvus


@pytest.fixture(params=[*IN_PROCESS, "milvus"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], VectorIndex]]:
    """Opens the index of a store: a second one of the same name finds what the first left."""
    if request.param in IN_PROCESS:
        yield lambda store: make_index(request.param, D, tmp_path, store)
        return
    client = connect(request.getfixturevalue("server").address)
    yield lambda store: MilvusIndex(client, store, "text", "digest", D)
    client.close()


def vector(seed: int) -> np.ndarray:
    """Of unit length, in steps that float16 holds."""
    values = np.random.default_rng(seed).standard_normal(D)
    unit: np.ndarray = (values / np.linalg.norm(values)).astype(np.float16).astype(np.float32)
    return unit


def select(eligible: set[int], hashes: Sequence[int], places: PositionCache) -> Selection:
    """Of a table whose rows are all numbers that were ever known, in the order they came."""
    numbers = np.array(hashes, np.int64)
    return Selection(numbers, np.isin(numbers, list(eligible)), IdMap(numbers).rows, places)


def brute(vectors: dict[int, np.ndarray], query: np.ndarray, limit: int) -> list[int]:
    return sorted(vectors, key=lambda n: (-round(float(vectors[n] @ query), 6), n))[:limit]


def open_index(
    index: VectorIndex, rows: dict[int, np.ndarray], sequences: dict[int, int], sequence: int
) -> None:
    """Open an index and let it hold `known`, each item `written` by a change, as a view does."""
    stored = index.open()
    sure = {
        n
        for n, s in zip(stored.hashes.tolist(), stored.sequences.tolist(), strict=True)
        if sequences.get(n, s + 1) <= s
    }
    missing = [n for n in rows if n not in sure]
    stale = np.array([n for n in stored.hashes.tolist() if n not in sure or n not in rows], np.int64)
    vectors = np.array([rows[n] for n in missing], np.float16).reshape(-1, D)
    index.reconcile(stale, np.array(missing, np.int64), vectors, sequence)


names = map("store{}".format, itertools.count())
steps = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 30), st.integers(0, 10_000)), max_size=8),
        st.lists(st.integers(1, 30)),
        st.sampled_from(["", "", "tidy", "again", "lost"]),
    ),
    max_size=6,
)


@given(steps=steps, query=st.integers(0, 99), eligible=st.none() | st.sets(st.integers(1, 40)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_search_equals_brute_force_after_any_changes_and_starts(
    make: Callable[[str], VectorIndex],
    steps: Sequence[tuple[list[tuple[int, int]], list[int], str]],
    query: int,
    eligible: set[int] | None,
) -> None:
    store = next(names)
    index, rows = make(store), dict[int, np.ndarray]()
    sequences, places, sequence = dict[int, int](), PositionCache(), 0
    open_index(index, rows, sequences, sequence)
    for upserts, deletions, then in steps:
        sequence += 1
        changes = {n: vector(seed) for n, seed in upserts}
        removals = [n for n in deletions if n not in changes]
        if then != "lost":  # else the index dies before it hears of the change, which SQL has
            index.change(changes, removals, sequence)
        rows = {n: v for n, v in (rows | changes).items() if n not in removals}
        sequences |= dict.fromkeys([*changes, *removals], sequence)
        if then == "tidy":
            index.maintain(sequence)
        elif then:
            index.close()
            index = make(store)
            open_index(index, rows, sequences, sequence)
        selection = None if eligible is None else select(eligible, [*range(1, 31)], places)
        hits, _ = index.search(np.stack([vector(query), vector(query + 1)]), 7, selection)
        candidates = {n: v for n, v in rows.items() if eligible is None or n in eligible}
        assert hits.hashes.tolist() == brute(candidates, vector(query), 7)
        np.testing.assert_allclose(
            hits.scores, [rows[n] @ vector(query) for n in hits.hashes.tolist()], atol=1e-5
        )
        assert len(index) == len(rows)
        at, vectors = index.vectors([999, *rows])
        assert at.tolist() == list(range(1, len(rows) + 1))
        np.testing.assert_array_equal(vectors, np.array(list(rows.values())).reshape(-1, D))


@pytest.mark.parametrize("share", [1, 0.5, 0.1, 0.01, 0.001])
def test_the_nearest_are_found_under_any_filter(
    make: Callable[[str], VectorIndex], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "_FILTER_ITEMS", 300)
    random = np.random.default_rng(0)
    centers = random.standard_normal((50, D))
    many = centers[random.integers(0, 50, 6000)] + 0.5 * random.standard_normal((6000, D))
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    numbers, queries = random.permutation(6000) + 2**62, unit[:20]
    index = make("clustered")
    open_index(index, dict(zip(numbers.tolist(), unit, strict=True)), dict.fromkeys(numbers.tolist(), 1), 1)
    index.maintain(1)
    mask = random.random(6000) < share
    hits = index.search(queries, 30, Selection(numbers, mask, IdMap(numbers).rows, PositionCache()))
    recall = []
    for near, query in zip(hits, queries, strict=True):
        exact = numbers[mask][np.argsort(-(unit[mask] @ query), kind="stable")[:30]]
        assert len(near.hashes) == min(30, mask.sum())
        assert np.isin(near.hashes, numbers[mask]).all()
        assert (np.diff(near.scores) <= 1e-6).all()
        recall.append(np.isin(exact, near.hashes).mean() if len(exact) else 1)
    assert np.mean(recall) >= 0.98


def test_ties_are_broken_alike(make: Callable[[str], VectorIndex]) -> None:
    index = make("equal")
    open_index(index, {n: vector(n % 3) for n in range(1, 40)}, dict.fromkeys(range(1, 40), 1), 1)
    [hits] = index.search(vector(0)[None], 5)
    assert hits.hashes.tolist() == [3, 6, 9, 12, 15]
    assert index.search(np.empty((0, D), np.float32), 5) == []


def clustered(count: int, seed: int) -> np.ndarray:
    """Unit vectors float32 (count, D) around centers, in steps that float16 holds."""
    random = np.random.default_rng(seed)
    drawn = np.random.default_rng(0).standard_normal((50, D))[random.integers(0, 50, count)]
    drawn += 0.5 * random.standard_normal((count, D))
    unit: np.ndarray = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)
    return unit.astype(np.float32)


def filled(index: VectorIndex, known: dict[int, np.ndarray]) -> VectorIndex:
    open_index(index, known, dict.fromkeys(known, 1), 1)
    index.maintain(1)
    return index


def scores_of(known: dict[int, np.ndarray], query: np.ndarray, limit: int) -> np.ndarray:
    """The best scores, descending: those of the exact hits, whatever the order of ties."""
    scores: np.ndarray = -np.sort([-float(vector @ query) for vector in known.values()])[:limit]
    return scores


def check(index: VectorIndex, known: dict[int, np.ndarray], selection: Selection | None = None) -> None:
    """Any number of hits, up to more than there are, has the scores of an exact scan."""
    queries = clustered(5, 9)
    for limit in (1, 20, len(known) + 300):
        for query, hits in zip(queries, index.search(queries, limit, selection), strict=True):
            assert len(hits.hashes) == len(set(hits.hashes.tolist())) == min(limit, len(known))
            assert set(hits.hashes.tolist()) <= known.keys()
            exact = scores_of(known, query, limit)
            near = np.isclose(hits.scores, exact, atol=1e-5)
            assert not len(near) or near.mean() >= 0.95  # an approximate index may miss some
            for number, score in zip(hits.hashes.tolist()[:3], hits.scores, strict=False):
                assert score == pytest.approx(float(known[number] @ query), abs=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3, 1500])
def test_an_index_of_any_size_is_saved_and_changed(make: Callable[[str], VectorIndex], count: int) -> None:
    store = next(names)
    known = dict(enumerate(clustered(count, 1), start=1))
    check(filled(make(store), known), known)
    index = make(store)
    open_index(index, known, dict.fromkeys(known, 1), 1)
    check(index, known)
    index.maintain(1)
    changed = dict(enumerate(clustered(count // 10 + 1, 2), start=count - count // 20 + 1))
    gone = list(range(1, count // 10 + 1))
    index.change(changed, gone, 2)
    known = {number: value for number, value in (known | changed).items() if number not in gone}
    check(index, known)
    assert len(index) == len(known)
    index.maintain(2)
    check(index, known)
    assert index.recall is None or index.recall > 0.97
    index.close()


def test_filters_that_pass_all_some_or_none(make: Callable[[str], VectorIndex]) -> None:
    known = dict(enumerate(clustered(1500, 1)))
    index, numbers = filled(make(next(names)), known), np.arange(1500)
    queries = clustered(5, 9)
    every = select(set(known), numbers.tolist(), PositionCache())
    for plain, all_passed in zip(index.search(queries, 20), index.search(queries, 20, every), strict=True):
        np.testing.assert_allclose(plain.scores, all_passed.scores, atol=1e-5)
    for allowed in (set[int](), {7}, set(range(40)), set(range(0, 1500, 3))):
        selection = select(allowed, numbers.tolist(), PositionCache())
        check(index, {number: known[number] for number in allowed}, selection)
    [hits] = index.search(queries[:1], 0)
    assert not len(hits.hashes)
    index.close()


def test_duplicates_of_a_vector_are_found_once_each(make: Callable[[str], VectorIndex]) -> None:
    known = dict(enumerate(clustered(10, 1)[np.arange(1500) % 10]))
    index = filled(make(next(names)), known)
    [hits] = index.search(known[3][None], 150)
    assert hits.hashes.tolist() == list(range(3, 1500, 10))
    index.close()


def test_an_unavailable_milvus_is_reported_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_milvus(tmp_path) as server:
        client = connect(server.address)
        index, vectors = MilvusIndex(client, "s", "text", "d", D), {n: vector(n) for n in range(50)}
        open_index(index, vectors, dict.fromkeys(vectors, 1), 1)
        server.kill()
        monkeypatch.setattr(milvus, "_TIMEOUT_SECONDS", 1.0)
        with pytest.raises(Unavailable, match="Milvus"):
            index.search(vector(3)[None], 5)
        with pytest.raises(Unavailable, match="Milvus"):
            index.change({3: vector(77)}, [4], 2)
        monkeypatch.setattr(milvus, "_TIMEOUT_SECONDS", 0.1)
        with pytest.raises(Unavailable):
            connect("http://127.0.0.1:1")
        monkeypatch.undo()
        server.start()
        for attempt in range(100):  # gRPC waits a while before it knocks again
            try:
                index.change({3: vector(77)}, [4], 2)
                break
            except Unavailable:
                assert attempt < 99
                time.sleep(0.2)
        vectors = {n: v for n, v in (vectors | {3: vector(77)}).items() if n != 4}
        [hits] = index.search(vector(77)[None], 50)
        assert hits.hashes.tolist() == brute(vectors, vector(77), 50)
        client.close()


async def test_writes_during_a_milvus_outage_are_found_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path)
    monkeypatch.setattr(milvus, "_CALL_TIMEOUT_SECONDS", 1.0)
    with running_milvus(tmp_path / "milvus") as server:
        async with serve_app(tmp_path, milvus=server.address) as (app, stub, _):
            await upsert(stub, item("early", "zebra"))
            assert await nearest(stub, "zebra") == "early"
            server.kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await nearest(stub, "zebra")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            feed: Any = stub.WatchItems(pb.WatchItemsRequest())
            while not (await feed.read()).caught_up:
                pass
            [outcome] = await upsert(stub, item("late", "walrus"))
            assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_CREATED
            assert [record.item.id for record in (await feed.read()).items] == ["late"]
            server.start()
            while app.current.view.sequence < outcome.sequence:
                await asyncio.sleep(0.05)
            assert await nearest(stub, "walrus") == "late"
            server.hang()
            [outcome] = await upsert(stub, item("hung", "okapi"))
            assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_CREATED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await nearest(stub, "zebra")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            server.kill()
            # The process ends before Milvus hears of these.
            await upsert(stub, item("later", "heron"), item("early", "gnu"))
        with monkeypatch.context() as patch, pytest.raises(Unavailable, match="Milvus"):
            patch.setattr(milvus, "_TIMEOUT_SECONDS", 1.0)
            async with serve_app(tmp_path, milvus=server.address):
                raise AssertionError("it started without Milvus")
        server.start()
        async with serve_app(tmp_path, milvus=server.address) as (_, stub, _):
            for word, item_id in {
                "gnu": "early",
                "walrus": "late",
                "heron": "later",
                "okapi": "hung",
            }.items():
                assert await nearest(stub, word) == item_id


@pytest.mark.parametrize("count", [1, 64 * 164 - 1, 64 * 164, 20_001])
def test_a_device_equals_brute_force_under_any_filter(count: int) -> None:
    random = np.random.default_rng(count)
    normals = random.standard_normal((count, D))
    vectors = (normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    segment = GpuBuilder(device)(np.arange(count), vectors)
    queries = vectors[:7].astype(np.float32)
    for share in (1, 0.9, 0.3, 0.04, 0.001):
        live = random.random(count) < share
        live[0] = True
        exact = np.where(live, queries @ vectors.astype(np.float32).T, -np.inf)
        scores, rows, _ = segment.search(queries, 100, live)
        many = min(100, int(live.sum()))
        assert rows.shape == scores.shape == (len(queries), many)
        assert live[rows].all()
        assert all(len(set(row)) == many for row in rows.tolist())
        np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), atol=1e-5)
        best = -np.sort(-exact, axis=1)[:, :many]
        np.testing.assert_allclose(scores, best, atol=1e-5)
