"""The catalogue's truth: items in SQL, and what is made of them.

Every change takes the next sequence number; deletions stay as tombstones so that a
follower learns of them. Knows nothing of encoders, indexes or transport.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import astuple, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import sqlalchemy as sa

from services import store
from services.catalog import Attribute, Item, has_image, item_number, item_text
from services.embedding import contents
from services.embedding.contents import Vector, photograph_hash, text_hash
from services.errors import AlreadyExists, NotFound, OutOfRange

_SEQUENCE = "items"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class State(IntEnum):
    """How far one modality of an item has come; values are the contract's ModalityState."""

    ABSENT = 1
    READY = 2
    PENDING = 3
    FAILED = 4


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


@dataclass(frozen=True)
class Written:
    """The outcome of one write and the sequence number the item now has."""

    outcome: Outcome
    sequence: int


class Conflict(Exception):
    """The item was changed since it was read; read it again."""


_items = sa.Table(
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
_CONTENT = {"text": _items.c.text_hash, "image": _items.c.image_hash}
"""What each space's vectors are made of."""

_imports = sa.Table("item_imports", store.metadata, sa.Column("version", sa.String(64), primary_key=True))
_names = sa.Table(
    "item_store",
    store.metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(32), nullable=False),
)
_trims = sa.Table(
    "item_trims",
    store.metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("sequence", sa.BigInteger, nullable=False),
)


class ItemStore:
    """Items in SQL, written by one thread.

    `clock` gives the time that create and update times are taken from.
    """

    def __init__(self, engine: sa.Engine, clock: Callable[[], datetime]) -> None:
        self._engine, self._clock = engine, clock
        store.create(engine, [_items, contents.files, contents.vectors, _imports, _trims, _names], _SEQUENCE)
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
            return store.current_sequence(connection, _SEQUENCE)

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
        stamp = _micros(self._clock())
        return self._writer.submit(
            lambda connection: _write(connection, item, vectors, image_error, expected_sequence, stamp)
        )

    def settled(self) -> "Future[None]":
        """Done once all that was submitted until now is committed or refused."""
        return self._writer.submit(lambda connection: None)

    def imported(self, version: str) -> bool:
        """Whether the catalogue of a bundle was loaded before."""
        with self._engine.connect() as connection:
            return bool(connection.scalar(sa.select(sa.exists().where(_imports.c.version == version))))

    def load(
        self, version: str, items: Sequence[Item], vectors: Sequence["Block"], created: Sequence[datetime]
    ) -> int:
        """Commit a bundle's items that were never here, with their vectors; how many. Blocks.

        Page by page, for which live writes wait, and with the last one that it is done.

        An item that is here with the same content gets the vectors it lacks; one with other
        content, or deleted, stays as it is.
        """
        stamp, count = _micros(self._clock()), 0
        for start in range(0, len(items), _LOADED):
            page = slice(start, start + _LOADED)
            blocks = [replace(b, values=b.values[page], present=b.present[page]) for b in vectors]
            load = partial(_load, items=items[page], blocks=blocks, created=created[page], stamp=stamp)
            count += self._writer.submit(load).result()
        self._writer.submit(partial(_mark_imported, version=version)).result()
        return count

    def lacking(self, digests: Mapping[str, str]) -> list[str]:
        """Ids of live items with a content that could have a vector by its space's digest and has none."""
        queries = [sa.select(_items.c.id).where(_lacks(space, digest)) for space, digest in digests.items()]
        with self._engine.connect() as connection:
            return [item_id for query in queries for item_id in connection.scalars(query)]

    def pending(self, after_sequence: int, limit: int) -> list[Record]:
        """Up to `limit` live items whose photograph is to be fetched, changed after a position, in order."""
        query = _items.select().where(
            _items.c.sequence > after_sequence,
            _items.c.image_state == State.PENDING,
            _items.c.image_uri != "",
            ~_items.c.deleted,
        )
        with self._engine.connect() as connection:
            return [
                _record(row) for row in connection.execute(query.order_by(_items.c.sequence).limit(limit))
            ]

    def contents_lacking(
        self, space: str, digest: str, since: int, after: bytes, limit: int
    ) -> list[tuple[bytes, Item]]:
        """Contents of live items that have no vector by a digest and could, each with an item that has it.

        Of items that changed since a position; in the order of hashes, from the first after `after`.
        """
        content = _CONTENT[space]
        lacking = (
            sa.select(sa.func.min(_items.c.number))
            .where(_lacks(space, digest), _items.c.sequence > since, content > after)
            .group_by(content)
            .order_by(content)
            .limit(limit)
        )
        query = _items.select().where(_items.c.number.in_(lacking.scalar_subquery())).order_by(content)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return [(bytes(getattr(row, content.name)), _record(row).item) for row in rows]

    def count_lacking(self, space: str, digest: str, since: int) -> int:
        """How many different contents `contents_lacking` has to tell of."""
        content = _CONTENT[space]
        query = sa.select(sa.func.count(sa.distinct(content))).where(
            _lacks(space, digest), _items.c.sequence > since
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
        stamp = _micros(self._clock())
        return self._writer.submit(lambda connection: _delete(connection, item_id, stamp))

    def get(self, item_ids: Iterable[str]) -> dict[str, Record]:
        """The live items of these ids; unknown ones are left out."""
        numbers = [item_number(item_id) for item_id in item_ids]
        query = _items.select().where(_items.c.number.in_(numbers), ~_items.c.deleted)
        with self._engine.connect() as connection:
            return {row.id: _record(row) for row in connection.execute(query)}

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
        query = _items.select().where(_items.c.number > after_number, ~_items.c.deleted)
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query.order_by(_items.c.number).limit(limit))]

    def changes(self, after_sequence: int, limit: int) -> list[Record]:
        """Up to `limit` items changed after a position, in commit order, tombstones included.

        An item changed twice comes once, at its last change. From 0 everything comes.

        Raises:
            OutOfRange: tombstones after the position were dropped, or it lies in the future.
        """
        query = _items.select().where(_items.c.sequence > after_sequence)
        with self._engine.connect() as connection:
            trimmed = connection.scalar(sa.select(_trims.c.sequence)) or 0
            current = store.current_sequence(connection, _SEQUENCE)
            if 0 < after_sequence < trimmed:
                raise OutOfRange(f"position {after_sequence} is older than {trimmed}; start again from 0")
            if after_sequence > current:
                raise OutOfRange(
                    f"position {after_sequence} is after the last change {current}; start from 0"
                )
            rows = connection.execute(query.order_by(_items.c.sequence).limit(limit)).all()
        return [_record(row) for row in rows]

    def vectors(self, numbers: Sequence[int], space: str, digest: str) -> dict[int, np.ndarray]:
        """The stored vectors of these items: number to float32 (D,); items without one are left out."""
        stored = contents.vectors.c
        query = sa.select(_items.c.number, stored.value).where(
            _items.c.number.in_(numbers),
            stored.content == _CONTENT[space],
            stored.space == space,
            stored.digest == digest,
            stored.content != b"",
        )
        with self._engine.connect() as connection:
            return {row.number: contents.floats(row.value) for row in connection.execute(query)}

    def trim(self, before_sequence: int) -> Future[None]:
        """Forget tombstones up to a position; followers behind it start again from 0."""
        return self._writer.submit(lambda connection: _trim(connection, before_sequence))


def _write(
    connection: sa.Connection,
    item: Item,
    vectors: Sequence[Vector],
    image_error: str,
    expected_sequence: int | None,
    stamp: int,
) -> Written:
    number = item_number(item.id)
    old = connection.execute(_items.select().where(_items.c.number == number)).first()
    if old is not None and old.id != item.id:
        message = f"item id {item.id!r} has the same number as {old.id!r}; choose another id"
        raise AlreadyExists("item", item.id, message)
    live = old if old is not None and not old.deleted else None
    if expected_sequence is not None and expected_sequence != (live.sequence if live else 0):
        raise Conflict(item.id)
    if live and _older(item.source_version, live.source_version):
        return Written(Outcome.STALE, live.sequence)
    columns = _columns(item, {vector.space for vector in vectors}, image_error)
    if item.image:  # also of an item that came with a bundle, whose file is not here
        contents.keep_file(connection, columns["image_hash"], item.image)
    fresh = contents.keep(connection, _contents_of(columns), vectors)
    if live and live.content_hash == columns["content_hash"] and not fresh:
        return Written(Outcome.UNCHANGED, live.sequence)
    sequence = store.take_sequence(connection, _SEQUENCE)
    values = columns | {"updated": stamp, "sequence": sequence, "deleted": False}
    if old is None:
        connection.execute(_items.insert().values(number=number, created=stamp, **values))
    else:
        created = live.created if live else stamp
        connection.execute(_items.update().where(_items.c.number == number).values(created=created, **values))
    if live:
        _drop_unused(connection, live, columns)
    return Written(Outcome.UPDATED if live else Outcome.CREATED, sequence)


_CHUNK = 2000
_LOADED = 2000  # in one transaction, for which live writes wait


def _load(
    connection: sa.Connection,
    *,
    items: Sequence[Item],
    blocks: Sequence[Block],
    created: Sequence[datetime],
    stamp: int,
) -> int:
    there = sa.select(_items.c.number, _items.c.content_hash).where(
        _items.c.number.in_([item_number(item.id) for item in items])
    )
    known = {row.number: row for row in connection.execute(there)}
    rows: list[dict[str, object]] = []
    made = [(list[bytes](), list[np.ndarray]()) for _ in blocks]
    for at, (item, since) in enumerate(zip(items, created, strict=True)):
        number = item_number(item.id)
        spaces = {b.space for b in blocks if b.present[at] and hashes_of(item)[b.space]}
        columns = _columns(item, spaces, "")
        old = known.get(number)
        if old is not None and bytes(old.content_hash) != columns["content_hash"]:
            continue
        for block, (hashes, values) in zip(blocks, made, strict=True):
            if block.present[at]:
                hashes.append(_contents_of(columns)[block.space])
                values.append(block.values[at])
        if old is None:
            rows.append(columns | {"number": number, "created": _micros(since), "updated": stamp})
    if rows:
        first = store.take_sequence(connection, _SEQUENCE, len(rows)) - len(rows) + 1
        rows = [row | {"sequence": first + at, "deleted": False} for at, row in enumerate(rows)]
    for start in range(0, len(rows), _CHUNK):
        connection.execute(_items.insert(), rows[start : start + _CHUNK])
    for block, (hashes, values) in zip(blocks, made, strict=True):
        contents.keep_many(connection, hashes, block.space, block.digest, values)
    return len(rows)


def _mark_imported(connection: sa.Connection, version: str) -> None:
    connection.execute(_imports.insert().values(version=version))


def _lacks(space: str, digest: str) -> sa.ColumnElement[bool]:
    """Whether a live item has a content that can be encoded and is not, by this digest."""
    content, stored = _CONTENT[space], contents.vectors.c
    has = sa.exists().where(stored.content == content, stored.space == space, stored.digest == digest)
    able = contents.files.c.hash == content
    readable = sa.true() if space == "text" else sa.exists().where(able)
    return sa.and_(~_items.c.deleted, content != b"", readable, ~has)


def _older(version: int | None, than: int | None) -> bool:
    return version is not None and than is not None and version < than


def hashes_of(item: Item) -> dict[str, bytes]:
    """What identifies an item's content in each space; empty where it has none."""
    photograph = photograph_hash(item.image) if item.image else item.image_hash
    return {"text": text_hash(item_text(item)), "image": photograph}


def _columns(item: Item, spaces: Set[str], image_error: str) -> dict[str, Any]:
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
        "available_from": _micros(item.available_from) if item.available_from else None,
        "available_until": _micros(item.available_until) if item.available_until else None,
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


def _contents_of(row: Mapping[str, Any]) -> dict[str, bytes]:
    return {space: row[column.name] for space, column in _CONTENT.items()}


def _drop_unused(connection: sa.Connection, old: sa.Row[Any], new: Mapping[str, Any]) -> None:
    """Forget the contents that a row had and has no more, unless another item has them."""
    for space, column in _CONTENT.items():
        before = bytes(getattr(old, column.name))
        if before != new[column.name]:
            contents.drop_unused(connection, before, space, column)


def _delete(connection: sa.Connection, item_id: str, stamp: int) -> Written:
    number = item_number(item_id)
    old = connection.execute(
        _items.select().where(_items.c.number == number, _items.c.id == item_id, ~_items.c.deleted)
    ).first()
    if old is None:
        raise NotFound("item", item_id)
    sequence = store.take_sequence(connection, _SEQUENCE)
    # The row stays as a tombstone with its id; everything else of the item goes.
    empty = _columns(Item(id=item_id), frozenset(), "") | {
        "updated": stamp,
        "deleted": True,
        "sequence": sequence,
    }
    connection.execute(_items.update().where(_items.c.number == number).values(**empty))
    _drop_unused(connection, old, empty)
    return Written(Outcome.DELETED, sequence)


def _trim(connection: sa.Connection, before_sequence: int) -> None:
    dropped = connection.scalar(
        sa.select(sa.func.max(_items.c.sequence)).where(
            _items.c.deleted, _items.c.sequence <= before_sequence
        )
    )
    if dropped is None:
        return
    connection.execute(_items.delete().where(_items.c.deleted, _items.c.sequence <= dropped))
    connection.execute(_trims.delete())
    connection.execute(_trims.insert().values(id=0, sequence=dropped))


def _record(row: sa.Row[tuple[object, ...]]) -> Record:
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


def _micros(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


def _time(micros: int | None) -> datetime | None:
    return None if micros is None else _EPOCH + micros * _MICROSECOND
