"""Files under a directory, those in archives included, each with a way to read it."""

import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from services.core.errors import FailedPrecondition

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".avif", ".heic", ".heif"})
_TAR = (".tar",)
_PACKED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_ZIP = (".zip",)
_ENCRYPTED = 1
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError)


@dataclass(frozen=True)
class StoredFile:
    """A file; `name` is the path below the directory, through an archive; `stamp` changes with the file."""

    name: str
    stamp: str
    read: Callable[[], bytes]

    @property
    def is_image(self) -> bool:
        """Whether the name says that it is an image of a format that is read; hidden files are none."""
        path = PurePosixPath(self.name)
        return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def files_below(directory: Path) -> Iterator[StoredFile]:
    """The files in the order of their paths; none when the directory is not there.

    A packed tar has no way to read one file alone: its images are unpacked into a temporary file, which ends
    with the process.

    Raises:
        FailedPrecondition: an archive is damaged or encrypted.
    """
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        opener = next((open_ for ends, open_ in _ARCHIVES if path.name.lower().endswith(ends)), None)
        if opener is None:
            status = path.stat()
            yield StoredFile(name, f"{status.st_size} {status.st_mtime_ns}", path.read_bytes)
            continue
        try:
            yield from opener(path, name)
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno:  # the machine's: no room, no temporary directory
                raise
            raise FailedPrecondition(
                f"{path} cannot be read as an archive: {error or 'it ends too early'}; "
                "copy it again, or unpack it into the same folder"
            ) from None


def _tar(path: Path, name: str) -> Iterator[StoredFile]:
    time = path.stat().st_mtime_ns
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile():
                read = partial(_read_range_of_path, path, member.offset_data, member.size)
                yield StoredFile(f"{name}/{member.name}", f"{member.offset_data} {member.size} {time}", read)


def _packed_tar(path: Path, name: str) -> Iterator[StoredFile]:
    time, offset = path.stat().st_mtime_ns, 0
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as somebody may read from it
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if not member.isfile():
                continue
            stored = StoredFile(
                f"{name}/{member.name}",
                f"{member.size} {time}",
                partial(_read_range, unpacked, offset, member.size),
            )
            content = archive.extractfile(member) if stored.is_image else None
            if content is not None:
                unpacked.write(content.read())
                unpacked.flush()
                offset += member.size
            yield stored


def _zip(path: Path, name: str) -> Iterator[StoredFile]:
    archive = zipfile.ZipFile(path)  # open as long as somebody may read from it
    for member in archive.infolist():
        if member.flag_bits & _ENCRYPTED:
            raise zipfile.BadZipFile("it is encrypted")
        if not member.is_dir():
            read = partial(archive.read, member)
            yield StoredFile(f"{name}/{member.filename}", f"{member.file_size} {member.CRC}", read)


def _read_range_of_path(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _read_range(file: IO[bytes], offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)


_ARCHIVES: tuple[tuple[tuple[str, ...], Callable[[Path, str], Iterator[StoredFile]]], ...] = (
    (_PACKED_TAR, _packed_tar),
    (_TAR, _tar),
    (_ZIP, _zip),
)
