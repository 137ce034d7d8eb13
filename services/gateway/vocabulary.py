"""The words of a shop: the values and names of its text attributes, as its items have them now.

Text is folded to words without regard to case, form (NFKC) or a plural s; where a script sets no spaces,
every character is a word, so that values in Chinese are found within a run of them.
"""

import asyncio
import bisect
import itertools
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np

from services.catalog import UNSPACED
from services.gateway.cues import CONCEPTS
from services.item_table import ItemTable

Key = tuple[str, ...]
_NUMBER = re.compile(r"([0-9]+(?:[.,][0-9]+)*)")
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_LONGEST_VALUE = 8
_MOST_SPELLINGS = 8
# Of an attribute; what has more, such as an article number, is not what people speak of.
_MOST_VALUES = 10_000
_NO_PLURAL = ("ss", "us", "is")
_HISSING = ("sses", "xes", "ches", "shes")
_SHORTEST_PLURAL = 4


@dataclass(frozen=True)
class Word:
    """A word as it is compared, and as it was written but for case and form."""

    key: str
    text: str


@dataclass(frozen=True)
class Choice:
    """A value of an attribute in the spellings that items have, and how many live items have it."""

    attribute: str
    texts: tuple[str, ...]
    items: int


@dataclass(frozen=True)
class Vocabulary:
    """`values` by folded words, the choice that most items have first; `names` likewise to attributes.

    `known` are an attribute's texts, and `prices` those of live items, rising.
    """

    values: Mapping[Key, tuple[Choice, ...]] = field(default_factory=dict)
    names: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)
    known: Mapping[str, frozenset[str]] = field(default_factory=dict)
    prices: Sequence[float] = ()

    @cached_property
    def longest(self) -> Mapping[str, int]:
        """The length of the longest phrase that begins with a word, by that word."""
        return longest_of((*self.values, *self.names))

    def below(self, price: float) -> float:
        """The highest price that is lower; one that no item has where there is none."""
        at = bisect.bisect_left(self.prices, price)
        return self.prices[at - 1] if at else max(math.nextafter(price, -math.inf), 0.0)

    def above(self, price: float) -> float:
        """The lowest price that is higher; one that no item has where there is none."""
        at = bisect.bisect_right(self.prices, price)
        return self.prices[at] if at < len(self.prices) else math.nextafter(price, math.inf)


class Vocabularies:
    """The vocabulary of a table, made anew, beside the event loop, when the table has changed."""

    def __init__(self, table: ItemTable) -> None:
        self._table, self._keys = table, dict[str, Key]()
        self._made: tuple[tuple[int, int], Vocabulary] | None = None
        self._making = asyncio.Lock()

    async def now(self) -> Vocabulary:
        """The vocabulary of the table as it is, at least as it was when it was asked for."""
        async with self._making:
            of = self._table.version, self._table.sequence
            if self._made is None or self._made[0] != of:
                self._made = of, await asyncio.to_thread(vocabulary_of, self._table, self._keys)
            return self._made[1]


def vocabulary_of(table: ItemTable, keys: dict[str, Key]) -> Vocabulary:
    """The vocabulary of the live items; `keys` holds what texts fold to, from one time to the next."""
    live = table.live
    values: dict[Key, list[Choice]] = defaultdict(list)
    known = {}
    for attribute in table.text_attributes:
        column = table.texts(attribute)
        if column is None or attribute == "family_id" or attribute.startswith("_"):
            continue
        codes, texts = column[0][: len(live)][live], list(column[1])
        counts = np.bincount(codes[codes >= 0].ravel(), minlength=len(texts))[: len(texts)]
        order = np.lexsort((np.arange(len(counts)), -counts))[:_MOST_VALUES]
        had = [(texts[code], int(counts[code])) for code in order if counts[code]]
        known[attribute] = frozenset(text for text, _ in had)
        for key, choice in _choices(attribute, had, keys).items():
            values[key].append(choice)
    ranked = {key: tuple(sorted(c, key=lambda one: (-one.items, one.attribute))) for key, c in values.items()}
    column_of_prices = table.numbers("price")
    prices = column_of_prices[: len(live)][live] if column_of_prices is not None else np.empty(0)
    return Vocabulary(ranked, _names(known), known, np.unique(prices[np.isfinite(prices)]).tolist())


def _choices(attribute: str, had: Iterable[tuple[str, int]], keys: dict[str, Key]) -> dict[Key, Choice]:
    """An attribute's texts by what they fold to, several spellings of one value together."""
    spelled: dict[Key, list[tuple[str, int]]] = defaultdict(list)
    for text, items in had:
        key = keys.get(text)
        if key is None:
            key = keys[text] = _key(text)
        if 0 < len(key) <= _LONGEST_VALUE:
            spelled[key].append((text, items))
    return {
        key: Choice(attribute, tuple(t for t, _ in some[:_MOST_SPELLINGS]), sum(n for _, n in some))
        for key, some in spelled.items()
    }


def _names(attributes: Iterable[str]) -> dict[Key, tuple[str, ...]]:
    """What attributes are called: their own names, and other words for the same concept."""
    called: dict[Key, list[tuple[int, str]]] = defaultdict(list)
    for attribute in attributes:
        own = _key(attribute)
        if not own:
            continue
        called[own].append((0, attribute))
        for concept in CONCEPTS:
            synonyms = [_key(name) for name in concept]
            if any(_within(synonym, own) for synonym in synonyms):
                for synonym in set(synonyms) - {own}:
                    called[synonym].append((len(own), attribute))
    return {key: tuple(attribute for _, attribute in sorted(some)) for key, some in called.items()}


def _key(text: str) -> Key:
    """What a text folds to, without what is no word at its ends."""
    keys = [word.key for word in words_of(text)]
    words = [at for at, key in enumerate(keys) if is_word(key)]
    return tuple(keys[words[0] : words[-1] + 1]) if words else ()


def longest_of(keys: Iterable[Key]) -> dict[str, int]:
    """The length of the longest of these that begins with a word, by that word."""
    found: dict[str, int] = {}
    for key in keys:
        found[key[0]] = max(len(key), found.get(key[0], 0))
    return found


def _within(part: Key, whole: Key) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def words_of(text: str) -> list[Word]:
    """The words, numbers and other characters of a text, without white space and what is unseen."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found: list[Word] = []
    for at, part in enumerate(_NUMBER.split(_HYPHEN.sub(" ", _APOSTROPHE.sub("", folded)))):
        if at % 2:
            found.append(Word(part, part))
            continue
        for kind, run in itertools.groupby(part, _kind):
            if kind == "letter":
                word = "".join(run)
                found.append(Word(_singular(word), word))
            elif kind:
                found += [Word(character, character) for character in run]
    return found


def is_word(key: str) -> bool:
    """Whether it has letters or numbers."""
    return _kind(key[0]) in ("letter", "unspaced") or key[0].isdecimal()


def is_unspaced(key: str) -> bool:
    """Whether it is a character of a script that sets no spaces."""
    return _kind(key[0]) == "unspaced"


@cache
def _kind(character: str) -> str:
    category = unicodedata.category(character)[0]
    if category in "LNM":
        return "unspaced" if UNSPACED.match(character) else "letter"
    return "" if category in "ZC" or character == "_" else "mark"


def _singular(word: str) -> str:
    if len(word) < _SHORTEST_PLURAL or not word.endswith("s") or word.endswith(_NO_PLURAL):
        return word
    return word[:-2] if word.endswith(_HISSING) else word[:-1]
