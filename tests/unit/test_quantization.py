"""The int8 text encoder is close to the float32 encoder."""

import importlib
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnx
import pytest
import torch

from services.catalog.bundle import Bundle
from services.core.errors import FailedPrecondition
from services.embedding.encoders.encoders import TextEncoder, TextSettings, digest, write_settings
from services.embedding.encoders.int8 import FILE
from services.serving.loaded_bundle import device_of
from training.encoders import quantization, text_encoder
from training.encoders.quantization import _NOISE, _InputRange, _SmoothedLinear, quantize

pytestmark = pytest.mark.slow  # ONNX Runtime calibrates an encoder

KINDS = ("lamp", "rug", "vase", "scarf", "wool coat", "pair of linen trousers for the summer")
TEXTS = [f"{colour} {kind}" for kind in KINDS for colour in ("red", "green", "midnight blue")]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exact")
    text_encoder.save_frozen(directory, "minilm", TextSettings(32))
    return directory


@pytest.fixture(scope="module")
def quantized_directory(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    quantize(directory, exact, TEXTS)
    return directory


def test_quantized_vectors_are_close_to_float32(exact: Path, quantized_directory: Path) -> None:
    strange = ["a text unlike any that scales were measured on: 40% off, EAN 4006381333931", "", "red"]
    one, other = TextEncoder(quantized_directory), TextEncoder(exact)
    assert ((one.encode(TEXTS).vectors * other.encode(TEXTS).vectors).sum(1) > 0.99).all()
    assert ((one.encode(strange).vectors * other.encode(strange).vectors).sum(1) > 0.96).all()
    products = Counter(node.op_type for node in onnx.load(quantized_directory / FILE).graph.node)[
        "QuantizeLinear"
    ]
    assert 18 <= products <= 36  # of six in each of six layers, those that would lose much stay


@pytest.mark.parametrize(("standing_out", "enough"), [(1, True), (400, False)])
def test_the_noise_estimate_equals_the_error_of_eight_bits(standing_out: float, enough: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2000, 24, generator=generator)
    samples[0] *= standing_out  # in every component, so that no weights can take it
    layer = torch.nn.Linear(24, 8)
    input_range = _InputRange(layer)
    input_range(layer, (samples[:1500],))
    input_range(layer, (samples[1500:],))
    inverse = input_range.inverse().detach()
    smooth = samples * inverse
    step = (smooth.max() - smooth.min()) / 255
    lost = (torch.round(smooth / step) * step - smooth).square().mean() / smooth.square().mean()
    noise = input_range.noise(inverse)
    assert (noise <= _NOISE) == enough
    if enough:
        assert noise == pytest.approx(float(lost), rel=0.05)
    with torch.no_grad():
        torch.testing.assert_close(
            _SmoothedLinear(deepcopy(layer), inverse)(samples), layer(samples), rtol=1e-4, atol=1e-4
        )


def test_a_vector_depends_on_no_other_text_of_its_batch(quantized_directory: Path) -> None:
    encoder = TextEncoder(quantized_directory)
    together = encoder.run(encoder.tokenize([*TEXTS, "x " * 200]).ids)
    alone = np.concatenate([encoder.run(encoder.tokenize([text]).ids) for text in TEXTS])
    np.testing.assert_allclose(together[: len(TEXTS)], alone, atol=1e-5)


def test_threads_compute_in_parallel(quantized_directory: Path) -> None:
    encoder = TextEncoder(quantized_directory)
    expected = encoder.encode(TEXTS).vectors
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(lambda _: encoder.run(encoder.tokenize(TEXTS).ids), range(12)):
            np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_the_quantized_encoder_has_its_own_digest_and_the_same_weights(
    exact: Path, quantized_directory: Path
) -> None:
    assert digest(quantized_directory) != digest(exact)
    weights = "model.safetensors"
    assert (quantized_directory / weights).read_bytes() == (exact / weights).read_bytes()
    assert TextEncoder(quantized_directory).settings == TextSettings(32, "int8")


def test_a_gpu_is_refused(quantized_directory: Path) -> None:
    with pytest.raises(FailedPrecondition, match="use the device cpu"):
        TextEncoder(quantized_directory, "cuda")


def test_auto_is_the_cpu_for_a_bundle_in_int8(
    quantized_directory: Path, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for encoder, device in ((quantized_directory, "cpu"), (exact, "cuda")):
        directory = tmp_path / device
        shutil.copytree(encoder, directory / "text")
        bundle = cast(Bundle, SimpleNamespace(directory=directory))
        assert device_of(bundle, "auto") == device
        assert device_of(bundle, "cuda") == "cuda"


def test_an_unknown_precision_is_named(exact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exact, tmp_path / "copied")
    write_settings(copy, TextSettings(32, "fp4"))
    with pytest.raises(FailedPrecondition, match="'fp4'"):
        TextEncoder(copy)


def test_an_encoder_that_int8_damages_is_refused(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "_NOISE", 0.0)
    with pytest.raises(FailedPrecondition, match="imprecise"):
        quantize(tmp_path / "made", exact, TEXTS)


def test_the_exported_network_contains_no_local_path(quantized_directory: Path) -> None:
    assert str(Path(__file__).parents[2]).encode() not in (quantized_directory / FILE).read_bytes()


def test_training_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "training.encoders.quantization")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FailedPrecondition, match=r"vitrine\[int8\]"):
        importlib.import_module("training.encoders.quantization")


def test_serving_names_the_missing_extra(quantized_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FailedPrecondition, match=r"vitrine\[int8\]"):
        TextEncoder(quantized_directory)
