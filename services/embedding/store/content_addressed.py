"""Content-addressed storage of image files and vectors: items with equal content share one copy.

A vector belongs to a content (a text or an image), a space and an encoder's digest. The functions run inside
the caller's transaction.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import sqlalchemy as sa

from services.core.errors import NotFound
from services.storage import store

_CHUNK = 2000

files = sa.Table(
    "images",
    store.metadata,
    sa.Column("hash", sa.LargeBinary, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
vectors = sa.Table(
    "content_vectors",
    store.metadata,
    sa.Column("content", sa.LargeBinary, primary_key=True),
    sa.Column("space", sa.String(16), primary_key=True),
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),  # little-endian float16
)


@dataclass(frozen=True)
class Vector:
    """One vector of an item: `values` float32 (D,), of unit length, by the encoder of `digest`.

    `space` is "text" or "image".
    """

    space: str
    digest: str
    values: np.ndarray = field(repr=False)


def text_hash(text: str) -> bytes:
    """32 bytes of BLAKE2b of a text; empty for blank text."""
    return hashlib.blake2b(text.encode(), digest_size=32).digest() if text.strip() else b""


def image_file_hash(data: bytes) -> bytes:
    """32 bytes of BLAKE2b of an image file."""
    return hashlib.blake2b(data, digest_size=32).digest()


def read_file(connection: sa.Connection, image_hash: bytes) -> bytes:
    """The image file with a hash; NotFound if there is none."""
    data = connection.scalar(sa.select(files.c.data).where(files.c.hash == image_hash))
    if data is None:
        raise NotFound("image", image_hash.hex())
    return bytes(data)


def read_files(connection: sa.Connection, image_hashes: Sequence[bytes]) -> dict[bytes, bytes]:
    """The image files with these hashes; missing ones are left out."""
    query = files.select().where(files.c.hash.in_(image_hashes))
    return {bytes(row.hash): bytes(row.data) for row in connection.execute(query)}


def store_file(connection: sa.Connection, image_hash: bytes, data: bytes) -> None:
    """Store an image file unless it exists."""
    if not connection.scalar(sa.select(sa.exists().where(files.c.hash == image_hash))):
        connection.execute(files.insert().values(hash=image_hash, data=data))


def stored_vectors(
    connection: sa.Connection, contents: Iterable[bytes], space: str, digest: str
) -> dict[bytes, np.ndarray]:
    """The stored vectors float32 (D,) of these contents; missing ones are left out."""
    requested, result = sorted(set(contents)), dict[bytes, np.ndarray]()
    for start in range(0, len(requested), _CHUNK):
        query = sa.select(vectors.c.content, vectors.c.value).where(
            vectors.c.content.in_(requested[start : start + _CHUNK]),
            vectors.c.space == space,
            vectors.c.digest == digest,
        )
        result |= {bytes(row.content): vector_from_bytes(row.value) for row in connection.execute(query)}
    return result


def store_item_vectors(
    connection: sa.Connection, contents: Mapping[str, bytes], item_vectors: Sequence[Vector]
) -> bool:
    """Store the vectors of an item with these content hashes by space; returns whether any is new.

    An existing vector stays, because a recomputed one differs in its last bits.
    """
    new = []
    for vector in item_vectors:
        row = {"content": contents[vector.space], "space": vector.space, "digest": vector.digest}
        same = sa.and_(*(vectors.c[name] == value for name, value in row.items()))
        if not connection.scalar(sa.select(sa.exists().where(same))):
            new.append(row | {"value": vector_to_bytes(vector.values)})
    if new:
        connection.execute(vectors.insert(), new)
    return bool(new)


def store_vectors(
    connection: sa.Connection,
    contents: Sequence[bytes],
    space: str,
    digest: str,
    values: Sequence[np.ndarray],
) -> None:
    """Store a vector float (D,) of each content of a space by one encoder, unless it exists."""
    existing = set(stored_vectors(connection, contents, space, digest)) | {b""}  # empty content has no vector
    rows: list[dict[str, object]] = []
    for content, value in zip(contents, values, strict=True):
        if content not in existing:
            existing.add(content)
            rows.append(
                {"content": content, "space": space, "digest": digest, "value": vector_to_bytes(value)}
            )
    for start in range(0, len(rows), _CHUNK):
        connection.execute(vectors.insert(), rows[start : start + _CHUNK])


def drop_unused(connection: sa.Connection, content: bytes, space: str, referring: sa.Column[bytes]) -> None:
    """Delete a content of a space, with its image file, unless the column `referring` has it."""
    if not content or connection.scalar(sa.select(sa.exists().where(referring == content))):
        return
    connection.execute(vectors.delete().where(vectors.c.content == content, vectors.c.space == space))
    if space == "image":
        connection.execute(files.delete().where(files.c.hash == content))


def vector_to_bytes(values: np.ndarray) -> bytes:
    """The stored form of a vector."""
    return values.astype("<f2").tobytes()


def vector_from_bytes(data: bytes) -> np.ndarray:
    """A stored vector as float32 (D,)."""
    return np.frombuffer(data, "<f2").astype(np.float32)
