"""Parse cells: null words, amounts with signs and separators, texts and lists.

Independent of the meaning of columns.
"""

import contextlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NULL_WORDS = (
    *("NULL", "Null", "null", "\\N", "nan", "NaN", "NAN", "None", "N/A", "n/a", "#N/A", "<NA>", "NaT"),
    *("undefined", "-", "–", "—"),
    *("0000-00-00", "0000-00-00 00:00:00", "0000-00-00 00:00:00.000000", "0000-00-00T00:00:00"),
    *("0000-00-00T00:00:00Z", "0000-00-00T00:00:00.000Z"),
)
"""Null words of exports, compared exactly."""
_AMOUNT = re.compile(
    r"""(?P<sign>[-−+]?) \s*
        (?P<before> [^\W\d_]{0,4}\.? \s* [^\w\s.,'’+−()-]? ) \s*
        (?P<inner>[-−]?)
        (?P<number> \d[\d.,'’\s]* | [.,]\d+ )
        (?P<dash>[-−–—]{0,2}) \s*
        (?P<after> [^\w\s.,'’+−()-]? \s* [^\W\d_]{0,4}\.? )""",
    re.VERBOSE,
)
# Accountants write -12.50 as (12.50), with a currency inside or outside.
_IN_PARENTHESES = re.compile(r"(?P<before>[^()\d]*)\((?P<inside>[^()]*\d[^()]*)\)(?P<after>[^()\d]*)")
# Words after a number that multiply it by a power of ten: Chinese, Japanese, Korean, Russian, Indian, German.
_POWERS = {
    **{"千": 3, "万": 4, "萬": 4, "만": 4, "亿": 8, "億": 8, "억": 8},
    **{"тыс": 3, "млн": 6, "tsd": 3, "lakh": 5, "mio": 6, "mln": 6},
}
_INDIAN = re.compile(r"\d{1,2}(,\d{2})+,\d{3}")
_LABELS = ("name", "title", "value", "src")
_MACHINE = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_GROUP = 3


@dataclass(frozen=True)
class ParsedNumbers:
    """The numbers of a column of N values.

    `values` float64 (N,), NaN where there is none; `invalid` bool (N,): the cell is not empty and not a
    number; `formatted` bool (N,): the number has signs, currencies or grouped digits, such as "12,50 €".
    `mark` is the decimal mark; `ambiguous` whether no value shows which mark it is; `units` counts the values
    by currency or other sign.
    """

    values: np.ndarray
    invalid: np.ndarray
    formatted: np.ndarray
    mark: str = "."
    ambiguous: bool = False
    units: Counter[str] = field(default_factory=Counter)


def without_null_words(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The column with null words and NaN replaced by null, and a mask of the replaced cells, bool (N,)."""
    if pa.types.is_floating(column.type):
        mask = pc.fill_null(pc.is_nan(column), False)
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        words = pa.array(NULL_WORDS, column.type)
        mask = pc.is_in(pc.utf8_trim_whitespace(column), value_set=words)
    else:
        return column, np.zeros(len(column), bool)
    is_null = np.asarray(mask.combine_chunks(), bool)
    return (pc.if_else(mask, pa.scalar(None, column.type), column) if is_null.any() else column), is_null


def read_amounts(column: pa.ChunkedArray, decimal: str = "") -> ParsedNumbers:
    """The numbers of a column: as machines write them, or with signs, currencies and grouped digits.

    The decimal mark is decided by the whole column: it is the one that stands last where both marks do, or
    that other than three digits follow. Where no value shows it, a dot is decimal and a comma groups.
    """
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        if not pa.types.is_integer(column.type) and not pa.types.is_floating(column.type):
            column = column.cast(pa.string(), safe=False) if pa.types.is_primitive(column.type) else column
        else:
            values = np.asarray(pc.fill_null(column.combine_chunks().cast(pa.float64(), safe=False), np.nan))
            return ParsedNumbers(values, np.zeros(len(values), bool), np.zeros(len(values), bool))
    encoded = pc.dictionary_encode(column.combine_chunks())
    texts = [text.strip() for text in encoded.dictionary.to_pylist()]
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    counts = np.bincount(codes[codes >= 0], minlength=len(texts))
    distinct = _amounts_of(texts, counts, decimal)
    return ParsedNumbers(
        np.append(distinct.values, np.nan)[codes],
        np.append(distinct.invalid, False)[codes],
        np.append(distinct.formatted, False)[codes],
        distinct.mark,
        distinct.ambiguous,
        distinct.units,
    )


def _amounts_of(texts: list[str], counts: np.ndarray, decimal: str) -> ParsedNumbers:
    enclosed = [_IN_PARENTHESES.fullmatch(text) for text in texts]
    plain = ["".join(of.groups()) if of else text for of, text in zip(enclosed, texts, strict=True)]
    matches = [_AMOUNT.fullmatch(text.strip()) for text in plain]
    digits = [re.sub(r"[\s'’]", "", match["number"]) if match else "" for match in matches]
    votes = Counter[str]()
    for number, count in zip(digits, counts.tolist(), strict=True):
        if vote := _certain_mark(number):
            votes[vote] += count
    mark = decimal or (votes.most_common(1)[0][0] if votes else ".")
    values, invalid = np.full(len(texts), math.nan), np.zeros(len(texts), bool)
    formatted, units = np.zeros(len(texts), bool), Counter[str]()
    for index, (text, match, number) in enumerate(zip(texts, matches, digits, strict=True)):
        if not text:
            continue
        machine = float(text) if _MACHINE.fullmatch(text) else None
        power, unit = _power_and_unit(match) if match else (0, "")
        value = _value(number, mark, power, fixed=bool(decimal)) if match else machine
        if value is None or not math.isfinite(value):
            invalid[index] = True
            continue
        negative = match and (enclosed[index] or _has_minus(match))
        values[index] = -value if negative else value
        if match and values[index] != machine:
            formatted[index] = True
            units[unit] += int(counts[index])
    has_mark = any(
        {".", ","} & set(number) for number, is_invalid in zip(digits, invalid, strict=True) if not is_invalid
    )
    undecided = not decimal and not votes and has_mark
    return ParsedNumbers(values, invalid, formatted, mark, undecided, units)


def _has_minus(match: re.Match[str]) -> bool:
    """Whether an amount is below zero: a dash behind it is a minus, except in "12,-", which has no cents."""
    trailing_dash = match["dash"] and not match["number"].rstrip().endswith((".", ","))
    return bool(trailing_dash or {match["sign"], match["inner"]} & {"-", "−"})


def _power_and_unit(match: re.Match[str]) -> tuple[int, str]:
    """The power of ten that a word behind the number stands for, such as 4 for "万元", and the currency."""
    suffix = match["after"].strip()
    word = next((word for word in _POWERS if suffix.casefold().startswith(word)), "")
    return _POWERS.get(word, 0), (match["before"] + suffix[len(word) :].lstrip(".")).strip()


def _certain_mark(number: str) -> str:
    """The decimal mark that the digits of a number show, or an empty text."""
    dots, commas = number.count("."), number.count(",")
    if dots and commas:
        last = "." if number.rfind(".") > number.rfind(",") else ","
        return last if number.count(last) == 1 else ""
    mark = "." if dots else ","
    if dots + commas > 1:
        return "," if dots else "."  # what comes twice groups digits
    if not dots + commas:
        return ""
    integer, fraction = number.split(mark)
    return mark if len(fraction) != _GROUP or integer in ("", "0") or len(integer) > _GROUP else ""


def _value(number: str, mark: str, power: int, *, fixed: bool) -> float | None:
    certain = "" if fixed else _certain_mark(number)
    mark = certain or mark
    group = "," if mark == "." else "."
    integer, _, fraction = number.partition(mark)
    parts = integer.split(group)
    grouped = all(len(part) == _GROUP for part in parts[1:]) or _INDIAN.fullmatch(integer)
    if group in fraction or not grouped or mark in fraction:
        return None
    digits = "".join(parts)
    return float(f"{digits or 0}.{fraction or 0}e{power}") if digits or fraction else None


def to_text(value: object) -> str:
    """A cell as text: what is nothing is empty, whole numbers have no decimals, spaces around are gone.

    An object of JSON is its name, title, value or src, the first that it has; other objects and lists are
    JSON text.
    """
    if value is None:
        return ""
    if isinstance(value, dict):
        labels = (to_text(value[key]) for key in _LABELS if isinstance(value.get(key), str | int | float))
        return next(filter(None, labels), "") or json_text(value)
    if isinstance(value, list):
        return json_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a column of whole numbers with gaps is read as floats
    return str(value).strip()


def json_text(value: object) -> str:
    """A list or an object as JSON text; what JSON has no form for, such as a date, is a string in it."""
    return json.dumps(value, ensure_ascii=False, default=_json)


def _json(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def as_json_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of lists, maps or structs as strings of JSON, null where it is null; others as they are."""
    if not pa.types.is_nested(column.type):
        return column
    texts = [None if value is None else json_text(value) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def to_texts(value: object, separator: str = "") -> tuple[str, ...]:
    """The different texts of a cell: of a list, in files of text as JSON, or parted by `separator`."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):  # a text may begin so
            value = json.loads(value)
    if isinstance(value, str) and separator:
        value = value.split(separator)
    values = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for v in values if (text := to_text(v))))


def cut_to_bytes(text: str, limit: int) -> str:
    """The beginning of a text that has at most `limit` bytes in UTF-8."""
    return text.encode()[:limit].decode(errors="ignore")
