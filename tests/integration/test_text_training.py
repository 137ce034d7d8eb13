"""Each mode of text fine-tuning changes what it should, and co-purchased items move closer."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from services.embedding.encoders.encoders import TextEncoder, TextSettings, digest, write_head
from tests.support.models import DIMENSION, make_text_encoder
from training.data.encoder_settings import TextTraining
from training.encoders.contrastive import apply_head
from training.encoders.text_encoder import fine_tune, save_frozen
from training.examples.positive_pairs import PositivePairs, make_pairs

pytestmark = pytest.mark.usefixtures("single_thread")

SHAPE = TextSettings(max_tokens=16)
WORDS = ("ash", "birch", "cedar", "elm", "fir", "oak", "pine", "yew")
TEXTS = [f"{word} {kind}" for word in WORDS for kind in ("lamp 1", "rug 22", "vase 333")]
LOWER = ("embeddings.", "encoder.layer.0.")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("base"))


def together() -> PositivePairs:
    """Baskets of a lamp, a rug or a vase of two neighbouring woods: what words share is not their letters."""
    half = np.arange(len(TEXTS)).reshape(4, 6)
    rows = [half[world][np.array(pair)] for world in range(4) for pair in ((0, 4), (1, 5), (2, 3), (0, 5))]
    return make_pairs(np.concatenate(rows), np.repeat(np.arange(16), 2), len(TEXTS))


def tune(
    base: Path, directory: Path, pairs: PositivePairs | None = None, seed: int = 0, **more: object
) -> Weights:
    arguments = {"steps": 3, "batch": 16, "learning_rate": 1e-2, "base": str(base)} | more
    training = TextTraining.model_validate(arguments)
    training_pairs = together() if pairs is None else pairs
    fine_tune(directory, training.base, SHAPE, training, TEXTS, training_pairs, seed)
    return weights(directory)


def weights(directory: Path) -> Weights:
    return load_file(directory / "model.safetensors")


def changed_weights(one: Weights, other: Weights) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_all_layers_or_only_the_top_are_tuned(base: Path, tmp_path: Path) -> None:
    before = weights(base)
    whole = changed_weights(before, tune(base, tmp_path / "whole", mode="full"))
    assert any(name.startswith("embeddings.word") for name in whole)
    assert {f"encoder.layer.{n}.attention.self.query.weight" for n in (0, 1)} <= whole
    top = changed_weights(before, tune(base, tmp_path / "top", mode="full", trainable_layers=1))
    assert "encoder.layer.1.attention.self.query.weight" in top
    assert not [name for name in top if name.startswith(LOWER)]


@pytest.mark.parametrize("layers", [0, 1])
def test_adapters_are_merged_into_a_plain_bert(base: Path, tmp_path: Path, layers: int) -> None:
    names = changed_weights(
        weights(base), tune(base, tmp_path / "lora", mode="lora", trainable_layers=layers)
    )
    assert "encoder.layer.1.attention.self.query.weight" in names
    assert ("encoder.layer.0.attention.self.query.weight" in names) == (layers == 0)
    # Adapters stand beside matrices of layers: embeddings, norms and biases stay as they came.
    assert all(name.startswith("encoder.layer.") and name.endswith(".weight") for name in names)
    assert not any("LayerNorm" in name for name in names)
    vectors = TextEncoder(tmp_path / "lora").encode(TEXTS).vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert np.abs(vectors - TextEncoder(base).encode(TEXTS).vectors).max() > 1e-3


def test_a_frozen_encoder_is_the_base(base: Path, tmp_path: Path) -> None:
    save_frozen(tmp_path / "frozen", str(base), SHAPE)
    assert not changed_weights(weights(base), weights(tmp_path / "frozen"))
    one, other = TextEncoder(tmp_path / "frozen"), TextEncoder(base)
    assert one.settings == SHAPE
    np.testing.assert_allclose(one.encode(TEXTS).vectors, other.encode(TEXTS).vectors, atol=1e-6)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_same_seed_gives_the_same_weights(base: Path, tmp_path: Path, mode: str) -> None:
    one, again = (tune(base, tmp_path / name, mode=mode) for name in ("one", "again"))
    assert not changed_weights(one, again)
    assert digest(tmp_path / "one") == digest(tmp_path / "again")
    assert changed_weights(one, tune(base, tmp_path / "other", mode=mode, seed=1))


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_co_purchased_items_move_closer(base: Path, tmp_path: Path, mode: str) -> None:
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


def test_a_projection_is_applied_to_the_output_of_its_encoder(base: Path, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((DIMENSION, DIMENSION)).astype(np.float32)
    shutil.copytree(base, tmp_path / "headed")
    write_head(tmp_path / "headed", weight)
    bare, headed = TextEncoder(base), TextEncoder(tmp_path / "headed")
    vectors, plain = headed.encode(TEXTS).vectors, bare.encode(TEXTS).vectors
    np.testing.assert_allclose(vectors, apply_head(plain, weight), atol=1e-5)
    assert np.abs(vectors - plain).max() > 0.1
    assert headed.digest != bare.digest
    write_head(tmp_path / "headed", 2 * weight)
    assert TextEncoder(tmp_path / "headed").digest not in (headed.digest, bare.digest)
    np.testing.assert_allclose(TextEncoder(tmp_path / "headed").encode(TEXTS).vectors, vectors, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_is_published_in_float32(
    base: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    AutoModel.from_pretrained(half, dtype=dtype).save_pretrained(half)
    assert weights(half)["embeddings.word_embeddings.weight"].dtype == dtype
    save_frozen(tmp_path / "frozen", str(half), SHAPE)
    for tensors in (tune(half, tmp_path / "tuned"), weights(tmp_path / "frozen")):
        assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    assert np.isfinite(TextEncoder(tmp_path / "tuned").encode(TEXTS).vectors).all()
