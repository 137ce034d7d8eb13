"""GPU decoding equals CPU decoding, and unusual files fall back to the CPU."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from services.core.errors import InvalidArgument
from services.embedding.encoders.encoder_pool import EncoderPool
from services.embedding.encoders.encoders import ImageEncoder, TextEncoder
from services.embedding.images import decoder, nvjpeg
from services.embedding.runtime.batching import Lane
from tests.support.image_bombs import progressive_jpeg
from tests.support.models import make_image_encoder, make_text_encoder

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TURNED = Image.Exif()
TURNED[0x0112] = 6


def make_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
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
    file(make_image(60, 50)),
    file(make_image(60, 50, seed=1)),
    file(make_image(33, 97, "L")),
    file(make_image(200, 120), quality=60, progressive=True),
    file(make_image(60, 50, seed=2)) + bytes(20),
    file(make_image(64, 64), exif=Image.Exif()),
]
ODD = {
    "turned": file(make_image(60, 50), exif=TURNED),
    "four colours": file(make_image(60, 50, "CMYK")),
    "png": file(make_image(60, 50), "PNG"),
    "cut off": file(make_image(60, 50))[:-100],
    "not YCbCr": file(make_image(60, 50), keep_rgb=True),
    "large": file(make_image(2100, 2000)),
    "many scans": progressive_jpeg(60, 50, 30),
    "too many scans": progressive_jpeg(60, 50, 200),
    "long": file(make_image(401, 100)),
    "nothing": b"",
    "noise": bytes(range(256)) * 4 + b"\xff\xd9",
    "no picture": file(make_image(60, 50))[:200] + b"\xff\xd9",
}


def test_complete_upright_jpegs_decode_as_on_the_cpu(encoder: ImageEncoder) -> None:
    files = [*PLAIN, ODD["turned"], *PLAIN[::-1]]
    assert encoder._fit_fast is not None
    tensors = nvjpeg.decode_jpegs(files, encoder._fit_fast, encoder.device)
    assert tensors[len(PLAIN)] is None
    for data, tensor in zip(files, tensors, strict=True):
        if data != ODD["turned"]:
            assert tensor is not None
            expected = encoder.pixels(decoder.load(data, encoder.side)).astype(float)
            assert tensor.device.type == torch.device(encoder.device).type
            assert np.abs(tensor.permute(1, 2, 0).cpu().numpy() - expected).mean() < 2  # of 255 levels


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_unusual_files_are_left_to_the_cpu(data: bytes, encoder: ImageEncoder) -> None:
    assert encoder._fit_fast is not None
    tensors = nvjpeg.decode_jpegs([PLAIN[0], data], encoder._fit_fast, encoder.device)
    assert tensors[1] is None


async def test_a_batch_has_a_result_per_row_from_either_decoder(
    encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageEncoder, "overlaps", True)  # as on a GPU, whatever there is
    encoding = EncoderPool(TextEncoder(make_text_encoder(tmp_path)), encoder)
    bad = {"cut off", "nothing", "noise", "no picture", "too many scans"}
    files = [data for pair in zip(ODD.values(), PLAIN * 2, strict=False) for data in pair]
    try:
        results = await encoding.images(files, "images[{}]", Lane.BULK)
    finally:
        encoding.close()
    for row, (name, vector) in enumerate(zip(ODD, results[::2], strict=False)):
        assert isinstance(vector, InvalidArgument) == (name in bad), name
        if isinstance(vector, InvalidArgument):
            assert f"images[{2 * row}]" in str(vector)
    assert not any(isinstance(vector, InvalidArgument) for vector in results[1::2])
    close = 0.9999 if encoder.device == "cpu" else 0.998
    for data, vector in zip(files, results, strict=True):
        if not isinstance(vector, InvalidArgument):
            alone = encoder.encode([decoder.load(data, encoder.side)])[0]
            assert vector @ alone > close


def test_files_that_the_gpu_refuses_are_left_and_the_rest_is_decoded(
    encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encoder._fit_fast is not None
    monkeypatch.setattr(nvjpeg, "plain_size", lambda data: 1)  # as if nothing were to be seen from outside
    files = [PLAIN[0], ODD["noise"], *PLAIN[1:5], ODD["no picture"]]
    tensors = nvjpeg.decode_jpegs(files, encoder._fit_fast, encoder.device)
    assert [tensor is None for tensor in tensors] == [
        data in (ODD["noise"], ODD["no picture"]) for data in files
    ]


def test_a_batch_that_is_too_large_for_the_memory_is_decoded_in_parts(
    encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = encoder._fit_fast
    assert fast is not None
    monkeypatch.setattr(nvjpeg, "_BATCH_PIXELS", 7_000)
    sizes = []

    def fit(pictures: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pictures) * pictures.shape[2] * pictures.shape[3])
        result: torch.Tensor = fast(pictures)
        return result

    files = [file(make_image(60, 50, seed=n)) for n in range(7)]
    tensors = nvjpeg.decode_jpegs(files, fit, encoder.device)
    assert max(sizes) <= 7_000
    assert all(tensor is not None for tensor in tensors)
