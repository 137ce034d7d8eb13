"""Keeps the item table in a file, so that a start need not read every item of a large store."""

import logging
import time
from pathlib import Path

from services.catalog import table_columns
from services.catalog.item_table import ItemTable
from services.catalog.table_columns import TableColumns

_MIN_CHANGES = 2000  # a start reads that many changes in a fraction of a second
_CHANGED_SHARE = 64
_PAUSE_FACTOR = 60  # of a minute, writing takes a second at most
_RETRY_SECONDS = 60.0
_log = logging.getLogger(__name__)


class TableFile:
    """The file of a table at `path`; `source` names the store and the encoders of the items.

    One thread at a time may call it.
    """

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, source
        self._sequence, self._not_before = 0, 0.0

    def load(self) -> TableColumns | None:
        """The columns in the file; None, with a log line, if it is of no use. The store has later changes."""
        columns = table_columns.load(self._path, self._source)
        self._sequence = columns.sequence if columns else 0
        return columns

    def save_if_outdated(self, table: ItemTable) -> bool:
        """Write the file if many rows have changed since it was written, and not too often; whether it did.

        If that fails, for example on a full disk, the log says so and a later call tries again.
        """
        if time.monotonic() < self._not_before:
            return False
        changed = int((table.sequences > self._sequence).sum())
        if changed < max(_MIN_CHANGES, table.length // _CHANGED_SHARE):
            return False
        start = time.monotonic()
        try:
            columns = table.columns()
            table_columns.save(columns, self._path, self._source)
        except OSError as error:
            self._not_before = time.monotonic() + _RETRY_SECONDS
            _log.warning("the item table is not saved, the next start takes longer: %s", error)
            return False
        seconds = time.monotonic() - start
        self._sequence, self._not_before = columns.sequence, time.monotonic() + _PAUSE_FACTOR * seconds
        _log.info("the item table: %d items saved in %.1f s", columns.length, seconds)
        return True
