"""Items: identity, validation and text. Independent of transport, storage and models.

The limits are those in the field comments of `protos/vitrine/catalog/v1/item.proto`.
"""

import functools
import hashlib
import itertools
import math
import re
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime

from services.catalog.markup import plain_text
from services.core.errors import FieldViolation, InvalidArgument, quoted

MAX_ID_LENGTH = 128
MAX_TITLE_BYTES = 64 << 10
MAX_DESCRIPTION_BYTES = 2 << 20
MAX_ATTRIBUTES = 64
MAX_ATTRIBUTE_NAME_LENGTH = 64
MAX_ATTRIBUTE_VALUES = 32
MAX_ATTRIBUTE_TEXT_LENGTH = 256
MAX_IMAGE_BYTES = 16 << 20
DEFAULT_ATTRIBUTE_NAMES = 1000
MAX_PRICE = 1e12
PRICE_PROBLEM = "must be finite, not negative and at most 1e12"

_MAX_WORDS = 24
_MAX_WORD_LENGTH = 64
_MAX_TITLE_LENGTH = 2000
# Scripts without spaces between words: Thai and Lao, Burmese, Khmer, kana, ideographs.
UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff"
    r"\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_INT64 = 1 << 63


@dataclass(frozen=True)
class Attribute:
    """A named value: texts or numbers, not both."""

    name: str
    texts: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True)
class Item:
    """A product as the shop wrote it; None is unknown, never zero.

    `image` is the bytes of the image file, `image_hash` the hash of bytes that are stored elsewhere, and
    `image_uri` an address; at most one of them is set. Times are aware, in UTC.
    """

    id: str
    title: str = ""
    description: str = ""
    attributes: tuple[Attribute, ...] = ()
    family_id: str = ""
    price: float | None = None
    image: bytes = field(default=b"", repr=False)
    image_uri: str = ""
    image_hash: bytes = field(default=b"", repr=False)
    available_from: datetime | None = None
    available_until: datetime | None = None
    source_version: int | None = None


def item_hash(item_id: str) -> int:
    """The item's hash: the first 63 bits, big-endian, of BLAKE2b (RFC 7693) of its UTF-8 id."""
    digest = hashlib.blake2b(item_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def item_text(item: Item) -> str:
    """The text that is encoded for an item: title, then description, then texts of attributes.

    HTML is removed. Attributes whose name starts with an underscore are for filters only.
    """
    labels = (plain_text(text) for a in item.attributes if not a.name.startswith("_") for text in a.texts)
    parts = plain_text(item.title), plain_text(item.description), ", ".join(filter(None, labels))
    return ". ".join(part for part in parts if part)


def title_words(title: str) -> tuple[str, ...]:
    """The first 24 distinct words of a title, case-folded and normalized (NFKC).

    Words consist of letters, digits and the marks on them. For scripts without spaces between words, such as
    Chinese and Thai, every pair of adjacent characters is a word. Only the first 2,000 characters count, and
    HTML is removed.
    """
    words = plain_text(title[:_MAX_TITLE_LENGTH])
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", words).casefold())
    tokens: list[str] = []
    for kind, run in itertools.groupby(text, _kind):
        word = "".join(run)
        if kind == "unspaced" and len(word) > 1:
            tokens += [word[start : start + 2] for start in range(len(word) - 1)]
        elif kind:
            tokens.append(word[:_MAX_WORD_LENGTH])
    return tuple(dict.fromkeys(tokens))[:_MAX_WORDS]


@functools.cache
def _kind(character: str) -> str:
    if unicodedata.category(character)[0] not in "LNM":
        return ""
    return "unspaced" if UNSPACED.match(character) else "spaced"


def has_image(item: Item) -> bool:
    """Whether the item has an image, wherever its bytes are."""
    return bool(item.image or item.image_hash or item.image_uri)


def identifier_problem(value: str) -> str:
    """The problem of a required id, or an empty string."""
    if not value:
        return "is required"
    if len(value) > MAX_ID_LENGTH:
        return f"has {len(value)} characters, at most {MAX_ID_LENGTH} are allowed"
    if not value.isprintable():
        return "contains a control character or white space other than plain spaces"
    if value != value.strip():
        return "begins or ends with a space"
    return ""


def validate(item: Item) -> None:
    """Check one item against the contract.

    Raises:
        InvalidArgument: lists every invalid field, relative to the item.
    """
    violations = [
        FieldViolation(name, problem)
        for name, problem in (
            ("id", identifier_problem(item.id)),
            ("title", _text_problem(item.title, MAX_TITLE_BYTES)),
            ("description", _text_problem(item.description, MAX_DESCRIPTION_BYTES)),
            ("family_id", identifier_problem(item.family_id) if item.family_id else ""),
            ("price", _price_problem(item.price)),
            ("image.data", _image_problem(item.image)),
            ("image.uri", _uri_problem(item.image_uri)),
            ("available_until", _window_problem(item)),
            ("source_version", _version_problem(item.source_version)),
        )
        if problem
    ]
    violations += _attribute_violations(item.attributes)
    if not (item.title.strip() or item.description.strip() or has_image(item)):
        violations.append(FieldViolation("title", "an item needs a title, a description or an image"))
    if violations:
        raise InvalidArgument(violations)


def _text_problem(text: str, limit: int) -> str:
    if "\0" in text:
        return "holds a NUL character"  # PostgreSQL cannot store one
    size = len(text.encode())
    return f"has {size} bytes, at most {limit} are allowed" if size > limit else ""


def _price_problem(price: float | None) -> str:
    return "" if price is None or 0 <= price <= MAX_PRICE else PRICE_PROBLEM


def _image_problem(image: bytes) -> str:
    too_large = len(image) > MAX_IMAGE_BYTES
    return f"has {len(image)} bytes, at most {MAX_IMAGE_BYTES} are allowed" if too_large else ""


def _uri_problem(uri: str) -> str:
    if uri and not uri.startswith(("http://", "https://")):
        return "must be an http or https address"
    return _text_problem(uri, 2048)


def _window_problem(item: Item) -> str:
    start, end = item.available_from, item.available_until
    return "must be later than available_from" if start and end and end <= start else ""


def _version_problem(version: int | None) -> str:
    return "" if version is None or -_INT64 <= version < _INT64 else "is outside 64 bits"


def _attribute_violations(attributes: tuple[Attribute, ...]) -> list[FieldViolation]:
    if len(attributes) > MAX_ATTRIBUTES:
        return [FieldViolation("attributes", f"has {len(attributes)}, at most {MAX_ATTRIBUTES} are allowed")]
    violations, names = [], set()
    for index, attribute in enumerate(attributes):
        problem = _attribute_problem(attribute)
        if not problem and attribute.name in names:
            problem = f"the name {quoted(attribute.name)} is there twice"
        if problem:
            violations.append(FieldViolation(f"attributes[{index}]", problem))
        names.add(attribute.name)
    return violations


def _attribute_problem(attribute: Attribute) -> str:
    values = len(attribute.texts) + len(attribute.numbers)
    checks = (
        (not attribute.name.strip() or not attribute.name.isprintable(), "needs a printable name"),
        (
            len(attribute.name) > MAX_ATTRIBUTE_NAME_LENGTH,
            f"its name has more than {MAX_ATTRIBUTE_NAME_LENGTH} characters: {quoted(attribute.name)}",
        ),
        (bool(attribute.texts) == bool(attribute.numbers), "needs texts or numbers, and not both"),
        (values > MAX_ATTRIBUTE_VALUES, f"has {values} values, at most {MAX_ATTRIBUTE_VALUES} are allowed"),
        (not all(math.isfinite(n) for n in attribute.numbers), "holds a number that is not finite"),
    )
    problem = next((problem for failed, problem in checks if failed), "")
    problems = (_value_problem(attribute.name, index, text) for index, text in enumerate(attribute.texts))
    return problem or next(filter(None, problems), "")


def _value_problem(name: str, index: int, text: str) -> str:
    """The problem of a text of the attribute `name`, or an empty string."""
    if len(text) > MAX_ATTRIBUTE_TEXT_LENGTH:
        problem = f"has {len(text)} characters, at most {MAX_ATTRIBUTE_TEXT_LENGTH} are allowed"
    elif "\0" in text:
        problem = "holds a NUL character"
    else:
        return ""
    return f"texts[{index}] of {name!r} {problem}: {quoted(text)}"
