"""A shop's vocabulary: the names and the values of the text attributes of its live items.

Text is normalized to words without case, Unicode form (NFKC) and plural s. In a script without spaces every
character is a word, which finds Chinese values inside longer text.
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
from functools import cache, cached_property, partial

import numpy as np

from services.catalog.item_table import ItemTable
from services.catalog.items import UNSPACED
from services.core.executors import BoundedPool
from services.gateway.conversation.language.lexicon import CONCEPTS

Key = tuple[str, ...]
_NUMBER = re.compile(r"([0-9]+(?:[.,][0-9]+)*)")
_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_MAX_VALUE_WORDS = 8
_MAX_SPELLINGS = 8
# Per attribute. Attributes with more values, such as article numbers, are not what customers talk about.
_MAX_VALUES = 10_000
_SINGULAR_ENDINGS = ("ss", "us", "is")
_ES_PLURALS = ("sses", "xes", "ches", "shes")
_MIN_PLURAL_LENGTH = 4


@dataclass(frozen=True)
class VocabularyWord:
    """A word: its normalized `key`, and its `text` with case and Unicode form normalized."""

    key: str
    text: str


@dataclass(frozen=True)
class AttributeValue:
    """A value of an attribute in the spellings that items have, and the number of live items with it."""

    attribute: str
    texts: tuple[str, ...]
    item_count: int


@dataclass(frozen=True)
class Vocabulary:
    """Lookup tables from normalized words.

    `values` has the attribute values of a phrase, the most frequent first; `attribute_names` has its
    attributes. `attribute_texts` has the texts of each attribute; `prices` are ascending.
    """

    values: Mapping[Key, tuple[AttributeValue, ...]] = field(default_factory=dict)
    attribute_names: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)
    attribute_texts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    prices: Sequence[float] = ()

    @cached_property
    def phrase_lengths(self) -> Mapping[str, int]:
        """The number of words in the longest phrase that starts with a word, by that word."""
        return phrase_lengths((*self.values, *self.attribute_names))

    def price_below(self, price: float) -> float:
        """The next lower price of an item; just below `price` if there is none."""
        index = bisect.bisect_left(self.prices, price)
        return self.prices[index - 1] if index else max(math.nextafter(price, -math.inf), 0.0)

    def price_above(self, price: float) -> float:
        """The next higher price of an item; just above `price` if there is none."""
        index = bisect.bisect_right(self.prices, price)
        return self.prices[index] if index < len(self.prices) else math.nextafter(price, math.inf)


class VocabularyCache:
    """Caches the vocabulary of a table and rebuilds it in a thread after the table changes."""

    def __init__(self, table: ItemTable, pool: BoundedPool) -> None:
        self._table, self._keys, self._pool = table, dict[str, Key](), pool
        self._cached: tuple[tuple[int, int], Vocabulary] | None = None
        self._lock = asyncio.Lock()

    async def current(self) -> Vocabulary:
        """The vocabulary of the table as of this call or later."""
        async with self._lock:
            version = self._table.version, self._table.sequence
            if self._cached is None or self._cached[0] != version:
                vocabulary = await self._pool.run(partial(vocabulary_of, self._table, self._keys))
                self._cached = version, vocabulary
            return self._cached[1]


def vocabulary_of(table: ItemTable, keys: dict[str, Key]) -> Vocabulary:
    """The vocabulary of the live items; `keys` caches the key of each text and loses unused texts."""
    live, old_keys = table.live, dict(keys)
    keys.clear()
    values: dict[Key, list[AttributeValue]] = defaultdict(list)
    attribute_texts = {}
    for attribute in table.text_attributes:
        column = table.text_entries(attribute)
        if column is None or attribute == "family_id" or attribute.startswith("_"):
            continue
        rows, codes, texts = column
        rows, codes = (part[: np.searchsorted(rows, len(live))] for part in (rows, codes))
        counts = np.bincount(codes[live[rows]])
        order = np.lexsort((np.arange(len(counts)), -counts))[:_MAX_VALUES]
        text_counts = [(texts[code], int(counts[code])) for code in order if counts[code]]
        attribute_texts[attribute] = frozenset(text for text, _ in text_counts)
        keys.update((text, old_keys[text] if text in old_keys else _key(text)) for text, _ in text_counts)
        for key, value in _group_spellings(attribute, text_counts, keys).items():
            values[key].append(value)
    return Vocabulary(
        {key: tuple(sorted(c, key=lambda v: (-v.item_count, v.attribute))) for key, c in values.items()},
        _attribute_names(attribute_texts),
        attribute_texts,
        _live_prices(table, live),
    )


def _live_prices(table: ItemTable, live: np.ndarray) -> list[float]:
    column = table.numbers("price")
    if column is None:
        return []
    prices = column[: len(live)][live]
    distinct: list[float] = np.unique(prices[np.isfinite(prices)]).tolist()
    return distinct


def _group_spellings(
    attribute: str, text_counts: Iterable[tuple[str, int]], keys: Mapping[str, Key]
) -> dict[Key, AttributeValue]:
    """The values of an attribute by key; the spellings of one value share a key."""
    groups: dict[Key, list[tuple[str, int]]] = defaultdict(list)
    for text, count in text_counts:
        key = keys[text]
        if 0 < len(key) <= _MAX_VALUE_WORDS:
            groups[key].append((text, count))
    return {
        key: AttributeValue(
            attribute,
            tuple(text for text, _ in spellings[:_MAX_SPELLINGS]),
            sum(count for _, count in spellings),
        )
        for key, spellings in groups.items()
    }


def _attribute_names(attributes: Iterable[str]) -> dict[Key, tuple[str, ...]]:
    """The attributes that a phrase names: by their own names, or by a synonym (`CONCEPTS`)."""
    names: dict[Key, list[tuple[int, str]]] = defaultdict(list)
    for attribute in attributes:
        own = _key(attribute)
        if not own:
            continue
        names[own].append((0, attribute))
        for concept in CONCEPTS:
            synonyms = [_key(name) for name in concept]
            if any(_contains(own, synonym) for synonym in synonyms):
                for synonym in set(synonyms) - {own}:
                    names[synonym].append((len(own), attribute))
    return {key: tuple(attribute for _, attribute in sorted(matches)) for key, matches in names.items()}


def _key(text: str) -> Key:
    """The normalized words of a text, without punctuation at its ends."""
    keys = [word.key for word in words_of(text)]
    words = [index for index, key in enumerate(keys) if is_word(key)]
    return tuple(keys[words[0] : words[-1] + 1]) if words else ()


def phrase_lengths(keys: Iterable[Key]) -> dict[str, int]:
    """The number of words in the longest of `keys` that starts with a word, by that word."""
    lengths: dict[str, int] = {}
    for key in keys:
        lengths[key[0]] = max(len(key), lengths.get(key[0], 0))
    return lengths


def _contains(key: Key, part: Key) -> bool:
    return any(key[index : index + len(part)] == part for index in range(len(key) - len(part) + 1))


def words_of(text: str) -> list[VocabularyWord]:
    """The words, numbers and other characters of a text, without white space and control characters."""
    normalized = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words: list[VocabularyWord] = []
    for index, part in enumerate(_NUMBER.split(_HYPHEN.sub(" ", _APOSTROPHE.sub("", normalized)))):
        if index % 2:
            words.append(VocabularyWord(part, part))
            continue
        for kind, characters in itertools.groupby(part, _character_kind):
            if kind == "letter":
                word = "".join(characters)
                words.append(VocabularyWord(_singular(word), word))
            elif kind:
                words += [VocabularyWord(character, character) for character in characters]
    return words


def is_word(key: str) -> bool:
    """Whether it has letters or digits."""
    return _character_kind(key[0]) in ("letter", "unspaced") or key[0].isdecimal()


def is_unspaced(key: str) -> bool:
    """Whether it is a character of a script without spaces."""
    return _character_kind(key[0]) == "unspaced"


@cache
def _character_kind(character: str) -> str:
    category = unicodedata.category(character)[0]
    if category in "LNM":
        return "unspaced" if UNSPACED.match(character) else "letter"
    return "" if category in "ZC" or character == "_" else "symbol"


def _singular(word: str) -> str:
    if len(word) < _MIN_PLURAL_LENGTH or not word.endswith("s") or word.endswith(_SINGULAR_ENDINGS):
        return word
    return word[:-2] if word.endswith(_ES_PLURALS) else word[:-1]
