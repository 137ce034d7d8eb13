"""Imports a bundle's catalog into the item store, within a transaction.

The file that a bundle was trained on and the API both write items. The store remembers which items a
bundle wrote last. A newer bundle updates those, and removes the ones that its file no longer has; an item
that the API wrote last stays as the API wrote it (docs/decisions/0046).
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa

from services.catalog.items import Item, item_hash
from services.catalog.shop_identity import another_shop
from services.core.errors import FailedPrecondition
from services.embedding.store import attribute_names, content_addressed
from services.embedding.store.attribute_names import names_of_row
from services.embedding.store.mutations import SEQUENCE, drop_unused, erase
from services.embedding.store.schema import content_hashes, content_hashes_of_row, micros, row_of_item, table
from services.storage import store

_CHUNK = 2000
_MAX_REMOVED_SHARE = 0.5
_log = logging.getLogger(__name__)

imports = sa.Table("item_imports", store.metadata, sa.Column("version", sa.String(64), primary_key=True))
origins = sa.Table(
    "item_origins",
    store.metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("removed", sa.Boolean, nullable=False),
)
"""Items that the bundle of `version` wrote or `removed`, and the API has not written or deleted since."""


@dataclass(frozen=True)
class VectorBlock:
    """Vectors of many items: `values` float (N, D), `present` bool (N,) where there is one."""

    space: str
    digest: str
    values: np.ndarray = field(repr=False)
    present: np.ndarray = field(repr=False)


@dataclass
class ImportResult:
    """What the import of a bundle changed, as numbers of items.

    `differing` items have another content in the bundle and stay as the API wrote them, `deleted` ones stay
    deleted as the API left them; `spared` items are not in the bundle and stay because removing them would
    remove most of the catalog.
    """

    added: int = 0
    updated: int = 0
    removed: int = 0
    differing: int = 0
    deleted: int = 0
    spared: int = 0

    def __add__(self, other: "ImportResult") -> "ImportResult":
        return ImportResult(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )


def log_changes(version: str, changes: ImportResult) -> None:
    """Log what the import of a bundle changed, and what it left alone and why."""
    counts = version, changes.added, changes.updated, changes.removed
    _log.info("bundle %s: %d items added, %d updated, %d removed", *counts)
    if changes.differing or changes.deleted:
        _log.warning(
            "bundle %s: %d items have another content than the API wrote, %d were deleted by the API: "
            "they stay so; `vitrine sync` applies the catalog file to them",
            version,
            changes.differing,
            changes.deleted,
        )
    if changes.spared:
        _log.warning(
            "bundle %s lacks %d items, most of the catalog: they stay; `vitrine sync` deletes them",
            version,
            changes.spared,
        )


def is_newest(connection: sa.Connection, version: str) -> bool:
    """Whether no bundle that was made later was imported; a version begins with the time it was made at."""
    newest = connection.scalar(sa.select(sa.func.max(imports.c.version)))
    return newest is None or version.partition("-")[0] >= newest.partition("-")[0]


def check_shop(connection: sa.Connection, items: Sequence[Item]) -> None:
    """Refuse a bundle of another shop.

    Raises:
        FailedPrecondition: the store has items, and hardly any of the bundle's has the same id and title.
    """
    live = connection.scalar(sa.select(sa.func.count()).where(~table.c.deleted)) or 0
    common = 0
    for start in range(0, len(items), _CHUNK) if live else ():
        titles = {item_hash(item.id): item.title for item in items[start : start + _CHUNK]}
        query = sa.select(table.c.number, table.c.title).where(table.c.number.in_(list(titles)))
        common += sum(titles[row.number] == row.title for row in connection.execute(query))
    if reason := another_shop(common, len(items), live):
        raise FailedPrecondition(
            f"{reason} Give each shop a state directory of its own, or say --allow-other-shop"
        )


def load(
    connection: sa.Connection,
    *,
    version: str,
    items: Sequence[Item],
    blocks: Sequence[VectorBlock],
    created: Sequence[datetime],
    stamp: int,
    newest: bool,
) -> ImportResult:
    """Write a page of a bundle; see `ItemStore.load`; `newest` is the result of `is_newest`."""
    keys = [item_hash(item.id) for item in items]
    stored = {row.number: row for row in connection.execute(table.select().where(table.c.number.in_(keys)))}
    removed = _removed(connection, keys)
    result, inserts, updates, claims = ImportResult(), list[dict[str, Any]](), list[dict[str, Any]](), []
    vectors = [(list[bytes](), list[np.ndarray]()) for _ in blocks]
    for index, (item, key, created_at) in enumerate(zip(items, keys, created, strict=True)):
        spaces = {b.space for b in blocks if b.present[index] and content_hashes(item)[b.space]}
        columns = row_of_item(item, spaces, "")
        old = stored.get(key)
        writable = newest and (old is None or removed.get(key) == old.deleted)
        if old is None or old.deleted or bytes(old.content_hash) != columns["content_hash"]:
            if not writable:
                result.differing += old is not None and not old.deleted
                result.deleted += old is not None and bool(old.deleted)
                continue
            row = columns | {"number": key, "created": micros(created_at), "updated": stamp}
            if old is None:
                inserts.append(row)
            else:
                updates.append(row if old.deleted else row | {"created": old.created})
        if writable:
            claims.append({"number": key, "version": version, "removed": False})
        for block, (hashes, values) in zip(blocks, vectors, strict=True):
            if block.present[index]:
                hashes.append(content_hashes_of_row(columns)[block.space])
                values.append(block.values[index])
    result.added, result.updated = len(inserts), len(updates)
    _apply(connection, inserts, updates, stored)
    _claim(connection, claims)
    for block, (hashes, values) in zip(blocks, vectors, strict=True):
        content_addressed.store_vectors(connection, hashes, block.space, block.digest, values)
    return result


def _removed(connection: sa.Connection, keys: Sequence[int]) -> dict[int, bool]:
    """For the items that a bundle wrote last: whether it removed them, by item hash."""
    query = sa.select(origins.c.number, origins.c.removed).where(origins.c.number.in_(keys))
    return {row.number: row.removed for row in connection.execute(query)}


def _apply(
    connection: sa.Connection,
    inserts: Sequence[dict[str, Any]],
    updates: Sequence[dict[str, Any]],
    stored: dict[int, sa.Row[Any]],
) -> None:
    """Write rows with the next sequence numbers, and update the counts of attribute names."""
    rows = [*inserts, *updates]
    if not rows:
        return
    names = Counter(name for row in rows for name in names_of_row(row["attributes"]))
    replaced = (stored[row["number"]] for row in updates)
    names.subtract(name for old in replaced if not old.deleted for name in names_of_row(old.attributes))
    attribute_names.add(connection, names)
    first = store.take_sequence(connection, SEQUENCE, len(rows)) - len(rows) + 1
    rows = [row | {"sequence": first + index, "deleted": False} for index, row in enumerate(rows)]
    if inserts:
        connection.execute(table.insert(), rows[: len(inserts)])
    for row in rows[len(inserts) :]:
        connection.execute(table.update().where(table.c.number == row["number"]).values(**row))
        drop_unused(connection, stored[row["number"]], row)


def _claim(connection: sa.Connection, claims: Sequence[dict[str, Any]]) -> None:
    """Record that the bundle wrote these items."""
    if claims:
        connection.execute(origins.delete().where(origins.c.number.in_([row["number"] for row in claims])))
        connection.execute(origins.insert(), list(claims))


def missing(connection: sa.Connection, version: str) -> list[int]:
    """Hashes of items that an earlier bundle wrote last and that `version` lacks."""
    query = sa.select(origins.c.number).where(origins.c.version != version, ~origins.c.removed)
    return list(connection.scalars(query.order_by(origins.c.number)))


def too_many(connection: sa.Connection, count: int) -> bool:
    """Whether `count` items are most of the items that bundles wrote."""
    imported = sa.select(sa.func.count()).select_from(origins).where(~origins.c.removed)
    return count > _MAX_REMOVED_SHARE * (connection.scalar(imported) or 0)


def remove(connection: sa.Connection, keys: Sequence[int], stamp: int) -> int:
    """Turn a page of `missing` items into tombstones unless the API wrote them; returns how many."""
    owned = [key for key, removed in _removed(connection, keys).items() if not removed]
    for row in connection.execute(table.select().where(table.c.number.in_(owned))).all():
        erase(connection, row, stamp)
    connection.execute(origins.update().where(origins.c.number.in_(owned)).values(removed=True))
    return len(owned)


def mark_imported(connection: sa.Connection, version: str) -> None:
    """Record that the catalog of a bundle is completely imported."""
    connection.execute(imports.insert().values(version=version))


def mark_written_by_api(connection: sa.Connection, key: int) -> None:
    """Record that the API wrote an item: bundles leave it alone from now on."""
    connection.execute(origins.delete().where(origins.c.number == key))
