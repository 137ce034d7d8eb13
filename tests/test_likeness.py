"""Likeness by attributes and titles against TF-IDF written out."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog import Attribute, Item, item_number, title_words
from services.item_table import Change, ItemTable
from services.ranking.likeness import Likeness
from services.ranking.moment import DAY, moment
from services.ranking.state import BehaviourState

NAMES = ("colour", "kind")
VALUES = st.lists(st.sampled_from(["red", "blue", "green", "big"]), unique=True, max_size=3)
ITEMS = st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=8)
Described = list[tuple[list[str], list[str]]]


def table_of(items: Described) -> ItemTable:
    table = ItemTable()
    for at, values in enumerate(items):
        held = [Attribute(name, tuple(mine)) for name, mine in zip(NAMES, values, strict=True) if mine]
        table.apply([Change(item_number(f"i{at}"), at + 1, Item(f"i{at}", attributes=tuple(held)))])
    return table


def written_out(items: Described, seeds: list[tuple[int, float]]) -> list[float]:
    words = [{(n, v) for n, mine in zip(NAMES, values, strict=True) for v in mine} for values in items]
    used = Counter(word for mine in words for word in mine)
    vectors = [{w: math.log(len(items) / used[w]) for w in mine} for mine in words]

    def cosine(a: dict[tuple[str, str], float], b: dict[tuple[str, str], float]) -> float:
        lengths = [math.sqrt(sum(x * x for x in v.values())) for v in (a, b)]
        return sum(a[w] * b[w] for w in a.keys() & b.keys()) / math.prod(lengths) if all(lengths) else 0.0

    total = sum(weight for _, weight in seeds)
    return [sum(weight * cosine(vectors[s], v) for s, weight in seeds) / total for v in vectors]


@given(
    ITEMS, st.lists(st.tuples(st.integers(0, 7), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=5)
)
@settings(deadline=None)
def test_likeness_is_the_mean_cosine_of_tf_idf(items: Described, drawn: list[tuple[int, float]]) -> None:
    seeds = [(at % len(items), weight) for at, weight in drawn]
    table = table_of(items)
    now = moment(BehaviourState({"purchase": 1.0}), table, 30_000 * DAY)
    rows = np.array([row for row, _ in seeds]), np.array([weight for _, weight in seeds])
    found = Likeness.of_attributes(table, NAMES).to(*rows, np.arange(len(items)), now)
    expected = np.array(written_out(items, seeds))
    known = ~np.isnan(found)
    np.testing.assert_allclose(found[known], expected[known], atol=1e-5)
    assert not expected[~known].any()  # what says nothing of itself is unknown, not unlike


@given(ITEMS, st.lists(st.integers(0, 7), min_size=1, max_size=5))
@settings(deadline=None)
def test_the_cosine_to_each_makes_up_the_mean(items: Described, drawn: list[int]) -> None:
    table = table_of(items)
    now = moment(BehaviourState({"purchase": 1.0}), table, 30_000 * DAY)
    likeness, rows = Likeness.of_attributes(table, NAMES), np.arange(len(items))
    seeds = np.array([at % len(items) for at in drawn])
    each = likeness.each(seeds, rows, now)
    assert each.shape == (len(rows), len(seeds))
    mean = likeness.to(seeds, np.ones(len(seeds)), rows, now)
    np.testing.assert_allclose(each.mean(1), mean, atol=1e-5)
    assert likeness.each(seeds[:0], rows, now).shape == (len(rows), 0)


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
def test_the_words_of_a_title(title: str) -> None:
    assert title_words(title) == TITLES[title]


@given(st.text(max_size=300))
def test_words_are_few_and_different(title: str) -> None:
    words = title_words(title)
    assert len(words) == len(set(words)) <= 24
    assert all(word and not any(c.isspace() for c in word) for word in words)


def test_without_items_or_attributes_nothing_is_known() -> None:
    table = table_of([(["red"], []), (["blue"], [])])
    now = moment(BehaviourState({"purchase": 1.0}), table, 30_000 * DAY)
    nobody, both = np.empty(0, np.int64), np.arange(2)
    assert np.isnan(Likeness.of_attributes(table, NAMES).to(nobody, np.empty(0), both, now)).all()
    assert np.isnan(Likeness.of_attributes(table, ["weight"]).to(both, np.ones(2), both, now)).all()
