"""A message as the phrases it is made of: values and attributes of the shop, cues, numbers, and other words.

At every place the longest phrase is taken; of equally long ones a cue before a value.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from services.gateway.cues import NUMERALS, PHRASES, PLACES, UNITS, Cue
from services.gateway.vocabulary import (
    Choice,
    Key,
    Vocabulary,
    Word,
    is_unspaced,
    is_word,
    longest_of,
    words_of,
)


class Part(Enum):
    """What a phrase is, where it is no cue."""

    NUMBER = auto()
    VALUE = auto()
    NAME = auto()
    PLACE = auto()
    WORD = auto()
    STRANGE = auto()
    """Neither word nor punctuation: an emoji, say."""


@dataclass(frozen=True)
class Mark:
    """A phrase: `number` of a NUMBER or of a PLACE, from 1 and -1 for the last; `names` attributes."""

    kind: Cue | Part
    text: str
    number: float = 0.0
    choices: tuple[Choice, ...] = ()
    names: tuple[str, ...] = ()


_CUES: Mapping[Key, Cue] = {
    tuple(word.key for word in words_of(phrase)): cue
    for cue, phrases in PHRASES.items()
    for phrase in phrases.split("|")
}
_PLACES = {(word.key,): place for place, name in enumerate(PLACES, 1) for word in words_of(name)}
_AFTER_NUMBERS = (Cue.OR_LESS, Cue.OR_MORE)
_LONGEST = longest_of([*_CUES, *_PLACES])
_NUMERIC = (Cue.CURRENCY, Cue.TO)
_OF_ITEMS = frozenset((Cue.LIKE, Cue.NOT, Cue.THAN, Cue.SAME, Cue.CHEAPER, Cue.DEARER))
_BEFORE_PRONOUNS = (Cue.LIKE, Cue.NOT, Cue.THAN, Cue.SAME, Cue.AT_MOST, Cue.AT_LEAST)
_EXCEPT = "but"
_MONEY = (Part.NUMBER, Cue.CURRENCY)
_WITHIN_WORDS = (Cue.AND, Cue.IN, Cue.THAN, Cue.NOT, Cue.SAME, *_NUMERIC)
_AFTER_NUMERALS = frozenset("元块以之左上内到至")
_AFTER_SHORT_VALUES = frozenset("的色")
_PARTICLES = "的了吗呢吧啊呀我你您他她请想给就是都很也还再那穿"
_ORDINAL = "第"
_LONGEST_PHRASE = 8
_LONGEST_WORD = 64
_THOUSANDS = 3


def marks_of(message: str, vocabulary: Vocabulary) -> list[Mark]:
    """The phrases of a message, in their order."""
    words, at = words_of(message), 0
    found: list[Mark] = []
    while at < len(words):
        counted = bool(found) and found[-1].kind in _MONEY
        mark, length = _longest(words, at, vocabulary, counted)
        found.append(mark)
        at += length
    return _places(_in_their_place(_whole_words(found)))


def _longest(words: Sequence[Word], at: int, vocabulary: Vocabulary, counted: bool) -> tuple[Mark, int]:
    numerals = _numerals(words, at)
    if numerals and at and words[at - 1].key == _ORDINAL:  # 第一个, though 一个 is a phrase
        return Mark(Part.NUMBER, numerals, float(_counted(numerals))), len(numerals)
    first = words[at].key
    longest = max(_LONGEST.get(first, 0), vocabulary.longest.get(first, 0), len(numerals))
    for length in range(min(longest, len(words) - at), 0, -1):
        some = words[at : at + length]
        key, text = tuple(word.key for word in some), _written(some)
        if length == len(numerals):
            return Mark(Part.NUMBER, text, float(_counted(numerals))), length
        if (cue := _CUES.get(key)) is not None and (
            cue not in _AFTER_NUMBERS or (counted and not _is_number(words, at + length))
        ):
            return Mark(cue, text), length
        if length == 1 and key in _PLACES:
            return Mark(Part.PLACE, text, float(_PLACES[key])), 1
        if key in vocabulary.values and _stands_alone(words, at, length):
            weak = length == 1 and (len(key[0]) == 1 or key[0][0].isdecimal()) and not is_unspaced(key[0])
            if not weak:
                return Mark(Part.VALUE, text, choices=vocabulary.values[key]), length
        if key in vocabulary.names:
            return Mark(Part.NAME, text, names=vocabulary.names[key]), length
    return _single(words[at], vocabulary), 1


def _single(word: Word, vocabulary: Vocabulary) -> Mark:
    choices = vocabulary.values.get((word.key,), ())
    if word.key[0].isdecimal() and math.isfinite(number := _number(word.text)):
        return Mark(Part.NUMBER, word.text, number, choices)
    if not is_word(word.key) or len(word.text) > _LONGEST_WORD:
        return Mark(Part.STRANGE, word.text[:_LONGEST_WORD])
    return Mark(Part.WORD, word.text, choices=choices)


def _stands_alone(words: Sequence[Word], at: int, length: int) -> bool:
    """Whether a value may be meant here: one character of a run without spaces may be part of a word."""
    if length > 1 or not is_unspaced(words[at].key) or at + 1 == len(words):
        return True
    after = words[at + 1].key
    return not is_unspaced(after) or after in _AFTER_SHORT_VALUES


def _written(words: Sequence[Word]) -> str:
    text = ""
    for before, word in zip([None, *words], words, strict=False):
        apart = before is not None and not (is_unspaced(before.key) and is_unspaced(word.key))
        text += f" {word.text}" if apart else word.text
    return text


def _number(text: str) -> float:
    """A number with a decimal point or comma; a comma before three digits parts thousands."""
    whole, comma, rest = text.rpartition(",")
    thousands = comma and len(rest.partition(".")[0]) == _THOUSANDS
    plain = text.replace(",", "") if thousands else f"{whole.replace(',', '')}.{rest}" if comma else text
    try:
        return float(plain)
    except ValueError:  # 1.2.3
        return math.nan


def _numerals(words: Sequence[Word], at: int) -> str:
    """The Chinese numerals here, where they stand for a number of money or a place."""
    end = at
    while end < min(len(words), at + _LONGEST_PHRASE + 1) and (
        words[end].key in NUMERALS or words[end].key in UNITS
    ):
        end += 1
    after = words[end].key if end < len(words) else ""
    ordinal = at > 0 and words[at - 1].key == _ORDINAL
    run = "".join(word.key for word in words[at:end])
    return run if len(run) <= _LONGEST_PHRASE and (ordinal or after in _AFTER_NUMERALS) else ""


def _counted(numerals: str) -> int:
    total = section = digit = 0
    for character in numerals:
        if character in NUMERALS:
            digit = NUMERALS[character]
        elif (unit := UNITS[character]) == UNITS["万"]:
            total, section, digit = total + (section + digit) * unit, 0, 0
        else:
            section, digit = section + (digit or 1) * unit, 0
    return total + section + digit


def _whole_words(marks: Sequence[Mark]) -> list[Mark]:
    """Where no spaces are set, characters that are no other phrase make words, with what may be part of one.

    So 内衣 is a word, though 内 alone is a cue; particles at the ends of a word are none of it.
    """
    found: list[Mark] = []
    run = ""
    for at, mark in enumerate([*marks, None]):
        if mark is not None and _part_of_word(marks, at):
            run += mark.text
            continue
        word = run.strip(_PARTICLES)
        if any((character,) not in _CUES for character in word):
            found.append(Mark(Part.WORD, word[:_LONGEST_WORD]))
        run = ""
        if mark is not None:
            found.append(mark)
    return found


def _part_of_word(marks: Sequence[Mark], at: int) -> bool:
    mark = marks[at]
    if len(mark.text) > 1 or not is_unspaced(mark.text):
        return False
    if mark.kind in (Part.WORD, Cue.FILLER):
        return True
    if mark.kind in _NUMERIC and at and marks[at - 1].kind in _MONEY:
        return False
    beside = [*marks[max(at - 1, 0) : at], *marks[at + 1 : at + 2]]
    return mark.kind in _WITHIN_WORDS and any(m.kind is Part.WORD and is_unspaced(m.text) for m in beside)


def _in_their_place(marks: Sequence[Mark]) -> list[Mark]:
    """What means something beside certain cues alone: "but" after "any colour", and the pronouns."""
    found: list[Mark] = []
    any_of, before = False, None
    for mark in marks:
        kind = mark.kind
        if kind is Cue.BREAK and any_of and mark.text == _EXCEPT:
            kind = Cue.NOT
        elif kind is Cue.IT:
            kind = Cue.THIS if before in _BEFORE_PRONOUNS else Cue.FILLER
        any_of = kind is Cue.ANY or (any_of and kind is not Cue.BREAK)
        before = before if kind is Cue.FILLER else kind
        found.append(replace(mark, kind=kind))
    return found


def _is_number(words: Sequence[Word], at: int) -> bool:
    return at < len(words) and words[at].key[0].isdecimal()


def _places(marks: Sequence[Mark]) -> list[Mark]:
    """Numbers that are places of items, as in "#2", "2nd" and 第2个, become places."""
    meant = bool(_OF_ITEMS & {mark.kind for mark in marks})
    at: dict[int, float] = {}
    gone, words = set[int](), set[int]()
    for n, (mark, after) in enumerate(itertools.pairwise(marks)):
        if mark.kind is Cue.NUMBERED and after.kind is Part.NUMBER:
            at[n + 1], gone = after.number, gone | {n}
        elif mark.kind is Part.NUMBER and after.kind is Cue.PLACED:
            at[n], gone = mark.number, gone | {n + 1}
        elif mark.kind is Part.PLACE and after.kind is Part.WORD and not meant:  # a first birthday
            words.add(n)
    found = []
    for n, mark in enumerate(marks):
        if n in at:
            found.append(Mark(Part.PLACE, mark.text, at[n]))
        elif mark.kind is Cue.LAST:
            found.append(Mark(Part.PLACE, mark.text, -1.0))
        elif n not in gone:
            found.append(replace(mark, kind=Part.WORD) if n in words else mark)
    return found
