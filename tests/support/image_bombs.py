"""Small image files that are expensive to decode, and ordinary files of every format."""

import io
import struct
import zlib

import numpy as np
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()  # only tests encode HEIC


def smooth_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth image of a few colors."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encode_image(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def progressive_jpeg(width: int, height: int, scans: int, segments: int = 0) -> bytes:
    """A gray JPEG in which every scan refines all coefficients with 5 bytes per 32,767 blocks.

    `segments` empty comments precede the first scan.
    """
    blocks = -(-width // 8) * -(-height // 8)
    dc = _entropy_coded("0" * blocks)
    runs, remaining = [], blocks
    while remaining > 0:
        run = min(remaining, 32_767)  # an end-of-band run is coded as 2**14 and 14 bits
        runs.append("0" + format(max(run, 16_384) - 16_384, "014b"))
        remaining -= run
    refinement = _segment(0xDA, b"\1\1\0\1\x3f\x10") + _entropy_coded("".join(runs))
    return b"".join(
        [
            b"\xff\xd8",
            b"\xff\xfe\0\2" * segments,
            _segment(0xDB, b"\0" + bytes([1] * 64)),
            _segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\1\x11\0"),
            _segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0"),
            _segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0"),
            _segment(0xDA, b"\1\1\0\0\0\0") + dc,
            refinement * (scans - 1),
            b"\xff\xd9",
        ]
    )


def webp_header(width: int, height: int) -> bytes:
    """The 34 bytes of a lossless WebP that declare its size."""
    body = b"VP8L" + struct.pack("<I", 14) + b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14)
    return b"RIFF" + struct.pack("<I", 4 + len(body) + 9) + b"WEBP" + body + bytes(9)


def plain_png(width: int, height: int, color_type: int, depth: int = 8, value: int = 0) -> bytes:
    """A PNG whose samples all have one byte value."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    row = b"\0" + bytes([value]) * -(-width * channels * depth // 8)
    packer = zlib.compressobj(1)
    content = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunk(b"IDAT", content), chunk(b"IEND", b"")]
    )


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def _entropy_coded(bits: str) -> bytes:
    padding = bits + "1" * (-len(bits) % 8)
    return int(padding, 2).to_bytes(len(padding) // 8, "big").replace(b"\xff", b"\xff\0")
