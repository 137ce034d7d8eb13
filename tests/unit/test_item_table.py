"""The item table equals plain dictionaries under concurrent reads, and bounds its memory."""

import math
import random
import sys
import threading
import tracemalloc
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.catalog.filters import AllOf, Equals, Filter, In, NoneOf, Range, evaluate
from services.catalog.item_table import Change, ItemTable
from services.catalog.items import Attribute, Item, title_words

NAMES = [f"a{n}" for n in range(6)]
CONDITIONS: list[Filter] = [
    *(Equals(name, "t1") for name in NAMES),
    *(In(name, frozenset({"t0", "t2", "unknown"})) for name in NAMES),
    *(Range(name, 1.0, 2.0) for name in NAMES),
    Range("price", None, 5.0),
    AllOf((NoneOf(Equals("a0", "t1")), Range("price", 2.0))),
]


def random_item(number: int, rng: random.Random) -> Item:
    """The lower an attribute's number, the more items have it; even ones have several values."""
    attributes = []
    for at, name in enumerate(NAMES):
        if rng.random() < 0.9 / (at * at + 1):
            count = 1 if at % 2 else rng.randrange(1, 5)
            texts = tuple(rng.sample([f"t{n}" for n in range(5)], count))
            numbers = tuple(float(n) for n in rng.sample(range(5), count))
            attributes.append(Attribute(name, texts) if rng.random() < 0.7 else Attribute(name, (), numbers))
    price = rng.choice([None, float(rng.randrange(10))])
    return Item(f"i{number}", f"title {number % 7}", "", tuple(attributes), "f" * (number % 3), price)


def texts_in(item: Item | None) -> dict[str, tuple[str, ...]]:
    return {} if item is None else {a.name: a.texts for a in item.attributes if a.texts}


def numbers_in(item: Item | None) -> dict[str, tuple[float, ...]]:
    return {} if item is None else {a.name: a.numbers for a in item.attributes if a.numbers}


def holds(condition: Filter, item: Item | None) -> bool:
    price = () if item is None or item.price is None else (item.price,)
    match condition:
        case AllOf(parts):
            return all(holds(part, item) for part in parts)
        case NoneOf(part):
            return not holds(part, item)
        case Equals(name, value):
            return value in texts_in(item).get(name, ())
        case In(name, texts):
            return bool(texts & set(texts_in(item).get(name, ())))
        case Range(name, low, high):
            values = price if name == "price" else numbers_in(item).get(name, ())
            return any((low is None or v >= low) and (high is None or v <= high) for v in values)
    raise AssertionError(condition)


def check(table: ItemTable, items: dict[int, Item | None]) -> None:
    """`items` are by row; None for a deleted one, of which only the attributes are looked at."""
    inner = min(5, len(items) - 1)
    rows = np.array([inner, 0, len(items) - 1, inner])
    for name in NAMES:
        expected = [texts_in(items[row]).get(name, ()) for row in range(len(items))]
        column = table.texts(name)
        assert (column is not None) == any(expected) == (name in table.text_attributes)
        if column is not None:
            codes, vocabulary = column
            text_of = {code: text for text, code in vocabulary.items()}
            assert [tuple(text_of[c] for c in row if c >= 0) for row in codes.tolist()] == expected
            some = table.texts_of_rows(name, rows)
            assert some is not None
            assert [tuple(text_of[c] for c in row if c >= 0) for row in some[0].tolist()] == [
                expected[row] for row in rows
            ]
            entries = table.text_entries(name)
            assert entries is not None
            pairs = zip(entries[0].tolist(), entries[1].tolist(), strict=True)
            assert [(row, entries[2][code]) for row, code in pairs] == [
                (row, text) for row, texts in enumerate(expected) for text in texts
            ]
        assert table.texts_of(name, inner) == expected[inner]
        values = table.numbers(name)
        stated = [numbers_in(items[row]).get(name, ()) for row in range(len(items))]
        assert (values is not None) == any(stated)
        if values is not None:
            assert [tuple(v for v in row if not math.isnan(v)) for row in values.tolist()] == stated


@given(seed=st.integers(0, 1 << 30), writes=st.integers(40, 2500), ids=st.sampled_from([1, 2, 20, 150, 1200]))
@settings(max_examples=25, deadline=None)
def test_the_table_equals_plain_dictionaries(seed: int, writes: int, ids: int) -> None:
    rng, table = random.Random(seed), ItemTable(capacity=2)
    items: dict[int, Item | None] = {}
    row_of: dict[int, int] = {}
    for sequence in range(1, writes):
        number = (rng.randrange(ids) if sequence > 10 else sequence) % ids
        row = row_of.setdefault(number, len(row_of))
        if row in items and rng.random() < 0.2:
            table.apply([Change(number, sequence, None)])
            items[row] = None
        else:
            items[row] = random_item(number, rng)
            table.apply([Change(number, sequence, items[row])])
    check(table, items)
    live = table.live
    for condition in CONDITIONS:
        expected = [holds(condition, items[int(row)]) for row in np.flatnonzero(live)]
        assert evaluate(condition, table)[live].tolist() == expected
    words, counts = table.words, Counter(w for i in items.values() if i for w in title_words(i.title))
    assert words.shape[0] == len(items)
    assert (words[live] >= 0).sum() == sum(counts.values())


def test_a_reader_sees_each_row_either_before_or_after_a_write() -> None:
    """Each write gives a row texts of one generation: a row with two generations would be half a write."""
    table, stop, titles = ItemTable(capacity=2), threading.Event(), list[str]()

    def item(number: int, generation: int) -> Item:
        rng = random.Random(generation)
        width = rng.choice([0, 1, 1, 1, 4])
        texts = tuple(f"{generation}-{at}" for at in range(width))
        attributes = (Attribute("tags", texts), Attribute(f"rare{generation % 5}", texts)) if texts else ()
        return Item(f"i{number}", "t", "", attributes, price=float(generation))

    def read_rows() -> None:
        try:
            while not stop.is_set():
                length = table.length
                if (column := table.texts("tags")) is not None:
                    codes, vocabulary = column
                    text_of = {code: text for text, code in list(vocabulary.items())}
                    for row in codes.tolist():
                        generations = {text_of[code].split("-")[0] for code in row if code >= 0}
                        assert len(generations) <= 1
                        assert sum(code >= 0 for code in row) in (0, 1, 4)
                mask = evaluate(AllOf((Range("price", 0), NoneOf(Equals("tags", "nothing")))), table)
                assert len(mask) >= length
                assert mask[:length].all()
                for name in table.text_attributes:
                    table.text_entries(name)
        except Exception as error:
            titles.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    reader = threading.Thread(target=read_rows)
    reader.start()
    try:
        for generation in range(6000):
            number = generation % (20 + generation // 10)
            table.apply([Change(number, generation, item(number, generation))])
    finally:
        stop.set()
        reader.join()
        sys.setswitchinterval(interval)
    assert titles == []


def test_memory_grows_and_shrinks_with_the_values() -> None:
    """New names with the most values an item may have, in a table of 20,000 items, then without them."""
    table = ItemTable()
    for n in range(20_000):
        table.apply([Change(n, n, Item(f"i{n}", "t", "", (Attribute("colour", (f"c{n % 9}",)),)))])
    numbers = tuple(float(n) for n in range(32))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for n in range(50):
            wide = tuple(Attribute(f"n{n}-{k}", (), numbers) for k in range(64))
            table.apply([Change(n, 20_000 + n, Item(f"i{n}", "t", "", wide))])
        growth = tracemalloc.get_traced_memory()[0] - before
        assert growth < 50 * 64 * 32 * 8 * 8  # the values are 820 KB
        for n in range(50):
            table.apply([Change(n, 30_000 + n, None)])
        assert table.numbers("n0-0") is None
        assert tracemalloc.get_traced_memory()[0] - before < growth / 5
    finally:
        tracemalloc.stop()


def test_unused_texts_are_released() -> None:
    table = ItemTable()
    for n in range(20_000):
        table.apply([Change(n % 10, n, Item(f"i{n % 10}", f"word{n}", "", (Attribute("a", (f"t{n}",)),)))])
    column = table.texts("a")
    assert column is not None
    codes, vocabulary = column
    assert len(vocabulary) < 2000
    text_of = {code: text for text, code in vocabulary.items()}
    assert [text_of[code] for code in codes[:, 0].tolist()] == [f"t{n}" for n in range(19_990, 20_000)]
