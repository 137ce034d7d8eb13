"""Open files as they are delivered: plain, compressed (gzip, bzip2, xz, Zstandard) or in a zip archive.

What a file is, its first bytes say, not its name.
"""

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from services.core.errors import FailedPrecondition

_MAGIC_LENGTH = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"(\xb5/\xfd": "zstd"}
_KINDS = {
    b"PAR1": "parquet",
    b"\xd0\xcf\x11\xe0": "spreadsheet",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"SQLite format 3": "a SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a pointer of Git LFS instead of the file",
}
_BINARY = (".parquet", ".pq", ".xlsx", ".xlsb", ".xls", ".ods")
_JSON = re.compile(rb'\{|\[\s*[{\[\]"]')
_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file without its compression; 'archive.zip/member' opens a member.

    Raises:
        FailedPrecondition: it cannot be opened, or its compression is damaged.
    """
    try:
        with _raw(path) as raw, _decompressed(raw) as stream:
            yield stream
    except _ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise FailedPrecondition(f"cannot be read: {reason}") from None


def kind(path: Path) -> str:
    """What a file holds: 'parquet', 'spreadsheet', 'zip', 'xml', 'json', 'text', or another thing by name."""
    with open_binary(path) as stream:
        head = stream.read(_MAGIC_LENGTH)
        for magic, name in _KINDS.items():
            if head.startswith(magic):
                return name
        if head.startswith(b"PK\x03\x04"):
            names = zipfile.ZipFile(io.BytesIO(head + stream.read())).namelist()
            return "spreadsheet" if _is_workbook(names) else "zip"
    if head[257:262] == b"ustar":
        return "a tar archive"
    start = head.removeprefix(b"\xef\xbb\xbf").replace(b"\0", b"").removeprefix(b"\xff\xfe").lstrip()
    if start.startswith(b"<"):
        return "a web page" if start[:50].lower().startswith((b"<!doctype html", b"<html")) else "xml"
    if path.suffix.lower() in _BINARY:
        raise FailedPrecondition(f"cannot be read: by its name it is {path.suffix}, by its content it is not")
    return "json" if _JSON.match(start) else "text"


def members(path: Path) -> list[Path]:
    """The files of a zip archive as paths below it, without those of macOS; the file itself if it is none."""
    if not zipfile.is_zipfile(path):
        return [path]
    with zipfile.ZipFile(path) as archive:
        names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    if _is_workbook(names):
        return [path]
    return [path / name for name in names if not is_hidden(Path(name))]


def is_hidden(path: Path) -> bool:
    """Whether a path below a folder or an archive is no data: '_SUCCESS', '.part.crc', '__MACOSX/...'."""
    return any(part.startswith((".", "_", "~$")) for part in path.parts)


def _is_workbook(names: list[str]) -> bool:
    return "[Content_Types].xml" in names or "META-INF/manifest.xml" in names


@contextmanager
def _raw(path: Path) -> Iterator[BinaryIO]:
    archive = next((parent for parent in path.parents if parent.is_file()), None)
    if archive is None:
        with path.open("rb") as stream:
            yield stream
        return
    with zipfile.ZipFile(archive) as archive_file:
        try:
            member = archive_file.open(str(path.relative_to(archive)))
        except (KeyError, RuntimeError, NotImplementedError) as error:  # none such, encrypted, rare packing
            raise FailedPrecondition(f"cannot be read: {error.args[0]}") from None
        with member:
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, member)))


@contextmanager
def _decompressed(raw: BinaryIO) -> Iterator[BinaryIO]:
    head = cast(io.BufferedReader, raw).peek(8)
    form = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")
    match form:
        case "gzip":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case "bz2":
            yield cast(BinaryIO, bz2.BZ2File(raw))
        case "xz":
            yield cast(BinaryIO, lzma.LZMAFile(raw))  # noqa: SIM115 - holds nothing but `raw`
        case "zstd":
            yield cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
        case _:
            yield raw
