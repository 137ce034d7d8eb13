"""How far candidates are looked for, and what a person's items are searched by.

Shared by the gateway, which asks for candidates, and training, which repeats it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PER_SOURCE = 400
PER_INTEREST = 150
SINGLES = 8


@dataclass(frozen=True)
class Interest:
    """Items, by number, that are searched by as one; no weights means equal ones."""

    numbers: Sequence[int]
    weights: Sequence[float] = ()


def interests(numbers: Sequence[int], weights: Sequence[float]) -> list[Interest]:
    """The interests in a history, newest first: at most 8 single items, then the whole."""
    latest = list(dict.fromkeys(numbers))[:SINGLES]
    found = [Interest([number]) for number in latest]
    if len(numbers) > 1:
        found.append(Interest(numbers, weights))
    return found
