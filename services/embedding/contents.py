"""What is stored by its content's hash, once however many items share it: photographs' files and vectors.

A vector belongs to a content (a text, a photograph), a space and an encoder's digest. Runs inside
the caller's transaction; knows nothing of items but what still refers to a hash.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import sqlalchemy as sa

from services import store
from services.errors import NotFound

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
    """What identifies a text: 32 bytes of BLAKE2b; empty for one of nothing but white space."""
    return hashlib.blake2b(text.encode(), digest_size=32).digest() if text.strip() else b""


def photograph_hash(data: bytes) -> bytes:
    """What identifies an image file: 32 bytes of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=32).digest()


def file_of(connection: sa.Connection, photograph: bytes) -> bytes:
    """The image file of a hash; NotFound when there is none."""
    data = connection.scalar(sa.select(files.c.data).where(files.c.hash == photograph))
    if data is None:
        raise NotFound("image", photograph.hex())
    return bytes(data)


def files_of(connection: sa.Connection, photographs: Sequence[bytes]) -> dict[bytes, bytes]:
    """The image files of some hashes."""
    query = files.select().where(files.c.hash.in_(photographs))
    return {bytes(row.hash): bytes(row.data) for row in connection.execute(query)}


def keep_file(connection: sa.Connection, photograph: bytes, data: bytes) -> None:
    """Store an image file, unless it is there."""
    if not connection.scalar(sa.select(sa.exists().where(files.c.hash == photograph))):
        connection.execute(files.insert().values(hash=photograph, data=data))


def known(
    connection: sa.Connection, contents: Iterable[bytes], space: str, digest: str
) -> dict[bytes, np.ndarray]:
    """The stored vectors float32 (D,) of these contents; those without one are left out."""
    wanted, found = sorted(set(contents)), dict[bytes, np.ndarray]()
    for start in range(0, len(wanted), _CHUNK):
        query = sa.select(vectors.c.content, vectors.c.value).where(
            vectors.c.content.in_(wanted[start : start + _CHUNK]),
            vectors.c.space == space,
            vectors.c.digest == digest,
        )
        found |= {bytes(row.content): floats(row.value) for row in connection.execute(query)}
    return found


def keep(connection: sa.Connection, of: Mapping[str, bytes], made: Sequence[Vector]) -> bool:
    """Store the vectors `made` of an item whose contents by space are `of`; whether any was new.

    One that is there stays: what is computed again differs in its last bits.
    """
    fresh = []
    for vector in made:
        row = {"content": of[vector.space], "space": vector.space, "digest": vector.digest}
        same = sa.and_(*(vectors.c[name] == value for name, value in row.items()))
        if not connection.scalar(sa.select(sa.exists().where(same))):
            fresh.append(row | {"value": as_bytes(vector.values)})
    if fresh:
        connection.execute(vectors.insert(), fresh)
    return bool(fresh)


def keep_many(
    connection: sa.Connection,
    contents: Sequence[bytes],
    space: str,
    digest: str,
    values: Sequence[np.ndarray],
) -> None:
    """Store a vector float (D,) of each content of a space by one encoder, unless it is there."""
    there = set(known(connection, contents, space, digest)) | {b""}  # what is empty has no vector
    rows: list[dict[str, object]] = []
    for content, value in zip(contents, values, strict=True):
        if content not in there:
            there.add(content)
            rows.append({"content": content, "space": space, "digest": digest, "value": as_bytes(value)})
    for start in range(0, len(rows), _CHUNK):
        connection.execute(vectors.insert(), rows[start : start + _CHUNK])


def drop_unused(connection: sa.Connection, content: bytes, space: str, referring: sa.Column[bytes]) -> None:
    """Forget a content of a space that `referring` holds no more; a photograph's file with it."""
    if not content or connection.scalar(sa.select(sa.exists().where(referring == content))):
        return
    connection.execute(vectors.delete().where(vectors.c.content == content, vectors.c.space == space))
    if space == "image":
        connection.execute(files.delete().where(files.c.hash == content))


def as_bytes(values: np.ndarray) -> bytes:
    """A vector as it is stored."""
    return values.astype("<f2").tobytes()


def floats(data: bytes) -> np.ndarray:
    """A stored vector as float32 (D,)."""
    return np.frombuffer(data, "<f2").astype(np.float32)
