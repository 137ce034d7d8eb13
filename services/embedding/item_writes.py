"""How items are written: what one transaction does to the tables.

Every change takes the next sequence number; deletions stay as tombstones so that a follower learns of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any

import numpy as np
import sqlalchemy as sa

from services import store
from services.catalog import Item, item_number
from services.embedding import contents
from services.embedding.contents import Vector
from services.embedding.item_rows import CONTENT, columns_of, contents_of, hashes_of, micros, table
from services.errors import AlreadyExists, NotFound

SEQUENCE = "items"
_CHUNK = 2000


class Outcome(IntEnum):
    """What became of a write; values are the contract's ItemOutcomeCode."""

    CREATED = 1
    UPDATED = 2
    UNCHANGED = 3
    STALE = 4
    DELETED = 5


@dataclass(frozen=True)
class Block:
    """Vectors of many items: `values` float (N, D), `present` bool (N,) where there is one."""

    space: str
    digest: str
    values: np.ndarray = field(repr=False)
    present: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Written:
    """The outcome of one write and the sequence number the item now has."""

    outcome: Outcome
    sequence: int


class Conflict(Exception):
    """The item was changed since it was read; read it again."""


imports = sa.Table("item_imports", store.metadata, sa.Column("version", sa.String(64), primary_key=True))
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
) -> Written:
    """Write one item whole, with its vectors, as `ItemStore.write` says.

    Raises:
        AlreadyExists: another id has the same number.
        Conflict: the stored sequence number is not the expected one.
    """
    number = item_number(item.id)
    old = connection.execute(table.select().where(table.c.number == number)).first()
    if old is not None and old.id != item.id:
        message = f"item id {item.id!r} has the same number as {old.id!r}; choose another id"
        raise AlreadyExists("item", item.id, message)
    live = old if old is not None and not old.deleted else None
    if expected_sequence is not None and expected_sequence != (live.sequence if live else 0):
        raise Conflict(item.id)
    if live and _older(item.source_version, live.source_version):
        return Written(Outcome.STALE, live.sequence)
    columns = columns_of(item, {vector.space for vector in vectors}, image_error)
    if item.image:  # also of an item that came with a bundle, whose file is not here
        contents.keep_file(connection, columns["image_hash"], item.image)
    fresh = contents.keep(connection, contents_of(columns), vectors)
    if live and live.content_hash == columns["content_hash"] and not fresh:
        return Written(Outcome.UNCHANGED, live.sequence)
    sequence = store.take_sequence(connection, SEQUENCE)
    values = columns | {"updated": stamp, "sequence": sequence, "deleted": False}
    if old is None:
        connection.execute(table.insert().values(number=number, created=stamp, **values))
    else:
        created = live.created if live else stamp
        connection.execute(table.update().where(table.c.number == number).values(created=created, **values))
    if live:
        _drop_unused(connection, live, columns)
    return Written(Outcome.UPDATED if live else Outcome.CREATED, sequence)


def load(
    connection: sa.Connection,
    *,
    items: Sequence[Item],
    blocks: Sequence[Block],
    created: Sequence[datetime],
    stamp: int,
) -> int:
    """Write a page of a bundle, as `ItemStore.load` says; how many items were new."""
    there = sa.select(table.c.number, table.c.content_hash).where(
        table.c.number.in_([item_number(item.id) for item in items])
    )
    known = {row.number: row for row in connection.execute(there)}
    rows: list[dict[str, object]] = []
    made = [(list[bytes](), list[np.ndarray]()) for _ in blocks]
    for at, (item, since) in enumerate(zip(items, created, strict=True)):
        number = item_number(item.id)
        spaces = {b.space for b in blocks if b.present[at] and hashes_of(item)[b.space]}
        columns = columns_of(item, spaces, "")
        old = known.get(number)
        if old is not None and bytes(old.content_hash) != columns["content_hash"]:
            continue
        for block, (hashes, values) in zip(blocks, made, strict=True):
            if block.present[at]:
                hashes.append(contents_of(columns)[block.space])
                values.append(block.values[at])
        if old is None:
            rows.append(columns | {"number": number, "created": micros(since), "updated": stamp})
    if rows:
        first = store.take_sequence(connection, SEQUENCE, len(rows)) - len(rows) + 1
        rows = [row | {"sequence": first + at, "deleted": False} for at, row in enumerate(rows)]
    for start in range(0, len(rows), _CHUNK):
        connection.execute(table.insert(), rows[start : start + _CHUNK])
    for block, (hashes, values) in zip(blocks, made, strict=True):
        contents.keep_many(connection, hashes, block.space, block.digest, values)
    return len(rows)


def mark_imported(connection: sa.Connection, version: str) -> None:
    """Note that the catalogue of a bundle is here whole."""
    connection.execute(imports.insert().values(version=version))


def _older(version: int | None, than: int | None) -> bool:
    return version is not None and than is not None and version < than


def _drop_unused(connection: sa.Connection, old: sa.Row[Any], new: Mapping[str, Any]) -> None:
    """Forget the contents that a row had and has no more, unless another item has them."""
    for space, column in CONTENT.items():
        before = bytes(getattr(old, column.name))
        if before != new[column.name]:
            contents.drop_unused(connection, before, space, column)


def delete(connection: sa.Connection, item_id: str, stamp: int) -> Written:
    """Make an item a tombstone; NotFound for an unknown or deleted id."""
    number = item_number(item_id)
    old = connection.execute(
        table.select().where(table.c.number == number, table.c.id == item_id, ~table.c.deleted)
    ).first()
    if old is None:
        raise NotFound("item", item_id)
    sequence = store.take_sequence(connection, SEQUENCE)
    # The row stays as a tombstone with its id; everything else of the item goes.
    empty = columns_of(Item(id=item_id), frozenset(), "") | {
        "updated": stamp,
        "deleted": True,
        "sequence": sequence,
    }
    connection.execute(table.update().where(table.c.number == number).values(**empty))
    _drop_unused(connection, old, empty)
    return Written(Outcome.DELETED, sequence)


def trim(connection: sa.Connection, before_sequence: int) -> None:
    """Forget tombstones up to a position."""
    dropped = connection.scalar(
        sa.select(sa.func.max(table.c.sequence)).where(table.c.deleted, table.c.sequence <= before_sequence)
    )
    if dropped is None:
        return
    connection.execute(table.delete().where(table.c.deleted, table.c.sequence <= dropped))
    connection.execute(trims.delete())
    connection.execute(trims.insert().values(id=0, sequence=dropped))
