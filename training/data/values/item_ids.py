"""Item ids of events that are written otherwise than in the items file: "123.0", "00123", "b'123'"."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

_Rewrite = Callable[[str], str]
# The same value written by another program: always the same item.
_ALWAYS: tuple[tuple[str, _Rewrite], ...] = (
    ("'123.0' and '123'", lambda text: re.sub(r"^(\d+)\.0+$", r"\1", text)),
    ("b'123' and '123'", lambda text: re.sub(r"""^b(['"])(.*)\1$""", r"\2", text)),
    ("'\"123\"' and '123'", lambda text: re.sub(r"""^=?"(.*)"$""", r"\1", text)),
    ("'a  b' and 'a b'", lambda text: " ".join(text.split())),
)
# Two ids may differ by nothing else: only where it explains most of what does not meet.
_IF_MAJORITY: tuple[tuple[str, _Rewrite], ...] = (
    ("'00123' and '123'", lambda text: re.sub(r"^0+(?=\d)", "", text)),
    ("'SKU-1' and 'sku-1'", str.casefold),
)
_MIN_SHARE = 0.5


@dataclass(frozen=True)
class IdMatch:
    """Ids of events and the item each stands for; `how` counts the rows that each way of writing joins."""

    item_of: dict[str, str]
    how: dict[str, int]


def reconcile(event_ids: Sequence[str], rows: np.ndarray, item_ids: Collection[str]) -> IdMatch:
    """Join ids of events that no item has to the one item that is written alike.

    `rows` int64 (I,) counts the rows of each of the event ids. An id that two items share once it is
    rewritten is not joined.
    """
    items = set(item_ids)
    unmatched = [index for index, event_id in enumerate(event_ids) if event_id and event_id not in items]
    item_of, how = dict[str, str](), dict[str, int]()
    for rules, min_share in ((_ALWAYS, 0.0), (_IF_MAJORITY, _MIN_SHARE)):
        for name, rewrite in rules:
            by_text = _unique(items, rewrite)
            joined = {index: item for index in unmatched if (item := by_text.get(rewrite(event_ids[index])))}
            count, total = int(rows[list(joined)].sum()), int(rows[unmatched].sum())
            if joined and count >= min_share * total:
                item_of |= {event_ids[index]: item for index, item in joined.items()}
                how[name] = count
                unmatched = [index for index in unmatched if index not in joined]
    return IdMatch(item_of, how)


def _unique(items: Collection[str], rewrite: _Rewrite) -> dict[str, str]:
    """Rewritten ids and the item that has each, without those that several have."""
    by_text: dict[str, str | None] = {}
    for item in items:
        text = rewrite(item)
        by_text[text] = None if text in by_text else item
    return {text: item for text, item in by_text.items() if item}
