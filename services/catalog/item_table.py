"""The item table: items in columns for filters and features, kept current by the change feed.

One thread applies changes; any thread reads. Rows never move, the length is set last for a new row, and a
changed value is replaced in place: a reader sees the old value or the new one, never half of one. The table
is derived from the item store and rebuilt from it.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np

from services.catalog.columns import Column, TextColumn
from services.catalog.hash_rows import HashRows
from services.catalog.items import Attribute, Item, item_hash, title_words
from services.catalog.mask_cache import MaskCache
from services.catalog.row_attributes import RowAttributes
from services.catalog.table_columns import Entries, TableColumns

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST, _LATEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(frozen=True)
class Change:
    """One change of the feed: an item as it is now, or, with `item` None, a deletion.

    `vectors` maps a space to the item's vector in it, float (D,).
    """

    item_hash: int
    sequence: int
    item: Item | None
    created: datetime | None = None
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)


def _fit(values: np.ndarray, rows: int, width: int, empty: float) -> np.ndarray:
    """The same array, or a larger copy that holds `rows` rows of `width`."""
    if rows <= values.shape[0] and width <= values.shape[1]:
        return values
    shape = (
        values.shape[0] if rows <= values.shape[0] else max(2 * values.shape[0], rows),
        max(width, values.shape[1]),
    )
    larger = np.full(shape, empty, values.dtype)
    larger[: values.shape[0], : values.shape[1]] = values
    return larger


def _number_column() -> Column:
    return Column(np.float64, np.nan)


class _VectorColumn:
    """Vectors float16 (capacity, D) of one space, and which rows have one, bool (capacity, 1)."""

    def __init__(
        self,
        capacity: int,
        dimension: int,
        values: np.ndarray | None = None,
        present: np.ndarray | None = None,
    ) -> None:
        self.values = np.zeros((capacity, dimension), np.float16) if values is None else values
        self.present = np.zeros((capacity, 1), bool) if present is None else present

    def put(self, row: int, vector: np.ndarray | None) -> None:
        self.values = _fit(self.values, row + 1, 1, 0)
        self.present = _fit(self.present, row + 1, 1, False)
        self.values[row] = 0 if vector is None else vector
        self.present[row] = vector is not None


class ItemTable:
    """Columns over every item that the feed ever had; a deleted item keeps its row and is not live."""

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity
        self._length = 0
        self._ids: list[str] = []
        self._row_of, self._masks = HashRows(), MaskCache()
        self._hashes = np.zeros((capacity, 1), np.int64)
        self._live = np.zeros((capacity, 1), bool)
        self._created = np.full((capacity, 1), _EARLIEST, np.int64)
        self._window = np.tile(np.array([_EARLIEST, _LATEST], np.int64), (capacity, 1))
        self._texts = {"family_id": TextColumn()}
        self._values = {"price": _number_column()}
        self._words = TextColumn()
        self._attributes = RowAttributes()
        self._vectors: dict[str, _VectorColumn] = {}
        self._changed = np.zeros((capacity, 1), np.int64)
        self._sequences = np.zeros((capacity, 1), np.int64)
        self.sequence = 0  # of the feed
        self.version = 0  # of this table: incremented by each write

    @classmethod
    def of(
        cls,
        items: Sequence[Item],
        vectors: Mapping[str, np.ndarray],
        present: Mapping[str, np.ndarray],
        created: Sequence[datetime],
    ) -> "ItemTable":
        """A table of items with, for each space, vectors (N, D) where `present`, bool (N,)."""
        table = cls(capacity=max(1024, len(items)))

        def change(index: int, item: Item) -> Change:
            item_vectors = {space: v[index] for space, v in vectors.items() if present[space][index]}
            return Change(item_hash(item.id), 0, item, created[index], item_vectors)

        table.apply(change(index, item) for index, item in enumerate(items))
        return table

    @classmethod
    def of_columns(cls, columns: TableColumns) -> "ItemTable":
        """The table that `columns` gave; changes after its sequence are to be applied next.

        The table takes the arrays over: their first `length` rows are used, the others are spare.
        """
        length, capacity = columns.length, len(columns.arrays["item_hashes"])
        table = cls(capacity=0)
        table._capacity = capacity
        table._ids = columns.ids
        table._hashes, table._live = columns.arrays["item_hashes"], columns.arrays["live"]
        table._created, table._window = columns.arrays["created"], columns.arrays["windows"]
        table._sequences = columns.arrays["sequences"]
        table._changed = np.ones((capacity, 1), np.int64)
        for space, (values, present) in columns.vectors.items():
            table._vectors[space] = _VectorColumn(capacity, values.shape[1], values, present)
        table._words = TextColumn.of(*columns.words)
        # A column whose last row lost its values while the columns were read is empty.
        texts = {name: entries for name, entries in columns.texts.items() if len(entries[0])}
        numbers = {name: entries for name, entries in columns.numbers.items() if len(entries[0])}
        table._texts |= {name: TextColumn.of(*entries) for name, entries in texts.items()}
        table._values |= {name: Column.of(*entries, np.nan) for name, entries in numbers.items()}
        table._attributes = RowAttributes.of(
            length,
            {name: entries[0] for name, entries in texts.items() if name != "family_id"},
            {name: entries[0] for name, entries in numbers.items() if name != "price"},
        )
        table._row_of = HashRows.of(table._hashes[:length, 0])
        table._length, table.version, table.sequence = length, 1, columns.sequence
        return table

    def columns(self) -> TableColumns:
        """What the table holds, in arrays and lists, for `of_columns`; the arrays may be those of the table.

        Any thread may call it. A row that changes meanwhile has its old or new values, column by column; its
        change is after `sequence` and repairs it.
        """
        sequence, length = self.sequence, self._length
        texts = {name: self._text_entries(column, length) for name, column in self._texts.copy().items()}
        numbers = {name: column.entries(length) for name, column in self._values.copy().items()}
        arrays = {
            "item_hashes": self._hashes,
            "live": self._live,
            "created": self._created,
            "windows": self._window,
            "sequences": self._sequences,
        }
        vectors = {
            space: (_padded(column.values, length, 0), _padded(column.present, length, False))
            for space, column in self._vectors.copy().items()
        }
        return TableColumns(
            sequence,
            length,
            self._ids[:length],
            {name: values[:length] for name, values in arrays.items()},
            texts,
            self._text_entries(self._words, length),
            numbers,
            vectors,
        )

    @staticmethod
    def _text_entries(column: TextColumn, length: int) -> Entries:
        dictionary = column.current
        rows, codes = dictionary.codes.entries(length)
        return rows, codes, dictionary.texts[:]  # after the codes: each code has its text

    @property
    def length(self) -> int:
        """The number of rows, live or not."""
        return self._length

    @property
    def item_hashes(self) -> np.ndarray:
        """The item hashes, int64 (N,)."""
        return self._hashes[: self._length, 0]

    @property
    def sequences(self) -> np.ndarray:
        """The sequence of each item's last change, int64 (N,)."""
        return self._sequences[: self._length, 0]

    @property
    def created(self) -> np.ndarray:
        """When each item was first written, microseconds since 1970, int64 (N,)."""
        return self._created[: self._length, 0]

    @property
    def arrivals(self) -> np.ndarray:
        """When each item arrived in the shop: the start of its availability, else its first write.

        Microseconds since 1970, int64 (N,).
        """
        starts = self._window[: self._length, 0]
        return np.where(starts > _EARLIEST, starts, self.created[: len(starts)])

    def arrivals_of(self, rows: np.ndarray) -> np.ndarray:
        """The same for some rows, int64 (R,)."""
        starts = self._window[rows, 0]
        return np.asarray(np.where(starts > _EARLIEST, starts, self._created[rows, 0]))

    def ids(self, rows: Iterable[int]) -> list[str]:
        """The item ids of rows."""
        return [self._ids[row] for row in rows]

    def rows(self, item_hashes: Iterable[int] | np.ndarray) -> np.ndarray:
        """The row of each item hash, int64; -1 for an unknown one."""
        return self._row_of.rows(item_hashes)

    def rows_of_ids(self, ids: frozenset[str]) -> np.ndarray:
        """The rows, int64, of these item ids; unknown ones are left out."""
        rows = self.rows(item_hash(item_id) for item_id in ids)
        return np.array([row for row in rows if row >= 0 and self._ids[row] in ids], np.int64)

    def texts(self, attribute: str) -> tuple[np.ndarray, Mapping[str, int]] | None:
        """A text attribute: codes int32 (N, W), -1 for none; the code of each text."""
        if (column := self._texts.get(attribute)) is None:
            return None
        dictionary = column.current
        return dictionary.codes.matrix(self._length), dictionary.vocabulary

    def texts_of_rows(self, attribute: str, rows: np.ndarray) -> tuple[np.ndarray, Mapping[str, int]] | None:
        """A text attribute of rows, int64 (R,): codes int32 (R, W), -1 for none; the code of each text."""
        if (column := self._texts.get(attribute)) is None:
            return None
        dictionary = column.current
        return dictionary.codes.of_rows(rows), dictionary.vocabulary

    def first_texts(self, attribute: str, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The first text of each of rows, int64 (R,): the distinct texts, and each row's index in them.

        The index is int64 (R,), -1 for no text.
        """
        if (column := self._texts.get(attribute)) is None or not len(rows):
            return [], np.full(len(rows), -1, np.int64)
        dictionary = column.current
        codes, index = np.unique(dictionary.codes.of_rows(rows)[:, 0], return_inverse=True)
        none = int(np.count_nonzero(codes < 0))  # of which there is at most one, the first
        return [dictionary.texts[code] for code in codes[none:].tolist()], index - none

    def text_entries(self, attribute: str) -> tuple[np.ndarray, np.ndarray, Sequence[str]] | None:
        """A text attribute as pairs: rows int32 (E,) in order, codes int32 (E,); the text of each code."""
        if (column := self._texts.get(attribute)) is None:
            return None
        dictionary = column.current
        return *dictionary.codes.entries(self._length), dictionary.texts

    def rows_with_text(self, attribute: str, texts: frozenset[str], length: int) -> np.ndarray:
        """Which of the first `length` rows have one of `texts`: bool (length,)."""
        column = self._texts.get(attribute)
        if column is None:
            return np.zeros(length, bool)
        dictionary = column.current
        query = [dictionary.vocabulary[text] for text in texts if text in dictionary.vocabulary]
        if not query:
            return np.zeros(length, bool)
        if len(query) == 1:
            return dictionary.codes.matches(length, lambda codes: codes == query[0])
        return dictionary.codes.matches(length, lambda codes: np.isin(codes, query))

    def rows_with_number(self, attribute: str, low: float, high: float, length: int) -> np.ndarray:
        """Which of the first `length` rows have a number from `low` to `high`: bool (length,)."""
        if (column := self._values.get(attribute)) is None:
            return np.zeros(length, bool)
        return column.matches(length, lambda values: (values >= low) & (values <= high))

    @property
    def text_attributes(self) -> tuple[str, ...]:
        """The names of the text attributes that items have, and "family_id"."""
        return tuple(self._texts)

    @property
    def live(self) -> np.ndarray:
        """Which rows have items that are not deleted, bool (N,)."""
        return self._live[: self._length, 0]

    def texts_of(self, attribute: str, row: int) -> tuple[str, ...]:
        """The texts that one item has of an attribute."""
        if (column := self._texts.get(attribute)) is None:
            return ()
        dictionary = column.current
        codes = dictionary.codes.of_rows(np.array([row]))[0].tolist()
        return tuple(dictionary.texts[code] for code in codes if code >= 0)

    @property
    def words(self) -> np.ndarray:
        """The words of the titles as codes, int32 (N, W), -1 for none."""
        return self._words.current.codes.matrix(self._length)

    def words_of_rows(self, rows: np.ndarray) -> tuple[np.ndarray, Mapping[str, int]]:
        """The title words of rows, int64 (R,): codes int32 (R, W), -1 for none; the code of each word."""
        dictionary = self._words.current
        return dictionary.codes.of_rows(rows), dictionary.vocabulary

    def numbers(self, attribute: str) -> np.ndarray | None:
        """A number attribute or "price": float64 (N, W), NaN for none."""
        column = self._values.get(attribute)
        return None if column is None else column.matrix(self._length)

    @property
    def spaces(self) -> dict[str, int]:
        """The vector spaces of the items, and their dimensions."""
        return {space: column.values.shape[1] for space, column in self._vectors.items()}

    def vectors(self, space: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The vectors of a space: float16 (N, D), zeros for none, and which rows have one, bool (N,)."""
        column = self._vectors.get(space)
        if column is None:
            return None
        present = _padded(column.present, self._length, False)[:, 0]
        return _padded(column.values, self._length, 0), present

    def retain(self, item_hashes: frozenset[int]) -> None:
        """Mark every other item as deleted, after a feed was read from its start."""
        for value, row in self._row_of.items():
            if value not in item_hashes:
                self._remove(row)

    def available(self, as_of: datetime) -> np.ndarray:
        """Which rows are live and within their availability window, bool (N,), read-only."""

        def columns() -> tuple[np.ndarray, np.ndarray]:
            length = self._length
            return self._live[:length, 0], self._window[:length]

        return self._masks.available(self.version, (as_of - _EPOCH) // _MICROSECOND, columns)

    def mask(self, key: Hashable, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The mask of rows, bool (N,), read-only, that `compute` gives: computed once for each version."""
        return self._masks.get(self.version, key, compute)

    def changed_since(self, version: int) -> tuple[np.ndarray, int]:
        """The rows, int64, that were written after a version, and the version that they reflect."""
        current = self.version
        return np.flatnonzero(self._changed[: self._length, 0] > version), current

    def apply(self, changes: Iterable[Change]) -> None:
        """Apply changes in the order of the feed."""
        for change in changes:
            row = self._row_of.get(change.item_hash)
            if change.item is not None:
                self._put(row, change.item, change)
            elif row is not None:
                self._remove(row)
                self._sequences[row] = change.sequence
            self.sequence = max(self.sequence, change.sequence)
        self._row_of.index()

    def _put(self, old_row: int | None, item: Item, change: Change) -> None:
        row = self._length if old_row is None else old_row
        self._hashes = _fit(self._hashes, row + 1, 1, 0)
        self._live = _fit(self._live, row + 1, 1, False)
        self._created = _fit(self._created, row + 1, 1, _EARLIEST)
        self._window = _fit(self._window, row + 1, 2, 0)
        self._sequences = _fit(self._sequences, row + 1, 1, 0)
        self._hashes[row] = change.item_hash
        self._sequences[row] = change.sequence
        self._created[row] = (
            _EARLIEST if change.created is None else (change.created - _EPOCH) // _MICROSECOND
        )
        self._window[row] = (
            (item.available_from - _EPOCH) // _MICROSECOND if item.available_from else _EARLIEST,
            (item.available_until - _EPOCH) // _MICROSECOND if item.available_until else _LATEST,
        )
        self._texts["family_id"].put(row, (item.family_id,) if item.family_id else ())
        self._values["price"].put(row, () if item.price is None else (item.price,))
        self._words.put(row, title_words(item.title))
        texts = [a for a in item.attributes if a.texts and a.name != "family_id"]
        numbers = [a for a in item.attributes if a.numbers and a.name != "price"]
        self._put_attributes(row, texts, numbers)
        self._put_vectors(row, change.vectors)
        self._changed = _fit(self._changed, row + 1, 1, 0)
        self._changed[row] = self.version + 1
        self._live[row] = True
        if old_row is None:
            self._ids.append(item.id)
            self._length = row + 1
        self.version += 1
        if old_row is None:
            self._row_of.add(change.item_hash, row)  # last: a reader with the row finds all columns

    def _remove(self, row: int) -> None:
        self._live[row] = False
        self._put_attributes(row, (), ())
        self.version += 1

    def _put_attributes(self, row: int, texts: Sequence[Attribute], numbers: Sequence[Attribute]) -> None:
        """Replace the attributes of a row, and drop columns that no row uses."""
        for text in texts:
            if text.name not in self._texts:
                self._texts[text.name] = TextColumn()
            self._texts[text.name].put(row, text.texts)
        for number in numbers:
            if number.name not in self._values:
                self._values[number.name] = _number_column()
            self._values[number.name].put(row, number.numbers)
        names = tuple(a.name for a in texts), tuple(a.name for a in numbers)
        lost, unused = self._attributes.replace(row, names)
        for name in lost[0]:
            self._texts[name].put(row, ())
        for name in lost[1]:
            self._values[name].put(row, ())
        for name in unused[0]:
            del self._texts[name]
        for name in unused[1]:
            del self._values[name]

    def _put_vectors(self, row: int, vectors: Mapping[str, np.ndarray]) -> None:
        for space, vector in vectors.items():
            if space not in self._vectors:
                self._vectors[space] = _VectorColumn(self._capacity, len(vector))
        for space, column in self._vectors.items():
            column.put(row, vectors.get(space))


def _padded(values: np.ndarray, length: int, empty: float) -> np.ndarray:
    return _fit(values, length, values.shape[1], empty)[:length]
