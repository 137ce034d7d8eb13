"""The strptime formats that dates of digits have, built from the values themselves, for advice.

Decides nothing: it says how a value would have to be read under each order of day, month and year.
"""

import re
from collections.abc import Collection
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ORDERS = ("dmy", "mdy", "ymd")
_SAMPLE = 1000
_DATE = re.compile(
    r"(?P<first>\d{1,4})(?P<one>[/.-])\d{1,2}(?P<two>[/.-])(?P<last>\d{1,4})"
    r"((?P<gap>[ T,]+)\d{1,2}:\d{2}(?P<seconds>:\d{2})?(?P<fraction>\.\d{1,6})?(?P<half>\s?[AaPp][Mm])?)?"
)
_YEAR_DIGITS = 4


def fitting_formats(
    cells: pa.ChunkedArray, rows: np.ndarray, orders: Collection[str] = ORDERS
) -> dict[str, float]:
    """The formats that the values in `rows`, bool (N,), may have, with the share of all values each reads.

    `cells` are N strings; a sample of 1,000 is looked at. The format that reads the most comes first.
    """
    samples = _sample(cells.filter(pa.array(rows)))
    formats = list(dict.fromkeys(name for text in samples for name in _formats(text, orders)))
    texts = _sample(cells)
    shares = {name: sum(_reads(name, text) for text in texts) / len(texts) for name in formats}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _sample(cells: pa.ChunkedArray) -> list[str]:
    texts = pc.utf8_trim_whitespace(cells.drop_null())
    positions = np.linspace(0, len(texts) - 1, min(_SAMPLE, len(texts))).astype(np.int64)
    return list(texts.take(pa.array(positions)).to_pylist())


def _formats(text: str, orders: Collection[str]) -> list[str]:
    match = _DATE.fullmatch(text)
    if not match:
        return []
    clock = ""
    if match["gap"]:
        hour = "%I:%M" if match["half"] else "%H:%M"
        seconds = ("%S", "%S.%f")[bool(match["fraction"])] if match["seconds"] else ""
        clock = match["gap"] + hour + (f":{seconds}" if seconds else "")
        clock += match["half"][:-2] + "%p" if match["half"] else ""
    formats = []
    for order in orders:
        digits = match["first" if order.startswith("y") else "last"]
        year = "%Y" if len(digits) == _YEAR_DIGITS else "%y"
        first, second, third = (year if part == "y" else f"%{part}" for part in order)
        name = f"{first}{match['one']}{second}{match['two']}{third}{clock}"
        if _reads(name, text):
            formats.append(name)
    return formats


def _reads(name: str, text: str) -> bool:
    try:
        datetime.strptime(text, name)
    except ValueError:
        return False
    return True
