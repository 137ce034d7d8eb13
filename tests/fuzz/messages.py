"""Random requests built from the descriptors of the contracts, from valid to noise, with mutated bytes."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from services.rpc.request_limits import MAX_ELEMENTS
from tests.fuzz import values
from tests.support.contracts import message_class, repeated_field
from tests.support.models import DIMENSION

_DEEPEST = 12
_WILDNESS = (0.0, 0.0, 0.01, 0.05, 0.2, 0.5)
_MUTATED = 0.1
_OVER_LONG = 0.02
_SET, _SET_IF_NEEDED, _SET_IF_TOKEN = 0.35, 0.95, 0.1
_NEEDED = frozenset(
    {
        *(
            "item_id",
            "event_id",
            "type",
            "user_id",
            "items",
            "events",
            "id",
            "title",
            "limit",
            "as_of",
            "user",
        ),
        *("texts", "images", "pages", "request", "offers", "offer_id", "users", "request_id", "served_at"),
        *(
            "attribute",
            "filter",
            "share",
            "amount",
            "max_count",
            "item_hashes",
            "percent",
            "text",
            "filters",
            "min",
        ),
    }
)


class Fuzzer:
    """Makes requests: a seed and a number give the same request, except for the `tokens` of a server."""

    def __init__(self, seed: int, tokens: Mapping[str, Sequence[str]]) -> None:
        self._seed, self._tokens = seed, tokens

    def request(self, method: MethodDescriptor, number: int) -> list[bytes]:
        """The encoded messages of one call; several for a stream."""
        dice = random.Random(f"{self._seed}:{number}")
        many = dice.choice([0, 1, 1, 2, 4]) if method.client_streaming else 1
        return [self._message(method.input_type, dice) for _ in range(many)]

    def _message(self, descriptor: Descriptor, dice: random.Random) -> bytes:
        wild = dice.choice(_WILDNESS)
        data: bytes = _Maker(dice, wild, self._tokens).message(descriptor).SerializeToString()
        if dice.random() < _OVER_LONG:
            data += _over_long(descriptor, dice)
        return _mutate(data, dice) if dice.random() < _MUTATED else data


class _Maker:
    """Makes one message; each value is invalid with the probability `wild`."""

    def __init__(self, dice: random.Random, wild: float, tokens: Mapping[str, Sequence[str]]) -> None:
        self._dice, self._wild, self._tokens = dice, wild, tokens

    def message(self, descriptor: Descriptor, depth: int = 0) -> Message:
        result: Message = message_class(descriptor)()
        if descriptor.full_name == "google.protobuf.Timestamp":
            result.seconds, result.nanos = values.moment(self._dice, wild=self._odd())  # type: ignore[attr-defined]
            return result
        if descriptor.name == "Vectors" and not self._odd():
            many = DIMENSION * self._dice.choice([1, 2, 5])
            floats = [self._dice.gauss() for _ in range(many)]
            vectors: Message = message_class(descriptor)(dimension=DIMENSION, values=floats)
            return vectors
        oneof_fields = {oneof.name: self._dice.choice(oneof.fields) for oneof in descriptor.oneofs}
        for field in descriptor.fields:
            of = field.containing_oneof
            if of is not None and (
                oneof_fields[of.name] is not field or (len(of.fields) > 1 and self._odd())
            ):
                continue
            one_of_many = of is not None and len(of.fields) > 1
            if one_of_many or self._dice.random() < self._chance(field):
                self._set(result, field, depth)
        if descriptor.name == "PredictEventsRequest" and not self._odd():
            for alone in ("user_id", "visitor_id", "session") if result.users else ():  # type: ignore[attr-defined]
                result.ClearField(alone)
        return result

    def _chance(self, field: FieldDescriptor) -> float:
        """How likely a field is set."""
        if field.name in self._tokens:
            return _SET_IF_TOKEN
        return _SET_IF_NEEDED if _is_needed(field) else _SET

    def _set(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        inner = field.message_type
        if inner is not None and depth >= _DEEPEST * (1 + self._odd()):
            return
        if field.is_repeated:
            many = self._dice.choice([int(_is_needed(field)), 1, 2, 3, 5])
            for _ in range(many if self._odd() else min(many, MAX_ELEMENTS[field.full_name])):
                if inner is not None:
                    getattr(message, field.name).add().CopyFrom(self.message(inner, depth + 1))
                else:
                    getattr(message, field.name).append(self._value(field))
        elif inner is not None:
            getattr(message, field.name).CopyFrom(self.message(inner, depth + 1))
        else:
            setattr(message, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        if self._odd():
            return values.odd(field, self._dice, self._tokens)
        if field.type == FieldDescriptor.TYPE_FIXED64:
            return self._dice.choice(values.NUMBERS)
        return values.usual(field, self._dice, self._tokens)

    def _odd(self) -> bool:
        return self._dice.random() < self._wild


def _is_needed(field: FieldDescriptor) -> bool:
    """Whether a request without the field is invalid or nearly empty."""
    return field.name in _NEEDED or field.full_name.endswith("DeleteItemsRequest.item_ids")


def _over_long(descriptor: Descriptor, dice: random.Random) -> bytes:
    """The encoding of one more list, longer than its limit."""
    lists = [field for field in descriptor.fields if field.is_repeated]
    if not lists:
        return b""
    field = dice.choice(lists)
    return repeated_field(field, MAX_ELEMENTS[field.full_name] + 1)


def _mutate(data: bytes, dice: random.Random) -> bytes:
    """The bytes with a few of them changed, removed, repeated or inserted."""
    mutant = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        at, end = sorted(dice.randrange(len(mutant) + 1) for _ in range(2))
        match dice.randrange(5):
            case 0 if mutant:
                mutant[min(at, len(mutant) - 1)] ^= 1 << dice.randrange(8)
            case 1:
                del mutant[at:]
            case 2:
                del mutant[at:end]
            case 3:
                mutant[at:at] = mutant[at:end]
            case _:
                mutant[at:at] = dice.randbytes(dice.choice([1, 2, 16]))
    return bytes(mutant)
