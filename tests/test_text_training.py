"""The text encoder's fine-tuning: what each mode changes and leaves, and that bought pairs come nearer."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from services.embedding.encoders import TextEncoder, TextSettings, digest, write_head
from tests.models import DIMENSION, make_text_encoder
from training.contrastive import apply_head
from training.pairs import Pairs, make_pairs
from training.shop_settings import TextTraining
from training.text_encoder import fine_tune, save_frozen

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = TextSettings(max_tokens=16)
WORDS = ("ash", "birch", "cedar", "elm", "fir", "oak", "pine", "yew")
TEXTS = [f"{word} {kind}" for word in WORDS for kind in ("lamp 1", "rug 22", "vase 333")]
NONE = make_pairs(np.empty(0, np.int64), np.empty(0, np.int64), len(TEXTS))
LOWER = ("embeddings.", "encoder.layer.0.")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("base"))


def together() -> Pairs:
    """Baskets of a lamp, a rug or a vase of two neighbouring woods: what words share is not their letters."""
    half = np.arange(len(TEXTS)).reshape(4, 6)
    rows = [
        half[world][np.array(chosen)] for world in range(4) for chosen in ((0, 4), (1, 5), (2, 3), (0, 5))
    ]
    return make_pairs(np.concatenate(rows), np.repeat(np.arange(16), 2), len(TEXTS))


def tune(base: Path, directory: Path, pairs: Pairs | None = None, seed: int = 0, **more: object) -> Weights:
    given = {"steps": 3, "batch": 16, "learning_rate": 1e-2, "base": str(base)} | more
    training = TextTraining.model_validate(given)
    chosen = together() if pairs is None else pairs
    fine_tune(training.base, directory, SHAPE, training, TEXTS, chosen, seed)
    return weights(directory)


def weights(directory: Path) -> Weights:
    return load_file(directory / "model.safetensors")


def changed(one: Weights, other: Weights) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_the_whole_model_is_tuned_or_its_top_alone(base: Path, tmp_path: Path) -> None:
    before = weights(base)
    whole = changed(before, tune(base, tmp_path / "whole", mode="full"))
    assert any(name.startswith("embeddings.word") for name in whole)
    assert {f"encoder.layer.{n}.attention.self.query.weight" for n in (0, 1)} <= whole
    top = changed(before, tune(base, tmp_path / "top", mode="full", layers=1))
    assert "encoder.layer.1.attention.self.query.weight" in top
    assert not [name for name in top if name.startswith(LOWER)]


@pytest.mark.parametrize("layers", [0, 1])
def test_adapters_are_merged_into_a_plain_bert(base: Path, tmp_path: Path, layers: int) -> None:
    moved = changed(weights(base), tune(base, tmp_path / "lora", mode="lora", layers=layers))
    assert "encoder.layer.1.attention.self.query.weight" in moved
    assert ("encoder.layer.0.attention.self.query.weight" in moved) == (layers == 0)
    # Adapters stand beside matrices of layers: embeddings, norms and biases stay as they came.
    assert all(name.startswith("encoder.layer.") and name.endswith(".weight") for name in moved)
    assert not any("LayerNorm" in name for name in moved)
    got = TextEncoder(tmp_path / "lora").encode(TEXTS).vectors
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    assert np.abs(got - TextEncoder(base).encode(TEXTS).vectors).max() > 1e-3


def test_a_frozen_encoder_is_the_base(base: Path, tmp_path: Path) -> None:
    before = weights(base)
    assert not changed(before, tune(base, tmp_path / "frozen", mode="frozen"))
    assert not changed(before, tune(base, tmp_path / "no_pairs", NONE, mode="full"))
    assert not changed(before, tune(base, tmp_path / "no_steps", mode="lora", steps=0))
    save_frozen(str(base), tmp_path / "saved", SHAPE)
    assert digest(tmp_path / "saved") == digest(tmp_path / "frozen")
    one, other = TextEncoder(tmp_path / "frozen"), TextEncoder(base)
    assert one.settings == SHAPE
    np.testing.assert_allclose(one.encode(TEXTS).vectors, other.encode(TEXTS).vectors, atol=1e-6)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_same_seed_gives_the_same_weights(base: Path, tmp_path: Path, mode: str) -> None:
    one, again = (tune(base, tmp_path / name, mode=mode) for name in ("one", "again"))
    assert not changed(one, again)
    assert digest(tmp_path / "one") == digest(tmp_path / "again")
    assert changed(one, tune(base, tmp_path / "other", mode=mode, seed=1))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_what_is_bought_together_comes_nearer(base: Path, tmp_path: Path, mode: str) -> None:
    world = np.arange(len(TEXTS)) // 6
    alike = (world[:, None] == world) & ~np.eye(len(TEXTS), dtype=bool)

    def apart(encoder: Path) -> float:
        """How much nearer items of one world are than those of two."""
        vectors = TextEncoder(encoder).encode(TEXTS).vectors
        near = vectors @ vectors.T
        return float(near[alike].mean() - near[world[:, None] != world].mean())

    # Random embeddings tell adapters beside frozen ones too little: the base has to know its words a bit.
    start = tmp_path / "start"
    tune(base, start, mode="full", steps=20, learning_rate=1e-3)
    tune(start, tmp_path / mode, mode=mode, steps=60, learning_rate=1e-3)
    assert apart(tmp_path / mode) > apart(start) + 0.2


def test_a_projection_beside_an_encoder_is_applied_to_what_it_gives(base: Path, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((DIMENSION, DIMENSION)).astype(np.float32)
    shutil.copytree(base, tmp_path / "headed")
    write_head(tmp_path / "headed", weight)
    bare, headed = TextEncoder(base), TextEncoder(tmp_path / "headed")
    got, plain = headed.encode(TEXTS).vectors, bare.encode(TEXTS).vectors
    np.testing.assert_allclose(got, apply_head(plain, weight), atol=1e-5)
    assert np.abs(got - plain).max() > 0.1
    assert headed.digest != bare.digest
    write_head(tmp_path / "headed", 2 * weight)
    assert TextEncoder(tmp_path / "headed").digest not in (headed.digest, bare.digest)
    np.testing.assert_allclose(TextEncoder(tmp_path / "headed").encode(TEXTS).vectors, got, atol=1e-5)
