"""What every `VectorIndex` owes, held against brute force: FAISS in this process, and Milvus."""

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

from services.embedding import milvus
from services.embedding.index import Places, Selection, VectorIndex
from services.embedding.milvus import MilvusIndex, connect
from services.embedding.numbered import Numbered
from services.embedding.on_device import DeviceBuilder
from services.embedding.segmented import Keep, SegmentedIndex
from services.errors import Unavailable
from services.wiring import App
from tests.catalogues import item, nearest, served, upsert
from tests.milvuses import Milvus, a_milvus
from tests.shops import make_bundle

D = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Milvus]:
    with a_milvus(tmp_path_factory.mktemp("milvus")) as milvus:
        yield milvus


@pytest.fixture(params=["segmented", "device", "milvus"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], VectorIndex]]:
    """Opens the index of a store: a second one of the same name finds what the first left."""
    if request.param == "segmented":
        yield lambda store: SegmentedIndex(D, keep=Keep(tmp_path / store, store))
        return
    if request.param == "device":  # a GPU's way of searching, by whatever device there is
        device = DeviceBuilder("cuda" if torch.cuda.is_available() else "cpu")
        yield lambda store: SegmentedIndex(D, 5, device)
        return
    client = connect(request.getfixturevalue("server").address)
    yield lambda store: MilvusIndex(client, store, "text", "digest", D)
    client.close()


def vector(seed: int) -> np.ndarray:
    """Of unit length, in steps that float16 holds."""
    values = np.random.default_rng(seed).standard_normal(D)
    unit: np.ndarray = (values / np.linalg.norm(values)).astype(np.float16).astype(np.float32)
    return unit


def select(allowed: set[int], known: Sequence[int], places: Places) -> Selection:
    """Of a table whose rows are all numbers that were ever known, in the order they came."""
    numbers = np.array(known, np.int64)
    return Selection(numbers, np.isin(numbers, list(allowed)), Numbered(numbers).rows, places)


def brute(known: dict[int, np.ndarray], query: np.ndarray, limit: int) -> list[int]:
    return sorted(known, key=lambda n: (-round(float(known[n] @ query), 6), n))[:limit]


def opened(index: VectorIndex, known: dict[int, np.ndarray], written: dict[int, int], sequence: int) -> None:
    """Open an index and let it hold `known`, each item `written` by a change, as a view does."""
    held = index.open()
    sure = {
        n
        for n, s in zip(held.numbers.tolist(), held.sequences.tolist(), strict=True)
        if written.get(n, s + 1) <= s
    }
    missing = [n for n in known if n not in sure]
    gone = np.array([n for n in held.numbers.tolist() if n not in sure or n not in known], np.int64)
    vectors = np.array([known[n] for n in missing], np.float16).reshape(-1, D)
    index.hold(gone, np.array(missing, np.int64), vectors, sequence)


names = map("store{}".format, itertools.count())
steps = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 30), st.integers(0, 10_000)), max_size=8),
        st.lists(st.integers(1, 30)),
        st.sampled_from(["", "", "tidy", "again", "lost"]),
    ),
    max_size=6,
)


@given(steps=steps, query=st.integers(0, 99), allowed=st.none() | st.sets(st.integers(1, 40)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_search_equals_brute_force_after_any_changes_and_starts(
    make: Callable[[str], VectorIndex],
    steps: Sequence[tuple[list[tuple[int, int]], list[int], str]],
    query: int,
    allowed: set[int] | None,
) -> None:
    store = next(names)
    index, known = make(store), dict[int, np.ndarray]()
    written, places, sequence = dict[int, int](), Places(), 0
    opened(index, known, written, sequence)
    for upserts, deletions, then in steps:
        sequence += 1
        changed = {n: vector(seed) for n, seed in upserts}
        gone = [n for n in deletions if n not in changed]
        if then != "lost":  # else the index dies before it hears of the change, which SQL has
            index.change(changed, gone, sequence)
        known = {n: v for n, v in (known | changed).items() if n not in gone}
        written |= dict.fromkeys([*changed, *gone], sequence)
        if then == "tidy":
            index.tidy(sequence)
        elif then:
            index.close()
            index = make(store)
            opened(index, known, written, sequence)
        selection = None if allowed is None else select(allowed, [*range(1, 31)], places)
        found, _ = index.search(np.stack([vector(query), vector(query + 1)]), 7, selection)
        qualified = {n: v for n, v in known.items() if allowed is None or n in allowed}
        assert found.numbers.tolist() == brute(qualified, vector(query), 7)
        np.testing.assert_allclose(
            found.scores, [known[n] @ vector(query) for n in found.numbers.tolist()], atol=1e-5
        )
        assert len(index) == len(known)
        at, vectors = index.vectors([999, *known])
        assert at.tolist() == list(range(1, len(known) + 1))
        np.testing.assert_array_equal(vectors, np.array(list(known.values())).reshape(-1, D))


@pytest.mark.parametrize("share", [1, 0.5, 0.1, 0.01, 0.001])
def test_the_nearest_are_found_however_few_qualify(
    make: Callable[[str], VectorIndex], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "_NAMED", 300)
    random = np.random.default_rng(0)
    centres = random.standard_normal((50, D))
    many = centres[random.integers(0, 50, 6000)] + 0.5 * random.standard_normal((6000, D))
    unit = (many / np.linalg.norm(many, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    numbers, queries = random.permutation(6000) + 2**62, unit[:20]
    index = make("clustered")
    opened(index, dict(zip(numbers.tolist(), unit, strict=True)), dict.fromkeys(numbers.tolist(), 1), 1)
    index.tidy(1)
    mask = random.random(6000) < share
    found = index.search(queries, 30, Selection(numbers, mask, Numbered(numbers).rows, Places()))
    recall = []
    for near, query in zip(found, queries, strict=True):
        exact = numbers[mask][np.argsort(-(unit[mask] @ query), kind="stable")[:30]]
        assert len(near.numbers) == min(30, mask.sum())
        assert np.isin(near.numbers, numbers[mask]).all()
        assert (np.diff(near.scores) <= 1e-6).all()
        recall.append(np.isin(exact, near.numbers).mean() if len(exact) else 1)
    assert np.mean(recall) >= 0.98


def test_of_equal_items_the_same_ones_are_found(make: Callable[[str], VectorIndex]) -> None:
    index = make("equal")
    opened(index, {n: vector(n % 3) for n in range(1, 40)}, dict.fromkeys(range(1, 40), 1), 1)
    [found] = index.search(vector(0)[None], 5)
    assert found.numbers.tolist() == [3, 6, 9, 12, 15]
    assert index.search(np.empty((0, D), np.float32), 5) == []


def test_a_milvus_that_is_away_is_said_so_and_forgets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_milvus(tmp_path) as server:
        client = connect(server.address)
        index, known = MilvusIndex(client, "s", "text", "d", D), {n: vector(n) for n in range(50)}
        opened(index, known, dict.fromkeys(known, 1), 1)
        server.kill()
        monkeypatch.setattr(milvus, "_SECONDS", 1.0)
        with pytest.raises(Unavailable, match="Milvus"):
            index.search(vector(3)[None], 5)
        with pytest.raises(Unavailable, match="Milvus"):
            index.change({3: vector(77)}, [4], 2)
        monkeypatch.setattr(milvus, "_SECONDS", 0.1)
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
        known = {n: v for n, v in (known | {3: vector(77)}).items() if n != 4}
        [found] = index.search(vector(77)[None], 50)
        assert found.numbers.tolist() == brute(known, vector(77), 50)
        client.close()


def test_writes_are_acknowledged_while_milvus_is_away_and_found_once_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path)
    monkeypatch.setattr(milvus, "_SOON", 1.0)
    with a_milvus(tmp_path / "milvus") as server:

        async def away(app: App, stub: Any, health: Any) -> None:
            await upsert(stub, item("early", "zebra"))
            assert await nearest(stub, "zebra") == "early"
            server.kill()
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await nearest(stub, "zebra")
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
            feed = stub.WatchItems(pb.WatchItemsRequest())
            while not (await feed.read()).caught_up:
                pass
            [outcome] = await upsert(stub, item("late", "walrus"))
            assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_CREATED
            assert [record.item.id for record in (await feed.read()).items] == ["late"]
            server.start()
            while app.now.view.sequence < outcome.sequence:
                await asyncio.sleep(0.05)
            assert await nearest(stub, "walrus") == "late"
            server.hang()
            [outcome] = await upsert(stub, item("hung", "okapi"))
            assert outcome.code == item_pb2.ITEM_OUTCOME_CODE_CREATED
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await nearest(stub, "zebra")
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
            server.kill()
            # The process ends before Milvus hears of these.
            await upsert(stub, item("later", "heron"), item("early", "gnu"))

        async def after(app: App, stub: Any, health: Any) -> None:
            for word, there in {"gnu": "early", "walrus": "late", "heron": "later", "okapi": "hung"}.items():
                assert await nearest(stub, word) == there

        served(tmp_path, away, milvus=server.address)
        with monkeypatch.context() as patch, pytest.raises(Unavailable, match="Milvus"):
            patch.setattr(milvus, "_SECONDS", 1.0)
            served(tmp_path, after, milvus=server.address)
        server.start()
        served(tmp_path, after, milvus=server.address)


@pytest.mark.parametrize("count", [1, 64 * 164 - 1, 64 * 164, 20_001])
def test_a_device_finds_what_brute_force_does_whatever_share_qualifies(count: int) -> None:
    random = np.random.default_rng(count)
    drawn = random.standard_normal((count, D))
    vectors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    segment = DeviceBuilder(device)(np.arange(count), vectors)
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
