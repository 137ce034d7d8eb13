"""Converts database failures to domain errors: a full disk, a lost connection, a locked or damaged file.

It uses the error codes of SQLite and PostgreSQL. An error that is not listed here stays as it is: it is a
bug.
"""

import shutil
import sqlite3
from pathlib import Path

import sqlalchemy as sa

from services.core.errors import FailedPrecondition, ResourceExhausted, StorageFull, Unavailable, VitrineError

_MIN_FREE_BYTES = 1 << 20
_PRIMARY_CODE = 0xFF  # the low byte of an extended result code (https://www.sqlite.org/rescode.html)
_RETRY = "the database is busy; try again"
_NO_ANSWER = "the database does not answer; try again"


def translate(engine: sa.Engine) -> None:
    """Let the statements of `engine` raise domain errors where one fits."""

    def raise_domain_error(context: sa.ExceptionContext) -> None:
        if context.is_pre_ping:  # the pool replaces the connection by itself
            return
        cause = context.original_exception
        if engine.dialect.name == "sqlite":
            error = _of_sqlite(cause, engine.url)
        else:
            error = _of_postgres(cause, context)
        if error is not None:
            raise error from cause

    sa.event.listen(engine, "handle_error", raise_domain_error)


def full_disk(folder: Path) -> StorageFull:
    """The error for a full disk under `folder`."""
    return StorageFull(f"the disk under {folder} is full: free some space, and writes go on by themselves")


def _of_sqlite(error: BaseException, url: sa.URL) -> VitrineError | None:
    if isinstance(error, MemoryError):  # the driver's word for SQLITE_NOMEM
        return ResourceExhausted("the process has no memory left for its database")
    if not isinstance(error, sqlite3.Error):
        return None
    path = Path(url.database or "").absolute()
    code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE  # the driver's own errors have none
    match code:
        case sqlite3.SQLITE_FULL:
            return full_disk(path.parent)
        case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_CANTOPEN:
            return _of_files(error, path, opening=code == sqlite3.SQLITE_CANTOPEN)
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return Unavailable(f"{path} is locked by another program; try again")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return FailedPrecondition(f"{path} cannot be written ({error}): let this process write there")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return FailedPrecondition(f"{path} is damaged ({error}): put a backup of it in its place")
        case _:
            return None


def _of_files(error: sqlite3.Error, path: Path, *, opening: bool) -> VitrineError:
    """SQLite names neither the file nor the reason: what space is left decides."""
    try:
        if shutil.disk_usage(path.parent).free < _MIN_FREE_BYTES:
            return full_disk(path.parent)
    except OSError as missing:
        return FailedPrecondition(f"{path.parent} cannot be used: {missing}")
    if opening:
        return FailedPrecondition(f"{path} cannot be opened: let this process read and write it")
    return StorageFull(f"the disk under {path.parent} takes no writes ({error}): a quota, or a failing disk")


def _of_postgres(error: BaseException, context: sa.ExceptionContext) -> VitrineError | None:
    """By the code in the standard's five letters (PostgreSQL documentation, appendix A)."""
    if not isinstance(error, context.dialect.loaded_dbapi.Error):
        return None
    state: str = getattr(error, "sqlstate", None) or ""
    match state[:2], state:
        case _, "53100":
            return StorageFull("the disk of the PostgreSQL server is full: free some space there")
        case _, "53200":
            return ResourceExhausted("the PostgreSQL server has no memory left")
        case (("40" | "53"), _) | (_, ("55P03" | "57014")):
            return Unavailable(_RETRY)
        case _, "25006":
            return Unavailable("the database takes no writes now: it is a replica, or set to read only")
        case (("08" | "57" | "58"), _):
            return Unavailable(_NO_ANSWER)
        case _:
            away = context.is_disconnect or (not state and isinstance(error, _operational(context)))
            return Unavailable(_NO_ANSWER) if away else None


def _operational(context: sa.ExceptionContext) -> type[Exception]:
    """The driver's class of errors that are not the statement's fault."""
    kind: type[Exception] = context.dialect.loaded_dbapi.OperationalError
    return kind
