"""Encoders equal a plain forward pass for each input, and read image files of every kind."""

import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from services.core.errors import FailedPrecondition, InvalidArgument
from services.embedding.encoders import encoders
from services.embedding.encoders.encoder_pool import EncoderPool
from services.embedding.encoders.encoders import ImageEncoder, TextEncoder, batches_by_length, digest
from services.embedding.images import decoder
from services.embedding.runtime import devices
from services.embedding.runtime.devices import PendingArray
from tests.support.models import make_image_encoder, make_text_encoder


@pytest.fixture(scope="module")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    return ImageEncoder(make_image_encoder(tmp_path_factory.mktemp("image")), budget=3)


def test_batched_texts_equal_single_texts_in_plain_transformers(text_directory: Path) -> None:
    texts = ["red scarf", "", "a much longer text of wool and silk", "赤い", "x"]
    encoding = TextEncoder(text_directory, budget=64).encode(texts)
    tokenizer = AutoTokenizer.from_pretrained(text_directory)
    model = AutoModel.from_pretrained(text_directory).eval()
    for text, vector, cut in zip(texts, encoding.vectors, encoding.truncated, strict=True):
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=16)
        with torch.inference_mode():
            mean = model(**batch).last_hidden_state.mean(1)[0].numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
        assert cut == (len(tokenizer(text)["input_ids"]) > 16)


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As if torch had found six cores in a caller that uses five."""
    before = torch.get_num_threads()
    monkeypatch.setattr(devices, "_CORES", 6)
    torch.set_num_threads(5)
    yield 5
    torch.set_num_threads(before)


def test_parallel_batches_use_one_core_each(cores: int) -> None:
    together = threading.Barrier(6)

    def run(batch: int) -> tuple[int, int]:
        together.wait(10)
        return batch, torch.get_num_threads()

    results = list(devices.map_batches(run, range(12), "cpu"))
    assert results == [(batch, 1) for batch in range(12)]
    with ThreadPoolExecutor(1) as pool:
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == cores


def test_a_thread_keeps_its_share_whatever_another_sets_before_it_computes(cores: int) -> None:
    with ThreadPoolExecutor(1, initializer=devices.share_cores, initargs=(2,)) as pool:
        pool.submit(int).result()
        torch.set_num_threads(cores)
        assert pool.submit(torch.get_num_threads).result() == 3


def test_threads_take_nearly_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in range(1, 130):
        monkeypatch.setattr(devices, "_CORES", count)
        threads = devices.model_threads("cpu")
        assert 1 <= threads <= 16
        assert 0.8 * count < threads * (count // threads) <= count, count
        assert devices.model_threads("cuda") == 1


@pytest.mark.usefixtures("cores")
async def test_an_encoding_runs_a_batch_on_each_core(text_directory: Path) -> None:
    together = threading.Barrier(6)
    encoder = TextEncoder(text_directory, budget=1)  # a text a batch
    begin = encoder.start

    def start_together(ids: Sequence[list[int]]) -> PendingArray:
        together.wait(10)
        assert torch.get_num_threads() == 1
        return begin(ids)

    texts = [f"scarf {n}" for n in range(6)]
    expected = encoder.encode(texts).vectors
    with patch.object(encoder, "start", start_together):
        encoding = EncoderPool(encoder, None)
        try:
            vectors = (await encoding.texts(texts)).vectors
        finally:
            encoding.close()
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_failing_batch_fails_the_call_and_restores_the_threads(cores: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(devices.map_batches(lambda batch: 1 / batch, [1, 0, 1], "cpu"))
    with ThreadPoolExecutor(1) as pool:
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == cores


@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_that_torch_sees(gpu: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert devices.resolve("auto") == device
    assert devices.resolve("cpu") == "cpu"


def test_an_explicit_gpu_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.resolve("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FailedPrecondition, match="serve with --device cpu"):
        devices.resolve("cuda:1")


def test_the_gpu_code_path_encodes_texts_like_the_cpu(
    text_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["red scarf", "a longer text of wool and silk", "blue scarf", "x"]
    plain = TextEncoder(text_directory).encode(texts).vectors
    monkeypatch.setattr(encoders, "attention_implementation", lambda device: "sdpa")
    monkeypatch.setattr(TextEncoder, "overlaps", True)
    there = TextEncoder(text_directory, budget=64)
    np.testing.assert_allclose(there.encode(texts).vectors, plain, atol=1e-5)
    np.testing.assert_allclose(there.encode(texts[::2]).vectors, plain[::2], atol=1e-5)  # none is padded


def test_a_megabyte_of_text_is_truncated_and_reported(text_directory: Path) -> None:
    encoding = TextEncoder(text_directory).encode(["wool " * 300_000, "wool"])
    assert encoding.truncated.tolist() == [True, False]
    np.testing.assert_allclose(np.linalg.norm(encoding.vectors, axis=1), 1, atol=1e-5)


def test_no_texts_give_no_vectors(text_directory: Path) -> None:
    assert TextEncoder(text_directory).encode([]).vectors.shape == (0, 32)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), budget=st.integers(1, 200))
@settings(deadline=None)
def test_batches_contain_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(np.array(lengths), budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(b) == 1 or max(lengths[r] for r in b) * len(b) <= budget for b in batches)


def test_a_digest_covers_weights_and_settings(tmp_path: Path) -> None:
    one = digest(make_text_encoder(tmp_path / "a"))
    assert digest(make_text_encoder(tmp_path / "b")) == one
    assert digest(make_text_encoder(tmp_path / "c", seed=1)) != one
    assert digest(make_text_encoder(tmp_path / "d", max_tokens=17)) != one


@given(
    width=st.integers(1, 300), height=st.integers(1, 300), detail=st.integers(1, 300), seed=st.integers(0, 9)
)
@settings(deadline=None, max_examples=40)
def test_preprocessing_equals_that_of_open_clip(
    image_encoder: ImageEncoder, width: int, height: int, detail: int, seed: int
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (detail, detail, 3), np.uint8)
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
    *_, normalize = image_encoder.preprocess.transforms
    mean, deviation = (np.array(v, np.float32) for v in (normalize.mean, normalize.std))
    pixels = (image_encoder.pixels(picture) / np.float32(255) - mean) / deviation
    tensor = image_encoder.preprocess(picture).permute(1, 2, 0).numpy()
    levels = np.abs((pixels - tensor) * deviation * 255)
    # Where noise overshoots black or white, one cuts it off before the other.
    assert np.quantile(levels, 0.9) < 2.5
    assert levels.mean() < 1


def test_batched_images_equal_single_images(image_encoder: ImageEncoder) -> None:
    pictures = [Image.new("RGB", (40 + n, 50), (n * 30, 90, 10)) for n in range(7)]
    together = image_encoder.encode(pictures)
    alone = np.concatenate([image_encoder.encode([p]) for p in pictures])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    words = ["red", "", "wool", "silk scarf", "blue"]
    captions = image_encoder.encode_texts(words)
    np.testing.assert_allclose(
        captions, np.concatenate([image_encoder.encode_texts([word]) for word in words]), atol=1e-5
    )


def _file(picture: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


_RED = Image.new("RGB", (64, 32), "red")


@pytest.mark.parametrize(
    "data",
    [
        _file(_RED, "JPEG"),
        _file(_RED, "PNG"),
        _file(_RED, "WEBP", lossless=True),
        _file(_RED, "GIF"),
        _file(_RED.convert("CMYK"), "JPEG"),
        _file(_RED.convert("P"), "PNG"),
        _file(_RED, "GIF", save_all=True, append_images=[Image.new("RGB", (64, 32), "blue")]),
    ],
)
def test_every_format_gives_the_same_image(data: bytes) -> None:
    picture = decoder.load(data, 32)
    assert (picture.mode, picture.size) == ("RGB", (64, 32))
    assert np.abs(np.asarray(picture).mean((0, 1)) - [255, 0, 0]).max() < 4


def test_transparency_is_white_rotation_is_applied_and_one_pixel_is_enough() -> None:
    clear = decoder.load(_file(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"), 32)
    assert np.asarray(clear).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert decoder.load(_file(_RED, "JPEG", exif=exif), 32).size == (32, 64)
    assert decoder.load(_file(Image.new("1", (1, 1)), "PNG"), 32).size == (1, 1)


@given(exif=st.binary(max_size=120), orientation=st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_unusual_exif_rotates_an_image_or_is_an_error(exif: bytes, orientation: int) -> None:
    tiff = b"MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03\0\0\0\x01" + bytes([0, orientation, 0, 0]) + exif
    data = _file(_RED, "JPEG", exif=b"Exif\0\0" + tiff)
    try:
        assert sorted(decoder.load(data, 32).size) == [32, 64]
    except InvalidArgument as error:
        assert "damaged" in str(error)


def test_a_large_image_is_reduced_like_a_jpeg() -> None:
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 255, (8, 12, 3), np.uint8))
    large = coarse.resize((1200, 800), Image.Resampling.BICUBIC)
    plain = np.asarray(large.resize((48, 32), Image.Resampling.BICUBIC), float)
    for form in ("PNG", "JPEG"):
        picture = decoder.load(_file(large, form), 32)
        assert 64 <= min(picture.size) < 800
        small = np.asarray(picture.resize((48, 32), Image.Resampling.BICUBIC), float)
        assert np.abs(small - plain).mean() < 2


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (900, 100)])
def test_a_long_image_is_cropped_to_its_middle(image_encoder: ImageEncoder, size: tuple[int, int]) -> None:
    long = np.full((size[1], size[0], 3), 255, np.uint8)
    along = 0 if size[1] > size[0] else 1
    middle = max(size) // 2
    reach = min(size) * 2
    part = [slice(None)] * 3
    part[along] = slice(middle - reach, middle + reach)
    long[tuple(part)] = (200, 30, 40)
    file = io.BytesIO()
    Image.fromarray(long).save(file, "PNG")
    picture = decoder.load(file.getvalue(), image_encoder.side)
    assert max(picture.size) <= 4 * min(picture.size)
    assert (image_encoder.pixels(picture) == (200, 30, 40)).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"plain text", "not a readable"),
        (_file(_RED, "BMP"), "not a readable"),
        (_file(_RED, "JPEG")[:200], "damaged"),
        (_file(_RED, "PNG")[:60], "damaged"),
        (_file(Image.new("1", (20_000, 6_000)), "PNG"), "pixels"),
        (b"\xff" * ((16 << 20) + 1), "bytes"),
    ],
)
def test_an_unreadable_image_names_its_field(data: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        decoder.load(data, 32, "image")
    assert caught.value.violations[0].field == "image"
