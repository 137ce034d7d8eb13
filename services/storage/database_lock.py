"""A lock on each database, so that only one process writes it; the lock ends with the process.

For SQLite it is a lock on a file next to the database, for PostgreSQL an advisory lock of a session.
"""

import fcntl
import logging
import os
import socket
import time
import zlib
from contextlib import suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import IO, Protocol

import sqlalchemy as sa

from services.core.errors import FailedPrecondition, Unavailable, VitrineError
from services.storage.storage_errors import full_disk, translate

_NAMESPACE = zlib.crc32(b"vitrine") >> 1  # a positive integer of four bytes, the first half of a lock's key
_MAX_NAME_LENGTH = 63  # of PostgreSQL's application_name
_RELEASE_SECONDS, _PAUSE = 2.0, 0.1
# PostgreSQL ends the session of a machine that vanished after about a minute instead of two hours.
_KEEPALIVES = {"tcp_keepalives_idle": 30, "tcp_keepalives_interval": 10, "tcp_keepalives_count": 3}
_log = logging.getLogger(__name__)


class Lock(Protocol):
    """A lock that this process holds."""

    def release(self) -> None:
        """Free the lock for other processes."""


def lock_database(engine: sa.Engine, service: str, holder: str) -> Lock:
    """Lock the data of `service` in the database of `engine`, before any connection writes.

    `holder` describes this process in the error of a process that the lock keeps out.

    Raises:
        FailedPrecondition: another process holds the lock, or PostgreSQL cannot be reached.
        StorageFull: the lock's file cannot be written.
    """
    if engine.dialect.name == "sqlite":
        path = Path(engine.url.database or "").resolve()
        return FileLock(path.with_name(f"{path.name}.lock"), path, holder)
    return _SessionLock(engine, service, holder)


class FileLock:
    """A lock on the file at `path` that protects `guarded`.

    Raises:
        FailedPrecondition: another process holds it; the message names that process.
        StorageFull: the disk has no space for the holder's name.
    """

    def __init__(self, path: Path, guarded: Path, holder: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.write(_describe(holder))
            self._file.flush()
        except BlockingIOError:
            self._file.seek(0)
            other = self._file.read().strip()
            self._file.close()
            raise _in_use(str(guarded), other) from None
        except OSError as error:
            with suppress(OSError):  # closing flushes again
                self._file.close()
            raise (full_disk(path.parent) if error.errno in (ENOSPC, EDQUOT) else error) from None

    def release(self) -> None:
        """See `Lock`."""
        self._file.close()


class _SessionLock:
    """An advisory lock of PostgreSQL; no write transaction of `engine` starts without it."""

    def __init__(self, engine: sa.Engine, service: str, holder: str) -> None:
        self._engine, self._service = engine, service
        self._key = {"namespace": _NAMESPACE, "service": zlib.crc32(service.encode()) >> 1}
        self._sessions = sa.create_engine(
            engine.url,
            poolclass=sa.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={
                "application_name": _describe(holder)[:_MAX_NAME_LENGTH],
                "connect_timeout": 5,
                "tcp_user_timeout": 10_000,  # milliseconds; the writer waits for this session
            },
        )
        translate(self._sessions)
        self._database = f"the database {engine.url.database!r} of PostgreSQL ({service})"
        self._lost = False
        self._session: sa.Connection | None = None
        try:
            self._session = self._open_locked(_RELEASE_SECONDS)
        except FailedPrecondition:
            raise
        except (VitrineError, sa.exc.SQLAlchemyError) as error:
            raise FailedPrecondition(f"{self._database} cannot be used: {_reason(error)}") from None
        sa.event.listen(engine, "begin", self._ensure)

    def release(self) -> None:
        """See `Lock`."""
        sa.event.remove(self._engine, "begin", self._ensure)
        if self._session is not None:
            self._session.close()

    def _ensure(self, connection: sa.Connection) -> None:
        """Refuse to write once another process may have written, because the state in memory is stale."""
        if not connection.get_execution_options().get("vitrine_writes", False):
            return
        if self._lost:
            raise FailedPrecondition(f"another process has written {self._database}: restart this one")
        if not self._session_answers():
            self._take_again()

    def _session_answers(self) -> bool:
        if (session := self._session) is None:
            return False
        try:
            session.execute(sa.text("SELECT 1"))
        except (VitrineError, sa.exc.SQLAlchemyError):
            self._session = None  # first, so that a lost session is never used again
            session.invalidate()
            session.close()
            return False
        return True

    def _take_again(self) -> None:
        try:
            self._session = self._open_locked(0.0)
        except FailedPrecondition as error:
            self._lost = True
            _log.error("%s; this process stops writing", error)
            raise
        except (VitrineError, sa.exc.SQLAlchemyError) as error:  # the next write tries again
            message = f"the lock on {self._database} cannot be taken again: {_reason(error)}; try again"
            raise Unavailable(message) from error
        _log.warning("the lock on %s was lost with its connection, and taken again", self._database)

    def _open_locked(self, seconds: float) -> sa.Connection:
        """A session with the lock; a killed session releases the lock after a moment."""
        session, end = self._sessions.connect(), time.monotonic() + seconds
        try:
            for name, value in _KEEPALIVES.items():
                session.exec_driver_sql(f"SET {name} = {value}")
            attempt = sa.text("SELECT pg_try_advisory_lock(:namespace, :service)")
            while not session.execute(attempt, self._key).scalar():
                if time.monotonic() >= end:
                    raise _in_use(self._database, self._holder(session))
                time.sleep(_PAUSE)
        except BaseException:
            session.close()
            raise
        return session

    def _holder(self, session: sa.Connection) -> str:
        query = sa.text(
            "SELECT a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
            "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid = :namespace "
            "AND l.objid = :service AND a.datname = current_database()"
        )
        return str(session.execute(query, self._key).scalar() or "")


def _reason(error: Exception) -> str:
    """The first line of the driver's message."""
    return str(error.__cause__ or error).strip().partition("\n")[0]


def _describe(holder: str) -> str:
    return f"process {os.getpid()} on {socket.gethostname()} ({holder})"


def _in_use(database: str, holder: str) -> VitrineError:
    if holder == _describe(holder.partition("(")[2].removesuffix(")")):
        return FailedPrecondition(
            f"{database} is in use by this process: give each service a database of its own"
        )
    process = holder or "another process without a name"
    return FailedPrecondition(
        f"{database} is in use by {process}: stop that process first, or use another state"
    )
