"""A GPU decodes as a processor does, and what is odd is left to that one: by any device of torch."""

import asyncio
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from services.embedding import images, jpegs
from services.embedding.batching import Lane
from services.embedding.encoders import ImageEncoder, TextEncoder
from services.embedding.encoding import Encoding
from services.errors import InvalidArgument
from tests.models import make_image_encoder, make_text_encoder

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TURNED = Image.Exif()
TURNED[0x0112] = 6


def drawn(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def file(picture: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="module", params=DEVICES)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    return ImageEncoder(make_image_encoder(tmp_path_factory.mktemp("image")), request.param)


PLAIN = [
    file(drawn(60, 50)),
    file(drawn(60, 50, seed=1)),
    file(drawn(33, 97, "L")),
    file(drawn(200, 120), quality=60, progressive=True),
    file(drawn(60, 50, seed=2)) + bytes(20),
    file(drawn(64, 64), exif=Image.Exif()),
]
ODD = {
    "turned": file(drawn(60, 50), exif=TURNED),
    "four colours": file(drawn(60, 50, "CMYK")),
    "png": file(drawn(60, 50), "PNG"),
    "cut off": file(drawn(60, 50))[:-100],
    "not YCbCr": file(drawn(60, 50), keep_rgb=True),
    "large": file(drawn(2100, 2000)),
    "long": file(drawn(401, 100)),
    "nothing": b"",
    "noise": bytes(range(256)) * 4 + b"\xff\xd9",
    "no picture": file(drawn(60, 50))[:200] + b"\xff\xd9",
}


def test_whole_upright_jpegs_are_seen_as_a_processor_sees_them(encoder: ImageEncoder) -> None:
    files = [*PLAIN, ODD["turned"], *PLAIN[::-1]]
    assert encoder._fit_fast is not None
    found = jpegs.decoded(files, encoder._fit_fast, encoder.device)
    assert found[len(PLAIN)] is None
    for data, seen in zip(files, found, strict=True):
        if data != ODD["turned"]:
            assert seen is not None
            expected = encoder.pixels(images.load(data, encoder.side)).astype(float)
            assert seen.device.type == torch.device(encoder.device).type
            assert np.abs(seen.permute(1, 2, 0).cpu().numpy() - expected).mean() < 2  # of 255 levels


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_what_is_odd_is_left_to_a_processor(data: bytes, encoder: ImageEncoder) -> None:
    assert encoder._fit_fast is not None
    found = jpegs.decoded([PLAIN[0], data], encoder._fit_fast, encoder.device)
    assert found[1] is None


def test_a_batch_is_answered_row_by_row_whoever_decodes(
    encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageEncoder, "overlaps", True)  # as on a GPU, whatever there is
    encoding = Encoding(TextEncoder(make_text_encoder(tmp_path)), encoder)
    bad = {"cut off", "nothing", "noise", "no picture"}
    files = [data for pair in zip(ODD.values(), PLAIN * 2, strict=False) for data in pair]
    try:
        found = asyncio.run(encoding.photographs(files, "images[{}]", Lane.BULK))
    finally:
        encoding.close()
    for row, (name, vector) in enumerate(zip(ODD, found[::2], strict=False)):
        assert isinstance(vector, InvalidArgument) == (name in bad), name
        if isinstance(vector, InvalidArgument):
            assert f"images[{2 * row}]" in str(vector)
    assert not any(isinstance(vector, InvalidArgument) for vector in found[1::2])
    close = 0.9999 if encoder.device == "cpu" else 0.998
    for data, vector in zip(files, found, strict=True):
        if not isinstance(vector, InvalidArgument):
            alone = encoder.encode([images.load(data, encoder.side)])[0]
            assert vector @ alone > close


def test_what_a_gpu_refuses_of_a_batch_is_left_and_the_rest_is_decoded(
    encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encoder._fit_fast is not None
    monkeypatch.setattr(jpegs, "plain_size", lambda data: 1)  # as if nothing were to be seen from outside
    files = [PLAIN[0], ODD["noise"], *PLAIN[1:5], ODD["no picture"]]
    found = jpegs.decoded(files, encoder._fit_fast, encoder.device)
    assert [seen is None for seen in found] == [data in (ODD["noise"], ODD["no picture"]) for data in files]


def test_a_batch_that_is_too_large_for_the_memory_is_decoded_in_parts(
    encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = encoder._fit_fast
    assert fast is not None
    monkeypatch.setattr(jpegs, "_PIXELS_AT_ONCE", 7_000)
    sizes = []

    def fit(pictures: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pictures) * pictures.shape[2] * pictures.shape[3])
        fitted: torch.Tensor = fast(pictures)
        return fitted

    files = [file(drawn(60, 50, seed=n)) for n in range(7)]
    found = jpegs.decoded(files, fit, encoder.device)
    assert max(sizes) <= 7_000
    assert all(seen is not None for seen in found)
