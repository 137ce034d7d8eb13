"""The state of a dialogue and the changes that messages make to it. Knows no words, messages or items.

A later statement replaces an earlier one that contradicts it. The state travels in a token, so every part is
bounded: the oldest entries beyond a limit are dropped and reported.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.catalog import filters

PRICE = "price"
MAX_CONSTRAINTS = 16
MAX_TEXTS = 32
MAX_LIKED = 50
MAX_DISLIKED = 200
MAX_SHOWN = 50
MAX_WORDS = 24
_MAX_CHARACTERS = 4000


@dataclass(frozen=True)
class AttributeConstraint:
    """An attribute has one of these texts, or none of them if `positive` is False."""

    attribute: str
    texts: tuple[str, ...]
    positive: bool = True


@dataclass(frozen=True)
class PriceConstraint:
    """A price within [low, high]; None is no bound. If `replaces`, earlier price bounds are dropped."""

    low: float | None = None
    high: float | None = None
    replaces: bool = False


@dataclass(frozen=True)
class ItemPreference:
    """The customer likes an item, or dislikes it if `positive` is False."""

    item_id: str
    positive: bool = True


@dataclass(frozen=True)
class SearchWords:
    """Words to add to the search, or to remove from it if `positive` is False."""

    words: tuple[str, ...]
    positive: bool = True


@dataclass(frozen=True)
class Forget:
    """Removes all constraints on an attribute, or on "price"."""

    attribute: str


@dataclass(frozen=True)
class Reset:
    """Clears the state except for disliked and shown items."""


Constraint = AttributeConstraint | PriceConstraint
Change = AttributeConstraint | PriceConstraint | ItemPreference | SearchWords | Forget | Reset


@dataclass(frozen=True)
class DialogueState:
    """The `constraints` and `words` to search by, oldest first, and item ids, newest last.

    `shown_ids` are the first items of the last page, best first.
    """

    constraints: tuple[Constraint, ...] = ()
    words: tuple[str, ...] = ()
    liked_ids: tuple[str, ...] = ()
    disliked_ids: tuple[str, ...] = ()
    shown_ids: tuple[str, ...] = ()

    def apply(self, changes: Iterable[Change]) -> "DialogueState":
        """The state after these changes, in their order."""
        state = self
        for change in changes:
            state = state._apply(change)
        return state

    def _apply(self, change: Change) -> "DialogueState":
        match change:
            case AttributeConstraint(attribute, texts, positive):
                narrowed = (_without(c, attribute, texts, positive) for c in self.constraints)
                others = tuple(c for c in narrowed if c is not None and c != change)
                return replace(self, constraints=(*others, change))
            case PriceConstraint():
                return replace(self, constraints=_with_price(self.constraints, change))
            case ItemPreference(item_id, positive):
                likes = tuple(i for i in self.liked_ids if i != item_id)
                dislikes = tuple(i for i in self.disliked_ids if i != item_id)
                if positive:
                    return replace(self, liked_ids=(*likes, item_id), disliked_ids=dislikes)
                return replace(self, liked_ids=likes, disliked_ids=(*dislikes, item_id))
            case SearchWords(words, positive):
                other_words = tuple(w for w in self.words if w not in words)
                return replace(self, words=(*other_words, *words) if positive else other_words)
            case Forget(attribute):
                others = tuple(c for c in self.constraints if _attribute(c) != attribute)
                return replace(self, constraints=others)
            case Reset():
                return DialogueState(disliked_ids=self.disliked_ids, shown_ids=self.shown_ids)

    def truncate(self) -> tuple["DialogueState", tuple[Change, ...]]:
        """The state within its limits, and the dropped constraints and dislikes."""
        constraints = self.constraints[-MAX_CONSTRAINTS:]
        while sum(map(_text_length, constraints)) > _MAX_CHARACTERS:
            constraints = constraints[1:]
        state = DialogueState(
            constraints,
            self.words[-MAX_WORDS:],
            self.liked_ids[-MAX_LIKED:],
            self.disliked_ids[-MAX_DISLIKED:],
            self.shown_ids[:MAX_SHOWN],
        )
        overflow = self.constraints[: len(self.constraints) - len(constraints)]
        dislikes = (ItemPreference(i, positive=False) for i in self.disliked_ids[:-MAX_DISLIKED])
        return state, (*overflow, *dislikes)


def filters_of(constraints: Sequence[Constraint]) -> list[filters.Filter]:
    """The item filter of each constraint."""
    return [_filter(constraint) for constraint in constraints]


def state_to_json(state: DialogueState) -> dict[str, Any]:
    """The state as JSON values."""
    return {
        "conditions": [
            {"a": c.attribute, "t": c.texts, "w": c.positive}
            if isinstance(c, AttributeConstraint)
            else {"l": c.low, "h": c.high}
            for c in state.constraints
        ],
        "words": state.words,
        "liked": state.liked_ids,
        "disliked": state.disliked_ids,
        "shown": state.shown_ids,
    }


def state_from_json(content: Mapping[str, Any]) -> DialogueState:
    """The state that `state_to_json` wrote."""
    constraints = tuple(
        AttributeConstraint(c["a"], tuple(c["t"]), c["w"]) if "a" in c else PriceConstraint(c["l"], c["h"])
        for c in content["conditions"]
    )
    return DialogueState(
        constraints,
        words=tuple(content["words"]),
        liked_ids=tuple(content["liked"]),
        disliked_ids=tuple(content["disliked"]),
        shown_ids=tuple(content["shown"]),
    )


def _attribute(constraint: Constraint) -> str:
    return constraint.attribute if isinstance(constraint, AttributeConstraint) else PRICE


def _text_length(constraint: Constraint) -> int:
    return sum(map(len, constraint.texts)) if isinstance(constraint, AttributeConstraint) else 0


def _without(
    constraint: Constraint, attribute: str, texts: Sequence[str], positive: bool
) -> Constraint | None:
    """A constraint without what a new one on `attribute` replaces; None if nothing remains.

    A positive constraint replaces an earlier positive one. The opposite sign removes common texts.
    """
    if not isinstance(constraint, AttributeConstraint) or constraint.attribute != attribute:
        return constraint
    if constraint.positive == positive:
        return None if positive else constraint
    others = tuple(text for text in constraint.texts if text not in texts)
    return replace(constraint, texts=others) if others else None


def _with_price(constraints: Sequence[Constraint], new: PriceConstraint) -> tuple[Constraint, ...]:
    """The constraints with a new price bound; an earlier bound that contradicts it is dropped."""
    low, high = new.low, new.high
    for old in constraints:
        if isinstance(old, PriceConstraint) and not new.replaces:
            low = old.low if low is None and (high is None or old.low is None or old.low <= high) else low
            high = old.high if high is None and (low is None or old.high is None or old.high >= low) else high
    others = tuple(c for c in constraints if not isinstance(c, PriceConstraint))
    return (*others, PriceConstraint(low, high))


def _filter(constraint: Constraint) -> filters.Filter:
    if isinstance(constraint, PriceConstraint):
        return filters.Range(PRICE, constraint.low, constraint.high)
    any_of = filters.In(constraint.attribute, frozenset(constraint.texts))
    return any_of if constraint.positive else filters.NoneOf(any_of)
