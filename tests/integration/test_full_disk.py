"""On a full disk no acknowledged write is lost, and writes resume when there is space."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.errors import StorageFull, Unavailable
from services.storage import store
from tests.support.disks import page_limit, small_disk

_blobs = sa.Table(
    "test_blobs",
    sa.MetaData(),
    sa.Column("n", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
_KIB = 1 << 10


def _insert(n: int, size: int) -> Callable[[sa.Connection], int]:
    def operation(connection: sa.Connection) -> int:
        connection.execute(_blobs.insert().values(n=n, content=os.urandom(size)))
        return n

    return operation


def _numbers(engine: sa.Engine) -> set[int]:
    with engine.connect() as connection:
        return set(connection.scalars(sa.select(_blobs.c.n)))


def _open(url: str) -> tuple[sa.Engine, store.Writer]:
    engine = store.open_engine(url)
    _blobs.create(engine, checkfirst=True)
    store.create(engine, [], "blobs")
    writer = store.Writer(engine)
    writer.health.probe_seconds = 0.02
    return engine, writer


def _in_groups(writer: store.Writer, groups: list[list[int]]) -> list["Future[int]"]:
    """Submit blobs of these sizes; each inner list is committed as one group."""
    futures: list[Future[int]] = []
    for sizes in groups:
        with writer.exclusive():
            futures += [writer.submit(_insert(len(futures) + n, size)) for n, size in enumerate(sizes)]
        for future in futures:
            future.exception()
    return futures


def _check(futures: list["Future[int]"], url: str) -> int:
    """Nothing acknowledged is missing in the reopened database, all else was refused by name; how many."""
    acks = {future.result() for future in futures if future.exception() is None}
    for future in futures:
        assert future.exception() is None or isinstance(future.exception(), StorageFull)
    engine_after = store.open_engine(url)
    assert _numbers(engine_after) == acks
    engine_after.dispose()
    return len(futures) - len(acks)


def _until_writable(writer: store.Writer) -> None:
    end = time.monotonic() + 60
    while writer.health.refusal is not None:
        assert time.monotonic() < end, writer.health.refusal
        time.sleep(0.05)


sizes = st.sampled_from([100, 3 * _KIB, 40 * _KIB, 300 * _KIB, 3000 * _KIB])


@given(groups=st.lists(st.lists(sizes, min_size=1, max_size=8), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_acknowledged_writes_survive_a_page_limit(groups: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder, page_limit() as limit:
        limit.pages = 600
        url = f"sqlite:///{folder}/full.sqlite"
        engine, writer = _open(url)
        futures = _in_groups(writer, groups)
        refusals = _check(futures, url)
        assert (writer.health.refused > 0) == (refusals > 0)
        limit.lift(engine)
        _until_writable(writer)  # nobody writes: it finds out by itself
        assert writer.submit(_insert(10_000, 3000 * _KIB)).result() == 10_000
        writer.close()
        engine.dispose()


def test_acknowledged_writes_survive_a_small_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 12) as disk:
        url = f"sqlite:///{disk.path}/full.sqlite"
        engine, writer = _open(url)
        futures = _in_groups(writer, [[20 * _KIB, 400 * _KIB, 100, 40 * _KIB]] * 40)
        assert _check(futures, url) > 0
        assert "is full" in str(writer.health.refusal)
        disk.resize(64)
        _until_writable(writer)
        assert writer.submit(_insert(10_000, 3000 * _KIB)).result() == 10_000
        writer.close()
        engine.dispose()


def test_a_writer_on_a_full_disk_closes_and_answers_all(tmp_path: Path) -> None:
    with page_limit() as limit:
        limit.pages = 100
        engine, writer = _open(f"sqlite:///{tmp_path}/full.sqlite")
        _in_groups(writer, [[3000 * _KIB]])
        with writer.exclusive():
            futures = [writer.submit(_insert(n, 300 * _KIB)) for n in range(1, 2000)]
        writer.close()
        assert {type(future.exception()) for future in futures} == {StorageFull}
        engine.dispose()


@pytest.fixture
def postgres_engine(postgres: str, tmp_path: Path) -> Iterator[sa.Engine]:
    name = f"test_{uuid4().hex}"
    admin = sa.create_engine(postgres.format(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine = store.open_engine(postgres.format(database=name))
    yield engine
    engine.dispose()
    admin.dispose()


def test_a_broken_postgres_connection_fails_the_whole_group(
    postgres_engine: sa.Engine,
) -> None:
    def terminate(connection: sa.Connection) -> None:
        connection.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))

    _blobs.create(postgres_engine)
    store.create(postgres_engine, [], "blobs")
    writer = store.Writer(postgres_engine)
    with writer.exclusive():
        operations: list[Callable[[sa.Connection], Any]] = [_insert(1, 10), terminate, _insert(2, 10)]
        futures = [writer.submit(operation) for operation in operations]
    assert [type(future.exception()) for future in futures] == [Unavailable] * 3
    _until_writable(writer)
    assert writer.submit(_insert(3, 10)).result() == 3
    assert _numbers(postgres_engine) == {3}
    writer.close()


def test_a_full_postgres_disk_fails_the_writes_that_do_not_fit(postgres_engine: sa.Engine) -> None:
    # Not under pytest's own folder, which is closed to the user that the server runs as.
    folder = Path(tempfile.mkdtemp(prefix="vitrine-tablespace-"))
    space = f"space_{os.getpid()}"
    with small_disk(folder / "disk", 8) as disk:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
            shutil.chown(disk.path, "postgres")
        outside = postgres_engine.execution_options(isolation_level="AUTOCOMMIT")
        with outside.connect() as connection:
            connection.exec_driver_sql(f"CREATE TABLESPACE {space} LOCATION '{disk.path}'")
        try:
            with outside.connect() as connection:
                columns = "n integer PRIMARY KEY, content bytea NOT NULL"
                connection.exec_driver_sql(f"CREATE TABLE test_blobs ({columns}) TABLESPACE {space}")
                connection.exec_driver_sql("ALTER TABLE test_blobs ALTER content SET STORAGE EXTERNAL")
            store.create(postgres_engine, [], "blobs")
            writer = store.Writer(postgres_engine)
            futures = _in_groups(writer, [[20 * _KIB, 900 * _KIB, 100]] * 20)
            acks = {future.result() for future in futures if future.exception() is None}
            assert {type(f.exception()) for f in futures} == {type(None), StorageFull}
            assert _numbers(postgres_engine) == acks
            disk.resize(64)
            _until_writable(writer)
            assert writer.submit(_insert(10_000, 900 * _KIB)).result() == 10_000
            writer.close()
        finally:
            with outside.connect() as connection:
                connection.exec_driver_sql("DROP TABLE IF EXISTS test_blobs")
                connection.exec_driver_sql(f"DROP TABLESPACE {space}")
    shutil.rmtree(folder)
