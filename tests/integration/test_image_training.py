"""The image encoder learns a shop of colored squares."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from services.embedding.encoders.encoders import ImageEncoder, digest
from services.embedding.encoders.preprocessing import Preprocessor
from services.embedding.images import decoder
from services.embedding.images.loader import ImageLoader
from services.embedding.runtime.batching import Lane
from tests.support.colored_squares import CHANCE, hit_rate, write_squares
from tests.support.image_bombs import encode_image, smooth_image
from tests.support.models import make_image_encoder
from training.data.encoder_settings import ImageTraining
from training.data.images import ShopImages
from training.encoders import image_cache
from training.encoders.image_encoder import (
    augment_text,
    encode_images,
    same_text,
    symmetric_loss,
    train_image_encoder,
)

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShopImages, list[tuple[str, str]]]:
    directory = tmp_path_factory.mktemp("shop")
    items = write_squares(directory, each=8, seed=0)
    return ShopImages(directory), items


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShopImages, list[str]]:
    directory = tmp_path_factory.mktemp("held-out")
    items = write_squares(directory, each=3, seed=1)
    return ShopImages(directory), [item_id for item_id, _ in items]


Shop = tuple[ShopImages, list[tuple[str, str]]]
HeldOut = tuple[ShopImages, list[str]]


def _train(directory: Path, shop: Shop, *, seed: int = 0, **training: object) -> Path:
    directory.mkdir()
    settings = ImageTraining.model_validate({"base": "small", **training})
    train_image_encoder(directory, settings, *shop, seed=seed)
    return directory


def test_after_training_texts_find_unseen_images(shop: Shop, held_out: HeldOut, tmp_path: Path) -> None:
    untrained = ImageEncoder(_train(tmp_path / "untrained", shop, epochs=0))
    assert hit_rate(untrained, *held_out) < 3 * CHANCE
    trained = ImageEncoder(_train(tmp_path / "trained", shop, epochs=4, batch=16))
    assert hit_rate(trained, *held_out) > 6 * CHANCE
    assert (trained.side, trained.dimension) == (64, 192)


def test_a_directory_is_fine_tuned_and_the_same_seed_gives_the_same_weights(
    shop: Shop, held_out: HeldOut, tmp_path: Path
) -> None:
    base = make_image_encoder(tmp_path / "base")
    assert hit_rate(ImageEncoder(base), *held_out) < 3 * CHANCE

    def tune(name: str, seed: int) -> Path:
        return _train(
            tmp_path / name, shop, seed=seed, base=str(base), epochs=15, batch=16, learning_rate=0.02
        )

    tuned = tune("tuned", 0)
    assert hit_rate(ImageEncoder(tuned), *held_out) > 6 * CHANCE
    assert digest(tune("again", 0)) == digest(tuned)
    assert digest(tune("other", 1)) != digest(tuned)
    preprocessing = json.loads((tuned / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert preprocessing["mean"] == [0.48, 0.46, 0.41]


def test_no_epochs_leave_the_base_unchanged(shop: Shop, tmp_path: Path) -> None:
    base = make_image_encoder(tmp_path / "base")
    result = _train(tmp_path / "kept", shop, base=str(base), epochs=0)
    before, after = (load_file(d / "open_clip_model.safetensors") for d in (base, result))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_photograph_that_cannot_be_read_is_skipped_and_named(tmp_path: Path) -> None:
    items = write_squares(tmp_path / "images", each=1, seed=0)
    (tmp_path / "images" / "red-0.png").write_bytes(b"no picture")
    base, photographs = make_image_encoder(tmp_path / "base"), ShopImages(tmp_path / "images")
    result = _train(tmp_path / "made", (photographs, items), base=str(base), epochs=1, batch=4)
    assert {path.name for path in result.iterdir()} == {
        "encoder.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }
    ids = ["nobody", *(item_id for item_id, _ in items)]
    vectors, present, unreadable = encode_images(ImageEncoder(result), photographs, ids, batch=3)
    assert [error.split(" is")[0] for error in unreadable] == ["red-0.png:"]
    assert present.tolist() == [False, False] + [True] * 7
    assert not vectors[~present].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[present].astype(np.float32), axis=1), 1, atol=1e-2)


def test_a_shop_whose_photographs_all_fail_gets_the_base(tmp_path: Path) -> None:
    base = make_image_encoder(tmp_path / "base")
    result = _train(
        tmp_path / "made", (ShopImages(tmp_path / "none"), [("a", "red")]), base=str(base), epochs=2
    )
    before, after = (load_file(d / "open_clip_model.safetensors") for d in (base, result))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_vectors_in_batches_equal_the_encoder_on_the_same_files(shop: Shop, tmp_path: Path) -> None:
    photographs, items = shop
    encoder = ImageEncoder(make_image_encoder(tmp_path / "base"))
    ids = [item_id for item_id, _ in items[:11]]
    vectors, _, _ = encode_images(encoder, photographs, ids, batch=4)
    pictures = [decoder.load(photographs.read(item_id), encoder.side) for item_id in ids]
    np.testing.assert_allclose(vectors, encoder.encode(pictures), atol=1e-3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF"])
async def test_training_reads_the_pixels_that_the_services_read(tmp_path: Path, form: str) -> None:
    encoder = ImageEncoder(make_image_encoder(tmp_path / "base"))
    sizes = ((300, 200), (31, 40), (900, 100), (1500, 1400))
    files = [encode_image(smooth_image(*size), form) for size in sizes]
    for n, data in enumerate(files):
        (tmp_path / f"{n}.jpg").write_bytes(data)  # content counts, not the name
    ids = [str(n) for n in range(len(files))]
    with closing(ImageLoader()) as loader, closing(Preprocessor(encoder, loader)) as decoding:
        rows = await decoding.pixels(files, range(len(files)), "{}", Lane.BULK)
    vectors, present, _ = encode_images(encoder, ShopImages(tmp_path), ids, batch=len(ids))
    assert present.all()
    expected = encoder.run([row for row in rows if isinstance(row, np.ndarray)])
    np.testing.assert_array_equal(vectors, expected.astype(np.float16))


def test_pairs_with_the_same_text_are_not_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 4, generator=generator)
    tokens = torch.tensor([[1, 2], [1, 2], [3, 2], [4, 2]])
    same = same_text(tokens, torch.tensor([0, 1, 2, 2]))
    assert same.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    rows = [
        logits[n, n] - torch.logsumexp(logits[n][[m for m in range(4) if m == n or not same[n, m]]], 0)
        for n in range(4)
    ]
    columns = [
        logits[n, n] - torch.logsumexp(logits[[m for m in range(4) if m == n or not same[n, m]], n], 0)
        for n in range(4)
    ]
    expected = -(torch.stack(rows).mean() + torch.stack(columns).mean()) / 2
    torch.testing.assert_close(symmetric_loss(logits, same), expected)


def test_a_text_variant_keeps_the_title_and_adds_nothing() -> None:
    choice = np.random.default_rng(0)
    text = "Red scarf. It is warm. Made of wool.. scarf, red"
    variants = {augment_text(text, choice) for _ in range(200)}
    assert {"Red scarf", "Red scarf. scarf, red", text} <= variants
    assert all(set(one.split(". ")) <= set(text.split(". ")) for one in variants)
    assert augment_text("Red scarf", choice) == "Red scarf"


def test_augmented_crops_come_from_the_image_and_differ() -> None:
    picture = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    many = image_cache.augment(picture.repeat(50, 1, 1, 1), torch.Generator().manual_seed(0))
    assert many.shape == (50, 3, 16, 16)
    assert many.min() >= 0 and many.max() <= 1
    rising = many[:, 0, 8, -1] > many[:, 0, 8, 0]
    assert 10 < rising.sum() < 40
    spread = (many[:, 0, 8, -1] - many[:, 0, 8, 0]).abs()
    assert spread.min() > 0.7 * 0.7 and spread.max() > 0.9
