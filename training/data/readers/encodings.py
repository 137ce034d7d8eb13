"""The text encoding of a file, detected: byte order marks, UTF-16, UTF-8, else a guess.

A file is UTF-8 unless its bytes say otherwise: a few bytes that are no UTF-8 do not make it anything else.
"""

import codecs
import re
from dataclasses import dataclass
from typing import BinaryIO

from charset_normalizer import from_bytes

_CHUNK = 1 << 22
_SAMPLE_BYTES = 1 << 16  # bytes of lines that are not plain ASCII
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What shops write apart from Unicode. Others resemble these in short texts and are guessed wrongly.
_CANDIDATES = ["gb18030", "big5", "cp932", "cp949", "cp1251", "cp1250", "cp1252"]
_WESTERN = "cp1252"
_RUNS = re.compile(rb"[\x80-\xff]+")
_ALONE = 0.5  # in Western text most letters beyond ASCII stand among ASCII letters


@dataclass(frozen=True)
class FileEncoding:
    """A Python codec; `guessed` when neither a mark nor valid UTF-8 proves it.

    Then `sample` is the first line, number `line`, that is no UTF-8.
    """

    codec: str
    guessed: bool = False
    sample: str = ""
    line: int = 0


def detect(stream: BinaryIO) -> FileEncoding:
    """The encoding of a stream of bytes, which is read up to what decides."""
    head = stream.read(_CHUNK)
    for mark, codec in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return FileEncoding(codec)
    wide = _utf16_without_mark(head)
    if wide:
        return FileEncoding(wide, guessed=True)
    return _narrow(_unusual_lines(head, stream))


def _utf16_without_mark(head: bytes) -> str:
    """UTF-16 of mostly Latin text has a NUL in every second byte."""
    sample = head[:4096]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    half = len(sample) / 2
    if odd > half * 0.4 and even < half * 0.05:
        return "utf-16-le"
    if even > half * 0.4 and odd < half * 0.05:
        return "utf-16-be"
    return ""


def _unusual_lines(head: bytes, stream: BinaryIO) -> dict[int, bytes]:
    """The first lines that hold bytes above 127, up to `_ENOUGH` bytes, by their number."""
    lines: dict[int, bytes] = {}
    size, remainder, chunk, number = 0, b"", head, 1
    while chunk and size < _SAMPLE_BYTES:
        next_chunk = stream.read(_CHUNK)
        block = remainder + chunk
        end = len(block) if not next_chunk else block.rfind(b"\n") + 1
        block, remainder = block[:end], block[end:]
        if not block.isascii():
            for index, line in enumerate(block.split(b"\n")):
                if not line.isascii() and size < _SAMPLE_BYTES:
                    lines[number + index] = _around(line)
                    size += len(lines[number + index])
        number += block.count(b"\n")
        chunk = next_chunk
    return lines


def _around(line: bytes, margin: int = 2000) -> bytes:
    """The part of a line that holds its first unusual bytes: a cell of megabytes is mostly ASCII."""
    if len(line) <= 2 * margin:
        return line
    first = next(index for index, byte in enumerate(line) if byte > 127)  # noqa: PLR2004
    return line[max(0, first - margin) : first + margin]


def _narrow(lines: dict[int, bytes]) -> FileEncoding:
    text = b"\n".join(lines.values()).decode("utf-8", "surrogateescape")
    invalid_count = sum("\udc80" <= character <= "\udcff" for character in text)
    valid_count = sum(character > "\x7f" for character in text) - invalid_count
    if valid_count >= invalid_count:
        return FileEncoding("utf-8")
    unusual = {number: line for number, line in lines.items() if not _is_utf8(line)}
    codec = _guess(b"\n".join(unusual.values()))
    number, line = next(iter(unusual.items()))
    return FileEncoding(codec, guessed=True, sample=line.decode(codec, "replace"), line=number)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _guess(text: bytes) -> str:
    """charset-normalizer takes short Western text for Japanese or Czech, so that is checked first."""
    runs = [len(run) for run in _RUNS.findall(text)]
    if runs.count(1) > _ALONE * sum(runs):
        return _WESTERN
    best = from_bytes(text, cp_isolation=_CANDIDATES, preemptive_behaviour=False).best()
    return best.encoding if best else _WESTERN
