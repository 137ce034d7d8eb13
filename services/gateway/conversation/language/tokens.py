"""Splits a message into tokens: keywords, attribute names, attribute values, numbers and other words.

The longest phrase wins at every position; a keyword wins over a value of the same length.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from services.gateway.conversation.language.lexicon import NUMERALS, ORDINALS, PHRASES, UNITS, Keyword
from services.gateway.conversation.language.vocabulary import (
    AttributeValue,
    Key,
    Vocabulary,
    VocabularyWord,
    is_unspaced,
    is_word,
    phrase_lengths,
    words_of,
)


class TokenKind(Enum):
    """The kind of a token that is not a keyword."""

    NUMBER = auto()
    VALUE = auto()
    ATTRIBUTE = auto()
    POSITION = auto()
    WORD = auto()
    UNRECOGNIZED = auto()
    """A symbol, such as an emoji, or a word that is too long."""


@dataclass(frozen=True)
class Token:
    """A phrase of a message.

    `number` is that of a NUMBER, or of a POSITION: from 1, or -1 for the last item. The phrase may mean one
    of `values`, the most frequent first, or name one of `attributes`.
    """

    kind: Keyword | TokenKind
    text: str
    number: float = 0.0
    values: tuple[AttributeValue, ...] = ()
    attributes: tuple[str, ...] = ()


_KEYWORDS: Mapping[Key, Keyword] = {
    tuple(word.key for word in words_of(phrase)): keyword
    for keyword, phrases in PHRASES.items()
    for phrase in phrases.split("|")
}
_ORDINALS = {(word.key,): position for position, name in enumerate(ORDINALS, 1) for word in words_of(name)}
_AFTER_NUMBERS = (Keyword.OR_LESS, Keyword.OR_MORE)
_PHRASE_LENGTHS = phrase_lengths((*_KEYWORDS, *_ORDINALS))
_NUMERIC = (Keyword.CURRENCY, Keyword.TO)
_ITEM_KEYWORDS = frozenset(
    (Keyword.LIKE, Keyword.NOT, Keyword.THAN, Keyword.SAME, Keyword.CHEAPER, Keyword.MORE_EXPENSIVE)
)
_BEFORE_PRONOUNS = (Keyword.LIKE, Keyword.NOT, Keyword.THAN, Keyword.SAME, Keyword.AT_MOST, Keyword.AT_LEAST)
_EXCEPT = "but"
_MONEY = (TokenKind.NUMBER, Keyword.CURRENCY)
_WITHIN_WORDS = (Keyword.AND, Keyword.IN, Keyword.THAN, Keyword.NOT, Keyword.SAME, *_NUMERIC)
_AFTER_NUMERALS = frozenset("元块以之左上内到至")
_AFTER_SHORT_VALUES = frozenset("的色")
_PARTICLES = "的了吗呢吧啊呀我你您他她请想给就是都很也还再那穿"
_ORDINAL_PREFIX = "第"
_MAX_PHRASE_LENGTH = 8
_MAX_WORD_LENGTH = 64
_THOUSANDS_DIGITS = 3


def tokenize(message: str, vocabulary: Vocabulary) -> list[Token]:
    """The tokens of a message, in their order."""
    words, index = words_of(message), 0
    tokens: list[Token] = []
    while index < len(words):
        after_number = bool(tokens) and tokens[-1].kind in _MONEY
        token, length = _longest_match(words, index, vocabulary, after_number)
        tokens.append(token)
        index += length
    return _resolve_positions(_resolve_context(_join_characters(tokens)))


def _longest_match(
    words: Sequence[VocabularyWord], index: int, vocabulary: Vocabulary, after_number: bool
) -> tuple[Token, int]:
    """The token at a word and how many words it has."""
    numerals = _numerals(words, index)
    if numerals and index and words[index - 1].key == _ORDINAL_PREFIX:  # 第一个, though 一个 is a phrase
        return Token(TokenKind.NUMBER, numerals, float(_numeral_value(numerals))), len(numerals)
    first = words[index].key
    longest = max(_PHRASE_LENGTHS.get(first, 0), vocabulary.phrase_lengths.get(first, 0), len(numerals))
    for length in range(min(longest, len(words) - index), 0, -1):
        phrase = words[index : index + length]
        key, text = tuple(word.key for word in phrase), _join(phrase)
        if length == len(numerals):
            return Token(TokenKind.NUMBER, text, float(_numeral_value(numerals))), length
        if (keyword := _KEYWORDS.get(key)) is not None and (
            keyword not in _AFTER_NUMBERS or (after_number and not _is_number(words, index + length))
        ):
            return Token(keyword, text), length
        if length == 1 and key in _ORDINALS:
            return Token(TokenKind.POSITION, text, float(_ORDINALS[key])), 1
        if key in vocabulary.values and _stands_alone(words, index, length):
            weak = length == 1 and (len(key[0]) == 1 or key[0][0].isdecimal()) and not is_unspaced(key[0])
            if not weak:
                return Token(TokenKind.VALUE, text, values=vocabulary.values[key]), length
        if key in vocabulary.attribute_names:
            return Token(TokenKind.ATTRIBUTE, text, attributes=vocabulary.attribute_names[key]), length
    return _word_token(words[index], vocabulary), 1


def _word_token(word: VocabularyWord, vocabulary: Vocabulary) -> Token:
    values = vocabulary.values.get((word.key,), ())
    if word.key[0].isdecimal() and math.isfinite(number := _parse_number(word.text)):
        return Token(TokenKind.NUMBER, word.text, number, values)
    if not is_word(word.key) or len(word.text) > _MAX_WORD_LENGTH:
        return Token(TokenKind.UNRECOGNIZED, word.text[:_MAX_WORD_LENGTH])
    return Token(TokenKind.WORD, word.text, values=values)


def _stands_alone(words: Sequence[VocabularyWord], index: int, length: int) -> bool:
    """Whether a phrase can be a value: one character of unspaced text may be part of a longer word."""
    if length > 1 or not is_unspaced(words[index].key) or index + 1 == len(words):
        return True
    following = words[index + 1].key
    return not is_unspaced(following) or following in _AFTER_SHORT_VALUES


def _join(words: Sequence[VocabularyWord]) -> str:
    text = ""
    for previous, word in zip([None, *words], words, strict=False):
        spaced = previous is not None and not (is_unspaced(previous.key) and is_unspaced(word.key))
        text += f" {word.text}" if spaced else word.text
    return text


def _parse_number(text: str) -> float:
    """A number with a decimal point or comma; a comma before three digits separates thousands."""
    whole, comma, rest = text.rpartition(",")
    thousands = comma and len(rest.partition(".")[0]) == _THOUSANDS_DIGITS
    plain = text.replace(",", "") if thousands else f"{whole.replace(',', '')}.{rest}" if comma else text
    try:
        return float(plain)
    except ValueError:  # 1.2.3
        return math.nan


def _numerals(words: Sequence[VocabularyWord], index: int) -> str:
    """The Chinese numerals from a word on, if they state a price or a position; otherwise empty."""
    end = index
    while end < min(len(words), index + _MAX_PHRASE_LENGTH + 1) and (
        words[end].key in NUMERALS or words[end].key in UNITS
    ):
        end += 1
    following = words[end].key if end < len(words) else ""
    ordinal = index > 0 and words[index - 1].key == _ORDINAL_PREFIX
    numerals = "".join(word.key for word in words[index:end])
    valid = len(numerals) <= _MAX_PHRASE_LENGTH and (ordinal or following in _AFTER_NUMERALS)
    return numerals if valid else ""


def _numeral_value(numerals: str) -> int:
    total = section = digit = 0
    for character in numerals:
        if character in NUMERALS:
            digit = NUMERALS[character]
        elif (unit := UNITS[character]) == UNITS["万"]:
            total, section, digit = total + (section + digit) * unit, 0, 0
        else:
            section, digit = section + (digit or 1) * unit, 0
    return total + section + digit


def _join_characters(tokens: Sequence[Token]) -> list[Token]:
    """Join the unspaced characters that are no longer phrase into words, with the keywords inside them.

    So 内衣 is a word, though 内 alone is a keyword. Particles at the ends of a word are removed.
    """
    joined: list[Token] = []
    characters = ""
    for index, token in enumerate([*tokens, None]):
        if token is not None and _is_part_of_word(tokens, index):
            characters += token.text
            continue
        word = characters.strip(_PARTICLES)
        if any((character,) not in _KEYWORDS for character in word):
            joined.append(Token(TokenKind.WORD, word[:_MAX_WORD_LENGTH]))
        characters = ""
        if token is not None:
            joined.append(token)
    return joined


def _is_part_of_word(tokens: Sequence[Token], index: int) -> bool:
    token = tokens[index]
    if len(token.text) > 1 or not is_unspaced(token.text):
        return False
    if token.kind in (TokenKind.WORD, Keyword.FILLER):
        return True
    if token.kind in _NUMERIC and index and tokens[index - 1].kind in _MONEY:
        return False
    adjacent = [*tokens[max(index - 1, 0) : index], *tokens[index + 1 : index + 2]]
    return token.kind in _WITHIN_WORDS and any(
        other.kind is TokenKind.WORD and is_unspaced(other.text) for other in adjacent
    )


def _resolve_context(tokens: Sequence[Token]) -> list[Token]:
    """Resolve the keywords that depend on earlier ones: "but" after "any color", and pronouns."""
    resolved: list[Token] = []
    after_any, previous = False, None
    for token in tokens:
        kind = token.kind
        if kind is Keyword.BREAK and after_any and token.text == _EXCEPT:
            kind = Keyword.NOT
        elif kind is Keyword.IT:
            kind = Keyword.THIS if previous in _BEFORE_PRONOUNS else Keyword.FILLER
        after_any = kind is Keyword.ANY or (after_any and kind is not Keyword.BREAK)
        previous = previous if kind is Keyword.FILLER else kind
        resolved.append(replace(token, kind=kind))
    return resolved


def _is_number(words: Sequence[VocabularyWord], index: int) -> bool:
    return index < len(words) and words[index].key[0].isdecimal()


def _resolve_positions(tokens: Sequence[Token]) -> list[Token]:
    """Make POSITION tokens of numbers such as "#2", "2nd" and 第2个."""
    about_items = bool(_ITEM_KEYWORDS & {token.kind for token in tokens})
    positions: dict[int, float] = {}
    affixes, words = set[int](), set[int]()
    for index, (token, following) in enumerate(itertools.pairwise(tokens)):
        if token.kind is Keyword.POSITION_PREFIX and following.kind is TokenKind.NUMBER:
            positions[index + 1], affixes = following.number, affixes | {index}
        elif token.kind is TokenKind.NUMBER and following.kind is Keyword.POSITION_SUFFIX:
            positions[index], affixes = token.number, affixes | {index + 1}
        elif token.kind is TokenKind.POSITION and following.kind is TokenKind.WORD and not about_items:
            words.add(index)  # a first birthday
    resolved = []
    for index, token in enumerate(tokens):
        if index in positions:
            resolved.append(Token(TokenKind.POSITION, token.text, positions[index]))
        elif token.kind is Keyword.LAST:
            resolved.append(Token(TokenKind.POSITION, token.text, -1.0))
        elif index not in affixes:
            resolved.append(replace(token, kind=TokenKind.WORD) if index in words else token)
    return resolved
