"""Field values: realistic ones by field name, and ones at and beyond every limit."""

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from PIL import Image

from services.catalog.items import item_hash
from tests.support.shops import EVENT_TYPES, UNTIL, items

_TYPE = FieldDescriptor
_IDS = [item.id for item in items()]
NUMBERS = sorted(map(item_hash, _IDS))
_NOW = int(UNTIL.timestamp())
_DAY = 86_400
_PEOPLE = [f"user-{n}" for n in range(12)]
_VISITORS = [f"visitor-{n}" for n in range(12)]

TEXTS: Mapping[str, Sequence[str]] = {
    "user_id": _PEOPLE,
    "visitor_id": _VISITORS,
    "session_id": ["visit-1", "visit-2"],
    "item_id": _IDS,
    "item_ids": _IDS,
    "exclude_item_ids": _IDS,
    "context_item_ids": _IDS,
    "liked_item_ids": _IDS,
    "disliked_item_ids": _IDS,
    "focus_item_id": _IDS,
    "id": [*_IDS[:8], *(f"new-{n}" for n in range(50))],
    "family_id": ["garden-family-1", "another-family"],
    "type": list(EVENT_TYPES),
    "channel": ["web", "app", "store"],
    "scenario": ["home", "similar", "together", "basket", "new", "popular", "", "nowhere"],
    "language": ["en", "zh", ""],
    "attribute": ["world", "colour", "price", "id", "family_id", "size", "unknown"],
    "text": ["garden", "kitchen", "red", "blue", "a red garden thing", "garden-03"],
    "name": ["world", "colour", "size", "_hidden"],
    "title": ["kitchen thing", "a <b>red</b> garden thing", "红色 花园"],
    "description": ["", "something for the garden"],
    "message": [
        "something red under 5",
        "not this one",
        "cheaper",
        "红色的",
        "reset",
        "like the 2nd but blue",
    ],
    "source": ["new_arrivals", "popular", "co_occurrence", "text", "image"],
    "sources": ["new_arrivals", "popular", "co_occurrence"],
    "relax": ["caps", "min_relevance", "filter"],
    "segments": ["champion", "loyal", "new", "unknown"],
    "offer_id": [f"offer-{n}" for n in range(20)],
    "uri": ["http://127.0.0.1:9/one.png", "https://192.0.2.1/two.jpg"],
    "bundle": [*[""] * 9, "20200101T000000-000000000000"],
    "request_id": ["request-1", "request-2", "request-3"],
    "arm": ["a", "b"],
}

_PATHS = (["items.item_id", "attribution_token", "items"], ["title", "price", "attributes", "image"])

_FLOATS_OF: Mapping[str, Sequence[float]] = {
    "share": [0.1, 0.5, 1.0],
    "diversity": [0.1, 0.5, 1.0],
    "exploration": [0.1, 0.5, 1.0],
    "min_relevance": [0.1, 0.5],
    "image_weight": [0.1, 0.5, 1.0],
    "margin": [0.2, 1.0],
    "amount": [0.5, 1.0, 1.0],
}
_INTEGERS_OF: Mapping[str, Sequence[int]] = {
    "item_index": [0],
    "excluded_indices": [0],
    "page_size": [0, 1, 5, 20, 500],
}

_ODD_TEXTS = [
    "",
    " ",
    "\0",
    "a\0b",
    "\n\t\r",
    "\u200b\u202e\ufeff",
    "\U0010ffff\ue000",
    "e\u0301" * 40,
    "👩‍👩‍👧‍👦" * 30,
    "\u0627\u0644" * 60,
    "'; DROP TABLE items; --",
    "%s%n{0}${HOME}",
    "../../etc/passwd",
    "NaN",
    "-1",
    "9" * 40,
    "1e400",
    "ß" * 128,
    "x" * 129,
    "x" * 257,
    "x" * 2001,
    "茶" * 30_000,
    "x" * 70_000,
    "p1.0123456789ab",
    "9223372036854775807.0123456789ab",
]
_ODD_FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-300,
    1e12,
    1e12 + 1e3,
    1e308,
    -1e308,
    math.inf,
    -math.inf,
    math.nan,
]
_LIKE_A_TOKEN = 0.7
_EDGES = [0, 1, 2, 20, 500, 501, 1000, 1001, 2000, 2001, 10_000]
_INTEGERS = {
    _TYPE.TYPE_INT32: [*_EDGES, -1, 2**31 - 1, -(2**31)],
    _TYPE.TYPE_UINT32: [*_EDGES, 2**31, 2**32 - 1],
    _TYPE.TYPE_FIXED32: [*_EDGES, 2**31, 2**32 - 1],
    _TYPE.TYPE_INT64: [*_EDGES, -1, 2**63 - 1, -(2**63)],
    _TYPE.TYPE_UINT64: [*_EDGES, 2**63 - 1, 2**63, 2**64 - 1],
    _TYPE.TYPE_FIXED64: [*_EDGES, 2**62, 2**63 - 1, 2**63, 2**64 - 1],
}
_MOMENTS = [
    (0, 0),
    (-1, 999_999_999),
    (_NOW, -1),
    (_NOW, 10**9),
    (-62135596800, 0),
    (-62135596801, 0),
    (253402300799, 999_999_999),
    (253402300800, 0),
    (2**63 - 1, 0),
    (-(2**63), 0),
]


def _picture(form: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((24, 24), 90).convert("RGB").save(out, form)
    return out.getvalue()


_PICTURES = [_picture("PNG"), _picture("JPEG"), _picture("WEBP"), _picture("GIF")]
_ODD_BYTES = [b"", b"\0", b"GIF89a", _PICTURES[0][:60], _PICTURES[1][:200], b"x" * 5000, b"\xff\xd8\xff\xe0"]


def usual(field: FieldDescriptor, random: random.Random, tokens: Mapping[str, Sequence[str]]) -> Any:
    """A realistic value of a field."""
    if field.name in tokens:
        return random.choice([*tokens[field.name], ""])
    match field.type:
        case _TYPE.TYPE_STRING if field.name == "event_id":
            return f"event-{random.randrange(2000)}"
        case _TYPE.TYPE_STRING if field.full_name.endswith("DeleteItemsRequest.item_ids"):
            return f"new-{random.randrange(50)}"  # deleting other items would leave nothing to search
        case _TYPE.TYPE_STRING if field.name == "paths":
            return random.choice(_PATHS[random.random() < 0.5])
        case _TYPE.TYPE_STRING:
            return random.choice(TEXTS.get(field.name, ["a text", ""]))
        case _TYPE.TYPE_BYTES:
            return random.choice(_PICTURES)
        case _TYPE.TYPE_BOOL:
            return random.random() < 0.5
        case _TYPE.TYPE_DOUBLE | _TYPE.TYPE_FLOAT:
            return random.choice(_FLOATS_OF.get(field.name, [0.1, 0.5, 1.0, 3.0, 10.0]))
        case _TYPE.TYPE_ENUM:
            members: Any = field.enum_type
            return random.choice(members.values).number
        case _TYPE.TYPE_UINT64:
            return random.choice([0, 0, 0, 1, 5])
        case _:
            return random.choice(_INTEGERS_OF.get(field.name, [1, 2, 3, 5, 10]))


def odd(field: FieldDescriptor, random: random.Random, tokens: Mapping[str, Sequence[str]]) -> Any:
    """An invalid or extreme value of a field."""
    if field.name in tokens and random.random() < _LIKE_A_TOKEN:
        return _mangle(random.choice([t for kind in tokens.values() for t in kind] or [""]), random)
    odd_of: Mapping[int, Callable[[], Any]] = {
        _TYPE.TYPE_STRING: lambda: random.choice(_ODD_TEXTS),
        _TYPE.TYPE_BYTES: lambda: random.choice(_ODD_BYTES),
        _TYPE.TYPE_BOOL: lambda: True,
        _TYPE.TYPE_DOUBLE: lambda: random.choice(_ODD_FLOATS),
        _TYPE.TYPE_FLOAT: lambda: random.choice(_ODD_FLOATS),
        _TYPE.TYPE_ENUM: lambda: random.choice([-1, 0, 9, 99, 2**31 - 1]),
    }
    if field.type in odd_of:
        return odd_of[field.type]()
    return random.choice(_INTEGERS[field.type])


def moment(random: random.Random, *, wild: bool) -> tuple[int, int]:
    """Seconds and nanoseconds of a time."""
    if wild:
        return random.choice(_MOMENTS)
    return _NOW + random.randrange(-30 * _DAY, _DAY), random.randrange(10**9)


def _mangle(token: str, random: random.Random) -> str:
    kind = random.randrange(5)
    at = random.randrange(len(token) + 1)
    if kind == 0:
        return token[:at]
    if kind == 1:
        return token[:at] + random.choice("AZaz09-_=. é") + token[at + 1 :]
    if kind == 2:
        return token + token
    if kind == 3:
        return "p" + token
    return token
