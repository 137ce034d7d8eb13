"""An item as a row: the table, and the way there and back.

Knows nothing of how and when rows are written.
"""

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import astuple, dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any

import sqlalchemy as sa

from services import store
from services.catalog import Attribute, Item, has_image, item_text
from services.embedding import contents
from services.embedding.contents import photograph_hash, text_hash

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class State(IntEnum):
    """How far one modality of an item has come; values are the contract's ModalityState."""

    ABSENT = 1
    READY = 2
    PENDING = 3
    FAILED = 4


@dataclass(frozen=True)
class Record:
    """An item as stored; of a photograph `item.image_hash` alone."""

    item: Item
    number: int
    sequence: int
    text_state: State
    image_state: State
    image_error: str
    created: datetime
    updated: datetime
    deleted: bool = False


table = sa.Table(
    "items",
    store.metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("attributes", sa.Text, nullable=False),
    sa.Column("family_id", sa.Text, nullable=False),
    sa.Column("price", sa.Double),
    sa.Column("image_uri", sa.Text, nullable=False),
    sa.Column("text_hash", sa.LargeBinary, nullable=False, index=True),
    sa.Column("image_hash", sa.LargeBinary, nullable=False, index=True),
    sa.Column("available_from", sa.BigInteger),
    sa.Column("available_until", sa.BigInteger),
    sa.Column("source_version", sa.BigInteger),
    sa.Column("content_hash", sa.LargeBinary, nullable=False),
    sa.Column("text_state", sa.SmallInteger, nullable=False),
    sa.Column("image_state", sa.SmallInteger, nullable=False),
    sa.Column("image_error", sa.Text, nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("updated", sa.BigInteger, nullable=False),
    sa.Column("deleted", sa.Boolean, nullable=False),
    sa.Column("sequence", sa.BigInteger, nullable=False, index=True),
)
CONTENT = {"text": table.c.text_hash, "image": table.c.image_hash}
"""What each space's vectors are made of."""


def hashes_of(item: Item) -> dict[str, bytes]:
    """What identifies an item's content in each space; empty where it has none."""
    photograph = photograph_hash(item.image) if item.image else item.image_hash
    return {"text": text_hash(item_text(item)), "image": photograph}


def columns_of(item: Item, spaces: Set[str], image_error: str) -> dict[str, Any]:
    """The row of an item of which there are vectors in `spaces`."""
    hashes = hashes_of(item)
    columns: dict[str, Any] = {
        "id": item.id,
        "title": item.title,
        "description": item.description,
        "attributes": json.dumps([astuple(a) for a in item.attributes], ensure_ascii=False),
        "family_id": item.family_id,
        "price": item.price,
        "image_uri": item.image_uri,
        "text_hash": hashes["text"],
        "image_hash": hashes["image"],
        "available_from": micros(item.available_from) if item.available_from else None,
        "available_until": micros(item.available_until) if item.available_until else None,
        "source_version": item.source_version,
        "text_state": State.READY if "text" in spaces else State.ABSENT,
        "image_state": _image_state(has_image(item), "image" in spaces, image_error),
        "image_error": image_error,
    }
    canonical = repr(sorted(columns.items())).encode()
    return columns | {"content_hash": hashlib.blake2b(canonical, digest_size=32).digest()}


def _image_state(present: bool, encoded: bool, error: str) -> State:
    if encoded:
        return State.READY
    if error:
        return State.FAILED
    return State.PENDING if present else State.ABSENT


def contents_of(row: Mapping[str, Any]) -> dict[str, bytes]:
    """The content hash of each space, of a row by column name."""
    return {space: row[column.name] for space, column in CONTENT.items()}


def lacks(space: str, digest: str) -> sa.ColumnElement[bool]:
    """Whether a live item has a content that can be encoded and is not, by this digest."""
    content, stored = CONTENT[space], contents.vectors.c
    has = sa.exists().where(stored.content == content, stored.space == space, stored.digest == digest)
    able = contents.files.c.hash == content
    readable = sa.true() if space == "text" else sa.exists().where(able)
    return sa.and_(~table.c.deleted, content != b"", readable, ~has)


def record_of(row: sa.Row[tuple[object, ...]]) -> Record:
    """What a row of the table says."""
    attributes = tuple(Attribute(n, tuple(t), tuple(v)) for n, t, v in json.loads(row.attributes))
    item = Item(
        id=row.id,
        image_hash=bytes(row.image_hash),
        title=row.title,
        description=row.description,
        attributes=attributes,
        family_id=row.family_id,
        price=row.price,
        image_uri=row.image_uri,
        available_from=_time(row.available_from),
        available_until=_time(row.available_until),
        source_version=row.source_version,
    )
    created, updated = _EPOCH + row.created * _MICROSECOND, _EPOCH + row.updated * _MICROSECOND
    states = State(row.text_state), State(row.image_state), row.image_error
    return Record(item, row.number, row.sequence, *states, created, updated, row.deleted)


def micros(time: datetime) -> int:
    """Microseconds since 1970, as times are stored."""
    return (time - _EPOCH) // _MICROSECOND


def _time(micros: int | None) -> datetime | None:
    return None if micros is None else _EPOCH + micros * _MICROSECOND
