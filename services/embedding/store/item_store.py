"""The source of truth of the catalog: items and their vectors in SQL.

Every change takes the next sequence number; deletions stay as tombstones, so that followers receive them.
The module depends on no encoders, indexes or transport.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime
from functools import partial
from uuid import uuid4

import numpy as np
import sqlalchemy as sa

from services.catalog.items import DEFAULT_ATTRIBUTE_NAMES, Item, item_hash
from services.core.errors import OutOfRange
from services.embedding.store import bundle_import, content_addressed, mutations
from services.embedding.store.attribute_names import AttributeNames
from services.embedding.store.attribute_names import table as attribute_names_table
from services.embedding.store.bundle_import import ImportResult, VectorBlock
from services.embedding.store.content_addressed import Vector
from services.embedding.store.mutations import SEQUENCE, WriteOutcome, WriteResult
from services.embedding.store.schema import (
    CONTENT,
    ModalityState,
    StoredItem,
    lacks_vector,
    micros,
    stored_item,
    table,
)
from services.embedding.store.write_turns import WriteTurns
from services.storage import store
from services.storage.write_health import WriteHealth

_PAGE_ROWS = 2000  # live writes wait for a transaction

_names = sa.Table(
    "item_store",
    store.metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(32), nullable=False),
)


class ItemStore:
    """Items in SQL, written by one thread.

    `clock` gives create and update times; `attribute_names` is the limit of distinct attribute names.
    """

    def __init__(
        self,
        engine: sa.Engine,
        clock: Callable[[], datetime],
        attribute_names: int = DEFAULT_ATTRIBUTE_NAMES,
    ) -> None:
        self._engine, self._clock = engine, clock
        self._attribute_names = AttributeNames(attribute_names)
        store.create(
            engine,
            [
                table,
                content_addressed.files,
                content_addressed.vectors,
                bundle_import.imports,
                bundle_import.origins,
                mutations.trims,
                attribute_names_table,
                _names,
            ],
            SEQUENCE,
        )
        self._attribute_names.open(engine)
        self._writer = store.Writer(engine)
        self.turns = WriteTurns()
        """Serializes writers that conflict on an item."""
        with engine.begin() as connection:
            if connection.scalar(sa.select(_names.c.name)) is None:
                connection.execute(_names.insert().values(id=0, name=uuid4().hex))
            self.name = str(connection.scalar(sa.select(_names.c.name)))
            """A random name that identifies this store; a new store gets another one."""

    def close(self) -> None:
        """Commit waiting writes and stop."""
        self._writer.close()

    @property
    def health(self) -> WriteHealth:
        """Whether the database accepts writes."""
        return self._writer.health

    @property
    def sequence(self) -> int:
        """The sequence of the last committed change."""
        with self._engine.connect() as connection:
            return store.current_sequence(connection, SEQUENCE)

    def write(
        self,
        item: Item,
        vectors: Sequence[Vector] = (),
        *,
        image_error: str = "",
        expected_sequence: int | None = None,
        by_api: bool = True,
    ) -> Future[WriteResult]:
        """Commit a valid, whole item with its vectors.

        Imports of bundles no longer change or remove an item that is written `by_api`.

        Vectors and image files that no item refers to any more are deleted.
        An item whose source_version is older than the stored one is STALE.

        The future raises:
            AlreadyExists: another id has the same hash.
            WriteConflict: `expected_sequence` is set and is not the stored one (0: no such item).
            InvalidArgument: the item exceeds the limit of distinct attribute names.
        """
        stamp = micros(self._clock())

        def write(connection: sa.Connection) -> WriteResult:
            result = mutations.write(
                connection, item, vectors, image_error, expected_sequence, stamp, self._attribute_names
            )
            if by_api and result.outcome is not WriteOutcome.STALE:
                bundle_import.mark_written_by_api(connection, item_hash(item.id))
            return result

        return self._writer.submit(write)

    def flush(self) -> "Future[None]":
        """Completes once all earlier submissions are committed or refused."""
        return self._writer.submit(lambda connection: None)

    def imported(self, version: str) -> bool:
        """Whether the catalog of a bundle has been imported."""
        with self._engine.connect() as connection:
            return bool(
                connection.scalar(sa.select(sa.exists().where(bundle_import.imports.c.version == version)))
            )

    def load(
        self,
        version: str,
        items: Sequence[Item],
        vectors: Sequence[VectorBlock],
        created: Sequence[datetime],
        *,
        any_shop: bool = False,
    ) -> ImportResult:
        """Import a bundle's items with their vectors; returns what changed. Blocks.

        Each page is a transaction, for which live writes wait; the last one marks the bundle as imported. An
        item that exists with the same content gets the vectors it lacks. An item that the API has not written
        since an earlier bundle brought it is updated, and removed if this bundle lacks it; where that would
        remove most of what bundles brought, nothing is removed. A bundle older than one that was loaded only
        adds vectors.

        Raises:
            FailedPrecondition: the items belong to another shop than the stored ones, unless `any_shop`.
        """
        stamp = micros(self._clock())
        with self._engine.connect() as connection:
            newest = bundle_import.is_newest(connection, version)
            if not any_shop:
                bundle_import.check_shop(connection, items)
        result = ImportResult()
        for start in range(0, len(items), _PAGE_ROWS):
            page = slice(start, start + _PAGE_ROWS)
            blocks = [replace(b, values=b.values[page], present=b.present[page]) for b in vectors]
            load = partial(
                bundle_import.load,
                version=version,
                items=items[page],
                blocks=blocks,
                created=created[page],
                stamp=stamp,
                newest=newest,
            )
            result += self._writer.submit(load).result()
        if newest:
            result += self._remove_missing(version, stamp)
        self._writer.submit(partial(bundle_import.mark_imported, version=version)).result()
        bundle_import.log_changes(version, result)
        return result

    def _remove_missing(self, version: str, stamp: int) -> ImportResult:
        """Remove items of earlier bundles that this one lacks, unless they are most of the items."""
        with self._engine.connect() as connection:
            missing = bundle_import.missing(connection, version)
            if bundle_import.too_many(connection, len(missing)):
                return ImportResult(spared=len(missing))
        pages = [missing[start : start + _PAGE_ROWS] for start in range(0, len(missing), _PAGE_ROWS)]
        removals = (partial(bundle_import.remove, keys=page, stamp=stamp) for page in pages)
        return ImportResult(removed=sum(self._writer.submit(removal).result() for removal in removals))

    def ids_without_vectors(self, digests: Mapping[str, str]) -> list[str]:
        """Ids of live items with an encodable content that lacks a vector by its space's digest."""
        queries = [
            sa.select(table.c.id).where(lacks_vector(space, digest)) for space, digest in digests.items()
        ]
        with self._engine.connect() as connection:
            return [item_id for query in queries for item_id in connection.scalars(query)]

    def with_content(self, space: str) -> np.ndarray:
        """The hashes, int64 (N,), of the live items with an encodable content for a space."""
        query = sa.select(table.c.number).where(CONTENT[space] != b"", ~table.c.deleted)
        with self._engine.connect() as connection:
            return np.fromiter(connection.scalars(query), np.int64)

    def pending(self, after_sequence: int, limit: int) -> list[StoredItem]:
        """Up to `limit` live items whose image is to be fetched, changed after a position, in order."""
        query = table.select().where(
            table.c.sequence > after_sequence,
            table.c.image_state == ModalityState.PENDING,
            table.c.image_uri != "",
            ~table.c.deleted,
        )
        with self._engine.connect() as connection:
            return [
                stored_item(row) for row in connection.execute(query.order_by(table.c.sequence).limit(limit))
            ]

    def contents_without_vectors(
        self, space: str, digest: str, since: int, after: bytes, limit: int
    ) -> list[tuple[bytes, Item]]:
        """Encodable contents without a vector by a digest, each with an item that has it.

        Only live items that changed after the position `since`; ordered by content hash, starting behind
        `after`.
        """
        content = CONTENT[space]
        item_hashes = (
            sa.select(sa.func.min(table.c.number))
            .where(lacks_vector(space, digest), table.c.sequence > since, content > after)
            .group_by(content)
            .order_by(content)
            .limit(limit)
        )
        query = table.select().where(table.c.number.in_(item_hashes.scalar_subquery())).order_by(content)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [(bytes(getattr(row, content.name)), stored_item(row).item) for row in rows]

    def count_contents_without_vectors(self, space: str, digest: str, since: int) -> int:
        """How many distinct contents `contents_without_vectors` returns in all."""
        content = CONTENT[space]
        query = sa.select(sa.func.count(sa.distinct(content))).where(
            lacks_vector(space, digest), table.c.sequence > since
        )
        with self._engine.connect() as connection:
            return int(connection.scalar(query) or 0)

    def store_vectors(self, space: str, digest: str, vectors: Mapping[bytes, np.ndarray]) -> Future[None]:
        """Commit vectors of contents by an encoder that is not served yet; items do not change."""
        return self._writer.submit(
            lambda connection: content_addressed.store_vectors(
                connection, list(vectors), space, digest, list(vectors.values())
            )
        )

    def delete(self, item_id: str) -> Future[WriteResult]:
        """Commit a deletion; the future raises NotFound for an unknown or deleted id."""
        stamp = micros(self._clock())

        def delete(connection: sa.Connection) -> WriteResult:
            bundle_import.mark_written_by_api(connection, item_hash(item_id))
            return mutations.delete(connection, item_id, stamp)

        return self._writer.submit(delete)

    def get(self, item_ids: Iterable[str]) -> dict[str, StoredItem]:
        """The live items of these ids; unknown ids are left out."""
        hashes = [item_hash(item_id) for item_id in item_ids]
        query = table.select().where(table.c.number.in_(hashes), ~table.c.deleted)
        with self._engine.connect() as connection:
            return {row.id: stored_item(row) for row in connection.execute(query)}

    def image(self, image_hash: bytes) -> bytes:
        """The image file with a hash; NotFound if there is none."""
        with self._engine.connect() as connection:
            return content_addressed.read_file(connection, image_hash)

    def files(self, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        """The image files with these hashes; missing ones are left out."""
        with self._engine.connect() as connection:
            return content_addressed.read_files(connection, hashes)

    def stored_vectors(self, hashes: Iterable[bytes], space: str, digest: str) -> dict[bytes, np.ndarray]:
        """The stored vectors float32 (D,) of these contents, whichever items have them."""
        with self._engine.connect() as connection:
            return content_addressed.stored_vectors(connection, hashes, space, digest)

    def page(self, after_hash: int, limit: int) -> list[StoredItem]:
        """Up to `limit` live items after an item hash (-1: from the first), in the order of hashes."""
        query = table.select().where(table.c.number > after_hash, ~table.c.deleted)
        with self._engine.connect() as connection:
            return [
                stored_item(row) for row in connection.execute(query.order_by(table.c.number).limit(limit))
            ]

    def changes(self, after_sequence: int, limit: int) -> list[StoredItem]:
        """Up to `limit` items changed after a position, in commit order, tombstones included.

        An item that changed twice appears once, at its last change. Position 0 returns everything.

        Raises:
            OutOfRange: tombstones after the position were deleted, or the position is in the future.
        """
        query = table.select().where(table.c.sequence > after_sequence)
        with self._engine.connect() as connection:
            trimmed = connection.scalar(sa.select(mutations.trims.c.sequence)) or 0
            current = store.current_sequence(connection, SEQUENCE)
            if 0 < after_sequence < trimmed:
                raise OutOfRange(f"position {after_sequence} is older than {trimmed}; start again from 0")
            if after_sequence > current:
                raise OutOfRange(
                    f"position {after_sequence} is after the last change {current}; start from 0"
                )
            rows = connection.execute(query.order_by(table.c.sequence).limit(limit)).all()
        return [stored_item(row) for row in rows]

    def vectors(self, hashes: Sequence[int], space: str, digest: str) -> dict[int, np.ndarray]:
        """The stored vectors of these items: item hash to float32 (D,); items without one are left out."""
        stored = content_addressed.vectors.c
        query = sa.select(table.c.number, stored.value).where(
            table.c.number.in_(hashes),
            stored.content == CONTENT[space],
            stored.space == space,
            stored.digest == digest,
            stored.content != b"",
        )
        with self._engine.connect() as connection:
            return {
                row.number: content_addressed.vector_from_bytes(row.value)
                for row in connection.execute(query)
            }

    def trim(self, before_sequence: int) -> Future[None]:
        """Delete tombstones up to a position; followers behind it start again from 0."""
        return self._writer.submit(lambda connection: mutations.trim(connection, before_sequence))
