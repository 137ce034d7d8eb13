"""Writes and deletes single items within a transaction.

Every change takes the next sequence number; deletions stay as tombstones, so that followers receive them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import sqlalchemy as sa

from services.catalog.items import Item, item_hash
from services.core.errors import AlreadyExists, NotFound
from services.embedding.store import attribute_names, content_addressed
from services.embedding.store.attribute_names import AttributeNames
from services.embedding.store.content_addressed import Vector
from services.embedding.store.schema import CONTENT, content_hashes_of_row, row_of_item, table
from services.storage import store

SEQUENCE = "items"


class WriteOutcome(IntEnum):
    """The outcome of a write; values are the contract's ItemOutcomeCode."""

    CREATED = 1
    UPDATED = 2
    UNCHANGED = 3
    STALE = 4
    DELETED = 5


@dataclass(frozen=True)
class WriteResult:
    """The outcome of one write and the resulting sequence number of the item."""

    outcome: WriteOutcome
    sequence: int


class WriteConflict(Exception):
    """The item has changed since it was read; read it again."""


trims = sa.Table(
    "item_trims",
    store.metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("sequence", sa.BigInteger, nullable=False),
)


def write(
    connection: sa.Connection,
    item: Item,
    vectors: Sequence[Vector],
    image_error: str,
    expected_sequence: int | None,
    stamp: int,
    names: AttributeNames,
) -> WriteResult:
    """Write one whole item with its vectors; see `ItemStore.write`.

    Raises:
        AlreadyExists: another id has the same hash.
        WriteConflict: the stored sequence number is not the expected one.
        InvalidArgument: the item exceeds the limit of distinct attribute names.
    """
    key = item_hash(item.id)
    old = connection.execute(table.select().where(table.c.number == key)).first()
    if old is not None and old.id != item.id:
        message = f"item id {item.id!r} has the same hash as {old.id!r}; choose another id"
        raise AlreadyExists("item", item.id, message)
    live = old if old is not None and not old.deleted else None
    if expected_sequence is not None and expected_sequence != (live.sequence if live else 0):
        raise WriteConflict(item.id)
    if live and _is_older(item.source_version, live.source_version):
        return WriteResult(WriteOutcome.STALE, live.sequence)
    columns = row_of_item(item, {vector.space for vector in vectors}, image_error)
    if item.image:  # also for an item of a bundle, which came without its file
        content_addressed.store_file(connection, columns["image_hash"], item.image)
    has_new_vectors = content_addressed.store_item_vectors(
        connection, content_hashes_of_row(columns), vectors
    )
    if live and live.content_hash == columns["content_hash"] and not has_new_vectors:
        return WriteResult(WriteOutcome.UNCHANGED, live.sequence)
    sequence = store.take_sequence(connection, SEQUENCE)
    names.replace(connection, live, item)
    values = columns | {"updated": stamp, "sequence": sequence, "deleted": False}
    if old is None:
        connection.execute(table.insert().values(number=key, created=stamp, **values))
    else:
        created = live.created if live else stamp
        connection.execute(table.update().where(table.c.number == key).values(created=created, **values))
    if live:
        drop_unused(connection, live, columns)
    return WriteResult(WriteOutcome.UPDATED if live else WriteOutcome.CREATED, sequence)


def _is_older(version: int | None, other: int | None) -> bool:
    return version is not None and other is not None and version < other


def drop_unused(connection: sa.Connection, old: sa.Row[Any], new: Mapping[str, Any]) -> None:
    """Delete the contents that only the old version of a row had."""
    for space, column in CONTENT.items():
        before = bytes(getattr(old, column.name))
        if before != new[column.name]:
            content_addressed.drop_unused(connection, before, space, column)


def delete(connection: sa.Connection, item_id: str, stamp: int) -> WriteResult:
    """Turn an item into a tombstone; NotFound for an unknown or deleted id."""
    key = item_hash(item_id)
    old = connection.execute(
        table.select().where(table.c.number == key, table.c.id == item_id, ~table.c.deleted)
    ).first()
    if old is None:
        raise NotFound("item", item_id)
    return WriteResult(WriteOutcome.DELETED, erase(connection, old, stamp))


def erase(connection: sa.Connection, old: sa.Row[Any], stamp: int) -> int:
    """Turn a live row into a tombstone; returns the sequence number of the change."""
    sequence = store.take_sequence(connection, SEQUENCE)
    attribute_names.add(connection, dict.fromkeys(attribute_names.names_of_row(old.attributes), -1))
    # The tombstone keeps only the id.
    empty = row_of_item(Item(id=old.id), frozenset(), "") | {
        "updated": stamp,
        "deleted": True,
        "sequence": sequence,
    }
    connection.execute(table.update().where(table.c.number == old.number).values(**empty))
    drop_unused(connection, old, empty)
    return sequence


def trim(connection: sa.Connection, before_sequence: int) -> None:
    """Delete tombstones up to a position."""
    last = connection.scalar(
        sa.select(sa.func.max(table.c.sequence)).where(table.c.deleted, table.c.sequence <= before_sequence)
    )
    if last is None:
        return
    connection.execute(table.delete().where(table.c.deleted, table.c.sequence <= last))
    connection.execute(trims.delete())
    connection.execute(trims.insert().values(id=0, sequence=last))
