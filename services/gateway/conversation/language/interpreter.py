"""The contract of an interpreter, which reads the messages of a dialogue, and the built-in interpreter.

The built-in interpreter reads English and Chinese by fixed phrases (`lexicon.py`) and by the shop's words.
It is deterministic. It knows the items of the last page, and neither the catalog nor earlier messages.
"""

import math
import statistics
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.gateway.conversation.language.clauses import (
    COMPARISONS,
    ITEM_KEYWORDS,
    Clause,
    Scope,
    clauses_of,
)
from services.gateway.conversation.language.dialogue_state import (
    MAX_TEXTS,
    MAX_WORDS,
    PRICE,
    AttributeConstraint,
    Change,
    Forget,
    ItemPreference,
    PriceConstraint,
    Reset,
    SearchWords,
)
from services.gateway.conversation.language.lexicon import Keyword
from services.gateway.conversation.language.tokens import Token, TokenKind, tokenize
from services.gateway.conversation.language.vocabulary import AttributeValue, Vocabulary

MAX_CHANGES = 64
MAX_UNRECOGNIZED = 20


@dataclass(frozen=True)
class ShownItem:
    """An item that a message may refer to: its text attributes, and its price, None if unknown."""

    item_id: str
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    price: float | None = None


@dataclass(frozen=True)
class InterpreterInput:
    """A message of at most 2000 characters and its context.

    `shown` are the items of the last page, best first; "this" in the message means `focus`. The caller waits
    at most `seconds` for the interpretation.
    """

    message: str
    language: str
    vocabulary: Vocabulary
    shown: Sequence[ShownItem] = ()
    focus: ShownItem | None = None
    seconds: float = math.inf


@dataclass(frozen=True)
class Interpretation:
    """The changes that a message makes, in its order, and the words that were not understood."""

    changes: tuple[Change, ...] = ()
    unrecognized: tuple[str, ...] = ()


class Interpreter(Protocol):
    """Reads messages. Runs in a thread; if it raises, the built-in interpreter reads the message."""

    def read(self, request: InterpreterInput) -> Interpretation:
        """Interpret one message."""


class PhraseInterpreter:
    """The built-in interpreter. Never raises."""

    def read(self, request: InterpreterInput) -> Interpretation:
        """Interpret one message."""
        return _MessageParser(request).parse()


class _MessageParser:
    """Parses one message, clause by clause."""

    def __init__(self, request: InterpreterInput) -> None:
        self._request = request
        self._changes: list[Change] = []
        self._words: dict[bool, list[str]] = {True: [], False: []}
        self._unrecognized: list[str] = []
        self._tokens = tokenize(request.message, request.vocabulary)
        references = (t for t in self._tokens if t.kind in (TokenKind.POSITION, Keyword.THIS))
        items = map(self._item, references)
        self._referent = next((item for item in items if item is not None), None)

    def parse(self) -> Interpretation:
        if any(token.kind is Keyword.RESET for token in self._tokens):
            self._changes.append(Reset())
        for clause in clauses_of(self._tokens):
            self._clause(clause)
        for positive, words in self._words.items():
            if words:
                self._changes.append(SearchWords(tuple(dict.fromkeys(words))[:MAX_WORDS], positive))
        unrecognized = tuple(dict.fromkeys(self._unrecognized))[:MAX_UNRECOGNIZED]
        return Interpretation(tuple(_merge_values(self._changes))[:MAX_CHANGES], unrecognized)

    def _clause(self, clause: Clause) -> None:
        self._changes += clause.prices
        if clause.is_comparison:
            self._compare_price(clause)
        for index, token in enumerate(clause.tokens):
            if index not in clause.price_indices:
                self._token(clause, token, clause.scopes[index])

    def _token(self, clause: Clause, token: Token, scope: Scope) -> None:
        match token.kind:
            case Keyword.PRICE | TokenKind.ATTRIBUTE if scope.forgotten:
                self._changes += [Forget(attribute) for attribute in token.attributes or (PRICE,)]
            case TokenKind.ATTRIBUTE:
                positive = not scope.negated and Keyword.OTHER not in clause.kinds
                self._attribute(clause, token, positive=positive)
            case TokenKind.POSITION | Keyword.THIS:
                self._item_reference(clause, token, negated=scope.negated)
            case TokenKind.VALUE if scope.forgotten and Keyword.FORGET in clause.kinds:
                self._changes.append(Forget(clause.value_of(token).attribute))
            case TokenKind.VALUE:
                self._value(clause.value_of(token), positive=not scope.negated)
            case TokenKind.NUMBER | TokenKind.WORD:
                self._word(clause, token, positive=not (scope.negated or scope.forgotten))
            case TokenKind.UNRECOGNIZED if not _is_punctuation(token.text):
                self._unrecognized.append(token.text)

    def _item(self, token: Token) -> ShownItem | None:
        """The item that a position or "this" refers to; None if there is none."""
        shown = self._request.shown
        if token.kind is Keyword.THIS:
            return self._this()
        position = int(token.number) if token.number.is_integer() else 0
        if position < 0:
            return shown[-1] if shown else None
        return shown[position - 1] if 1 <= position <= len(shown) else None

    def _this(self) -> ShownItem | None:
        shown = self._request.shown
        return self._request.focus or (shown[0] if len(shown) == 1 else None)

    def _compare_price(self, clause: Clause) -> None:
        """Bound the price by that of the item the message refers to, or by the median of the shown items."""
        prices = [item.price for item in self._request.shown if item.price is not None]
        if self._referent is not None:
            prices = [self._referent.price] if self._referent.price is not None else []
        if not prices:
            self._unrecognized += [token.text for token in clause.tokens if token.kind in COMPARISONS]
            return
        median, vocabulary = statistics.median(prices), self._request.vocabulary
        if clause.more_expensive:
            self._changes.append(PriceConstraint(low=vocabulary.price_above(median), replaces=True))
        else:
            self._changes.append(PriceConstraint(high=vocabulary.price_below(median), replaces=True))

    def _attribute(self, clause: Clause, token: Token, *, positive: bool) -> None:
        """An attribute name: it belongs to a value of the clause, or to the item the message refers to."""
        if set(token.attributes) & clause.valued_attributes:
            return
        item = (self._referent or self._this()) if clause.is_about_attribute else None
        attribute = next((a for a in token.attributes if item is not None and item.attributes.get(a)), None)
        if item is None or attribute is None:
            self._unrecognized.append(token.text)
        else:
            texts = item.attributes[attribute][:MAX_TEXTS]
            self._changes.append(AttributeConstraint(attribute, texts, positive))

    def _item_reference(self, clause: Clause, token: Token, *, negated: bool) -> None:
        """An item reference: a preference, unless the clause is about its price or an attribute."""
        item = self._item(token)
        if item is None:
            if token.kind is TokenKind.POSITION or clause.kinds & ITEM_KEYWORDS:
                self._unrecognized.append(token.text)
        elif clause.is_about_item:
            self._changes.append(ItemPreference(item.item_id, not negated))

    def _value(self, value: AttributeValue, *, positive: bool) -> None:
        self._changes.append(AttributeConstraint(value.attribute, value.texts, positive))

    def _word(self, clause: Clause, token: Token, *, positive: bool) -> None:
        """A word or number: a value if the clause names its attribute, else a search word."""
        values = [value for value in token.values if value.attribute in clause.attributes]
        if values:
            self._value(values[0], positive=positive)
        elif token.kind is TokenKind.WORD:
            self._words[positive].append(token.text)
        else:
            self._unrecognized.append(token.text)


def _merge_values(changes: Sequence[Change]) -> list[Change]:
    """The changes with one constraint per attribute and sign."""
    merged: dict[object, Change] = {}
    for change in changes:
        if not isinstance(change, AttributeConstraint):
            merged[change] = change
            continue
        key = change.attribute, change.positive
        previous = merged.get(key)
        texts = change.texts
        if isinstance(previous, AttributeConstraint):
            texts = (*previous.texts, *texts)
        unique = tuple(dict.fromkeys(texts))[:MAX_TEXTS]
        merged[key] = AttributeConstraint(change.attribute, unique, change.positive)
    return list(merged.values())


def _is_punctuation(text: str) -> bool:
    return len(text) == 1 and unicodedata.category(text)[0] == "P"
