"""The candidates in columns equal dictionaries of the scores of each item by source."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.catalog.candidate_sources import NAMES
from services.gateway.candidates import MAX_LEADING_SOURCES, SOURCES, CandidateSet

Lists = list[tuple[str, list[int], list[float]]]
Scores = dict[int, dict[str, float]]
SOURCE = st.sampled_from([*NAMES, "quota", "explore", "backfill"])
ITEMS = st.one_of(st.integers(0, 12), st.sampled_from([-(1 << 63), (1 << 63) - 1]))
SCORED = st.lists(st.tuples(ITEMS, st.integers(-3, 3)), max_size=12)


@st.composite
def source_lists(draw: st.DrawFn) -> Lists:
    """Lists with few distinct scores, so that many are equal; sources and items may repeat."""
    result: Lists = []
    for source in draw(st.lists(SOURCE, max_size=7)):
        scored = draw(SCORED)
        result.append((source, [item for item, _ in scored], [score / 2 for _, score in scored]))
    return result


def dictionaries(*parts: Lists) -> Scores:
    """The highest score of each item by source, items in the order of their first appearance."""
    scores: Scores = {}
    for lists in parts:
        for source, items, of_items in lists:
            for item, score in zip(items, of_items, strict=True):
                of_item = scores.setdefault(item, {})
                of_item[source] = max(score, of_item.get(source, score))
    return scores


def check(candidates: CandidateSet, expected: Scores) -> None:
    """The candidates are those expected, in any order."""
    assert len(candidates) == len(candidates.item_hashes) == len(expected)
    assert set(candidates.item_hashes.tolist()) == set(expected)
    assert candidates.item_hashes.dtype == np.int64
    assert candidates.scores.dtype == np.float32
    assert candidates.scores.shape == (len(expected), len(candidates.names))
    assert len(set(candidates.names)) == len(candidates.names)
    for item, of_item in expected.items():
        assert candidates.sources_of(item) == of_item
    columns = {name: dict[int, float]() for name in (*NAMES, "quota", "explore", "backfill")}
    for name, used, scores in candidates.columns():
        items = candidates.item_hashes[used].tolist()
        columns[name] = dict(zip(items, scores.tolist(), strict=True))
    hashes = candidates.item_hashes.tolist()
    for name, column in columns.items():
        of_source = {item: of_item[name] for item, of_item in expected.items() if name in of_item}
        assert column == of_source
        assert candidates.proposed_by(name).tolist() == [item in of_source for item in hashes]
        assert candidates.only_by(name).tolist() == [set(expected[item]) == {name} for item in hashes]


@given(source_lists())
def test_candidates_equal_dictionaries(lists: Lists) -> None:
    candidates, expected = CandidateSet.of(lists), dictionaries(lists)
    check(candidates, expected)
    assert candidates.item_hashes.tolist() == list(expected)
    assert candidates.names == tuple(dict.fromkeys(name for name, *_ in lists))
    assert candidates.sources_of(99) == {}


@given(source_lists())
def test_lists_of_arrays_give_the_same_candidates(lists: Lists) -> None:
    arrays = [(name, np.array(items, np.int64), np.array(scores)) for name, items, scores in lists]
    one, other = CandidateSet.of(lists), CandidateSet.of(arrays)
    np.testing.assert_array_equal(one.item_hashes, other.item_hashes)
    np.testing.assert_array_equal(one.scores, other.scores)
    assert one.names == other.names


@given(source_lists(), SOURCE, SCORED)
def test_another_source_adds_its_items_and_scores(
    lists: Lists, source: str, scored: list[tuple[int, int]]
) -> None:
    items, scores = [item for item, _ in scored], [score / 2 for _, score in scored]
    more = CandidateSet.of(lists).with_source(source, items, scores)
    check(more, dictionaries(lists, [(source, items, scores)]))


@given(source_lists(), source_lists())
def test_two_sets_together_have_the_scores_of_both(first: Lists, second: Lists) -> None:
    both = CandidateSet.of(first).with_lists(CandidateSet.of(second))
    check(both, dictionaries(first, second))


@given(source_lists(), source_lists())
def test_a_merge_adds_only_new_items_with_their_own_sources(first: Lists, second: Lists) -> None:
    merged = CandidateSet.of(first).merged(CandidateSet.of(second))
    check(merged, dictionaries(second) | dictionaries(first))


@given(source_lists(), st.data())
def test_some_candidates_keep_their_sources_and_come_in_the_given_order(
    lists: Lists, data: st.DataObject
) -> None:
    expected = dictionaries(lists)
    order = data.draw(st.permutations(range(len(expected))))
    indices = order[: data.draw(st.integers(0, len(order)))]
    taken = CandidateSet.of(lists).take(np.array(indices, np.int64))
    items = [list(expected)[index] for index in indices]
    assert taken.item_hashes.tolist() == items
    check(taken, {item: expected[item] for item in items})
    # A set of some candidates is a set like any other.
    check(taken.with_lists(CandidateSet.of(lists)), expected)


@given(source_lists(), st.data())
def test_leading_sources_are_those_with_the_best_ranks(lists: Lists, data: st.DataObject) -> None:
    scores = dictionaries(lists)
    items = data.draw(st.lists(st.sampled_from(list(scores)), max_size=8)) if scores else []
    leading = CandidateSet.of(lists).leading_sources(items)
    assert set(leading) == set(items)
    for item in items:

        def rank(name: str, own: dict[str, float] = scores[item]) -> tuple[int, int]:
            at_least = sum(of_item.get(name, -np.inf) >= own[name] for of_item in scores.values())
            return at_least, NAMES.index(name)

        known = sorted(SOURCES & set(scores[item]), key=rank)[:MAX_LEADING_SOURCES]
        assert leading[item] == [*known, *sorted(set(scores[item]) - SOURCES)]


@given(source_lists(), source_lists())
def test_no_operation_changes_a_set(first: Lists, second: Lists) -> None:
    candidates, other = CandidateSet.of(first), CandidateSet.of(second)
    candidates.with_source("popular", [1, 2], [7.0, 8.0])
    candidates.with_lists(other)
    candidates.merged(other)
    candidates.leading_sources(candidates.item_hashes.tolist())
    check(candidates, dictionaries(first))
    check(other, dictionaries(second))


def test_an_unknown_item_has_no_leading_sources() -> None:
    with pytest.raises(KeyError):
        CandidateSet.of([("popular", [1], [1.0])]).leading_sources([2])


def test_a_list_with_another_number_of_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="popular has another number of scores"):
        CandidateSet.of([("text", [1], [0.5]), ("popular", [1, 2], [0.5])])


def test_a_score_that_is_no_number_never_hides_another() -> None:
    lists = [("popular", [1, 1, 2], [0.5, float("nan"), 1.0]), ("text", [1], [float("nan")])]
    assert CandidateSet.of(lists).sources_of(1) == {"popular": 0.5}
