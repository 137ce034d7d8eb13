"""The item table, and the conversion between items and rows."""

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import astuple, dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Any

import sqlalchemy as sa

from services.catalog.items import Attribute, Item, has_image, item_text
from services.embedding.store import content_addressed
from services.embedding.store.content_addressed import image_file_hash, text_hash
from services.storage import store

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class ModalityState(IntEnum):
    """The encoding state of one modality of an item; values are the contract's ModalityState."""

    ABSENT = 1
    READY = 2
    PENDING = 3
    FAILED = 4


@dataclass(frozen=True)
class StoredItem:
    """An item as stored; it has `item.image_hash` but not the image bytes."""

    item: Item
    item_hash: int
    sequence: int
    text_state: ModalityState
    image_state: ModalityState
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
"""The column with the hash of the content that each space encodes."""


def content_hashes(item: Item) -> dict[str, bytes]:
    """The hash of an item's content in each space; empty if it has none."""
    image = image_file_hash(item.image) if item.image else item.image_hash
    return {"text": text_hash(item_text(item)), "image": image}


def row_of_item(item: Item, spaces: Set[str], image_error: str) -> dict[str, Any]:
    """The column values of an item that has vectors in `spaces`."""
    hashes = content_hashes(item)
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
        "text_state": ModalityState.READY if "text" in spaces else ModalityState.ABSENT,
        "image_state": _image_state(has_image(item), "image" in spaces, image_error),
        "image_error": image_error,
    }
    canonical = repr(sorted(columns.items())).encode()
    return columns | {"content_hash": hashlib.blake2b(canonical, digest_size=32).digest()}


def _image_state(has_image: bool, is_encoded: bool, error: str) -> ModalityState:
    if is_encoded:
        return ModalityState.READY
    if error:
        return ModalityState.FAILED
    return ModalityState.PENDING if has_image else ModalityState.ABSENT


def content_hashes_of_row(row: Mapping[str, Any]) -> dict[str, bytes]:
    """The content hash of each space, from column values by name."""
    return {space: row[column.name] for space, column in CONTENT.items()}


def lacks_vector(space: str, digest: str) -> sa.ColumnElement[bool]:
    """SQL condition: the item is live and has an encodable content without a vector by this digest."""
    content, stored = CONTENT[space], content_addressed.vectors.c
    has_vector = sa.exists().where(stored.content == content, stored.space == space, stored.digest == digest)
    has_file = sa.exists().where(content_addressed.files.c.hash == content)
    is_encodable = sa.true() if space == "text" else has_file
    return sa.and_(~table.c.deleted, content != b"", is_encodable, ~has_vector)


def stored_item(row: sa.Row[tuple[object, ...]]) -> StoredItem:
    """The item of a row."""
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
    states = ModalityState(row.text_state), ModalityState(row.image_state), row.image_error
    return StoredItem(item, row.number, row.sequence, *states, created, updated, row.deleted)


def micros(time: datetime) -> int:
    """Microseconds since 1970, as times are stored."""
    return (time - _EPOCH) // _MICROSECOND


def _time(micros: int | None) -> datetime | None:
    return None if micros is None else _EPOCH + micros * _MICROSECOND
