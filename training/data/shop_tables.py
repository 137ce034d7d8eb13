"""Open the items or events table, match its columns, clean its cells and count what is dropped."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from services.core.errors import FailedPrecondition
from training.data.column_match import FIELDS, LISTS, Match, match_columns
from training.data.config import EventColumns, ItemColumns
from training.data.presets import PRESETS, suggestion, suggestion_without_header
from training.data.presets.conversion import attributes
from training.data.readers import reader
from training.data.readers.reader import Table
from training.data.table_report import TableReport
from training.data.values.time_formats import ORDERS, fitting_formats
from training.data.values.times import ACCEPTED, FORMS, NO_TIME, Times, read_times
from training.data.values.values import ParsedNumbers, as_json_texts, read_amounts, without_null_words

_ORDER_OF = {"day/month/year": "dmy", "month/day/year": "mdy"}
_MAY_BE_LISTS = ("image", "image_url")


@dataclass(frozen=True)
class ShopTable:
    """A table, the match of its columns with fields, and the report on it."""

    table: Table
    match: Match
    columns: ItemColumns | EventColumns
    report: TableReport

    @property
    def size(self) -> int:
        """The number of rows."""
        return int(self.table.rows.num_rows)

    def cells(self, field: str, attribute: bool = False) -> pa.ChunkedArray | None:
        """The column of a field without null words; None where there is none.

        Lists stay lists in an attribute; the other fields have one value, so that lists are JSON text.
        """
        column = (self.match.attributes if attribute else self.match.fields).get(field)
        if not column:
            return None
        cells = self.table.rows[column]
        if not attribute and pa.types.is_nested(cells.type):
            cells = as_json_texts(cells)
            if field not in _MAY_BE_LISTS:
                sample = "".join(f" such as {text!r}" for text in cells.drop_null().slice(0, 1).to_pylist())
                self.report.warnings.append(
                    f"{field}: the cells of column {column!r} are lists, each of which is read as one "
                    f"text{sample}: write one value in each row"
                )
        cells, nothing = without_null_words(cells)
        if not attribute:
            self.report.value_counts[field] = len(cells) - cells.null_count
        rows = np.flatnonzero(nothing)
        reason = f"note: {field}: a placeholder such as NULL is read as an empty cell"
        self.report.add_rows("note", reason, self.table, rows, column)
        return cells

    def amounts(self, field: str, attribute: bool = False) -> np.ndarray | None:
        """The numbers of a field, float64 (N,), None without a column; the report counts invalid values."""
        cells = self.cells(field, attribute)
        if cells is None:
            return None
        column = (self.match.attributes if attribute else self.match.fields)[field]
        amounts = read_amounts(as_json_texts(cells), self.columns.decimal)
        self._report_amounts(field, column, amounts)
        return amounts.values

    def times(self, field: str) -> Times | None:
        """The times of a field, None without a column; the report counts their formats."""
        cells = self.cells(field)
        if cells is None:
            return None
        times = read_times(cells, self.columns.time_format)
        counts = times.counts()
        if counts:
            self.report.formats[field] = ", ".join(f"{form} ({count:,})" for form, count in counts.items())
        for form in [form for form in counts if form in _ORDER_OF]:
            advice = self._format_advice(field, times.form == FORMS.index(form), [_ORDER_OF[form]])
            advice = advice or "to be sure, write all values in one form and set time_format"
            self.report.warnings.append(
                f"{field} is read as {form}, the only order that fits every value: {advice}"
            )
        unit_forms = [form for form in counts if form.endswith("seconds")]
        if len(unit_forms) > 1:
            units = ", ".join(f"{counts[form]:,} in {form}" for form in unit_forms)
            self.report.warnings.append(
                f"{field} has numbers in several units: {units}; the size of each number decides its unit"
            )
        return times

    @property
    def section(self) -> str:
        """Its section of shop.toml."""
        return "items" if isinstance(self.columns, ItemColumns) else "events"

    def time_losses(self, field: str, times: Times, cells: np.ndarray) -> list[tuple[str, np.ndarray, str]]:
        """Reasons, rows bool (N,) and remedies for invalid times among the rows in `cells`, bool (N,)."""
        invalid = cells & (times.micros == NO_TIME) & ~times.unordered
        fallback = f'write time_format, such as "%d.%m.%Y %H:%M", under [{self.section}]'
        remedy = f"accepted forms are {ACCEPTED}; otherwise {self._format_advice(field, invalid) or fallback}"
        order_advice = self._format_advice(field, times.unordered & cells, list(_ORDER_OF.values()))
        order_advice = (
            order_advice or f"write all values in one form, and set time_format under [{self.section}]"
        )
        return [
            (f"{field}: not a readable time", invalid, remedy),
            (f"{field}: day and month may be in either order", times.unordered & cells, order_advice),
        ]

    def has_value(self, field: str) -> np.ndarray:
        """Which rows have a value in a matched field, null words excluded: bool (N,)."""
        return valid(without_null_words(self.table.rows[self.match.fields[field]])[0], self.size)

    def _format_advice(self, field: str, rows: np.ndarray, orders: Collection[str] = ORDERS) -> str:
        """Advice on time_format for the values in `rows`, bool (N,); empty if no format reads every value."""
        cells = self.table.rows[self.match.fields[field]]
        if not rows.any() or not pa.types.is_string(cells.type):
            return ""
        shares = fitting_formats(without_null_words(cells)[0], rows, orders)
        formats = [f'"{name}"' for name, share in shares.items() if share == 1]
        return f"write time_format = {' or '.join(formats)} under [{self.section}]" if formats else ""

    def _report_amounts(self, field: str, column: str, amounts: ParsedNumbers) -> None:
        self.report.add_rows(
            "value",
            f"value dropped: {field} is not a number",
            self.table,
            np.flatnonzero(amounts.invalid),
            column,
            "write a number alone, or a currency and a number",
            field,
        )
        rows = np.flatnonzero(amounts.formatted)
        if len(rows):
            sample = self.table.rows[column][int(rows[0])].as_py()
            value = amounts.values[rows[0]]
            self.report.formats[field] = f"{sample!r} is {value:g}"
            place = self.table.place(int(rows[0]))
            self.report.notes.append(
                f"{field}: {len(rows):,} values such as {sample!r} ({place}) are read as numbers; that "
                f"value is read as {value:g}"
            )
        if amounts.ambiguous:
            self.report.warnings.append(
                f"{field}: no value shows whether a dot or a comma is the decimal mark; {amounts.mark!r} is "
                f'assumed: to be sure, write decimal = "{amounts.mark}" under [{self.section}]'
            )
        currencies = {unit: count for unit, count in amounts.units.items() if unit}
        if len(currencies) > 1:
            units = ", ".join(f"{count:,} in {unit}" for unit, count in currencies.items())
            self.report.warnings.append(f"{field}: several currencies, which are not converted: {units}")


def open_table(
    directory: Path,
    section: str,
    columns: ItemColumns | EventColumns,
    types: Collection[str] = (),
    preset: str = "",
) -> ShopTable:
    """Read the table of a section of shop.toml, "items" or "events", and match its columns.

    With a `preset`, every non-standard column of the items is a text attribute, unless shop.toml names the
    text attributes.

    Raises:
        FailedPrecondition: the table is missing or unreadable.
    """
    table = PRESETS[preset].read(section, directory, columns.file) if preset else None
    if table is None:
        table = _read_described(directory, section, columns)
    elif isinstance(columns, ItemColumns):
        columns = _preset_columns(columns, table)
    match = match_columns(table.name, table.rows.column_names, section, columns, types)
    report = TableReport.of(table)
    report.match = match
    report.problems += match.problems
    report.warnings += match.warnings
    report.notes += match.notes
    candidate = "" if preset else suggestion(table.rows.column_names)
    if candidate and _is_preset_usable(candidate, directory, section, columns):
        report.notes.append(_hint(candidate))
    return ShopTable(table, match, columns, report)


def _read_described(directory: Path, section: str, columns: ItemColumns | EventColumns) -> Table:
    dialect = reader.Dialect(columns.separator, columns.encoding, columns.quote, columns.columns)
    paths = reader.find(directory, section, columns.file)
    try:
        return reader.read(paths, dialect, _expected_names(section, columns))
    except FailedPrecondition as error:
        candidate = "" if columns.columns else suggestion_without_header(paths[0].name)
        if not candidate or not _is_preset_usable(candidate, directory, section, columns):
            raise
        raise FailedPrecondition(f"{error}; or {_hint(candidate)}") from None


def _is_preset_usable(
    preset: str, directory: Path, section: str, columns: ItemColumns | EventColumns
) -> bool:
    """Whether the preset can read the shop's items too; for events, from other files than this table's."""
    items = {path for part in PRESETS[preset].items for path in part.find(directory)}
    if section == "items":
        return bool(items or columns.file)
    return bool(items - set(reader.find(directory, section, columns.file)))


def _hint(preset: str) -> str:
    advice = f'write preset = "{preset}" under [source] to read all of it'
    return f"this looks like {PRESETS[preset].description}: {advice}"


def _preset_columns(columns: ItemColumns, table: Table) -> ItemColumns:
    """The columns of items in a preset's standard form, where shop.toml says nothing else."""
    explicit = columns.model_fields_set
    images = {name: name for name in ("image", "image_url") if name in table.rows.column_names}
    defaults = {"text_attributes": tuple(attributes(table)), **images}
    return columns.model_copy(
        update={name: value for name, value in defaults.items() if name not in explicit}
    )


def format_counts(values: Mapping[str, int], limit: int = 12) -> str:
    """Values with their counts, the most frequent first: 'view' (2,052), 'cart' (12)."""
    ranked = sorted(values.items(), key=lambda item: -item[1])
    more = f", and {len(ranked) - limit:,} more" if len(ranked) > limit else ""
    return ", ".join(f"{value!r} ({count:,})" for value, count in ranked[:limit]) + more


def valid(cells: pa.ChunkedArray | None, size: int) -> np.ndarray:
    """Which cells hold something: bool (N,)."""
    return np.zeros(size, bool) if cells is None else np.asarray(pc.is_valid(cells).combine_chunks(), bool)


def _expected_names(section: str, columns: ItemColumns | EventColumns) -> list[str]:
    lists = [name for part in LISTS for name in getattr(columns, part, ())]
    return [*(getattr(columns, field) for field in FIELDS[section]), *lists]
