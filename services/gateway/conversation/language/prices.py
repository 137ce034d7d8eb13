"""The price bounds that the numbers of a clause state."""

from collections.abc import Collection, Sequence

from services.gateway.conversation.language.dialogue_state import PriceConstraint
from services.gateway.conversation.language.lexicon import Keyword
from services.gateway.conversation.language.tokens import Token, TokenKind

_AROUND = 0.2
_SKIPPED_BEFORE = (Keyword.CURRENCY, Keyword.FILLER, Keyword.THAN, Keyword.PRICE)
_SKIPPED_AFTER = (Keyword.CURRENCY,)
# Whether a keyword before or after a number makes it an upper bound.
_UPPER_BEFORE = {
    Keyword.AT_MOST: True,
    Keyword.CHEAPER: True,
    Keyword.AT_LEAST: False,
    Keyword.MORE_EXPENSIVE: False,
}
_UPPER_AFTER = {Keyword.OR_LESS: True, Keyword.OR_MORE: False}


def bounds_of(tokens: Sequence[Token]) -> tuple[list[PriceConstraint], set[int]]:
    """The bounds that a clause sets, in their order, and the indices of the numbers that state them."""
    bounds: list[PriceConstraint] = []
    indices: set[int] = set()
    for index, token in enumerate(tokens):
        if token.kind is not TokenKind.NUMBER or index in indices:
            continue
        end = _range_end(tokens, index)
        if end is not None:
            low, high = sorted((token.number, tokens[end].number))
            bounds.append(PriceConstraint(low, high, replaces=True))
            indices |= {index, end}
        elif (bound := _bound(tokens, index)) is not None:
            bounds.append(bound)
            indices.add(index)
    return bounds, indices


def _bound(tokens: Sequence[Token], index: int) -> PriceConstraint | None:
    number = tokens[index].number
    left, right = _skip(tokens, index, -1, _SKIPPED_BEFORE), _skip(tokens, index, 1, _SKIPPED_AFTER)
    before, after = _kind(tokens, left), _kind(tokens, right)
    upper = _UPPER_AFTER.get(after) if isinstance(after, Keyword) else None
    if upper is None and isinstance(before, Keyword) and before in _UPPER_BEFORE:
        upper = _UPPER_BEFORE[before] != (_kind(tokens, left - 1) is Keyword.NOT)
    if upper is None and _follows_than(tokens, index) and isinstance(after, Keyword):  # 比30便宜
        upper = _UPPER_BEFORE.get(after)
    if upper is not None:
        return PriceConstraint(high=number) if upper else PriceConstraint(low=number)
    money = {Keyword.CURRENCY, Keyword.PRICE} & {_kind(tokens, index - 1), _kind(tokens, index + 1)}
    if money or Keyword.AROUND in (before, after):
        return PriceConstraint((1 - _AROUND) * number, (1 + _AROUND) * number, replaces=True)
    return None


def _range_end(tokens: Sequence[Token], index: int) -> int | None:
    """The index of the other end of a price range, as in 10 to 20 euros; None without a range."""
    joint = _skip(tokens, index, 1, _SKIPPED_AFTER)
    end = joint + 1 if _kind(tokens, joint + 1) is not Keyword.CURRENCY else joint + 2
    if _kind(tokens, joint) not in (Keyword.TO, Keyword.AND) or _kind(tokens, end) is not TokenKind.NUMBER:
        return None
    between = _kind(tokens, _skip(tokens, index, -1, _SKIPPED_BEFORE)) is Keyword.BETWEEN
    kinds = {token.kind for token in tokens[max(index - 1, 0) : end + 2]}
    money = bool(kinds & {Keyword.CURRENCY, Keyword.PRICE}) and _kind(tokens, joint) is Keyword.TO
    return end if between or money else None


def _follows_than(tokens: Sequence[Token], index: int) -> bool:
    return Keyword.THAN in {token.kind for token in tokens[:index]}


def _skip(tokens: Sequence[Token], index: int, step: int, kinds: Collection[Keyword]) -> int:
    """The index of the next token in one direction that is not of `kinds`; out of range if there is none."""
    index += step
    while 0 <= index < len(tokens) and tokens[index].kind in kinds:
        index += step
    return index


def _kind(tokens: Sequence[Token], index: int) -> Keyword | TokenKind | None:
    return tokens[index].kind if 0 <= index < len(tokens) else None
