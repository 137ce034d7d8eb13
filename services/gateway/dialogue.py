"""What a dialogue has come to, and how what is said changes it. Knows neither words nor messages nor items.

A later statement replaces what contradicts it. Everything is bounded, for a dialogue travels in a token:
what is too much is dropped, the oldest first, and told.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from services import filters

PRICE = "price"
MAX_CONDITIONS = 16
MAX_TEXTS = 32
MAX_LIKED = 50
MAX_DISLIKED = 200
MAX_SHOWN = 50
MAX_WORDS = 24
_MAX_CHARACTERS = 4000


@dataclass(frozen=True)
class Values:
    """Any of these texts of an attribute, or with `wanted` False none of them."""

    attribute: str
    texts: tuple[str, ...]
    wanted: bool = True


@dataclass(frozen=True)
class Price:
    """A price within [low, high]; None is no bound. `alone`: what was said of the price before is over."""

    low: float | None = None
    high: float | None = None
    alone: bool = False


@dataclass(frozen=True)
class Liking:
    """An item, by its id, that is liked, or disliked."""

    item_id: str
    liked: bool = True


@dataclass(frozen=True)
class Words:
    """Words to search by, or with `wanted` False words to search by no longer."""

    words: tuple[str, ...]
    wanted: bool = True


@dataclass(frozen=True)
class Forget:
    """What was said of an attribute, or of "price", is over."""

    attribute: str


@dataclass(frozen=True)
class Reset:
    """All that was said is over; what is disliked stays away."""


Change = Values | Price | Liking | Words | Forget | Reset
Condition = Values | Price


@dataclass(frozen=True)
class Dialogue:
    """`conditions` the oldest first; `words` to search by; ids of items, the latest last.

    `shown` are the first items of the last page, best first.
    """

    conditions: tuple[Condition, ...] = ()
    words: tuple[str, ...] = ()
    liked: tuple[str, ...] = ()
    disliked: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()

    def after(self, changes: Iterable[Change]) -> "Dialogue":
        """The dialogue once all of these were said, one after the other."""
        now = self
        for change in changes:
            now = now._after(change)
        return now

    def _after(self, change: Change) -> "Dialogue":
        match change:
            case Values(attribute, texts, wanted):
                kept = (_without(c, attribute, texts, wanted) for c in self.conditions)
                left = tuple(c for c in kept if c is not None and c != change)
                return replace(self, conditions=(*left, change))
            case Price():
                return replace(self, conditions=_priced(self.conditions, change))
            case Liking(item_id, liked):
                likes = tuple(i for i in self.liked if i != item_id)
                dislikes = tuple(i for i in self.disliked if i != item_id)
                if liked:
                    return replace(self, liked=(*likes, item_id), disliked=dislikes)
                return replace(self, liked=likes, disliked=(*dislikes, item_id))
            case Words(words, wanted):
                others = tuple(w for w in self.words if w not in words)
                return replace(self, words=(*others, *words) if wanted else others)
            case Forget(attribute):
                left = tuple(c for c in self.conditions if _of(c) != attribute)
                return replace(self, conditions=left)
            case Reset():
                return Dialogue(disliked=self.disliked, shown=self.shown)

    def bounded(self) -> tuple["Dialogue", tuple[Change, ...]]:
        """The dialogue within its limits, and what had to go for that and had kept items away."""
        conditions = self.conditions[-MAX_CONDITIONS:]
        while sum(map(_length, conditions)) > _MAX_CHARACTERS:
            conditions = conditions[1:]
        now = Dialogue(
            conditions,
            self.words[-MAX_WORDS:],
            self.liked[-MAX_LIKED:],
            self.disliked[-MAX_DISLIKED:],
            self.shown[:MAX_SHOWN],
        )
        gone = self.conditions[: len(self.conditions) - len(conditions)]
        return now, (*gone, *(Liking(i, liked=False) for i in self.disliked[:-MAX_DISLIKED]))


def filters_of(conditions: Sequence[Condition]) -> list[filters.Filter]:
    """What items have to meet, one filter for each condition."""
    return [_filter(condition) for condition in conditions]


def content_of(dialogue: Dialogue) -> dict[str, Any]:
    """The dialogue as JSON can hold it."""
    conditions = [
        {"a": c.attribute, "t": c.texts, "w": c.wanted}
        if isinstance(c, Values)
        else {"l": c.low, "h": c.high}
        for c in dialogue.conditions
    ]
    return asdict(replace(dialogue, conditions=())) | {"conditions": conditions}


def dialogue_from(content: Mapping[str, Any]) -> Dialogue:
    """The dialogue of such a content."""
    conditions = tuple(
        Values(c["a"], tuple(c["t"]), c["w"]) if "a" in c else Price(c["l"], c["h"])
        for c in content["conditions"]
    )
    lists = {name: tuple(content[name]) for name in ("words", "liked", "disliked", "shown")}
    return Dialogue(conditions, **lists)


def _of(condition: Condition) -> str:
    return condition.attribute if isinstance(condition, Values) else PRICE


def _length(condition: Condition) -> int:
    return sum(map(len, condition.texts)) if isinstance(condition, Values) else 0


def _without(condition: Condition, attribute: str, texts: Sequence[str], wanted: bool) -> Condition | None:
    """What is left of a condition once texts of an attribute are wanted, or are not."""
    if not isinstance(condition, Values) or condition.attribute != attribute:
        return condition
    if condition.wanted == wanted:
        return None if wanted else condition
    left = tuple(text for text in condition.texts if text not in texts)
    return replace(condition, texts=left) if left else None


def _priced(conditions: Sequence[Condition], new: Price) -> tuple[Condition, ...]:
    """The conditions with a new bound of the price; an older bound that contradicts it goes."""
    low, high = new.low, new.high
    for old in conditions:
        if isinstance(old, Price) and not new.alone:
            low = old.low if low is None and (high is None or old.low is None or old.low <= high) else low
            high = old.high if high is None and (low is None or old.high is None or old.high >= low) else high
    others = tuple(c for c in conditions if not isinstance(c, Price))
    return (*others, Price(low, high))


def _filter(condition: Condition) -> filters.Filter:
    if isinstance(condition, Price):
        return filters.Range(PRICE, condition.low, condition.high)
    chosen = filters.In(condition.attribute, frozenset(condition.texts))
    return chosen if condition.wanted else filters.NoneOf(chosen)
