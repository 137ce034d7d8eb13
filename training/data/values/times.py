"""Times in a column of a table, read as microseconds since 1970 in UTC.

The unit of a number follows from its size, value by value. An order of day and month that is not certain is
never guessed. Knows nothing of what happened at those times.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NO_TIME = int(np.iinfo(np.int64).min)
EARLIEST = int(datetime(1990, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
DAY_MICROS = 86_400_000_000
FORMS = (
    "time_format",
    "ISO 8601",
    "YYYYMMDD",
    "YYYYMMDDhhmmss",
    "seconds",
    "milliseconds",
    "microseconds",
    "nanoseconds",
    "day/month/year",
    "month/day/year",
)
ACCEPTED = (
    "ISO 8601 (2026-11-28T10:15:00+01:00, without a zone UTC), 20261128, 20261128101500, and seconds, "
    "milli-, micro- or nanoseconds since 1970"
)
# A number of seconds is below 1e11 until the year 5138, of milliseconds from 1973 on above it.
_UNITS = (("seconds", 1e11, 1e6), ("milliseconds", 1e14, 1e3), ("microseconds", 1e17, 1.0))
_NUMBER = r"^[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"
_ISO = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)?(Z|[+-][0-9]{2}(:?[0-9]{2})?)?$"
)
_ZONE = r"(Z|:[0-9]{2}[^-]*[+-][0-9]{2}(:?[0-9]{2})?)$"
_ORDERED = (
    r"^(?P<first>[0-9]{1,2})[/.-](?P<second>[0-9]{1,2})[/.-](?P<year>[0-9]{4})"
    r"(?:[ T,]+(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2})(?::(?P<seconds>[0-9]{2}))?)?$"
)
_SIMPLE_FORMAT = re.compile(r"(?:%[YmdHMS]|[^%])*")
_MIN_EVIDENCE = 0.01
_MONTHS = 12


@dataclass(frozen=True)
class Times:
    """`micros` int64 (N,), NO_TIME where there is none; `form` int8 (N,), a place in FORMS or -1.

    `unordered` bool (N,) marks dates whose order of day and month is open.
    """

    micros: np.ndarray
    form: np.ndarray
    unordered: np.ndarray

    def counts(self) -> dict[str, int]:
        """How many values have each form, the most frequent first."""
        forms, counts = np.unique(self.form[self.form >= 0], return_counts=True)
        return {FORMS[forms[index]]: int(counts[index]) for index in np.argsort(-counts, kind="stable")}


def read_times(column: pa.ChunkedArray, time_format: str = "") -> Times:
    """The times of a column of texts, numbers, dates or timestamps, N values.

    `time_format` is strptime's; without it the forms of `ACCEPTED` are read, and dates with day and month in
    front where some value fits one order alone, at least a hundredth do, and none contradicts.
    """
    data_type = column.type
    if pa.types.is_timestamp(data_type) or pa.types.is_date(data_type):
        micros = _integers(column.combine_chunks().cast(pa.timestamp("us"), safe=False))
        return _times(micros, np.where(micros == NO_TIME, -1, FORMS.index("ISO 8601")))
    if (pa.types.is_integer(data_type) or pa.types.is_floating(data_type)) and not time_format:
        return _of_numbers(column.combine_chunks().cast(pa.float64(), safe=False))
    texts = column.cast(pa.string()) if pa.types.is_primitive(data_type) else column
    encoded = pc.dictionary_encode(texts.combine_chunks())
    values = pc.utf8_trim_whitespace(encoded.dictionary)
    distinct = _formatted(values, time_format) if time_format else _of_texts(values)
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    return Times(
        np.append(distinct.micros, NO_TIME)[codes],
        np.append(distinct.form, np.int8(-1))[codes],
        np.append(distinct.unordered, False)[codes],
    )


def out_of_range(micros: np.ndarray, now: datetime) -> np.ndarray:
    """Which times, int64 (N,), lie before 1990 or more than a day after now: bool (N,)."""
    latest = int(now.timestamp() * 1e6) + DAY_MICROS
    return np.asarray((micros != NO_TIME) & ((micros < EARLIEST) | (micros > latest)))


def to_datetime(micros: int) -> datetime:
    """An aware datetime; OverflowError outside the years 1 to 9999."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


def _times(micros: np.ndarray, form: np.ndarray) -> Times:
    return Times(micros, form.astype(np.int8), np.zeros(len(micros), bool))


def _integers(values: pa.Array) -> np.ndarray:
    """A timestamp array in microseconds as int64, NO_TIME for null."""
    return np.array(pc.fill_null(values.cast(pa.int64()), NO_TIME))


def _of_numbers(values: pa.Array) -> Times:
    number = np.asarray(pc.fill_null(values, np.nan), np.float64)
    micros, form = np.full(len(number), NO_TIME), np.full(len(number), -1)
    size = np.abs(number)
    for name, limit, factor in (*_UNITS, ("nanoseconds", 9e18, 1e-3)):
        of_unit = (form < 0) & (size < limit)
        micros[of_unit] = np.round(number[of_unit] * factor).astype(np.int64)
        form[of_unit] = FORMS.index(name)
    is_integer = np.where((number == np.floor(number)) & (size < _UNITS[1][1]), number, 0)
    digits = is_integer.astype(np.int64)
    for name, clock in (("YYYYMMDD", 1), ("YYYYMMDDhhmmss", 1_000_000)):
        micros_of_date, valid = _of_digits(digits // clock, digits % clock)
        micros[valid] = micros_of_date[valid]
        form[valid] = FORMS.index(name)
    return _times(micros, form)


def _of_digits(day: np.ndarray, clock: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds of dates YYYYMMDD and clocks hhmmss, int64 (N,), and which of them exist."""
    year, month, number = day // 10_000, day // 100 % 100, day % 100
    hour, minute, second = clock // 10_000, clock // 100 % 100, clock % 100
    valid = (year >= 1900) & (year <= 2100) & (month >= 1) & (month <= _MONTHS) & (number >= 1)  # noqa: PLR2004
    valid &= (hour < 24) & (minute < 60) & (second < 60)  # noqa: PLR2004 - a clock
    months = np.where(valid, (year - 1970) * _MONTHS + month - 1, 0).astype("datetime64[M]")
    length = ((months + 1).astype("datetime64[D]") - months.astype("datetime64[D]")).astype(np.int64)
    valid &= number <= length
    days = months.astype("datetime64[D]").astype(np.int64) + number - 1
    return days * DAY_MICROS + (hour * 3600 + minute * 60 + second) * 1_000_000, valid


def _of_texts(values: pa.Array) -> Times:
    result = _times(np.full(len(values), NO_TIME), np.full(len(values), -1))
    rows = np.arange(len(values))
    numeric = np.asarray(pc.match_substring_regex(values, _NUMBER), bool)
    is_numeric = _of_numbers(values.filter(pa.array(numeric)).cast(pa.float64()))
    _put(result, rows[numeric], is_numeric.micros, is_numeric.form)
    rows = rows[~numeric]
    texts = values.take(pa.array(rows))
    for normal in (False, True):  # most files have no value to make normal, which takes longer than to read
        texts = _normal(texts) if normal else texts
        is_iso = np.asarray(pc.match_substring_regex(texts, _ISO), bool)
        micros = _of_iso(texts.filter(pa.array(is_iso)))
        _put(result, rows[is_iso], micros, np.full(len(micros), FORMS.index("ISO 8601")))
        rows, texts = rows[~is_iso], texts.filter(pa.array(~is_iso))
    is_ordered = np.asarray(pc.match_substring_regex(texts, _ORDERED), bool)
    _read_ordered(result, rows[is_ordered], texts.filter(pa.array(is_ordered)))
    rows, texts = rows[~is_ordered], texts.filter(pa.array(~is_ordered))
    micros = _one_by_one(texts, datetime.fromisoformat)
    _put(result, rows, micros, np.full(len(micros), FORMS.index("ISO 8601")))
    return result


def _put(result: Times, rows: np.ndarray, micros: np.ndarray, form: np.ndarray) -> None:
    result.micros[rows] = micros
    result.form[rows] = np.where(micros == NO_TIME, -1, form)


def _normal(texts: pa.Array) -> pa.Array:
    """Zones as Z or +hh:mm without a space before, dates with hyphens, two digits, at most six decimals."""
    for pattern, by in (
        (r"^([0-9]{4})[/.-]([0-9])([/.-])", r"\1-0\2\3"),
        (r"^([0-9]{4})[/.-]([0-9]{2})[/.-]([0-9])([^0-9]|$)", r"\1-\2-0\3\4"),
        (r"^([0-9]{4})[/.-]([0-9]{2})[/.-]([0-9]{2})", r"\1-\2-\3"),
        (r"^([0-9-]{10})(T| +)([0-9]):", r"\1T0\3:"),
        (r"\s*(UTC|GMT|[Zz])$", "Z"),
        (r"\s+([+-][0-9]{2}:?[0-9]{2})$", r"\1"),
        (r"(\.[0-9]{6})[0-9]+", r"\1"),
    ):
        texts = pc.replace_substring_regex(texts, pattern, by)
    return texts


def _of_iso(texts: pa.Array) -> np.ndarray:
    zoned = pc.match_substring_regex(texts, _ZONE)
    micros = np.full(len(texts), NO_TIME)
    for rows, zone in ((zoned, "UTC"), (pc.invert(zoned), None)):
        subset = texts.filter(rows)
        try:
            values = _integers(subset.cast(pa.timestamp("us", zone)))
        except pa.ArrowInvalid:  # one at least is no date, such as 30 February
            values = _one_by_one(subset, datetime.fromisoformat)
        micros[np.asarray(rows, bool)] = values
    return micros


def _read_ordered(result: Times, rows: np.ndarray, texts: pa.Array) -> None:
    """Read dates of the form 28/11/2026, if their order of day and month is certain."""
    if not len(texts):
        return
    parts = pc.extract_regex(texts, _ORDERED)
    first, second, year, hour, minute, seconds = (
        np.asarray(pc.replace_with_mask(p, pc.equal(p, ""), "0").cast(pa.int64()), np.int64)
        for p in (parts.field(name) for name in ("first", "second", "year", "hour", "minute", "seconds"))
    )
    day_first = int(((first > _MONTHS) & (second <= _MONTHS)).sum())
    month_first = int(((second > _MONTHS) & (first <= _MONTHS)).sum())
    evidence = max(day_first, month_first)
    if min(day_first, month_first) or evidence < max(1, _MIN_EVIDENCE * len(texts)):
        result.unordered[rows] = True
        return
    day, month, form = (first, second, "day/month/year") if day_first else (second, first, "month/day/year")
    micros, valid = _of_digits(year * 10_000 + month * 100 + day, hour * 10_000 + minute * 100 + seconds)
    micros = np.where(valid, micros, NO_TIME)
    _put(result, rows, micros, np.full(len(rows), FORMS.index(form)))


def _formatted(values: pa.Array, time_format: str) -> Times:
    if _SIMPLE_FORMAT.fullmatch(time_format):
        timestamps = pc.strptime(values, format=time_format, unit="us", error_is_null=True)
        micros = _integers(timestamps)
        # Arrow takes 31 February for 3 March.
        is_equal = pc.equal(pc.strftime(timestamps, format=time_format), values)
        is_uncertain = ~np.asarray(pc.fill_null(is_equal, False), bool)
        micros[is_uncertain] = _one_by_one(
            values.filter(pa.array(is_uncertain)), lambda text: datetime.strptime(text, time_format)
        )
    else:
        micros = _one_by_one(values, lambda text: datetime.strptime(text, time_format))
    return _times(micros, np.where(micros == NO_TIME, -1, FORMS.index("time_format")))


def _one_by_one(texts: pa.Array, parse: Callable[[str], datetime]) -> np.ndarray:
    micros = np.full(len(texts), NO_TIME)
    epoch, microsecond = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
    for index, text in enumerate(texts.to_pylist()):
        try:
            value = parse(text)
            aware = value if value.tzinfo else value.replace(tzinfo=UTC)
            micros[index] = (aware - epoch) // microsecond
        except (ValueError, OverflowError):
            continue
    return micros
