"""The clauses of a message: the tokens between two breaks, and how they modify each other."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from services.gateway.conversation.language.lexicon import Keyword
from services.gateway.conversation.language.prices import bounds_of
from services.gateway.conversation.language.tokens import Token, TokenKind
from services.gateway.conversation.language.vocabulary import AttributeValue

COMPARISONS = frozenset((Keyword.CHEAPER, Keyword.MORE_EXPENSIVE, Keyword.AT_MOST, Keyword.AT_LEAST))
# A clause with one of these is about an item: if it does not say which, the pronoun is unrecognized.
ITEM_KEYWORDS = frozenset(
    (
        Keyword.LIKE,
        Keyword.NOT,
        Keyword.SAME,
        Keyword.OTHER,
        Keyword.THAN,
        Keyword.AT_MOST,
        Keyword.AT_LEAST,
        TokenKind.ATTRIBUTE,
    )
)
_REFERENCES = frozenset((Keyword.THIS, Keyword.SAME, Keyword.OTHER, TokenKind.POSITION))
_INDIFFERENCE_WINDOW = 2
_COMPLAINTS = ("too", "so", "太")


@dataclass(frozen=True)
class Scope:
    """Whether a token is negated, and whether it drops an earlier constraint."""

    negated: bool
    forgotten: bool


class Clause:
    """One clause of a message.

    `prices` are the bounds that the numbers at `price_indices` state. The clause names `attributes`, and has
    values of `valued_attributes`. `scopes` has one entry per token.
    """

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens, self.kinds = tokens, frozenset(token.kind for token in tokens)
        self.prices, self.price_indices = bounds_of(tokens)
        self.attributes = frozenset(name for token in tokens for name in token.attributes)
        candidates = [
            value for token in tokens for value in token.values if value.attribute in self.attributes
        ]
        best = [self.value_of(token) for token in tokens if token.kind is TokenKind.VALUE]
        self.valued_attributes = frozenset(value.attribute for value in (*candidates, *best))
        self.scopes = _scopes(tokens)

    @property
    def is_comparison(self) -> bool:
        """Whether it asks for a lower or a higher price and states no number."""
        return bool(self.kinds & COMPARISONS) and not self.prices

    @property
    def more_expensive(self) -> bool:
        """Whether it asks for a higher price: "not cheaper" does, "not too expensive" does not."""
        more = bool(self.kinds & {Keyword.MORE_EXPENSIVE, Keyword.AT_LEAST})
        pairs = pairwise(token for token in self.tokens if token.kind is not Keyword.FILLER)
        negated = any(
            first.kind is Keyword.NOT
            and second.kind in COMPARISONS
            and not second.text.lower().startswith(_COMPLAINTS)
            for first, second in pairs
        )
        return more != negated

    @property
    def is_about_attribute(self) -> bool:
        """Whether it refers to an attribute of an item, as in "the color of the first one"."""
        return bool(self.attributes - self.valued_attributes) and bool(self.kinds & _REFERENCES)

    @property
    def is_about_item(self) -> bool:
        """Whether the customer likes or dislikes the item itself, not its price or an attribute."""
        if self.is_about_attribute:
            return False
        return Keyword.LIKE in self.kinds or not (self.is_comparison or self.prices)

    def value_of(self, token: Token) -> AttributeValue:
        """The value that a token means: of an attribute that the clause names, else the most frequent one."""
        candidates = (value for value in token.values if value.attribute in self.attributes)
        return next(candidates, token.values[0])


def clauses_of(tokens: Sequence[Token]) -> list[Clause]:
    """The clauses, in their order."""
    parts: dict[int, list[Token]] = defaultdict(list)
    index = 0
    for token in tokens:
        if token.kind is Keyword.BREAK:
            index += 1
        else:
            parts[index].append(token)
    return [Clause(part) for part in parts.values()]


def _scopes(tokens: Sequence[Token]) -> list[Scope]:
    scopes: list[Scope] = []
    negated = forgotten = False
    previous: Keyword | TokenKind | None = None
    for index, token in enumerate(tokens):
        if token.kind is Keyword.NOT:
            negated = True
        elif token.kind is Keyword.WANT or (
            token.kind is Keyword.IN and previous is Keyword.AND
        ):  # no Nike and in red
            negated = forgotten = False
        elif token.kind in (Keyword.FORGET, Keyword.ANY):
            forgotten = True
        window = tokens[index + 1 : index + 1 + _INDIFFERENCE_WINDOW]
        indifferent = Keyword.INDIFFERENT in (*(other.kind for other in window), previous)
        scopes.append(Scope(negated, forgotten or indifferent))
        previous = token.kind
    return scopes
