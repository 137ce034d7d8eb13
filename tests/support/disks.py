"""Full disks: a small tmpfs, and a limit on the number of pages of a SQLite database."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.conftest import skip_without


class SmallDisk:
    """A tmpfs of some MiB at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, mebibytes: int) -> None:
        subprocess.run(
            ["mount", "-o", f"remount,size={mebibytes}M", str(self.path)], check=True, capture_output=True
        )

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True, capture_output=True)

    def fill(self) -> None:
        """Leave no room."""
        with suppress(OSError), (self.path / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass


@contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[SmallDisk]:
    """Mount a tmpfs for the block; skip the test if this user may not mount."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}M", "vitrine-test", str(path)]
    if (mount := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
        skip_without("tmpfs", mount.stderr.strip())
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


class PageLimit:
    """A page limit for every SQLite database that is opened while it is active; 0 means no limit."""

    def __init__(self) -> None:
        self.pages = 0

    def configure(self, connection: Any, _record: Any) -> None:
        # SQLite applies the limit per connection, and never below the current size of the file.
        if self.pages and type(connection).__module__ == "sqlite3":
            connection.execute(f"PRAGMA max_page_count={self.pages}")

    def lift(self, *engines: sa.Engine) -> None:
        """Remove the limit, as if somebody had freed disk space."""
        self.pages = 0
        for engine in engines:
            engine.dispose()


@contextmanager
def page_limit() -> Iterator[PageLimit]:
    """Limit the connections that are opened inside the block."""
    limit = PageLimit()
    sa.event.listen(sa.Pool, "connect", limit.configure)
    try:
        yield limit
    finally:
        sa.event.remove(sa.Pool, "connect", limit.configure)
