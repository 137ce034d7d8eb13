"""A filter over columns equals its evaluation on each item."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.catalog.filters import AllOf, AnyOf, Equals, Filter, In, NoneOf, Range, check_size, evaluate
from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash
from services.core.errors import InvalidArgument
from services.rpc import proto_conversions
from tests.conftest import Clock
from tests.support.filter_oracle import matches

NAMES, WORDS = st.sampled_from(["colour", "size", "brand"]), st.sampled_from(["red", "blue", "x", "7"])
NUMBERS = st.sampled_from([-1.0, 0.0, 2.5, 7.0])


def _attribute(name: str, values: list[str] | list[float]) -> Attribute:
    texts = tuple(v for v in values if isinstance(v, str))
    return Attribute(name, texts, tuple(v for v in values if not isinstance(v, str)))


_attributes = st.dictionaries(
    NAMES,
    st.lists(WORDS, min_size=1, max_size=3, unique=True)
    | st.lists(NUMBERS, min_size=1, max_size=3, unique=True),
).map(lambda d: tuple(_attribute(name, values) for name, values in d.items()))
_items = st.builds(
    Item,
    id=st.sampled_from([f"i{n}" for n in range(12)]),
    title=st.just("t"),
    attributes=_attributes,
    family_id=st.sampled_from(["", "f", "g"]),
    price=st.none() | NUMBERS,
)
_leaves = (
    st.builds(
        Equals, NAMES | st.sampled_from(["id", "family_id", "nothing"]), WORDS | st.sampled_from(["i1", "f"])
    )
    | st.builds(Equals, NAMES | st.just("price"), NUMBERS)
    | st.builds(
        In, NAMES | st.sampled_from(["id", "family_id"]), st.frozensets(WORDS | st.sampled_from(["i2", "g"]))
    )
    | st.builds(Range, NAMES | st.just("price"), st.none() | NUMBERS, st.none() | NUMBERS)
)
_filters: st.SearchStrategy[Filter] = st.recursive(
    _leaves,
    lambda inner: (
        st.builds(AllOf, st.lists(inner, max_size=3).map(tuple))
        | st.builds(AnyOf, st.lists(inner, max_size=3).map(tuple))
        | st.builds(NoneOf, inner)
    ),
    max_leaves=6,
)


@given(writes=st.lists(_items, max_size=25), conditions=st.lists(_filters, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_filter_over_columns_equals_the_filter_on_each_item(
    writes: list[Item], conditions: list[Filter]
) -> None:
    table = ItemTable(capacity=2)
    for sequence, item in enumerate(writes, 1):
        table.apply([Change(item_hash(item.id), sequence, item)])
    latest = {item.id: item for item in writes}
    for condition in conditions:
        mask = evaluate(condition, table)
        assert mask.shape == (table.length,)
        assert dict(zip(table.ids(range(table.length)), mask.tolist(), strict=True)) == {
            name: matches(condition, item) for name, item in latest.items()
        }


@given(condition=_filters)
def test_a_filter_survives_conversion_to_a_message_and_back(condition: Filter) -> None:
    assume("min=None, max=None" not in repr(condition))  # a span without an end is refused
    assert proto_conversions.filter_from(proto_conversions.filter_to(condition)) == condition


def test_deleted_and_unavailable_items_are_not_available(clock: Clock) -> None:
    item, day = Item("a", "t"), timedelta(days=1)
    now, table = clock.now, ItemTable()
    coming = replace(item, id="b", available_from=now + day)
    going = replace(item, id="c", available_until=now + day)
    table.apply(Change(item_hash(i.id), n, i) for n, i in enumerate([item, coming, going], 1))
    assert table.available(now).tolist() == [True, False, True]
    assert table.available(now + day).tolist() == [True, True, False]
    table.apply([Change(item_hash("a"), 4, None)])
    assert table.available(now).tolist() == [False, False, True]
    table.apply([Change(item_hash("a"), 5, item)])
    assert (table.available(now).tolist(), table.length, table.sequence) == ([True, False, True], 3, 5)
    np.testing.assert_array_equal(table.rows([item_hash("c"), 5]), [2, -1])


def test_a_filter_that_is_too_deep_or_too_large_is_refused() -> None:
    deep: Filter = Equals("a", "b")
    for _ in range(8):
        deep = NoneOf(deep)
    with pytest.raises(InvalidArgument, match="deep"):
        check_size(deep)
    with pytest.raises(InvalidArgument, match="conditions"):
        check_size(AllOf((Equals("a", "b"),) * 256))
    check_size(AllOf((Equals("a", "b"),) * 255))
