"""SQL for services that own state: engines, the lock on a state directory, and one writer thread.

Knows nothing of items or events. SQLite runs WAL with synchronous=FULL, so that a
committed write outlives the process and the machine's power; PostgreSQL is one URL away
and runs the same statements.
"""

import fcntl
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy as sa

from services.errors import FailedPrecondition, ResourceExhausted, Unavailable

metadata = sa.MetaData()
"""Every service's tables; `create` makes those it is given."""

_sequences = sa.Table(
    "sequences",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)


def open_engine(url: str) -> sa.Engine:
    """An engine for `url`, a SQLAlchemy database URL of SQLite or PostgreSQL."""
    engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own transaction handling breaks savepoints; `_begin_sqlite` begins instead.
    connection.isolation_level = None
    # What is deleted is overwritten: a file must not remember whom a shop has forgotten.
    pragmas = (
        "journal_mode=WAL",
        "synchronous=FULL",
        "busy_timeout=10000",
        "foreign_keys=ON",
        "secure_delete=ON",
    )
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("vitrine_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def create(engine: sa.Engine, tables: list[sa.Table], sequence: str) -> None:
    """Make `tables` and the counter `sequence`, if they are not there yet.

    Raises:
        FailedPrecondition: another version of Vitrine made a table that is there.
    """
    metadata.create_all(engine, tables=[_sequences, *tables])
    for table in tables:
        there = {column["name"] for column in sa.inspect(engine).get_columns(table.name)}
        if missing := {column.name for column in table.columns} - there:
            raise FailedPrecondition(
                f"the state in {engine.url!r} is of another version: table {table.name} has no "
                f"{', '.join(sorted(missing))}; start from an empty state and import again"
            )
        for index in table.indexes:
            index.create(engine, checkfirst=True)
    with engine.begin() as connection:
        known = connection.scalar(sa.select(_sequences.c.value).where(_sequences.c.name == sequence))
        if known is None:
            connection.execute(_sequences.insert().values(name=sequence, value=0))


def take_sequence(connection: sa.Connection, sequence: str, count: int = 1) -> int:
    """Take `count` numbers inside the running transaction; the last of them.

    The counter's row stays locked until the commit, so commit order is sequence order.
    """
    update = (
        _sequences.update()
        .where(_sequences.c.name == sequence)
        .values(value=_sequences.c.value + count)
        .returning(_sequences.c.value)
    )
    return int(connection.execute(update).scalar_one())


def current_sequence(connection: sa.Connection, sequence: str) -> int:
    """The last committed number, or the transaction's own."""
    return int(
        connection.execute(sa.select(_sequences.c.value).where(_sequences.c.name == sequence)).scalar_one()
    )


class StateLock:
    """One process writes a state directory; the lock goes with the process, however it ends.

    Raises:
        FailedPrecondition: another process holds `directory`; the message names it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (directory / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise FailedPrecondition(f"{directory} is in use by process {holder}") from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Let another process have the directory."""
        self._file.close()


T = TypeVar("T")
_STOP = object()


class Writer:
    """One thread that commits operations in groups.

    A group is what has queued up while the last one was committed, at most `group`
    operations in one transaction, each in a savepoint of its own: one that raises is
    undone alone and its future gets the error. A future is done only after the commit.
    """

    def __init__(self, engine: sa.Engine, *, group: int = 256, capacity: int = 4096) -> None:
        self._engine = engine.execution_options(vitrine_writes=True)
        self._group = group
        self._queue: queue.Queue[Any] = queue.Queue(capacity)
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Callable[[sa.Connection], T]) -> Future[T]:
        """Queue `operation`; its future holds its result once that is committed.

        Raises:
            ResourceExhausted: the queue is full.
            Unavailable: the writer was closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise Unavailable("the store is closing")
            try:
                self._queue.put_nowait((operation, future))
            except queue.Full:
                raise ResourceExhausted("too many writes are waiting") from None
        return future

    def close(self) -> None:
        """Commit what is queued, then stop; later submissions are refused."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._queue.put(_STOP)
        self._thread.join()

    def _run(self) -> None:
        running = True
        while running:
            taken = [self._queue.get()]
            while len(taken) < self._group and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            running = _STOP not in taken
            self._commit([entry for entry in taken if entry is not _STOP])

    def _commit(self, entries: list[tuple[Callable[[sa.Connection], Any], Future[Any]]]) -> None:
        entries = [e for e in entries if e[1].set_running_or_notify_cancel()]
        outcomes: list[tuple[Any, BaseException | None]] = []
        try:
            with self._engine.begin() as connection:
                outcomes = [self._attempt(connection, operation) for operation, _ in entries]
        except Exception as error:  # the commit failed: nothing of the group was written
            outcomes = [(None, error)] * len(entries)
        for (_, future), (result, failure) in zip(entries, outcomes, strict=True):
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    @staticmethod
    def _attempt(
        connection: sa.Connection, operation: Callable[[sa.Connection], Any]
    ) -> tuple[Any, BaseException | None]:
        try:
            with connection.begin_nested():
                return operation(connection), None
        except Exception as error:  # handed to the caller through the future
            if connection.invalidated:  # the group is lost with the connection
                raise
            return None, error
