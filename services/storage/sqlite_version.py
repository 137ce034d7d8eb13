"""Warns at start if the SQLite of this Python has a bug that damages databases."""

import logging
import sqlite3
from functools import cache

_log = logging.getLogger(__name__)


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Whether a version of SQLite can damage a database that two connections write at once.

    See https://www.sqlite.org/wal.html#walresetbug: fixed in 3.51.3, and in 3.50.7 and 3.44.6.
    """
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return version >= (3, 7, 0) and not fixed


@cache
def warn_of_wal_reset() -> None:
    """Log one warning, once, if this process runs an affected SQLite."""
    if has_wal_reset_bug(sqlite3.sqlite_version_info):
        _log.warning(
            "SQLite %s can damage a database that two connections write at once (WAL-reset bug). Vitrine "
            "writes through one connection at a time: let no other program write its databases, or use "
            "SQLite 3.51.3, 3.50.7 or 3.44.6",
            sqlite3.sqlite_version,
        )
