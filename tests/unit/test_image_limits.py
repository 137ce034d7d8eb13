"""Image files are checked by their headers before decoding and read right in every format."""

import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from services.core.errors import InvalidArgument
from services.embedding.images import decoder
from services.embedding.images.file_segments import MAX_SCANS, scan_bound
from services.embedding.images.headers import FORMATS, MAX_MEMORY, format_of, read_header
from tests.support.cpu_reference import reference_seconds
from tests.support.image_bombs import (
    chunk,
    encode_image,
    plain_png,
    progressive_jpeg,
    smooth_image,
    webp_header,
)

_LOSSY = {"JPEG": 12, "WEBP": 12, "AVIF": 12, "HEIF": 14, "PNG": 0, "GIF": 24}
"""Mean difference from the picture that was written, in levels of 255."""


def whole_blocks(picture: Image.Image, reduced: tuple[int, int]) -> Image.Image:
    """The picture with its edges repeated: each pixel of its `reduced` size stands for a whole block."""
    blocks = [round(side / small) for side, small in zip(picture.size, reduced, strict=True)]
    right, bottom = (
        max(block * small - side, 0) for block, small, side in zip(blocks, reduced, picture.size, strict=True)
    )
    return Image.fromarray(np.pad(np.asarray(picture), ((0, bottom), (0, right), (0, 0)), mode="edge"))


def error_of(data: bytes) -> str:
    with pytest.raises(InvalidArgument) as caught:
        decoder.load(data, 64, "image")
    return str(caught.value)


@given(
    form=st.sampled_from(FORMATS),
    width=st.integers(16, 300),
    height=st.integers(16, 300),
    seed=st.integers(0, 9),
    target=st.sampled_from([16, 64, 224]),
)
@settings(deadline=None, max_examples=60)
def test_every_format_decodes_to_the_image_that_was_written(
    form: str, width: int, height: int, seed: int, target: int
) -> None:
    picture = smooth_image(width, height, seed=seed)
    data = encode_image(picture, form)
    assert format_of(data) == form
    result = decoder.load(data, target)
    left, top = (max(side - 4 * min(picture.size), 0) // 2 for side in picture.size)
    middle = picture.crop((left, top, width - left, height - top))
    small = [p.resize((8, 8), Image.Resampling.BOX) for p in (result, whole_blocks(middle, result.size))]
    difference = np.abs(np.subtract(*(np.asarray(p, float) for p in small))).mean()
    assert result.mode == "RGB"
    assert difference <= _LOSSY[form] + 8
    assert min(result.size) >= min(2 * target, width, height)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16", "RGB", "PA"])
@pytest.mark.parametrize("size", [(40, 30), (700, 500)])
def test_every_png_mode_decodes_to_the_same_gray(mode: str, size: tuple[int, int]) -> None:
    value = {"1": 255, "I;16": 120 << 8}.get(mode, 120)
    if mode in ("P", "PA"):
        picture = Image.new("L", size, 120).convert("RGB").quantize(4)
        data = encode_image(picture, "PNG", **({"transparency": 3} if mode == "PA" else {}))
    else:
        color = {"LA": (120, 255), "RGBA": (120, 120, 120, 255), "RGB": (120,) * 3}.get(mode, value)
        data = encode_image(Image.new(mode, size, color), "PNG")
    assert np.unique(np.asarray(decoder.load(data, 32))).tolist() == [255 if mode == "1" else 120]


@given(pixels=st.lists(st.integers(0, 65_535), min_size=64, max_size=64))
@settings(deadline=None, max_examples=40)
def test_sixteen_bit_gray_is_scaled_to_eight_bits(pixels: list[int]) -> None:
    values = np.array(pixels, np.uint16).reshape(8, 8)
    result = np.asarray(decoder.load(encode_image(Image.fromarray(values), "PNG"), 32))
    assert np.array_equal(result, np.repeat((values >> 8)[:, :, None], 3, 2))


@given(alpha=st.integers(0, 255), size=st.sampled_from([(20, 30), (600, 900), (128, 1100)]))
@settings(deadline=None, max_examples=30)
def test_transparency_becomes_white_in_strips_and_in_whole_images(alpha: int, size: tuple[int, int]) -> None:
    result = np.asarray(decoder.load(encode_image(Image.new("RGBA", size, (200, 30, 0, alpha)), "PNG"), 32))
    expected = [round(channel * alpha / 255 + 255 - alpha) for channel in (200, 30, 0)]
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_decoding_in_strips_equals_decoding_the_whole_image() -> None:
    picture = smooth_image(3001, 2003, "RGBA")
    picture.putalpha(smooth_image(3001, 2003, "L", seed=3))
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    expected = white.convert("RGB").reduce(2003 // 64)
    assert np.array_equal(np.asarray(decoder.load(encode_image(picture, "PNG"), 32)), np.asarray(expected))


def test_a_cmyk_jpeg_is_read_inverted_as_adobe_writes_it() -> None:
    adobe = encode_image(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)
    at = adobe.index(b"\xff\xee")
    unmarked = adobe[:at] + adobe[at + 2 + int.from_bytes(adobe[at + 2 : at + 4], "big") :]
    for data in (adobe, unmarked):  # browsers take both for inverted
        assert np.abs(np.asarray(decoder.load(data, 32)).mean((0, 1)) - [255, 0, 0]).max() < 4


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF"])
def test_the_first_frame_of_an_animation_is_read(form: str) -> None:
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "blue", "lime")]
    data = encode_image(frames[0], form, save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(decoder.load(data, 32)).mean((0, 1)) - [255, 0, 0]).max() < 6


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF"])
def test_exif_orientation_is_applied_once(form: str) -> None:
    picture = Image.new("RGB", (64, 32), "blue")
    picture.paste("red", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise: what is left comes up
    result = np.asarray(decoder.load(encode_image(picture, form, exif=exif.tobytes()), 32)).astype(int)
    assert result.shape == (64, 32, 3)
    assert np.abs(result[4, 16] - [255, 0, 0]).max() < 12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (progressive_jpeg(400, 300, MAX_SCANS + 1), f"more than {MAX_SCANS} scans"),
        (webp_header(9900, 9900), "9900 x 9900 pixels, at most 25 megapixels are allowed of a WEBP file"),
        (plain_png(11_000, 10_000, 0), "at most 100 megapixels are allowed of a PNG file"),
        (b"<!DOCTYPE html><title>403</title>", "it is an HTML page"),
        (b"<svg xmlns='x'/>", "SVG"),
        (encode_image(Image.new("RGB", (9, 9)), "BMP"), "it is a BMP file"),
        (encode_image(Image.new("RGB", (9, 9)), "TIFF"), "it is a TIFF file"),
        (b"nothing", "not a readable JPEG, PNG, GIF, WebP, AVIF or HEIC file"),
        (encode_image(Image.new("RGB", (64, 64)), "AVIF")[:200], "damaged"),
        (encode_image(Image.new("RGB", (64, 64)), "HEIF")[:300], "damaged"),
        (encode_image(Image.new("RGB", (64, 64)), "WEBP")[:30], "damaged"),
    ],
)
def test_a_refusal_names_the_limit_or_the_file_type(data: bytes, message: str) -> None:
    assert message in error_of(data)


def _with_size(data: bytes, width: int, height: int) -> bytes:
    """An AVIF or HEIC file that states another size than it has."""
    at = data.index(b"ispe\0\0\0\0") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
def test_the_declared_size_of_avif_and_heic_is_checked_before_decoding(form: str) -> None:
    data = _with_size(encode_image(Image.new("RGB", (64, 64)), form), 16_000, 17_000)
    with pytest.raises(InvalidArgument, match="16000 x 17000 pixels"):
        read_header(data, 64, "image")


def test_a_thumbnail_and_trailing_bytes_are_not_scans() -> None:
    thumbnail = progressive_jpeg(16, 16, 90)
    picture = encode_image(smooth_image(64, 64), "JPEG", progressive=True)
    comment = b"\xff\xfe" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    data = picture[:2] + comment + picture[2:] + progressive_jpeg(64, 64, 200)
    assert decoder.load(data, 32).size == (64, 64)


def test_a_jpeg_with_the_maximum_number_of_scans_is_read() -> None:
    assert decoder.load(progressive_jpeg(400, 300, MAX_SCANS), 32).size == (100, 75)


_SIDE = Image.new("RGB", (64, 64))
_COMMENTS = b"!\xfe" + b"\1a" * 2_000_000 + b"\0"
_MANY_SEGMENTS = {
    "JPEG": progressive_jpeg(64, 64, 3, segments=2_000_000),
    "JPEG fill": b"\xff\xd8" + b"\xff" * 8_000_000 + encode_image(_SIDE, "JPEG")[2:],
    "PNG": (png := encode_image(_SIDE, "PNG"))[:33] + chunk(b"tEXt", b"") * 600_000 + png[33:],
    "GIF": (gif := encode_image(_SIDE, "GIF"))[: (start := gif.index(b"\x2c"))] + _COMMENTS + gif[start:],
}


@pytest.mark.parametrize("kind", list(_MANY_SEGMENTS))
def test_a_million_segments_are_refused_cheaply(kind: str) -> None:
    start = time.process_time()
    assert "has more than" in error_of(_MANY_SEGMENTS[kind])
    assert time.process_time() - start < 10 * reference_seconds()  # Pillow alone takes 40 to 80 for each


@given(data=st.binary(max_size=400), start=st.sampled_from([b"\xff\xd8\xff", b"GIF89a", b"RIFF1234WEBPVP8X"]))
@settings(deadline=None, max_examples=200)
def test_noise_after_a_valid_header_is_refused_with_a_message(data: bytes, start: bytes) -> None:
    assert error_of(start + data).startswith("image: ")


@given(form=st.sampled_from(FORMATS), cut=st.floats(0, 1), noise=st.binary(min_size=1, max_size=30))
@settings(deadline=None, max_examples=150)
def test_a_damaged_file_gives_an_image_or_a_message(form: str, cut: float, noise: bytes) -> None:
    whole = encode_image(smooth_image(90, 70), form)
    at = int(cut * len(whole))
    try:
        assert decoder.load(whole[:at] + noise + whole[at + len(noise) :], 32).mode == "RGB"
    except InvalidArgument as error:
        assert error.violations[0].description


def test_a_header_tells_the_memory_that_decoding_needs() -> None:
    pixels = 5000 * 4000
    for color_type, depth, of_a_pixel in ((0, 8, 1), (0, 16, 2), (2, 8, 4), (6, 8, 4), (6, 16, 4)):
        header = read_header(plain_png(5000, 4000, color_type, depth), 64, "image")
        assert header.memory == pixels * of_a_pixel
        assert header.is_costly == (of_a_pixel == 4)
    # libjpeg holds the coefficients of a progressive file at its full size: 2 bytes for each of 3 components.
    large = smooth_image(2000, 2000)
    plain, several = (encode_image(large, "JPEG", progressive=p, subsampling=0) for p in (False, True))
    assert read_header(plain, 64, "image").memory < 2000 * 2000
    assert read_header(several, 64, "image").memory >= 2000 * 2000 * 3 * 2
    assert read_header(webp_header(5000, 5000), 64, "image").memory <= MAX_MEMORY


def test_a_sequential_jpeg_has_one_scan_whatever_its_segments_contain() -> None:
    plain = encode_image(smooth_image(64, 64), "JPEG")
    thumbnail = progressive_jpeg(16, 16, 90)
    comment = b"\xff\xfe" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    assert scan_bound(plain[:2] + comment + plain[2:] + thumbnail) == 1
    assert scan_bound(progressive_jpeg(64, 64, 7)) == 7
    assert scan_bound(encode_image(smooth_image(64, 64), "JPEG", progressive=True)) > 3
