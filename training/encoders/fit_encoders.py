"""The encoders of a bundle and the vectors of its catalog, stage by stage.

A body (BERT, CLIP) is fine-tuned on behavior before the ranking days. The projection after it is cheap, so it
is fitted twice: on the same events, for the training rows of the rankers, and on all events.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.catalog.items import item_text
from services.embedding.encoders import encoders
from services.embedding.encoders.encoders import TextSettings
from training.core import base_models, metrics
from training.core.decisions import Decision, decide
from training.core.stages import Stages, digest_of
from training.data import images
from training.data.config import ShopConfig
from training.data.encoder_settings import ImageTraining
from training.data.images import examples
from training.data.shop import ShopData
from training.encoders import (
    image_encoder,
    image_trunk,
    image_vectors,
    projections,
    text_encoder,
    text_vectors,
)
from training.encoders.contrastive import apply_head
from training.encoders.text_effort import with_effort
from training.examples.positive_pairs import PositivePairs, family_recall, make_pairs, pair_recall
from training.examples.queries import baskets

_HELD_OUT = 3000
# If fewer engagements share a basket with another, all items of a user form one basket.
_MIN_SHARED = 0.1
_K, _FAMILY_K = 20, 10
_TUNED_TEXT, _PARTNERS = "the tuned text encoder", "of partners found"
# With this temperature and dropout H&M's images find .139 of the partners, .128 without; texts lose by them.
_PROJECTIONS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"temperature": 0.07, "dropout_share": 0.2},
}
_log = logging.getLogger(__name__)


@dataclass
class FittedEncoders:
    """Encoders and vectors by space, in the order of the shop's items.

    `encoders` are directories that the services load. `base`, `fold` and `final` are float16 (M, D): vectors
    of the bodies, with the projections fitted before the ranking days, and with the published projections.
    `present` is bool (M,). `base_keys` and `fold_keys` are the keys of their stages. `image_hashes` maps an
    item id to its file's hash. `unreadable` lists the files that cannot be decoded, with reasons.
    `pair_recall` is the recall on held-out pairs, and `decisions` are what it decides.
    """

    encoders: dict[str, Path] = field(default_factory=dict)
    base: dict[str, np.ndarray] = field(default_factory=dict)
    fold: dict[str, np.ndarray] = field(default_factory=dict)
    final: dict[str, np.ndarray] = field(default_factory=dict)
    present: dict[str, np.ndarray] = field(default_factory=dict)
    base_keys: list[str] = field(default_factory=list)
    fold_keys: list[str] = field(default_factory=list)
    image_hashes: dict[str, bytes] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    pair_recall: dict[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)


@dataclass(frozen=True)
class _BasketPairs:
    """Pairs of items of one basket, or of one user: before the ranking days, during them, and of all days."""

    before: PositivePairs
    during: PositivePairs
    all: PositivePairs


def encode(stages: Stages, shop: ShopData, settings: ShopConfig, split_time: int) -> FittedEncoders:
    """Fit the encoders and encode the catalog; `split_time` is in microseconds since 1970."""
    has_images = any(item.id in shop.images for item in shop.items)
    image_base = base_models.locate(settings.image.base)
    if has_images and image_trunk.is_trunk(image_base):
        image_trunk.check_bases(image_base, settings.text.base)
        if names := settings.image.model_fields_set & {"epochs", "batch", "learning_rate"}:
            _log.warning("[image] %s: a trunk is not trained and reads none of it", ", ".join(sorted(names)))
    pairs = _basket_pairs(shop, split_time)
    encoded = FittedEncoders()
    text_body = _text(stages, shop, settings, pairs, encoded)
    if has_images:
        _image(stages, shop, settings, pairs, text_body, encoded)
        files, errors = sum(item.id in shop.images for item in shop.items), encoded.unreadable
        if errors:
            _log.warning("%d of %d images cannot be decoded: %s", len(errors), files, examples(errors))
    return encoded


def _basket_pairs(shop: ShopData, split_time: int) -> _BasketPairs:
    events = shop.events
    row_of = {item.id: index for index, item in enumerate(shop.items)}
    items = np.array([row_of.get(item_id, -1) for item_id in events.item_ids], np.int64)[events.item]
    is_engagement = np.array(list(shop.settings.event_types.values()))[events.kind] > 0
    groups, early = baskets(events), events.time < split_time
    everything = make_pairs(items[is_engagement], groups[is_engagement], len(shop.items))
    if len(everything) < _MIN_SHARED * is_engagement.sum():  # most baskets have one item
        groups = events.user.astype(np.int64)

    def of(mask: np.ndarray) -> PositivePairs:
        return make_pairs(items[mask], groups[mask], len(shop.items))

    return _BasketPairs(of(is_engagement & early), of(is_engagement & ~early), of(is_engagement))


def _text(
    stages: Stages, shop: ShopData, settings: ShopConfig, pairs: _BasketPairs, encoded: FittedEncoders
) -> Path:
    """Fit the text encoder; return its body in the precision that it is trained in."""
    training = with_effort(settings.text, len(pairs.before))
    chosen_precision = training.precision
    if chosen_precision == "int8":
        from training.encoders import quantization  # noqa: PLC0415 - an extra; fails before the training
    shape = TextSettings(
        training.max_tokens, precision() if chosen_precision in ("auto", "int8") else chosen_precision
    )
    texts = [item_text(item) for item in shop.items]
    texts_digest = digest_of(*(text.encode() for text in texts))
    identity = _identity(base_models.locate(training.base))
    frozen = stages.run(
        "text-frozen", [identity, shape.__dict__], text_encoder.save_frozen, training.base, shape
    )
    trained_body = frozen
    if training.mode != "frozen" and training.steps and len(pairs.before):
        fit_settings = training.model_dump(exclude={"projection_steps", "base", "precision"})
        inputs = [identity, shape.__dict__, fit_settings, *_pair_inputs(pairs.before, texts_digest)]
        tuned = stages.run(
            "text", inputs, text_encoder.fine_tune, training.base, shape, training, texts, pairs.before
        )
        decision = _tuning_decision(stages, frozen, tuned, texts, pairs)
        if training.mode != "auto" and not decision.accepted:
            decision = replace(decision, accepted=True, reason=f"[text] mode is {training.mode}")
        decision.log()
        encoded.decisions.append(decision)
        trained_body = tuned if decision.accepted else frozen
    body = trained_body
    if chosen_precision == "int8":
        body_and_texts = [encoders.digest(body), texts_digest]
        body = stages.run("text-int8", body_and_texts, quantization.quantize, body, texts)
    body_and_texts = [encoders.digest(body), texts_digest]
    vectors = stages.run("text-vectors", body_and_texts, text_vectors.write_text_vectors, body, texts)
    _fit_projections(stages, "text", body, vectors, None, pairs, training.projection_steps, encoded)
    if (hits := _text_hits(stages, "frozen", frozen, texts, pairs)) is not None:
        encoded.pair_recall["text"]["frozen"] = metrics.interval(hits).to_dict()
    return trained_body


def precision() -> str:
    """The precision of text encoding on this machine: bf16 if it is fast, else fp32."""
    return "bf16" if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def _image(
    stages: Stages,
    shop: ShopData,
    settings: ShopConfig,
    pairs: _BasketPairs,
    text_body: Path,
    encoded: FittedEncoders,
) -> None:
    training = settings.image
    ids = [item.id for item in shop.items]
    files = stages.run("photographs", [_image_stamps(shop, ids)], images.write_hashes, shop.images, ids)
    hashes = json.loads((files / images.HASHES).read_text())
    image_items = [(item.id, item_text(item)) for item in shop.items if item.id in hashes]
    content_digest = digest_of(*(f"{i}\0{t}\0{hashes[i]}".encode() for i, t in image_items))
    body = _image_body(stages, shop, training, image_items, content_digest, text_body)
    from_trunk = image_trunk.is_trunk(base_models.locate(training.base))
    vectors = stages.run(
        "image-vectors",
        [encoders.digest(body), content_digest, digest_of(*(i.encode() for i in ids))],
        image_vectors.write_image_vectors,
        body,
        shop.images,
        ids,
        None if from_trunk else [item_text(item) for item in shop.items],
    )
    encoded.unreadable = json.loads((vectors / image_vectors.UNREADABLE).read_text())
    if not np.load(vectors / "present.npy").any():
        _log.warning("no image can be read: the bundle has no image encoder")
        return
    captions = (
        image_trunk.texts_as_images(body, encoded.base["text"])
        if from_trunk
        else np.load(vectors / image_vectors.CAPTIONS)
    )
    _fit_projections(stages, "image", body, vectors, captions, pairs, training.projection_steps, encoded)
    readable = {item_id for item_id, ok in zip(ids, encoded.present["image"], strict=True) if ok}
    encoded.image_hashes = {i: bytes.fromhex(value) for i, value in hashes.items() if i in readable}
    families = [item.family_id for item in shop.items]
    photographs = [hashes.get(item_id, "") for item_id in ids]
    hits = family_recall(
        encoded.fold["image"], encoded.present["image"], families, photographs, _FAMILY_K, _HELD_OUT
    )
    if len(hits):
        recall = {"recall": metrics.interval(hits).to_dict(), "k": _FAMILY_K}
        encoded.pair_recall.setdefault("image", {})["same_product"] = recall
    _evaluate_image(stages, shop, training, _held_out(pairs, encoded.present["image"]), encoded)


def _identity(base: str) -> str:
    """A base for the key of a stage: the contents of a directory, or the name of a hub or a package."""
    return encoders.digest(Path(base)) if Path(base).is_dir() else base


def _image_body(
    stages: Stages,
    shop: ShopData,
    training: ImageTraining,
    image_items: list[tuple[str, str]],
    content_digest: str,
    text_body: Path,
) -> Path:
    """The image encoder without its projection, from a trunk or as a CLIP model."""
    base = base_models.locate(training.base)
    identity = _identity(base)
    if image_trunk.is_trunk(base):
        return stages.run(
            "image",
            [identity, content_digest, encoders.digest(text_body)],
            image_trunk.fit_image_encoder,
            base,
            shop.images,
            image_items,
            text_body,
        )
    return stages.run(
        "image",
        [identity, training.model_dump(exclude={"projection_steps", "base"}), content_digest],
        image_encoder.train_image_encoder,
        training.model_copy(update={"base": base}),
        shop.images,
        image_items,
    )


def _evaluate_image(
    stages: Stages,
    shop: ShopData,
    training: ImageTraining,
    held_out: tuple[np.ndarray, np.ndarray],
    encoded: FittedEncoders,
) -> None:
    """Held-out pair recall of images by the pretrained base."""
    base = base_models.locate(training.base)
    if not len(held_out[0]) or image_trunk.is_trunk(base):
        return
    no_training = training.model_copy(update={"epochs": 0, "base": base})
    frozen = stages.run(
        "image-frozen", [_identity(base)], image_encoder.train_image_encoder, no_training, shop.images, []
    )
    ids = [shop.items[index].id for index in np.unique(np.concatenate(held_out))]

    identity = [
        encoders.digest(frozen),
        digest_of(*(i.encode() + encoded.image_hashes[i] for i in ids)),
    ]
    entry = image_vectors.write_image_vectors_only
    frozen_vectors = stages.run("image-frozen-vectors", identity, entry, frozen, shop.images, ids)
    hits = _hits(np.load(frozen_vectors / "vectors.npy"), held_out)
    encoded.pair_recall["image"]["frozen"] = metrics.interval(hits).to_dict()


def _image_stamps(shop: ShopData, ids: list[str]) -> str:
    return digest_of(*(f"{i}\0{shop.images.stamp(i)}".encode() for i in ids if i in shop.images))


def _fit_projections(
    stages: Stages,
    space: str,
    body: Path,
    vectors: Path,
    partners: np.ndarray | None,
    pairs: _BasketPairs,
    steps: int,
    encoded: FittedEncoders,
) -> None:
    """Fit the projections of a space and add encoder, vectors and recall to `encoded`."""
    base, present = np.load(vectors / "vectors.npy"), np.load(vectors / "present.npy")
    settings = _PROJECTIONS[space] | {"partners": partners}
    partners_digest = "" if partners is None else digest_of(partners.tobytes())

    def fitted(name: str, training_pairs: PositivePairs, steps: int) -> Path:
        return stages.run(
            f"{space}-{name}",
            [vectors.name, steps, _PROJECTIONS[space], partners_digest, *_pair_inputs(training_pairs, "")],
            projections.write_projection,
            base,
            training_pairs.restrict_to(present),
            steps=steps,
            **settings,
        )

    fold = fitted("head-before", pairs.before, steps)
    tuned = apply_head(base, np.load(fold / projections.HEAD)).astype(np.float16)
    held_out = _held_out(pairs, present)
    pool = np.unique(np.concatenate(held_out))
    recall = {name: _hits(v[pool], held_out) for name, v in (("body", base), ("tuned", tuned)) if len(pool)}
    is_used = False
    if steps:
        decision = projection_decision(space, recall)
        decision.log()
        encoded.decisions.append(decision)
        is_used = decision.accepted
    final = fitted("head", pairs.all, steps if is_used else 0)
    encoded.base[space], encoded.present[space] = base, present
    encoded.fold[space] = tuned if is_used else base
    encoded.final[space] = apply_head(base, np.load(final / projections.HEAD)).astype(np.float16)
    encoded.base_keys.append(vectors.name)
    encoded.fold_keys.append(fold.name if is_used else vectors.name)

    encoded.encoders[space] = stages.run(
        f"{space}-encoder", [body.name, final.name], projections.write_projected_encoder, body, final
    )
    if recall:
        encoded.pair_recall[space] = {
            **{name: metrics.interval(values).to_dict() for name, values in recall.items()},
            "chance": _K / (len(pool) - 1),
            "pairs": len(recall["body"]),
            "k": _K,
            "projection": "used" if is_used else "left out",
        }


def projection_decision(space: str, recall: Mapping[str, np.ndarray]) -> Decision:
    """Whether a projection finds more partners of held-out baskets, by a 95% interval.

    `recall` has bool (P,) whether each partner is found, by the "body" alone and "tuned" by the projection;
    it is empty if there are no held-out baskets.
    """
    tuned, body = (recall.get(name, np.empty(0, bool)) for name in ("tuned", "body"))
    return decide(f"the projection of {space}", "the vectors without it", _PARTNERS, tuned, body)


def _held_out(pairs: _BasketPairs, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of later baskets of the items in `present`, bool (M,): two columns of item rows."""
    return pairs.during.restrict_to(present).held_out(_HELD_OUT)


def _hits(vectors: np.ndarray, held_out: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Whether partners are found among the items of the pairs, bool (P,); `vectors` (., D) are of these."""
    place = np.unique(np.concatenate(held_out), return_inverse=True)[1]
    return pair_recall(vectors, (place[: len(held_out[0])], place[len(held_out[0]) :]), _K)


def _tuning_decision(
    stages: Stages, frozen: Path, tuned: Path, texts: list[str], pairs: _BasketPairs
) -> Decision:
    """Whether the tuned text encoder finds more partners of held-out baskets than the frozen one."""
    nothing = np.empty(0, bool)
    hits = [_text_hits(stages, *body, texts, pairs) for body in (("tuned", tuned), ("frozen", frozen))]
    of_tuned, of_frozen = (nothing if h is None else h for h in hits)
    return decide(_TUNED_TEXT, "the frozen one", _PARTNERS, of_tuned, of_frozen)


def _text_hits(
    stages: Stages, name: str, body: Path, texts: list[str], pairs: _BasketPairs
) -> np.ndarray | None:
    """Whether an encoder finds the partners of held-out baskets, bool (P,); None if there are none."""
    held_out = _held_out(pairs, np.array([bool(text) for text in texts]))
    if not len(held_out[0]):
        return None
    selected = [texts[index] for index in np.unique(np.concatenate(held_out))]
    identity = [encoders.digest(body), digest_of(*(text.encode() for text in selected))]
    entry = text_vectors.write_text_vectors
    vectors = stages.run(f"text-{name}-vectors", identity, entry, body, selected)
    return _hits(np.load(vectors / "vectors.npy"), held_out)


def _pair_inputs(pairs: PositivePairs, content_digest: str) -> list[str]:
    """The inputs of a stage that depends on pairs."""
    return [content_digest, digest_of(pairs.item.tobytes(), pairs.start.tobytes())]
