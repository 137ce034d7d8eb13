"""The clauses of a message: what stands between its breaks, and what in one bears on what."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from services.gateway.cues import Cue
from services.gateway.marks import Mark, Part
from services.gateway.prices import bounds_of
from services.gateway.vocabulary import Choice

COMPARING = frozenset((Cue.CHEAPER, Cue.DEARER, Cue.AT_MOST, Cue.AT_LEAST))
NEEDING_AN_ITEM = frozenset(
    (Cue.LIKE, Cue.NOT, Cue.SAME, Cue.OTHER, Cue.THAN, Cue.AT_MOST, Cue.AT_LEAST, Part.NAME)
)
_POINTING = frozenset((Cue.THIS, Cue.SAME, Cue.OTHER, Part.PLACE))
_FREES_WITHIN = 2
_COMPLAINTS = ("too", "so", "太")


@dataclass(frozen=True)
class Scope:
    """Whether what stands at a place is not wanted, and whether it is to be forgotten."""

    negated: bool
    forgotten: bool


class Clause:
    """`prices` are what the numbers at `used` state; attributes are `named`, and of `valued` ones are values.

    `scopes` has one for each of the marks.
    """

    def __init__(self, marks: Sequence[Mark]) -> None:
        self.marks, self.kinds = marks, frozenset(mark.kind for mark in marks)
        self.prices, self.used = bounds_of(marks)
        self.named = frozenset(name for mark in marks for name in mark.names)
        choices = [choice for mark in marks for choice in mark.choices if choice.attribute in self.named]
        meant = [self.choice(mark) for mark in marks if mark.kind is Part.VALUE]
        self.valued = frozenset(choice.attribute for choice in (*choices, *meant))
        self.scopes = _scopes(marks)

    @property
    def compares(self) -> bool:
        """Whether it asks for what is cheaper or dearer than something, and states no price."""
        return bool(self.kinds & COMPARING) and not self.prices

    @property
    def dearer(self) -> bool:
        """Whether that is what is dearer: "not cheaper" is, "not dearer" and "not too dear" are not."""
        dearer = bool(self.kinds & {Cue.DEARER, Cue.AT_LEAST})
        pairs = pairwise(mark for mark in self.marks if mark.kind is not Cue.FILLER)
        negated = any(
            first.kind is Cue.NOT and then.kind in COMPARING and not then.text.lower().startswith(_COMPLAINTS)
            for first, then in pairs
        )
        return dearer != negated

    @property
    def points(self) -> bool:
        """Whether an attribute of an item that is meant is spoken of."""
        return bool(self.named - self.valued) and bool(self.kinds & _POINTING)

    @property
    def likes(self) -> bool:
        """Whether an item that is meant is itself liked or disliked."""
        return not self.points and (Cue.LIKE in self.kinds or not (self.compares or self.prices))

    def choice(self, mark: Mark) -> Choice:
        """What a value means: one of an attribute that is named beside it, else what most items have."""
        named = (choice for choice in mark.choices if choice.attribute in self.named)
        return next(named, mark.choices[0])


def clauses_of(marks: Sequence[Mark]) -> list[Clause]:
    """The clauses, in their order."""
    parts: dict[int, list[Mark]] = defaultdict(list)
    at = 0
    for mark in marks:
        if mark.kind is Cue.BREAK:
            at += 1
        else:
            parts[at].append(mark)
    return [Clause(part) for part in parts.values()]


def _scopes(marks: Sequence[Mark]) -> list[Scope]:
    found: list[Scope] = []
    negated = forgetting = False
    before: Cue | Part | None = None
    for at, mark in enumerate(marks):
        if mark.kind is Cue.NOT:
            negated = True
        elif mark.kind is Cue.WANT or (mark.kind is Cue.IN and before is Cue.AND):  # no Nike and in red
            negated = forgetting = False
        elif mark.kind in (Cue.FORGET, Cue.ANY):
            forgetting = True
        freed = Cue.FREE in [after.kind for after in marks[at + 1 : at + 1 + _FREES_WITHIN]]
        found.append(Scope(negated, forgetting or freed or before is Cue.FREE))
        before = mark.kind
    return found
