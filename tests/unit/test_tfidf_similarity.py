"""TF-IDF similarity of attributes and titles equals the written-out formula."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash, title_words
from services.ranking.features.tfidf_similarity import TfidfSimilarity
from services.ranking.state.event_columns import EventState
from services.ranking.state.item_stats import DAY, item_stats

NAMES = ("colour", "kind")
VALUES = st.lists(st.sampled_from(["red", "blue", "green", "big"]), unique=True, max_size=3)
ITEMS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=8)
Described = list[tuple[list[str], list[str]]]


def table_of(items: Described) -> ItemTable:
    table = ItemTable()
    for at, values in enumerate(items):
        attributes = [
            Attribute(name, tuple(texts)) for name, texts in zip(NAMES, values, strict=True) if texts
        ]
        table.apply([Change(item_hash(f"i{at}"), at + 1, Item(f"i{at}", attributes=tuple(attributes)))])
    return table


def written_out(items: Described, seeds: list[tuple[int, float]]) -> list[float]:
    words = [{(n, v) for n, texts in zip(NAMES, values, strict=True) for v in texts} for values in items]
    used = Counter(word for texts in words for word in texts)
    vectors = [{w: math.log(len(items) / used[w]) for w in texts} for texts in words]

    def cosine(a: dict[tuple[str, str], float], b: dict[tuple[str, str], float]) -> float:
        lengths = [math.sqrt(sum(x * x for x in v.values())) for v in (a, b)]
        return sum(a[w] * b[w] for w in a.keys() & b.keys()) / math.prod(lengths) if all(lengths) else 0.0

    total = sum(weight for _, weight in seeds)
    return [sum(weight * cosine(vectors[s], v) for s, weight in seeds) / total for v in vectors]


@given(
    ITEMS, st.lists(st.tuples(st.integers(0, 7), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=5)
)
@settings(deadline=None)
def test_similarity_is_the_weighted_mean_tfidf_cosine(
    items: Described, profile: list[tuple[int, float]]
) -> None:
    seeds = [(at % len(items), weight) for at, weight in profile]
    table = table_of(items)
    now = item_stats(EventState({"purchase": 1.0}), table, 30_000 * DAY)
    rows = np.array([row for row, _ in seeds]), np.array([weight for _, weight in seeds])
    similarity = TfidfSimilarity.of_attributes(table, NAMES).to(*rows, np.arange(len(items)), now)
    expected = np.array(written_out(items, seeds))
    is_known = ~np.isnan(similarity)
    np.testing.assert_allclose(similarity[is_known], expected[is_known], atol=1e-5)
    assert not expected[~is_known].any()  # what says nothing of itself is unknown, not unlike


@given(ITEMS, st.lists(st.integers(0, 7), min_size=1, max_size=5))
@settings(deadline=None)
def test_the_mean_of_the_cosines_is_the_similarity(items: Described, profile: list[int]) -> None:
    table = table_of(items)
    now = item_stats(EventState({"purchase": 1.0}), table, 30_000 * DAY)
    similarity, rows = TfidfSimilarity.of_attributes(table, NAMES), np.arange(len(items))
    seeds = np.array([at % len(items) for at in profile])
    each = similarity.each(seeds, rows, now)
    assert each.shape == (len(rows), len(seeds))
    mean = similarity.to(seeds, np.ones(len(seeds)), rows, now)
    np.testing.assert_allclose(each.mean(1), mean, atol=1e-5)
    assert similarity.each(seeds[:0], rows, now).shape == (len(rows), 0)


TITLES = {
    "Jade HW skinny, JADE!": ("jade", "hw", "skinny"),
    "V-neck 3-pack": ("v", "neck", "3", "pack"),
    "  ": (),
    "Große Öfen_2": ("grosse", "öfen", "2"),
    "红色连衣裙 XL": ("红色", "色连", "连衣", "衣裙", "xl"),
    "裙": ("裙",),
    "ＪＡＤＥ・ジーンズ": ("jade", "ジー", "ーン", "ンズ"),
    "किताब लाल": ("किताब", "लाल"),
    "cafe\u0301 İpek": ("café", "i̇pek"),
    "เสื้อ": ("เส", "สื", "ื้", "้อ"),
    "👗👠": (),
    "x" * 70 + " y": ("x" * 64, "y"),
}


@pytest.mark.parametrize("title", TITLES)
def test_titles_are_split_into_words(title: str) -> None:
    assert title_words(title) == TITLES[title]


@given(st.text(max_size=300))
def test_words_are_limited_and_unique(title: str) -> None:
    words = title_words(title)
    assert len(words) == len(set(words)) <= 24
    assert all(word and not any(c.isspace() for c in word) for word in words)


def test_without_items_or_attributes_similarity_is_unknown() -> None:
    table = table_of([(["red"], []), (["blue"], [])])
    now = item_stats(EventState({"purchase": 1.0}), table, 30_000 * DAY)
    nobody, both = np.empty(0, np.int64), np.arange(2)
    assert np.isnan(TfidfSimilarity.of_attributes(table, NAMES).to(nobody, np.empty(0), both, now)).all()
    assert np.isnan(TfidfSimilarity.of_attributes(table, ["weight"]).to(both, np.ones(2), both, now)).all()
