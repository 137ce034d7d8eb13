"""Whether a database takes writes: the last refusal, and probes that detect when writes work again."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import sqlalchemy as sa

from services.core.errors import VitrineError

_PROBE_BYTES = 256 << 10  # large enough to fail: a page or two may fit on a full disk
_log = logging.getLogger(__name__)

_metadata = sa.MetaData()
_probes = sa.Table(
    "write_probes",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
)


def create_probes(engine: sa.Engine) -> None:
    """Create the table of the probes, if it is missing."""
    _metadata.create_all(engine)


class WriteHealth:
    """The state of one database, for the only thread that writes through `engine`, within `exclusive()`."""

    def __init__(self, engine: sa.Engine, exclusive: Callable[[], AbstractContextManager[None]]) -> None:
        self._engine, self._exclusive = engine, exclusive
        self.refusal: VitrineError | None = None
        """The last error while the database refuses writes; None while it takes them."""
        self.refused = 0
        """The number of operations that the database has refused."""
        self.probe_seconds = 1.0
        """The pause between a refused write and a probe, and between probes."""
        self._probe_at = 0.0

    def refuse(self, error: VitrineError, operations: int) -> None:
        """Record that the database refused so many operations."""
        if self.refusal is None:
            _log.error("the database refuses writes: %s (%s)", error, error.__cause__)
            self._probe_at = time.monotonic() + self.probe_seconds
        self.refusal, self.refused = error, self.refused + operations

    def probe_when_due(self) -> None:
        """While the database refuses writes, try a write at intervals; a commit ends the refusal."""
        if self.refusal is None or time.monotonic() < self._probe_at:
            return
        try:
            for row in ({"id": 0, "content": bytes(_PROBE_BYTES)}, None):
                with self._exclusive(), self._engine.begin() as connection:
                    connection.execute(_probes.delete())
                    if row:
                        connection.execute(_probes.insert().values(row))
        except (VitrineError, sa.exc.SQLAlchemyError) as error:
            self.refusal = error if isinstance(error, VitrineError) else self.refusal
            self._probe_at = time.monotonic() + self.probe_seconds
            return
        self.refusal = None
        _log.warning("the database takes writes again; it refused %d so far", self.refused)
