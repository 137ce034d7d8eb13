"""Availability and filters equal the plain formula at every time and after every kind of write."""

from datetime import UTC, datetime, timedelta
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog import mask_cache
from services.catalog.filters import AllOf, AnyOf, Equals, Filter, In, NoneOf, Range, evaluate
from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, item_hash
from services.catalog.mask_cache import MaskCache
from tests.support.filter_oracle import matches

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
EARLIEST, LATEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max
# Few times, so that many fall on the bounds of a window; the first ones are before 1970.
TIMES = st.one_of(st.integers(-6, 12), st.integers(-(10**15), 10**15))
BOUNDS = st.none() | TIMES
COLORS, SIZES = ("red", "blue", "green"), (1.0, 2.0, 3.0)
CONDITIONS: tuple[Filter, ...] = (
    Equals("color", "red"),
    Equals("size", 2.0),
    Equals("id", "i1"),
    Equals("family_id", "f1"),
    In("color", frozenset({"red", "blue", "unknown"})),
    In("id", frozenset({"i0", "i2", "unknown"})),
    Range("size", 2.0, None),
    Range("price", None, 1.0),
    Range("price"),
    NoneOf(Equals("color", "red")),
    AllOf(()),
    AnyOf(()),
    AllOf((NoneOf(Equals("id", "i1")), AnyOf((Equals("color", "green"), Range("size", 1.0, 1.0))))),
)


def items(number: int) -> st.SearchStrategy[Item]:
    return st.builds(
        lambda start, end, colors, size, family, price: Item(
            id=f"i{number}",
            attributes=(
                *((Attribute("color", tuple(colors)),) if colors else ()),
                *((Attribute("size", (), (size,)),) if size else ()),
            ),
            family_id=family,
            price=price,
            available_from=None if start is None else EPOCH + start * MICROSECOND,
            available_until=None if end is None else EPOCH + end * MICROSECOND,
        ),
        BOUNDS,
        BOUNDS,
        st.lists(st.sampled_from(COLORS), unique=True, max_size=2),
        st.none() | st.sampled_from(SIZES),
        st.sampled_from(["", "f1", "f2"]),
        st.none() | st.sampled_from([0.0, 1.0, 2.0]),
    )


ITEM_CHANGES = st.integers(0, 5).flatmap(lambda n: st.tuples(st.just(n), st.none() | items(n)))
RETAINED = st.tuples(st.just("retain"), st.frozensets(st.integers(0, 5)))
QUERIES = st.tuples(st.just("time"), TIMES)
CONDITION = st.tuples(st.just("filter"), st.sampled_from(range(len(CONDITIONS))))


def is_available(item: Item | None, time: int) -> bool:
    if item is None:
        return False
    at = EPOCH + time * MICROSECOND
    return (item.available_from is None or item.available_from <= at) and (
        item.available_until is None or at < item.available_until
    )


@given(st.lists(st.one_of(ITEM_CHANGES, ITEM_CHANGES, RETAINED, QUERIES, CONDITION), max_size=60))
@settings(deadline=None, max_examples=200)
def test_masks_follow_every_write(steps: list[tuple[object, object]]) -> None:
    table, sequence = ItemTable(capacity=2), count(1)
    row_of, current = dict[int, int](), dict[int, Item | None]()

    def check_time(time: int) -> None:
        expected = [is_available(current[row], time) for row in range(len(row_of))]
        mask = table.available(EPOCH + time * MICROSECOND)
        assert mask.tolist() == expected
        assert not mask.flags.writeable

    def check_filter(condition: Filter) -> None:
        live = [row for row in range(len(row_of)) if current[row] is not None]
        mask = evaluate(condition, table)
        assert len(mask) == len(row_of)
        assert mask[live].tolist() == [matches(condition, item) for row in live if (item := current[row])]
        assert not mask.flags.writeable

    for kind, value in steps:
        if kind == "time":
            assert isinstance(value, int)
            check_time(value)
        elif kind == "filter":
            assert isinstance(value, int)
            check_filter(CONDITIONS[value])
        elif kind == "retain":
            assert isinstance(value, frozenset)
            table.retain(frozenset(item_hash(f"i{number}") for number in value))
            current |= {row: None for number, row in row_of.items() if number not in value}
        else:
            assert isinstance(kind, int)
            assert value is None or isinstance(value, Item)
            table.apply([Change(item_hash(f"i{kind}"), next(sequence), value)])
            if value is not None:
                current[row_of.setdefault(kind, len(row_of))] = value
            elif kind in row_of:
                current[row_of[kind]] = None
    for condition in CONDITIONS:
        check_filter(condition)
    for time in (-6, 0, 1, 12):
        check_time(time)


WINDOWS = st.lists(
    st.tuples(
        st.booleans(),
        st.sampled_from([EARLIEST, -3, 0, 2, 5]),
        st.sampled_from([LATEST, -3, 0, 2, 5]),
    ),
    max_size=8,
)


@given(WINDOWS, st.lists(st.tuples(st.integers(0, 2), st.integers(-5, 7)), min_size=1, max_size=30))
def test_a_kept_mask_holds_exactly_until_the_next_bound(
    windows: list[tuple[bool, int, int]], queries: list[tuple[int, int]]
) -> None:
    live = np.array([is_live for is_live, *_ in windows], bool)
    window = np.array([bounds for _, *bounds in windows], np.int64).reshape(-1, 2)
    masks, computed = MaskCache(), list[int]()
    for version, time in queries:
        # Each version has its own items: a mask of another version would be wrong.
        of_version = live ^ bool(version % 2)

        def columns(of_version: np.ndarray = of_version, time: int = time) -> tuple[np.ndarray, np.ndarray]:
            computed.append(time)
            return of_version, window

        mask = masks.available(version, time, columns)
        expected = of_version & (window[:, 0] <= time) & (time < window[:, 1])
        np.testing.assert_array_equal(mask, expected)
        calls = len(computed)
        assert masks.available(version, time, columns) is mask
        assert len(computed) == calls


def test_masks_by_key_are_computed_once_for_each_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_cache, "_CAPACITY", 3)
    masks, computed = MaskCache(), list[tuple[int, str]]()

    def get(version: int, key: str) -> bool:
        def compute() -> np.ndarray:
            computed.append((version, key))
            return np.array([version % 2 == len(key) % 2])

        [value] = masks.get(version, key, compute)
        return bool(value)

    for version, key in [(1, "a"), (1, "bb"), (1, "a"), (2, "a"), (2, "bb"), (2, "a")]:
        assert get(version, key) == (version % 2 == len(key) % 2)
    assert computed == [(1, "a"), (1, "bb"), (2, "a"), (2, "bb")]
    for key in ("ccc", "dddd", "eeeee", "ffffff"):  # more than the cache holds
        get(2, key)
    assert get(2, "ffffff")
    assert computed[-1] == (2, "ffffff")
    assert get(2, "a") is False
    assert computed[-1] == (2, "a")
