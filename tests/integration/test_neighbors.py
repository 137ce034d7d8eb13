"""A search by groups of items equals brute force while items are written, changed and deleted."""

import random
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.catalog.v1 import filter_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb

from services.catalog.filters import Equals, Filter
from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Item, item_hash
from services.catalog.query_vectors import QueryGroup
from services.embedding.catalog import neighbors
from services.embedding.catalog.neighbors import Neighbors
from services.embedding.catalog.search_view import SearchView
from services.embedding.index.segmented_index import SegmentedIndex
from tests.conftest import Clock
from tests.support.catalogs import (
    CatalogServer,
    ServedCatalog,
    catalog,
    catalog_server,
    encoders,
    item,
    upsert,
    violations,
)

__all__ = ["catalog", "catalog_server", "encoders"]  # fixtures

D = 40
Vectors = dict[int, np.ndarray]


def unit(vector: np.ndarray) -> np.ndarray:
    """At unit length: a vector of float16 has it up to rounding only."""
    return np.asarray(vector / np.linalg.norm(vector))


def vector(seed: int, *, exact: bool) -> np.ndarray:
    """Of unit length; the products of `exact` ones are multiples of 1/4, those of others are rounded."""
    if exact:
        values = np.zeros(D, np.float32)
        values[(seed + np.arange(4) * (1 + seed % 3)) % 12] = (0.5, 0.5, 0.5, -0.5 if seed % 2 else 0.5)
        return values
    # Of the even seeds many have the same vector.
    return (
        unit(np.random.default_rng(seed % 8 if seed % 2 == 0 else seed).standard_normal(D))
        .astype(np.float16)
        .astype(np.float32)
    )


def nearest(vectors: Vectors, query: np.ndarray, allowed: Collection[int], limit: int) -> list[int]:
    """The nearest allowed items, ties by item hash."""
    usable = sorted(set(vectors) & set(allowed))
    return sorted(usable, key=lambda n: (-round(float(vectors[n] @ query), 6), n))[:limit]


Write = tuple[int, int | None]
"""An item and the seed of its vector, None for a deletion."""
Search = tuple[list[int], int, str]
WRITES = st.lists(
    st.tuples(st.integers(1, 25), st.none() | st.integers(0, 1000)), max_size=9, unique_by=lambda w: w[0]
)
SEARCHES = st.tuples(
    st.lists(st.integers(1, 27), min_size=1, max_size=6),
    st.sampled_from([1, 2, 5, 40]),
    st.sampled_from(["all", "most", "few", "none"]),
)


@pytest.mark.parametrize("exact", [True, False])
@given(steps=st.lists(st.tuples(WRITES, st.lists(SEARCHES, max_size=3)), min_size=1, max_size=14))
@settings(deadline=None, max_examples=150)
def test_neighbors_equal_brute_force(steps: list[tuple[list[Write], list[Search]]], *, exact: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_SPARE", 3), ("_MAX_CHANGES", 7), ("_CAPACITY", 4)):
            patch.setattr(neighbors, name, value)
        index, table, vectors = SegmentedIndex(D), ItemTable(capacity=2), dict[int, np.ndarray]()
        by_item = Neighbors(index, table)
        for sequence, (writes, searches) in enumerate(steps, 1):
            upserts = {n: vector(seed, exact=exact) for n, seed in writes if seed is not None}
            deletions = [n for n, seed in writes if seed is None]
            table.apply(
                Change(n, sequence, None if seed is None else Item(f"i{n}", "t")) for n, seed in writes
            )
            index.change(upserts, deletions, sequence)
            by_item.note([n for n, _ in writes])
            vectors = {n: v for n, v in (vectors | upserts).items() if n not in deletions}
            for items, limit, kind in searches:
                check_neighbors(by_item, table, vectors, items, limit, kind, exact=exact)


def check_neighbors(
    by_item: Neighbors,
    table: ItemTable,
    vectors: Vectors,
    items: list[int],
    limit: int,
    kind: str,
    *,
    exact: bool,
) -> None:
    hashes = table.item_hashes
    mask = {
        "all": np.ones(len(hashes), bool),
        "most": hashes % 5 != 0,
        "few": hashes % 5 == 0,
        "none": np.zeros(len(hashes), bool),
    }[kind]
    allowed = hashes[mask].tolist()
    rows, scores, rest = by_item.search(items, limit, mask)
    answered = [n for n in items if n in vectors and n not in rest]
    assert len(rows) == len(scores) == len(answered)
    assert set(rest) <= set(items)
    if kind == "all":
        assert not rest  # enough neighbors of each are known
    for n, of_item, item_scores in zip(answered, rows, scores, strict=True):
        neighbors, query = hashes[of_item].tolist(), unit(vectors[n])
        expected = nearest(vectors, query, allowed, limit)
        assert len(set(neighbors)) == len(neighbors) == len(expected)
        assert set(neighbors) <= set(allowed) & set(vectors)
        np.testing.assert_allclose(item_scores, [vectors[m] @ query for m in neighbors], atol=1e-5)
        np.testing.assert_allclose(item_scores, [vectors[m] @ query for m in expected], atol=1e-5)
        # Of equal scores, up to rounding, the lower hash comes first.
        assert np.lexsort((neighbors, -item_scores)).tolist() == list(range(len(neighbors)))
        if exact:
            assert neighbors == expected


def test_equal_items_come_by_hash_when_some_were_written_again() -> None:
    """The score of a written item is computed otherwise, and may differ from equal ones in the last bit."""
    checked = 0
    for seed in range(1, 60, 2):
        index, table = SegmentedIndex(D), ItemTable()
        query, equal = vector(seed, exact=False), vector(seed + 100, exact=False)
        millionths = float(equal @ unit(query)) * 1e6
        if abs(millionths - round(millionths)) > 0.3:
            continue  # the last bit may decide how it is rounded
        checked += 1
        upserts = {1: query} | dict.fromkeys(range(2, 42), equal)
        table.apply(Change(n, 1, Item(f"i{n}", "t")) for n in upserts)
        index.change(upserts, [], 1)
        by_item, every = Neighbors(index, table), np.ones(len(upserts), bool)
        assert by_item.search([1], 20, every)[2] == []
        again = dict.fromkeys(range(3, 40, 4), equal)
        index.change(again, [], 2)
        by_item.note(list(again))
        [rows], [scores], _ = by_item.search([1], 41, every)
        assert table.item_hashes[rows].tolist() == [1, *range(2, 42)]
        np.testing.assert_allclose(scores[1:], equal @ unit(query), atol=1e-5)
    assert checked > 9


COLORS = ("red", "blue", "green")
AVAILABLE = timedelta(hours=1)


def random_message(number: int, rng: random.Random, now: datetime) -> item_pb2.Item:
    """An item of any color, some of which is not available yet, or no longer."""
    title = f"{rng.choice('abcdefgh')} {rng.randrange(10**6)}"
    message = item(f"i{number}", title)
    message.attributes.add(name="color", texts=[rng.choice(COLORS)])
    kind = rng.random()
    if kind < 0.2:
        message.available_from.FromDatetime(now + AVAILABLE)
    elif kind < 0.4:
        message.available_until.FromDatetime(now - AVAILABLE)
    return message


def is_available(message: item_pb2.Item, at: datetime) -> bool:
    time = Timestamp()
    time.FromDatetime(at)
    start, end = message.available_from, message.available_until
    return (not message.HasField("available_from") or start.ToNanoseconds() <= time.ToNanoseconds()) and (
        not message.HasField("available_until") or time.ToNanoseconds() < end.ToNanoseconds()
    )


class Shop:
    """The items of a catalog as plain messages, and the brute-force search over them."""

    def __init__(self, view: SearchView) -> None:
        self.view, self.items = view, dict[int, item_pb2.Item]()

    def vectors(self) -> Vectors:
        hashes = list(self.items)
        places, vectors = self.view.spaces["text"].vectors(hashes)
        assert len(places) == len(hashes)
        return dict(zip(hashes, vectors, strict=True))

    def allowed(self, color: str | None, excluded: Collection[int], as_of: datetime | None) -> set[int]:
        return {
            n
            for n, message in self.items.items()
            if n not in excluded
            and (color is None or color in message.attributes[0].texts)
            and (as_of is None or is_available(message, as_of))
        }

    def search(self, groups: Sequence[QueryGroup], limit: int, allowed: Collection[int]) -> dict[int, float]:
        """The `limit` nearest items of each group, with the best score of any group that finds them."""
        vectors, best = self.vectors(), dict[int, float]()
        for group in groups:
            weights = group.weights or [1.0] * len(group.item_hashes)
            members = [
                (vectors[n], w) for n, w in zip(group.item_hashes, weights, strict=True) if n in vectors
            ]
            if not members:
                continue
            mean = np.sum([w * v for v, w in members], axis=0)
            query = unit(mean)
            for n in nearest(vectors, query, allowed, limit):
                best[n] = max(best.get(n, -np.inf), float(vectors[n] @ query))
        return best


def random_groups(known: Sequence[int], rng: random.Random) -> list[QueryGroup]:
    """Groups of one item and of several, some of which no catalog has."""
    every = [*known, item_hash("unknown"), item_hash("deleted")]
    groups = [QueryGroup([rng.choice(every)]) for _ in range(rng.randrange(5))]
    groups.append(QueryGroup(rng.sample(every, 1), [rng.choice([0.5, 3.0])]))
    for _ in range(rng.randrange(2)):
        members = rng.sample(every, min(4, len(every)))
        groups.append(QueryGroup(members, [rng.choice([0.25, 1.0, 2.0]) for _ in members]))
    return groups


@pytest.mark.parametrize("seed", range(3))
async def test_a_search_by_groups_equals_brute_force_between_writes(
    catalog: ServedCatalog, clock: Clock, seed: int
) -> None:
    rng, shop, now = random.Random(seed), Shop(catalog.writer.view), clock.now
    view, sizes = catalog.writer.view, set[int]()
    for step in range(25):
        changed = [
            random_message(n, rng, now) for n in rng.sample(range(200), rng.randrange(1, 5) if step else 90)
        ]
        await upsert(catalog.stub, *changed)
        shop.items |= {item_hash(message.id): message for message in changed}
        if step and rng.random() < 0.5:
            deleted = rng.sample(list(shop.items), 2)
            ids = [shop.items.pop(n).id for n in deleted]
            await catalog.stub.DeleteItems(pb.DeleteItemsRequest(item_ids=ids))
        for _ in range(3):
            groups = random_groups(list(shop.items), rng)
            limit = rng.choice([1, 7, 30, 300])
            color = rng.choice([None, None, *COLORS])
            condition: Filter | None = Equals("color", color) if color else None
            excluded = rng.sample(list(shop.items), rng.choice([0, 5, len(shop.items) - 3, len(shop.items)]))
            as_of = rng.choice([None, now, now + AVAILABLE, now - AVAILABLE])
            hits = (await view.search_groups(groups, ["text"], limit, condition, excluded, as_of))["text"]
            expected = shop.search(groups, limit, shop.allowed(color, excluded, as_of))
            score_of = dict(zip(hits.hashes.tolist(), hits.scores.tolist(), strict=True))
            assert score_of == pytest.approx(expected, abs=1e-5)
            assert len(hits.hashes) == len(score_of)
            assert (np.diff(hits.scores) <= 1e-6).all()
            sizes.add(len(score_of))
    assert 0 in sizes
    assert len(sizes) > 10


def search_request(groups: Sequence[QueryGroup], limit: int, *, merge: bool) -> pb.SearchRequest:
    return pb.SearchRequest(
        groups=[pb.QueryGroup(item_hashes=g.item_hashes, weights=g.weights) for g in groups],
        limit=limit,
        merge_groups=merge,
    )


async def test_merged_hits_have_the_best_score_of_the_separate_ones(
    catalog: ServedCatalog, clock: Clock
) -> None:
    rng, shop = random.Random(5), Shop(catalog.writer.view)
    messages = [random_message(n, rng, clock.now) for n in range(60)]
    await upsert(catalog.stub, *messages)
    known = [item_hash(message.id) for message in messages]
    shop.items = dict(zip(known, messages, strict=True))
    for step in range(30):
        groups = random_groups(known, rng)
        if step % 3 == 2:  # away from an item
            groups.append(QueryGroup(rng.sample(known, 1), [-1.0]))
        separate, merged = (
            search_request(groups, rng.choice([3, 20, 100]) if step % 2 else 10, merge=merge)
            for merge in (False, True)
        )
        merged.limit = separate.limit
        for request in (separate, merged):
            if step % 5 == 3:
                request.filter.CopyFrom(
                    filter_pb2.Filter(equals=filter_pb2.Equals(attribute="color", text="red"))
                )
            if step % 5 == 4:
                request.as_of.FromDatetime(clock.now)
            request.exclude_item_hashes.extend(known[: step * 2])
        best: dict[tuple[int, int], float] = {}
        for result in (await catalog.stub.Search(separate)).results:
            for n, score in zip(result.item_hashes, result.scores, strict=True):
                best[result.space, n] = max(score, best.get((result.space, n), -np.inf))
        response = await catalog.stub.Search(merged)
        assert len({result.space for result in response.results}) == len(response.results)
        found = {
            (result.space, n): score
            for result in response.results
            for n, score in zip(result.item_hashes, result.scores, strict=True)
        }
        assert found == pytest.approx(best, abs=1e-5)
        assert {result.query for result in response.results} == {0}


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("merge_groups", {"text": "a"}),
        ("merge_groups", {"image": b"a"}),
        ("groups", {"groups": []}),
        ("groups[0].weights", {"groups": [pb.QueryGroup(item_ids=["a"], weights=[1.0, 2.0])]}),
    ],
)
async def test_a_merged_search_needs_groups_only(
    catalog: ServedCatalog, field: str, more: dict[str, object]
) -> None:
    request = pb.SearchRequest(
        **({"groups": [pb.QueryGroup(item_ids=["a"])], "limit": 3, "merge_groups": True} | more)  # type: ignore[arg-type]
    )
    _, fields = await violations(catalog.stub.Search(request))
    assert fields == [field]


async def test_a_catalog_without_items_has_no_hits(catalog: ServedCatalog) -> None:
    response = await catalog.stub.Search(search_request([QueryGroup([5])], 3, merge=True))
    assert [list(result.item_hashes) for result in response.results] == [[]] * len(response.results)


async def test_neighbors_are_found_again_after_a_restart(catalog_server: CatalogServer, clock: Clock) -> None:
    rng = random.Random(9)
    messages = [random_message(n, rng, clock.now) for n in range(20)]
    request = search_request([QueryGroup([item_hash("i3")])], 5, merge=True)
    async with catalog_server.serve() as catalog:
        await upsert(catalog.stub, *messages)
        before = await catalog.stub.Search(request)
    async with catalog_server.serve() as catalog:
        after = await catalog.stub.Search(request)
    assert [list(r.item_hashes) for r in before.results] == [list(r.item_hashes) for r in after.results]
    assert len(before.results[-1].item_hashes) == 5
