"""Counts the segments of an image file and limits them, because Pillow reads each segment in Python.

A valid file of 16 MiB may have a million empty segments, which take Pillow seconds before it knows the size.
"""

import re
from collections.abc import Callable

MAX_SCANS = 100
"""For a JPEG file: encoders write about 10 scans, and every scan costs a pass over all pixels."""
_MAX_SEGMENTS = {"JPEG": 1000, "PNG": 20_000, "GIF": 4000}
_MAX_JUNK = 1 << 16  # bytes between the segments of a JPEG file, which Pillow skips one by one
_SCAN, _END, _ALONE = 0xDA, 0xD9, frozenset({0x01, 0xD8})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame (ITU-T T.81, table B.1)
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
_GIF_IMAGE, _GIF_EXTENSION = 0x2C, 0x21


def problem(data: bytes, form: str) -> str:
    """The problem with a file's number of segments, as text; empty if there is none."""
    walk = _WALKS.get(form)
    return walk(data, _MAX_SEGMENTS[form]) if walk else ""


def scan_bound(data: bytes) -> int:
    """An upper bound of the scans of a JPEG file; scans of a thumbnail count too.

    A sequential file with all components in its first scan has one. In other files a scan may have almost no
    data.
    """
    # Counting the two bytes of the marker anywhere takes a hundredth of the time of a walk.
    return 1 if _is_sequential(data) else data.count(bytes([0xFF, _SCAN]))


def _is_sequential(data: bytes) -> bool:
    position, components = 2, b""
    while marker := _MARKER.search(data, position):
        position, code = marker.end(), marker[1][0]
        if code == _SCAN:
            return data[position + 2 : position + 3] == components
        if code in _FRAMES:
            if code not in _SEQUENTIAL:
                return False
            components = data[position + 7 : position + 8]
        position += 0 if code in _ALONE else int.from_bytes(data[position : position + 2], "big")
    return True


def _jpeg(data: bytes, limit: int) -> str:
    """A JPEG's segments before its first scan, and its scans up to the end marker.

    Markers within segments, such as a thumbnail's in EXIF, and behind the end do not count.
    """
    position, segments, scans, junk = 2, 0, 0, 0
    while marker := _MARKER.search(data, position):
        junk += 0 if scans else marker.start() - position
        position, code = marker.end(), marker[1][0]
        if code == _END:
            break
        segments += 1
        scans += code == _SCAN
        if scans == 1 and scan_bound(data) <= MAX_SCANS:
            break
        if scans > MAX_SCANS:
            return f"has more than {MAX_SCANS} scans, the most that a JPEG file may have"
        if segments > limit or junk > _MAX_JUNK:
            return f"has more than {limit} segments, or {_MAX_JUNK} bytes between them"
        position += 0 if code in _ALONE else int.from_bytes(data[position : position + 2], "big")
    return ""


def _png(data: bytes, limit: int) -> str:
    position = 8
    for _ in range(limit):
        if position >= len(data) or data[position + 4 : position + 8] == b"IEND":
            return ""
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return f"has more than {limit} chunks"


def _gif(data: bytes, limit: int) -> str:
    """A GIF's blocks before its first image."""
    flags = data[10] if len(data) > 13 else 0  # noqa: PLR2004 - the header's length
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    in_extension = False
    for _ in range(limit):
        if position >= len(data) or (not in_extension and data[position] == _GIF_IMAGE):
            return ""
        if in_extension:
            in_extension = data[position] > 0
            position += 1 + data[position]
        else:
            in_extension = data[position] == _GIF_EXTENSION
            position += 2 if in_extension else 1
    return f"has more than {limit} blocks before its first image"


_WALKS: dict[str, Callable[[bytes, int], str]] = {"JPEG": _jpeg, "PNG": _png, "GIF": _gif}
