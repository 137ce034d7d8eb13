"""Items in columns, as filters and features read them, kept up through the change feed.

One thread applies changes; any thread reads. Rows are never moved, a new row is published
by the length last, and a changed value is replaced in place: a reader sees the value before
or after, never half of one. Derived from the catalogue's truth and rebuilt from it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np

from services.catalog import Item, item_number, title_words

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST, _LATEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(frozen=True)
class Change:
    """One change of the feed: an item as it is now, or, with `item` None, a deletion.

    `vectors` maps a space to the item's vector in it, float (D,).
    """

    number: int
    sequence: int
    item: Item | None
    created: datetime | None = None
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)


class _TextColumn:
    """Codes int32 (capacity, width), -1 for none, and the vocabulary they index."""

    def __init__(self, capacity: int) -> None:
        self.codes = np.full((capacity, 1), -1, np.int32)
        self.vocabulary: dict[str, int] = {}
        self.spelled: list[str] = []

    def put(self, row: int, texts: Sequence[str]) -> None:
        codes = [self._code(text) for text in texts]
        self.codes = _fit(self.codes, row + 1, len(codes), -1)
        self.codes[row] = codes + [-1] * (self.codes.shape[1] - len(codes))

    def _code(self, text: str) -> int:
        if text not in self.vocabulary:
            self.spelled.append(text)
            self.vocabulary[text] = len(self.vocabulary)
        return self.vocabulary[text]


class _NumberColumn:
    """Values float64 (capacity, width), NaN for none."""

    def __init__(self, capacity: int) -> None:
        self.values = np.full((capacity, 1), np.nan)

    def put(self, row: int, numbers: Sequence[float]) -> None:
        self.values = _fit(self.values, row + 1, len(numbers), np.nan)
        self.values[row] = [*numbers, *[np.nan] * (self.values.shape[1] - len(numbers))]


def _fit(values: np.ndarray, rows: int, width: int, empty: float) -> np.ndarray:
    """The same array, or a larger copy that holds `rows` rows of `width`."""
    if rows <= values.shape[0] and width <= values.shape[1]:
        return values
    shape = (
        values.shape[0] if rows <= values.shape[0] else max(2 * values.shape[0], rows),
        max(width, values.shape[1]),
    )
    grown = np.full(shape, empty, values.dtype)
    grown[: values.shape[0], : values.shape[1]] = values
    return grown


class _VectorColumn:
    """Vectors float16 (capacity, D) of one space, and which rows have one, bool (capacity, 1)."""

    def __init__(self, capacity: int, dimension: int) -> None:
        self.values = np.zeros((capacity, dimension), np.float16)
        self.present = np.zeros((capacity, 1), bool)

    def put(self, row: int, vector: np.ndarray | None) -> None:
        self.values = _fit(self.values, row + 1, 1, 0)
        self.present = _fit(self.present, row + 1, 1, False)
        self.values[row] = 0 if vector is None else vector
        self.present[row] = vector is not None


class ItemTable:
    """Columns over every item ever seen; deleted ones keep their row and are not live."""

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity
        self._length = 0
        self._ids: list[str] = []
        self._row_of: dict[int, int] = {}
        self._numbers = np.zeros((capacity, 1), np.int64)
        self._live = np.zeros((capacity, 1), bool)
        self._created = np.full((capacity, 1), _EARLIEST, np.int64)
        self._window = np.tile(np.array([_EARLIEST, _LATEST], np.int64), (capacity, 1))
        self._texts: dict[str, _TextColumn] = {"family_id": _TextColumn(capacity)}
        self._values: dict[str, _NumberColumn] = {"price": _NumberColumn(capacity)}
        self._words = _TextColumn(capacity)
        self._vectors: dict[str, _VectorColumn] = {}
        self._changed = np.zeros((capacity, 1), np.int64)
        self.sequence = 0  # of the feed
        self.version = 0  # of this table: one more with every item written

    @classmethod
    def of(
        cls,
        items: Sequence[Item],
        vectors: Mapping[str, np.ndarray],
        present: Mapping[str, np.ndarray],
        created: Sequence[datetime],
    ) -> "ItemTable":
        """A table of items with, of each space, vectors (N, D) where `present`, bool (N,)."""
        table = cls(capacity=max(1024, len(items)))
        for at, item in enumerate(items):
            mine = {space: values[at] for space, values in vectors.items() if present[space][at]}
            table.apply([Change(item_number(item.id), 0, item, created[at], mine)])
        return table

    @property
    def length(self) -> int:
        """The number of rows, live or not."""
        return self._length

    @property
    def item_numbers(self) -> np.ndarray:
        """Item numbers, int64 (N,)."""
        return self._numbers[: self._length, 0]

    @property
    def created(self) -> np.ndarray:
        """When each item was first written, microseconds since 1970, int64 (N,)."""
        return self._created[: self._length, 0]

    @property
    def came(self) -> np.ndarray:
        """When each item came to the shop: as it says itself, else when it was first written."""
        stated = self._window[: self._length, 0]
        return np.where(stated > _EARLIEST, stated, self.created[: len(stated)])

    def ids(self, rows: Iterable[int]) -> list[str]:
        """The item ids of rows."""
        return [self._ids[row] for row in rows]

    def rows(self, numbers: Iterable[int]) -> np.ndarray:
        """The row of each item number, int64; -1 for an unknown one."""
        return np.fromiter((self._row_of.get(int(n), -1) for n in numbers), np.int64)

    def rows_of_ids(self, ids: frozenset[str]) -> np.ndarray:
        """The rows, int64, of these item ids; unknown ones are left out."""
        rows = self.rows(item_number(item_id) for item_id in ids)
        return np.array([row for row in rows if row >= 0 and self._ids[row] in ids], np.int64)

    def texts(self, attribute: str) -> tuple[np.ndarray, Mapping[str, int]] | None:
        """A text attribute: codes int32 (N, W), -1 for none, and the text of each code."""
        column = self._texts.get(attribute)
        return None if column is None else (_padded(column.codes, self._length, -1), column.vocabulary)

    @property
    def text_attributes(self) -> tuple[str, ...]:
        """The names of the text attributes that any item ever had, and "family_id"."""
        return tuple(self._texts)

    @property
    def live(self) -> np.ndarray:
        """Which rows are of items that are not deleted, bool (N,)."""
        return self._live[: self._length, 0]

    def texts_of(self, attribute: str, row: int) -> tuple[str, ...]:
        """The texts that one item has of an attribute."""
        column = self._texts[attribute]
        codes = column.codes[row] if row < len(column.codes) else ()  # a young column may be short
        return tuple(column.spelled[code] for code in codes if code >= 0)

    @property
    def words(self) -> np.ndarray:
        """The words of the titles as codes, int32 (N, W), -1 for none."""
        return _padded(self._words.codes, self._length, -1)

    def numbers(self, attribute: str) -> np.ndarray | None:
        """A number attribute or "price": float64 (N, W), NaN for none."""
        column = self._values.get(attribute)
        return None if column is None else _padded(column.values, self._length, np.nan)

    @property
    def spaces(self) -> dict[str, int]:
        """The spaces that items have vectors in, and their dimensions."""
        return {space: column.values.shape[1] for space, column in self._vectors.items()}

    def vectors(self, space: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A space: float16 (N, D), zeros for none, and which rows have a vector, bool (N,)."""
        column = self._vectors.get(space)
        if column is None:
            return None
        present = _padded(column.present, self._length, False)[:, 0]
        return _padded(column.values, self._length, 0), present

    def retain(self, numbers: frozenset[int]) -> None:
        """Take every other item for deleted: what a feed read from the beginning implies."""
        for number, row in self._row_of.items():
            if number not in numbers:
                self._live[row] = False

    def available(self, as_of: datetime) -> np.ndarray:
        """Which rows are live and within their availability window, bool (N,)."""
        at, window = (as_of - _EPOCH) // _MICROSECOND, self._window[: self._length]
        return np.asarray(self._live[: self._length, 0] & (window[:, 0] <= at) & (at < window[:, 1]))

    def changed_since(self, version: int) -> tuple[np.ndarray, int]:
        """The rows, int64, whose items were written after a version, and the version they are of."""
        now = self.version
        return np.flatnonzero(self._changed[: self._length, 0] > version), now

    def apply(self, changes: Iterable[Change]) -> None:
        """Apply changes in the order of the feed."""
        for change in changes:
            row = self._row_of.get(change.number)
            if change.item is not None:
                self._put(row, change.item, change)
            elif row is not None:
                self._live[row] = False
            self.sequence = max(self.sequence, change.sequence)

    def _put(self, known: int | None, item: Item, change: Change) -> None:
        row = self._length if known is None else known
        self._numbers = _fit(self._numbers, row + 1, 1, 0)
        self._live = _fit(self._live, row + 1, 1, False)
        self._created = _fit(self._created, row + 1, 1, _EARLIEST)
        self._window = _fit(self._window, row + 1, 2, 0)
        self._numbers[row] = change.number
        self._created[row] = (
            _EARLIEST if change.created is None else (change.created - _EPOCH) // _MICROSECOND
        )
        self._window[row] = (
            (item.available_from - _EPOCH) // _MICROSECOND if item.available_from else _EARLIEST,
            (item.available_until - _EPOCH) // _MICROSECOND if item.available_until else _LATEST,
        )
        self._put_attributes(row, item)
        self._put_vectors(row, change.vectors)
        self._changed = _fit(self._changed, row + 1, 1, 0)
        self._changed[row] = self.version + 1
        self._live[row] = True
        if known is None:
            self._ids.append(item.id)
            self._length = row + 1
        self.version += 1
        self._row_of[change.number] = row  # last: who finds the row finds all of it

    def _put_attributes(self, row: int, item: Item) -> None:
        texts = {a.name: a.texts for a in item.attributes if a.texts}
        texts["family_id"] = (item.family_id,) if item.family_id else ()
        numbers = {a.name: a.numbers for a in item.attributes if a.numbers}
        numbers["price"] = () if item.price is None else (item.price,)
        for name in texts.keys() - self._texts.keys():
            self._texts[name] = _TextColumn(self._capacity)
        for name in numbers.keys() - self._values.keys():
            self._values[name] = _NumberColumn(self._capacity)
        self._words.put(row, title_words(item.title))
        for name, text_column in self._texts.items():
            text_column.put(row, texts.get(name, ()))
        for name, number_column in self._values.items():
            number_column.put(row, numbers.get(name, ()))

    def _put_vectors(self, row: int, vectors: Mapping[str, np.ndarray]) -> None:
        for space, vector in vectors.items():
            if space not in self._vectors:
                self._vectors[space] = _VectorColumn(self._capacity, len(vector))
        for space, column in self._vectors.items():
            column.put(row, vectors.get(space))


def _padded(values: np.ndarray, length: int, empty: float) -> np.ndarray:
    return _fit(values, length, values.shape[1], empty)[:length]
