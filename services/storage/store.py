"""SQL for services that own state: engines, tables, and one writer thread.

It is independent of items and events. Database failures raise the errors of `storage_errors`.
SQLite runs with WAL and synchronous=FULL, so a committed write survives a crash of the process and a power
failure. PostgreSQL runs the same statements.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa

from services.core.errors import FailedPrecondition, ResourceExhausted, StorageFull, Unavailable, VitrineError
from services.core.fair_queue import FairQueue
from services.storage.sqlite_version import warn_of_wal_reset
from services.storage.storage_errors import translate
from services.storage.write_health import WriteHealth, create_probes

_PSYCOPG_IN_TRANSACTION = (2, 3)  # psycopg.pq.TransactionStatus: INTRANS and INERROR

metadata = sa.MetaData()
"""The tables of all services; `create` creates the ones of one service."""

_sequences = sa.Table(
    "sequences",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)


def open_engine(url: str) -> sa.Engine:
    """An engine for `url`, a SQLAlchemy database URL of SQLite or PostgreSQL."""
    if url.startswith("sqlite"):
        warn_of_wal_reset()
        engine = sa.create_engine(url)
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    else:
        # Otherwise a server that vanished would block the writer, and a stop, for minutes.
        timeouts = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
        engine = sa.create_engine(url, pool_pre_ping=True, connect_args=timeouts)
    translate(engine)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own transaction handling breaks savepoints; `_begin_sqlite` starts transactions instead.
    connection.isolation_level = None
    # secure_delete overwrites deleted content: the file must not contain erased users.
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
    """Create `tables` and the counter `sequence`, if they are missing.

    Raises:
        FailedPrecondition: a table was created by another version of Vitrine.
    """
    metadata.create_all(engine, tables=[_sequences, *tables])
    create_probes(engine)
    for table in tables:
        present = {column["name"] for column in sa.inspect(engine).get_columns(table.name)}
        if missing := {column.name for column in table.columns} - present:
            raise FailedPrecondition(
                f"the state in {engine.url!r} is from another version: table {table.name} has no "
                f"{', '.join(sorted(missing))}; start from an empty state and import again"
            )
        for index in table.indexes:
            index.create(engine, checkfirst=True)
    with engine.begin() as connection:
        value = connection.scalar(sa.select(_sequences.c.value).where(_sequences.c.name == sequence))
        if value is None:
            connection.execute(_sequences.insert().values(name=sequence, value=0))


def take_sequence(connection: sa.Connection, sequence: str, count: int = 1) -> int:
    """Take `count` sequence numbers in the running transaction; returns the last one.

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
    """The last committed sequence number, or the transaction's own."""
    return int(
        connection.execute(sa.select(_sequences.c.value).where(_sequences.c.name == sequence)).scalar_one()
    )


T = TypeVar("T")
Operation = Callable[[sa.Connection], Any]
GROUP_ROWS = 2_500
"""The maximum number of rows per transaction, which then takes about a tenth of a second."""
_MAX_QUEUED_ROWS = 2_000_000


class Writer:
    """One thread that commits operations in groups.

    A group is one transaction of the operations that queued up during the last commit: at most `group`
    operations and `GROUP_ROWS` rows. Each operation has its own savepoint: one that raises is undone alone,
    and its future gets the error. A future is done only after the commit. If the database rolls back the
    whole transaction, like SQLite on a full disk, every future of the group fails.

    Operations of one caller are committed in their order. Callers share the thread by rows, so an operation
    waits for little more than one group, whatever other callers have queued.
    """

    def __init__(self, engine: sa.Engine, *, group: int = 256, capacity: int = 4096) -> None:
        self._engine = engine.execution_options(vitrine_writes=True)
        self._group = group
        self._queue: FairQueue[tuple[Callable[[sa.Connection], Any], Future[Any]]] = FairQueue(
            capacity, _MAX_QUEUED_ROWS
        )
        self._closed = False
        self._lock = threading.Lock()
        self._queue_lock, self._write_lock = threading.Lock(), threading.Lock()
        self.health = WriteHealth(self._engine, self.exclusive)
        """Whether the database takes writes; writes are attempted in any case."""
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(
        self, operation: Callable[[sa.Connection], T], *, caller: Hashable = None, rows: int = 1
    ) -> Future[T]:
        """Queue `operation`, which writes about `rows` rows; the future has its result after the commit.

        Operations without a caller count as one caller.

        The future raises what the operation raises, and:
            StorageFull: the disk is full.
            Unavailable: the database does not answer, or is locked.

        Raises:
            ResourceExhausted: the queue is full.
            Unavailable: the writer was closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise Unavailable("the store is closing")
            if not self._queue.put((operation, future), caller, rows):
                raise ResourceExhausted("too many writes are waiting")
        return future

    def close(self) -> None:
        """Commit the queued operations, then stop; later submissions raise Unavailable."""
        with self._lock:
            self._closed = True
        self._queue.close()
        self._thread.join()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold back the commits of the writer during the block; waits only for the running one.

        So two connections never write one SQLite database at the same time.
        """
        # A waiting thread holds `_queue_lock`, so that the writer's next group comes after it.
        with self._queue_lock:
            self._write_lock.acquire()
        try:
            yield
        finally:
            self._write_lock.release()

    def _run(self) -> None:
        while not self._queue.finished:
            timeout = self.health.probe_seconds if self.health.refusal else None
            entries = self._queue.take(self._group, GROUP_ROWS, timeout)
            entries = [entry for entry in entries if entry[1].set_running_or_notify_cancel()]
            outcomes = self._commit([operation for operation, _ in entries]) if entries else []
            for (_, future), (result, failure) in zip(entries, outcomes, strict=True):
                if failure is None:
                    future.set_result(result)
                else:
                    future.set_exception(failure)
            if not self._closed:
                self.health.probe_when_due()

    def _commit(self, operations: list[Operation]) -> list[tuple[Any, Exception | None]]:
        """Commit a group; the result or the error of each operation."""
        if self._closed and self.health.refusal:  # at a stop, do not wait for the database once per group
            return [(None, self.health.refusal)] * len(operations)
        try:
            with self.exclusive(), self._engine.begin() as connection:
                outcomes = [self._attempt(connection, operation) for operation in operations]
        except Exception as error:  # no operation of the group was written
            if isinstance(error, VitrineError):
                self.health.refuse(error, len(operations))
            return [(None, error)] * len(operations)
        if full := [failure for _, failure in outcomes if isinstance(failure, StorageFull)]:
            self.health.refuse(full[-1], len(full))
        return outcomes

    @staticmethod
    def _attempt(connection: sa.Connection, operation: Operation) -> tuple[Any, Exception | None]:
        savepoint = connection.begin_nested()
        try:
            result = operation(connection)
        except Exception as error:  # the caller gets it through the future
            if not _in_transaction(connection):  # the group's earlier operations are lost too
                raise
            savepoint.rollback()
            return None, error
        savepoint.commit()
        return result, None


def _in_transaction(connection: sa.Connection) -> bool:
    """Whether the transaction is still open: the database may have ended it, or the connection is lost."""
    if connection.invalidated:
        return False
    driver: Any = connection.connection.dbapi_connection
    if connection.dialect.name == "sqlite":
        return bool(driver.in_transaction)
    return driver.info.transaction_status in _PSYCOPG_IN_TRANSACTION
