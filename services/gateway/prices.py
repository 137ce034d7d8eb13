"""What the numbers of a clause say of prices."""

from collections.abc import Collection, Sequence

from services.gateway.cues import Cue
from services.gateway.dialogue import Price
from services.gateway.marks import Mark, Part

_AROUND = 0.2
_BEFORE = (Cue.CURRENCY, Cue.FILLER, Cue.THAN, Cue.PRICE)
_AT_MOST = {Cue.AT_MOST: True, Cue.CHEAPER: True, Cue.AT_LEAST: False, Cue.DEARER: False}
_AFTER = {Cue.OR_LESS: True, Cue.OR_MORE: False}


def bounds_of(marks: Sequence[Mark]) -> tuple[list[Price], set[int]]:
    """The bounds that a clause sets, in their order, and the places of the numbers that are told thereby."""
    found: list[Price] = []
    used: set[int] = set()
    for at, mark in enumerate(marks):
        if mark.kind is not Part.NUMBER or at in used:
            continue
        other = _other_end(marks, at)
        if other is not None:
            ends = sorted((mark.number, marks[other].number))
            found.append(Price(ends[0], ends[1], alone=True))
            used |= {at, other}
        elif (bound := _bound(marks, at)) is not None:
            found.append(bound)
            used.add(at)
    return found, used


def _bound(marks: Sequence[Mark], at: int) -> Price | None:
    number = marks[at].number
    before, after = _beside(marks, at, -1, _BEFORE), _beside(marks, at, 1, (Cue.CURRENCY,))
    kinds = _kind(marks, before), _kind(marks, after)
    at_most = _AFTER.get(kinds[1]) if isinstance(kinds[1], Cue) else None
    if at_most is None and isinstance(kinds[0], Cue) and kinds[0] in _AT_MOST:
        at_most = _AT_MOST[kinds[0]] != (_kind(marks, before - 1) is Cue.NOT)
    if at_most is None and _than(marks, at) and isinstance(kinds[1], Cue):  # 比30便宜
        at_most = _AT_MOST.get(kinds[1])
    if at_most is not None:
        return Price(high=number) if at_most else Price(low=number)
    money = {Cue.CURRENCY, Cue.PRICE} & {_kind(marks, at - 1), _kind(marks, at + 1)}
    if money or Cue.AROUND in kinds:
        return Price((1 - _AROUND) * number, (1 + _AROUND) * number, alone=True)
    return None


def _other_end(marks: Sequence[Mark], at: int) -> int | None:
    """Where the other end of a span of prices stands, as in 10 to 20 euros; None where there is none."""
    joint = _beside(marks, at, 1, (Cue.CURRENCY,))
    end = joint + 1 if _kind(marks, joint + 1) is not Cue.CURRENCY else joint + 2
    if _kind(marks, joint) not in (Cue.TO, Cue.AND) or _kind(marks, end) is not Part.NUMBER:
        return None
    between = _kind(marks, _beside(marks, at, -1, _BEFORE)) is Cue.BETWEEN
    kinds = {mark.kind for mark in marks[max(at - 1, 0) : end + 2]}
    money = bool(kinds & {Cue.CURRENCY, Cue.PRICE}) and _kind(marks, joint) is Cue.TO
    return end if between or money else None


def _than(marks: Sequence[Mark], at: int) -> bool:
    return Cue.THAN in {mark.kind for mark in marks[:at]}


def _beside(marks: Sequence[Mark], at: int, step: int, passed_over: Collection[Cue]) -> int:
    """The place of the next mark to one side that is not passed over; one beyond the marks for none."""
    at += step
    while 0 <= at < len(marks) and marks[at].kind in passed_over:
        at += step
    return at


def _kind(marks: Sequence[Mark], at: int) -> Cue | Part | None:
    return marks[at].kind if 0 <= at < len(marks) else None
