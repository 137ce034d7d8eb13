"""The catalogue's truth: items in SQL, and what is made of them.

Every change takes the next sequence number; deletions stay as tombstones so that a
follower learns of them. Knows nothing of encoders, indexes or transport.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime
from functools import partial
from uuid import uuid4

import numpy as np
import sqlalchemy as sa

from services import store
from services.catalog import Item, item_number
from services.embedding import contents, item_writes
from services.embedding.contents import Vector
from services.embedding.item_rows import CONTENT, Record, State, lacks, micros, record_of, table
from services.embedding.item_writes import SEQUENCE, Block, Written
from services.errors import OutOfRange

_LOADED = 2000  # in one transaction, for which live writes wait

_names = sa.Table(
    "item_store",
    store.metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(32), nullable=False),
)


class ItemStore:
    """Items in SQL, written by one thread.

    `clock` gives the time that create and update times are taken from.
    """

    def __init__(self, engine: sa.Engine, clock: Callable[[], datetime]) -> None:
        self._engine, self._clock = engine, clock
        store.create(
            engine,
            [table, contents.files, contents.vectors, item_writes.imports, item_writes.trims, _names],
            SEQUENCE,
        )
        self._writer = store.Writer(engine)
        with engine.begin() as connection:
            if connection.scalar(sa.select(_names.c.name)) is None:
                connection.execute(_names.insert().values(id=0, name=uuid4().hex))
            self.name = str(connection.scalar(sa.select(_names.c.name)))
            """What tells this store from any other, one that is made anew included."""

    def close(self) -> None:
        """Commit what is waiting and stop."""
        self._writer.close()

    @property
    def sequence(self) -> int:
        """The last committed change."""
        with self._engine.connect() as connection:
            return store.current_sequence(connection, SEQUENCE)

    def write(
        self,
        item: Item,
        vectors: Sequence[Vector] = (),
        *,
        image_error: str = "",
        expected_sequence: int | None = None,
    ) -> Future[Written]:
        """Commit a valid item whole, with the vectors made of it.

        What no item refers to any more, a text's vectors or a photograph with its own, is dropped.
        An item whose source_version is older than the stored one is STALE.

        The future raises:
            AlreadyExists: another id has the same number.
            Conflict: `expected_sequence` is given and is not the stored one (0: no such item).
        """
        stamp = micros(self._clock())
        return self._writer.submit(
            lambda connection: item_writes.write(
                connection, item, vectors, image_error, expected_sequence, stamp
            )
        )

    def settled(self) -> "Future[None]":
        """Done once all that was submitted until now is committed or refused."""
        return self._writer.submit(lambda connection: None)

    def imported(self, version: str) -> bool:
        """Whether the catalogue of a bundle was loaded before."""
        with self._engine.connect() as connection:
            return bool(
                connection.scalar(sa.select(sa.exists().where(item_writes.imports.c.version == version)))
            )

    def load(
        self, version: str, items: Sequence[Item], vectors: Sequence["Block"], created: Sequence[datetime]
    ) -> int:
        """Commit a bundle's items that were never here, with their vectors; how many. Blocks.

        Page by page, for which live writes wait, and with the last one that it is done.

        An item that is here with the same content gets the vectors it lacks; one with other
        content, or deleted, stays as it is.
        """
        stamp, count = micros(self._clock()), 0
        for start in range(0, len(items), _LOADED):
            page = slice(start, start + _LOADED)
            blocks = [replace(b, values=b.values[page], present=b.present[page]) for b in vectors]
            load = partial(
                item_writes.load, items=items[page], blocks=blocks, created=created[page], stamp=stamp
            )
            count += self._writer.submit(load).result()
        self._writer.submit(partial(item_writes.mark_imported, version=version)).result()
        return count

    def lacking(self, digests: Mapping[str, str]) -> list[str]:
        """Ids of live items with a content that could have a vector by its space's digest and has none."""
        queries = [sa.select(table.c.id).where(lacks(space, digest)) for space, digest in digests.items()]
        with self._engine.connect() as connection:
            return [item_id for query in queries for item_id in connection.scalars(query)]

    def pending(self, after_sequence: int, limit: int) -> list[Record]:
        """Up to `limit` live items whose photograph is to be fetched, changed after a position, in order."""
        query = table.select().where(
            table.c.sequence > after_sequence,
            table.c.image_state == State.PENDING,
            table.c.image_uri != "",
            ~table.c.deleted,
        )
        with self._engine.connect() as connection:
            return [
                record_of(row) for row in connection.execute(query.order_by(table.c.sequence).limit(limit))
            ]

    def contents_lacking(
        self, space: str, digest: str, since: int, after: bytes, limit: int
    ) -> list[tuple[bytes, Item]]:
        """Contents of live items that have no vector by a digest and could, each with an item that has it.

        Of items that changed since a position; in the order of hashes, from the first after `after`.
        """
        content = CONTENT[space]
        lacking = (
            sa.select(sa.func.min(table.c.number))
            .where(lacks(space, digest), table.c.sequence > since, content > after)
            .group_by(content)
            .order_by(content)
            .limit(limit)
        )
        query = table.select().where(table.c.number.in_(lacking.scalar_subquery())).order_by(content)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [(bytes(getattr(row, content.name)), record_of(row).item) for row in rows]

    def count_lacking(self, space: str, digest: str, since: int) -> int:
        """How many different contents `contents_lacking` has to tell of."""
        content = CONTENT[space]
        query = sa.select(sa.func.count(sa.distinct(content))).where(
            lacks(space, digest), table.c.sequence > since
        )
        with self._engine.connect() as connection:
            return int(connection.scalar(query) or 0)

    def keep_vectors(self, space: str, digest: str, found: Mapping[bytes, np.ndarray]) -> Future[None]:
        """Commit vectors of contents by an encoder that is not served yet; no item changes by it."""
        return self._writer.submit(
            lambda connection: contents.keep_many(
                connection, list(found), space, digest, list(found.values())
            )
        )

    def delete(self, item_id: str) -> Future[Written]:
        """Commit a deletion; the future raises NotFound for an unknown or deleted id."""
        stamp = micros(self._clock())
        return self._writer.submit(lambda connection: item_writes.delete(connection, item_id, stamp))

    def get(self, item_ids: Iterable[str]) -> dict[str, Record]:
        """The live items of these ids; unknown ones are left out."""
        numbers = [item_number(item_id) for item_id in item_ids]
        query = table.select().where(table.c.number.in_(numbers), ~table.c.deleted)
        with self._engine.connect() as connection:
            return {row.id: record_of(row) for row in connection.execute(query)}

    def image(self, image_hash: bytes) -> bytes:
        """The image file of a record; NotFound when there is none."""
        with self._engine.connect() as connection:
            return contents.file_of(connection, image_hash)

    def files(self, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        """The image files of these hashes; those that have none are left out."""
        with self._engine.connect() as connection:
            return contents.files_of(connection, hashes)

    def known(self, hashes: Iterable[bytes], space: str, digest: str) -> dict[bytes, np.ndarray]:
        """The vectors float32 (D,) that are stored of these contents, whichever items have them."""
        with self._engine.connect() as connection:
            return contents.known(connection, hashes, space, digest)

    def page(self, after_number: int, limit: int) -> list[Record]:
        """Up to `limit` live items after a number (-1: from the first), in the order of numbers."""
        query = table.select().where(table.c.number > after_number, ~table.c.deleted)
        with self._engine.connect() as connection:
            return [record_of(row) for row in connection.execute(query.order_by(table.c.number).limit(limit))]

    def changes(self, after_sequence: int, limit: int) -> list[Record]:
        """Up to `limit` items changed after a position, in commit order, tombstones included.

        An item changed twice comes once, at its last change. From 0 everything comes.

        Raises:
            OutOfRange: tombstones after the position were dropped, or it lies in the future.
        """
        query = table.select().where(table.c.sequence > after_sequence)
        with self._engine.connect() as connection:
            trimmed = connection.scalar(sa.select(item_writes.trims.c.sequence)) or 0
            current = store.current_sequence(connection, SEQUENCE)
            if 0 < after_sequence < trimmed:
                raise OutOfRange(f"position {after_sequence} is older than {trimmed}; start again from 0")
            if after_sequence > current:
                raise OutOfRange(
                    f"position {after_sequence} is after the last change {current}; start from 0"
                )
            rows = connection.execute(query.order_by(table.c.sequence).limit(limit)).all()
        return [record_of(row) for row in rows]

    def vectors(self, numbers: Sequence[int], space: str, digest: str) -> dict[int, np.ndarray]:
        """The stored vectors of these items: number to float32 (D,); items without one are left out."""
        stored = contents.vectors.c
        query = sa.select(table.c.number, stored.value).where(
            table.c.number.in_(numbers),
            stored.content == CONTENT[space],
            stored.space == space,
            stored.digest == digest,
            stored.content != b"",
        )
        with self._engine.connect() as connection:
            return {row.number: contents.floats(row.value) for row in connection.execute(query)}

    def trim(self, before_sequence: int) -> Future[None]:
        """Forget tombstones up to a position; followers behind it start again from 0."""
        return self._writer.submit(lambda connection: item_writes.trim(connection, before_sequence))
