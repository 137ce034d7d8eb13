"""What a message of a dialogue means: the contract of an interpreter, and the one that is built in.

The built-in one reads English and Chinese by phrases (`cues.py`) and by the shop's own vocabulary, and says
the same of the same message always. It knows neither the catalogue nor what was said before, but for the
items shown.
"""

import math
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.gateway.clauses import COMPARING, NEEDING_AN_ITEM, Clause, Scope, clauses_of
from services.gateway.cues import Cue
from services.gateway.dialogue import (
    MAX_TEXTS,
    MAX_WORDS,
    PRICE,
    Change,
    Forget,
    Liking,
    Price,
    Reset,
    Values,
    Words,
)
from services.gateway.marks import Mark, Part, marks_of
from services.gateway.vocabulary import Choice, Vocabulary

MAX_CHANGES = 64
MAX_STRANGE = 20


@dataclass(frozen=True)
class Shown:
    """An item that a message may refer to: its text attributes, and its price, None when unknown."""

    item_id: str
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    price: float | None = None


@dataclass(frozen=True)
class Heard:
    """A message of at most 2000 characters, and what it may refer to.

    `shown` are the items of the last page, best first; `focus` is what "this" means. `seconds` is how long
    an answer is waited for.
    """

    message: str
    language: str
    vocabulary: Vocabulary
    shown: Sequence[Shown] = ()
    focus: Shown | None = None
    seconds: float = math.inf


@dataclass(frozen=True)
class Reading:
    """What a message changes, in its order, and the words of it that were not understood."""

    changes: tuple[Change, ...] = ()
    not_understood: tuple[str, ...] = ()


class Interpreter(Protocol):
    """Reads messages. Called in a thread; may raise, and is then stood in for."""

    def read(self, heard: Heard) -> Reading:
        """What a message means."""


class Phrases:
    """The built-in interpreter. Never raises."""

    def read(self, heard: Heard) -> Reading:
        """What a message means."""
        return _Reader(heard).read()


class _Reader:
    """One message on its way through its clauses."""

    def __init__(self, heard: Heard) -> None:
        self._heard = heard
        self._changes: list[Change] = []
        self._words: dict[bool, list[str]] = {True: [], False: []}
        self._strange: list[str] = []
        self._marks = marks_of(heard.message, heard.vocabulary)
        told = (self._item(mark) for mark in self._marks if mark.kind in (Part.PLACE, Cue.THIS))
        self._referent = next((item for item in told if item is not None), None)

    def read(self) -> Reading:
        if any(mark.kind is Cue.RESET for mark in self._marks):
            self._changes.append(Reset())
        for clause in clauses_of(self._marks):
            self._clause(clause)
        for wanted, words in self._words.items():
            if words:
                self._changes.append(Words(tuple(dict.fromkeys(words))[:MAX_WORDS], wanted))
        strange = tuple(dict.fromkeys(self._strange))[:MAX_STRANGE]
        return Reading(tuple(_joined(self._changes))[:MAX_CHANGES], strange)

    def _clause(self, clause: Clause) -> None:
        self._changes += clause.prices
        if clause.compares:
            self._compare(clause)
        for at, mark in enumerate(clause.marks):
            if at not in clause.used:
                self._mark(clause, mark, clause.scopes[at])

    def _mark(self, clause: Clause, mark: Mark, scope: Scope) -> None:
        match mark.kind:
            case Cue.PRICE | Part.NAME if scope.forgotten:
                self._changes += [Forget(name) for name in mark.names or (PRICE,)]
            case Part.NAME:
                self._name(clause, mark, wanted=not scope.negated and Cue.OTHER not in clause.kinds)
            case Part.PLACE | Cue.THIS:
                self._point(clause, mark, negated=scope.negated)
            case Part.VALUE if scope.forgotten and Cue.FORGET in clause.kinds:
                self._changes.append(Forget(clause.choice(mark).attribute))
            case Part.VALUE:
                self._value(clause.choice(mark), wanted=not scope.negated)
            case Part.NUMBER | Part.WORD:
                self._word(clause, mark, wanted=not (scope.negated or scope.forgotten))
            case Part.STRANGE if not _is_punctuation(mark.text):
                self._strange.append(mark.text)

    def _item(self, mark: Mark) -> Shown | None:
        """The item that is meant by a place or by "this"; None where there is none."""
        shown = self._heard.shown
        if mark.kind is Cue.THIS:
            return self._this()
        place = int(mark.number) if mark.number.is_integer() else 0
        if place < 0:
            return shown[-1] if shown else None
        return shown[place - 1] if 1 <= place <= len(shown) else None

    def _this(self) -> Shown | None:
        shown = self._heard.shown
        return self._heard.focus or (shown[0] if len(shown) == 1 else None)

    def _compare(self, clause: Clause) -> None:
        """Cheaper, or dearer, than the item that is meant, or than the middle of those shown."""
        known = [item.price for item in self._heard.shown if item.price is not None]
        if self._referent is not None:
            known = [self._referent.price] if self._referent.price is not None else []
        if not known:
            self._strange += [mark.text for mark in clause.marks if mark.kind in COMPARING]
            return
        middle, vocabulary = statistics.median(known), self._heard.vocabulary
        if clause.dearer:
            self._changes.append(Price(low=vocabulary.above(middle), alone=True))
        else:
            self._changes.append(Price(high=vocabulary.below(middle), alone=True))

    def _name(self, clause: Clause, mark: Mark, *, wanted: bool) -> None:
        """An attribute that is named: of a value beside it, or of the item that is meant."""
        if set(mark.names) & clause.valued:
            return
        item = (self._referent or self._this()) if clause.points else None
        found = next((n for n in mark.names if item is not None and item.attributes.get(n)), None)
        if item is None or found is None:
            self._strange.append(mark.text)
        else:
            self._changes.append(Values(found, item.attributes[found][:MAX_TEXTS], wanted))

    def _point(self, clause: Clause, mark: Mark, *, negated: bool) -> None:
        """An item that is meant: liked or disliked, unless its price or an attribute is spoken of."""
        item = self._item(mark)
        if item is None:
            if mark.kind is Part.PLACE or clause.kinds & NEEDING_AN_ITEM:
                self._strange.append(mark.text)
        elif clause.likes:
            self._changes.append(Liking(item.item_id, not negated))

    def _value(self, choice: Choice, *, wanted: bool) -> None:
        self._changes.append(Values(choice.attribute, choice.texts, wanted))

    def _word(self, clause: Clause, mark: Mark, *, wanted: bool) -> None:
        """A word that is no value, unless the attribute of one that it may be is named beside it."""
        chosen = [choice for choice in mark.choices if choice.attribute in clause.named]
        if chosen:
            self._value(chosen[0], wanted=wanted)
        elif mark.kind is Part.WORD:
            self._words[wanted].append(mark.text)
        else:
            self._strange.append(mark.text)


def _joined(changes: Sequence[Change]) -> list[Change]:
    """The changes, all wanted values of an attribute as one, and all unwanted ones."""
    found: dict[object, Change] = {}
    for change in changes:
        if not isinstance(change, Values):
            found[change] = change
            continue
        about = change.attribute, change.wanted
        before = found.get(about)
        texts = (*before.texts, *change.texts) if isinstance(before, Values) else change.texts
        found[about] = Values(*about[:1], tuple(dict.fromkeys(texts))[:MAX_TEXTS], change.wanted)
    return list(found.values())


def _is_punctuation(text: str) -> bool:
    return len(text) == 1 and unicodedata.category(text)[0] == "P"
