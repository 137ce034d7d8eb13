"""A text encoder in eight bits against the one in float32 that it was made of."""

import importlib
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from services.embedding.eight_bits import FILE
from services.embedding.encoders import TextEncoder, TextSettings, digest, write_settings
from services.errors import FailedPrecondition
from training import quantising, text_encoder
from training.quantising import _NOISE, _Seen, _Smoothed, quantise

KINDS = ("lamp", "rug", "vase", "scarf", "wool coat", "pair of linen trousers for the summer")
TEXTS = [f"{colour} {kind}" for kind in KINDS for colour in ("red", "green", "midnight blue")]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exact")
    text_encoder.save_frozen("minilm", directory, TextSettings(32))
    return directory


@pytest.fixture(scope="module")
def made(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    quantise(exact, directory, TEXTS)
    return directory


def test_vectors_are_nearly_those_of_float32(exact: Path, made: Path) -> None:
    strange = ["a text unlike any that scales were measured on: 40% off, EAN 4006381333931", "", "red"]
    one, other = TextEncoder(made), TextEncoder(exact)
    assert ((one.encode(TEXTS).vectors * other.encode(TEXTS).vectors).sum(1) > 0.99).all()
    assert ((one.encode(strange).vectors * other.encode(strange).vectors).sum(1) > 0.96).all()
    products = Counter(node.op_type for node in onnx.load(made / FILE).graph.node)["QuantizeLinear"]
    assert 18 <= products <= 36  # of six in each of six layers, those that would lose much stay


@pytest.mark.parametrize(("standing_out", "enough"), [(1, True), (400, False)])
def test_noise_is_what_eight_bits_take_away(standing_out: float, enough: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(2000, 24, generator=generator)
    seen[0] *= standing_out  # in every component, so that no weights can take it
    layer = torch.nn.Linear(24, 8)
    watched = _Seen(layer)
    watched(layer, (seen[:1500],))
    watched(layer, (seen[1500:],))
    inverse = watched.inverse().detach()
    smooth = seen * inverse
    step = (smooth.max() - smooth.min()) / 255
    lost = (torch.round(smooth / step) * step - smooth).square().mean() / smooth.square().mean()
    noise = watched.noise(inverse)
    assert (noise <= _NOISE) == enough
    if enough:
        assert noise == pytest.approx(float(lost), rel=0.05)
    with torch.no_grad():
        torch.testing.assert_close(
            _Smoothed(deepcopy(layer), inverse)(seen), layer(seen), rtol=1e-4, atol=1e-4
        )


def test_a_vector_depends_on_no_other_text_of_its_batch(made: Path) -> None:
    encoder = TextEncoder(made)
    together = encoder.run(encoder.tokenise([*TEXTS, "x " * 200]).ids)
    alone = np.concatenate([encoder.run(encoder.tokenise([text]).ids) for text in TEXTS])
    np.testing.assert_allclose(together[: len(TEXTS)], alone, atol=1e-5)


def test_threads_compute_at_once(made: Path) -> None:
    encoder = TextEncoder(made)
    expected = encoder.encode(TEXTS).vectors
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: encoder.run(encoder.tokenise(TEXTS).ids), range(12)):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_is_another_encoder_with_the_same_weights_beside(exact: Path, made: Path) -> None:
    assert digest(made) != digest(exact)
    weights = "model.safetensors"
    assert (made / weights).read_bytes() == (exact / weights).read_bytes()
    assert TextEncoder(made).settings == TextSettings(32, "int8")


def test_a_gpu_is_refused(made: Path) -> None:
    with pytest.raises(FailedPrecondition, match="use the device cpu"):
        TextEncoder(made, "cuda")


def test_a_precision_of_a_later_version_is_named(exact: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(exact, tmp_path / "copied")
    write_settings(copied, TextSettings(32, "fp4"))
    with pytest.raises(FailedPrecondition, match="'fp4'"):
        TextEncoder(copied)


def test_an_encoder_that_eight_bits_are_not_enough_for_is_refused(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantising, "_NOISE", 0.0)
    with pytest.raises(FailedPrecondition, match="noisy"):
        quantise(exact, tmp_path / "made", TEXTS)


def test_the_network_tells_no_path_of_where_it_was_made(made: Path) -> None:
    assert str(Path(__file__).parent.parent).encode() not in (made / FILE).read_bytes()


def test_without_the_extra_training_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "training.quantising")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FailedPrecondition, match=r"vitrine\[int8\]"):
        importlib.import_module("training.quantising")


def test_without_onnx_runtime_the_extra_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FailedPrecondition, match=r"vitrine\[int8\]"):
        TextEncoder(made)
