"""The encoders of a bundle and the vectors of its catalogue, stage by stage.

A body (BERT, CLIP) is tuned on behaviour before the ranking days; a projection after it, cheap to
fit, is fitted twice: on the same events, for the rows that rankers learn from, and on all.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from services.catalog import item_text
from services.embedding import eight_bits, encoders, images
from services.embedding.encoders import ImageEncoder, TextEncoder, TextSettings, write_head
from training import contrastive, image_encoder, metrics, pairs, pixels, text_encoder
from training.contrastive import apply_head, fit_head
from training.dataset import Shop
from training.pairs import Pairs, make_pairs, pair_recall
from training.progress import track
from training.queries import baskets
from training.shop_settings import ImageTraining, ShopSettings
from training.stages import Stages, digest_of

_ENCODED_AT_ONCE = 2048
_HELD_OUT = 3000
# Where fewer engagements share a basket with another, a person's items are one.
_SHARED_BASKETS = 0.1
_K = 20


@dataclass
class Encoded:
    """Encoders and vectors by space, in the order of the shop's items.

    `encoders` are directories as the services load them; `base`, `fold` and `final` float16
    (M, D): of the bodies, with the projections that know nothing of the ranking days, and
    with the published ones; `present` bool (M,); `base_keys` and `fold_keys` name what
    they were made of; `photographs` maps an item id to its file's hash; `judged` is held-out
    pair recall.
    """

    encoders: dict[str, Path] = field(default_factory=dict)
    base: dict[str, np.ndarray] = field(default_factory=dict)
    fold: dict[str, np.ndarray] = field(default_factory=dict)
    final: dict[str, np.ndarray] = field(default_factory=dict)
    present: dict[str, np.ndarray] = field(default_factory=dict)
    base_keys: list[str] = field(default_factory=list)
    fold_keys: list[str] = field(default_factory=list)
    photographs: dict[str, bytes] = field(default_factory=dict)
    judged: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Behaviour:
    """Pairs of items of one basket, or person: before the ranking days, in them, and in all."""

    before: Pairs
    during: Pairs
    all: Pairs


def encode(stages: Stages, shop: Shop, settings: ShopSettings, learned_until: int) -> Encoded:
    """Make the encoders and encode the catalogue; `learned_until` in microseconds since 1970."""
    behaviour = _behaviour(shop, learned_until)
    encoded = Encoded()
    _text(stages, shop, settings, behaviour, encoded)
    if any(item.id in shop.photographs for item in shop.items):
        _image(stages, shop, settings, behaviour, encoded)
    return encoded


def _behaviour(shop: Shop, learned_until: int) -> _Behaviour:
    events = shop.events
    row = {item.id: at for at, item in enumerate(shop.items)}
    items = np.array([row.get(item_id, -1) for item_id in events.item_ids], np.int64)[events.item]
    engaged = np.array(list(shop.settings.event_types.values()))[events.kind] > 0
    groups, early = baskets(events), events.time < learned_until
    everything = make_pairs(items[engaged], groups[engaged], len(shop.items))
    if len(everything) < _SHARED_BASKETS * engaged.sum():  # people who take one item at a time
        groups = events.user.astype(np.int64)

    def of(mask: np.ndarray) -> Pairs:
        return make_pairs(items[mask], groups[mask], len(shop.items))

    return _Behaviour(of(engaged & early), of(engaged & ~early), of(engaged))


def _text(
    stages: Stages, shop: Shop, settings: ShopSettings, behaviour: _Behaviour, encoded: Encoded
) -> None:
    training = settings.text
    given = training.precision
    if given == "int8":
        from training import quantising  # noqa: PLC0415 - an extra; what is missing is told before the training
    shape = TextSettings(training.max_tokens, precision() if given in ("auto", "int8") else given)
    texts = [item_text(item) for item in shop.items]
    described = digest_of(*(text.encode() for text in texts))
    located = text_encoder.locate(training.base)
    identity = encoders.digest(Path(located)) if Path(located).is_dir() else located
    fitting = training.model_dump(exclude={"head_steps", "base", "precision"})
    inputs = [
        identity,
        shape.__dict__,
        fitting,
        *_seen(behaviour.before, described, training.mode != "frozen"),
    ]
    body = stages.run(
        "text",
        inputs,
        [text_encoder, contrastive, pairs],
        lambda d: text_encoder.fine_tune(training.base, d, shape, training, texts, behaviour.before),
    )
    if given == "int8":
        tuned = body
        body = stages.run(
            "text-int8",
            [encoders.digest(tuned), described],
            [quantising, eight_bits, encoders],
            lambda d: quantising.quantise(tuned, d, texts),
        )
    vectors = _text_vectors(stages, body, texts, described)
    _projected(stages, "text", body, vectors, None, behaviour, training.head_steps, encoded)
    if training.mode == "frozen":
        return
    frozen = stages.run(
        "text-frozen",
        [identity, shape.__dict__],
        [text_encoder],
        lambda d: text_encoder.save_frozen(training.base, d, shape),
    )
    _judge_text(stages, frozen, texts, behaviour, encoded)


def _text_vectors(stages: Stages, body: Path, texts: list[str], described: str) -> Path:
    def build(directory: Path) -> None:
        np.save(directory / "vectors.npy", encode_texts(body, texts))
        np.save(directory / "present.npy", np.ones(len(texts), bool))

    return stages.run("text-vectors", [encoders.digest(body), described], [encoders, eight_bits], build)


def precision() -> str:
    """What texts are encoded in here: bf16 where it is fast."""
    return "bf16" if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def encode_texts(encoder: Path, texts: list[str]) -> np.ndarray:
    """Vectors float16 (N, D) of texts by an encoder's directory."""
    on_gpu = torch.cuda.is_available() and not encoders.in_eight_bits(encoder)
    model = TextEncoder(encoder, "cuda" if on_gpu else "cpu")
    starts = range(0, len(texts), _ENCODED_AT_ONCE)
    done = [model.encode(texts[s : s + _ENCODED_AT_ONCE]).vectors for s in track(starts, "texts encoded")]
    return np.concatenate(done).astype(np.float16)


def _image(
    stages: Stages, shop: Shop, settings: ShopSettings, behaviour: _Behaviour, encoded: Encoded
) -> None:
    training = settings.image
    ids = [item.id for item in shop.items]
    pictured = [(item.id, item_text(item)) for item in shop.items if item.id in shop.photographs]
    files = stages.run(
        "photographs",
        [_places(shop, ids)],
        [],
        lambda d: _hash_photographs(shop, [i for i, _ in pictured], d),
    )
    hashes = json.loads((files / "hashes.json").read_text())
    encoded.photographs = {item_id: bytes.fromhex(value) for item_id, value in hashes.items()}
    described = digest_of(*(f"{i}\0{t}\0{hashes[i]}".encode() for i, t in pictured))
    body = stages.run(
        "image",
        [training.model_dump(exclude={"head_steps"}), described],
        [image_encoder, pixels, images],
        lambda d: image_encoder.train_image_encoder(d, training, shop.photographs, pictured),
    )

    def build(directory: Path) -> None:
        model = ImageEncoder(body, "cuda" if torch.cuda.is_available() else "cpu")
        vectors, present = image_encoder.encode_photographs(model, shop.photographs, ids)
        np.save(directory / "vectors.npy", vectors)
        np.save(directory / "present.npy", present)
        captions = _encode_captions(model, [item_text(item) for item in shop.items])
        np.save(directory / "captions.npy", captions)

    inputs = [encoders.digest(body), described, digest_of(*(i.encode() for i in ids))]
    vectors = stages.run("image-vectors", inputs, [encoders, images, image_encoder, pixels], build)
    captions = np.load(vectors / "captions.npy")
    _projected(stages, "image", body, vectors, captions, behaviour, training.head_steps, encoded)
    missing = {item_id for item_id, ok in zip(ids, encoded.present["image"], strict=True) if not ok}
    encoded.photographs = {i: h for i, h in encoded.photographs.items() if i not in missing}
    _judge_image(stages, shop, training, behaviour.during.among(encoded.present["image"]), encoded)


def _judge_image(stages: Stages, shop: Shop, training: ImageTraining, late: Pairs, encoded: Encoded) -> None:
    """Held-out pair recall by photographs alone, with the base as it came beside it."""
    held = late.held_out(_HELD_OUT)
    if not len(held[0]):
        return
    untouched = training.model_copy(update={"epochs": 0})
    code = [image_encoder, pixels, images]
    frozen = stages.run(
        "image-frozen",
        [training.base],
        code,
        lambda d: image_encoder.train_image_encoder(d, untouched, shop.photographs, []),
    )
    ids = [shop.items[at].id for at in np.unique(np.concatenate(held))]

    def build(directory: Path) -> None:
        model = ImageEncoder(frozen, "cuda" if torch.cuda.is_available() else "cpu")
        np.save(directory / "vectors.npy", image_encoder.encode_photographs(model, shop.photographs, ids)[0])

    chosen = digest_of(*(i.encode() + encoded.photographs[i] for i in ids))
    made = stages.run("image-frozen-vectors", [encoders.digest(frozen), chosen], [encoders, *code], build)
    _judge("image", late, {"frozen": np.load(made / "vectors.npy")}, encoded)


def _places(shop: Shop, ids: list[str]) -> str:
    return digest_of(*(f"{i}\0{shop.photographs.stamp(i)}".encode() for i in ids if i in shop.photographs))


def _hash_photographs(shop: Shop, ids: list[str], directory: Path) -> None:
    hashes = {i: hashlib.blake2b(shop.photographs.read(i), digest_size=32).hexdigest() for i in ids}
    (directory / "hashes.json").write_text(json.dumps(hashes))


def _encode_captions(model: ImageEncoder, texts: list[str]) -> np.ndarray:
    """The texts of items in the image space, float16 (M, D)."""
    starts = range(0, len(texts), _ENCODED_AT_ONCE)
    done = [model.encode_texts(texts[s : s + _ENCODED_AT_ONCE]) for s in track(starts, "captions encoded")]
    return np.concatenate(done).astype(np.float16)


def _projected(
    stages: Stages,
    space: str,
    body: Path,
    vectors: Path,
    partners: np.ndarray | None,
    behaviour: _Behaviour,
    steps: int,
    encoded: Encoded,
) -> None:
    """Fit the space's projections and put encoder, vectors and their recall into `encoded`."""
    base, present = np.load(vectors / "vectors.npy"), np.load(vectors / "present.npy")
    code: list[ModuleType] = [contrastive, pairs]

    def fitted(name: str, learned: Pairs) -> Path:
        def build(directory: Path) -> None:
            mine = learned.among(present)
            np.save(directory / "head.npy", fit_head(base, mine, steps=steps, partners=partners))

        return stages.run(f"{space}-{name}", [vectors.name, steps, *_seen(learned, "")], code, build)

    fold, final = fitted("head-before", behaviour.before), fitted("head", behaviour.all)
    encoded.base[space], encoded.present[space] = base, present
    encoded.fold[space] = apply_head(base, np.load(fold / "head.npy")).astype(np.float16)
    encoded.final[space] = apply_head(base, np.load(final / "head.npy")).astype(np.float16)
    encoded.base_keys.append(vectors.name)
    encoded.fold_keys.append(fold.name)

    def publish(directory: Path) -> None:
        shutil.copytree(body, directory, dirs_exist_ok=True)
        write_head(directory, np.load(final / "head.npy"))

    encoded.encoders[space] = stages.run(f"{space}-encoder", [body.name, final.name], [], publish)
    _judge(space, behaviour.during.among(present), {}, encoded)


def _judge(space: str, late: Pairs, more: Mapping[str, np.ndarray], encoded: Encoded) -> None:
    """Held-out pair recall among the items of the held-out pairs, which `more` holds further vectors of."""
    held = late.held_out(_HELD_OUT)
    if not len(held[0]):
        return
    pool, place = np.unique(np.concatenate(held), return_inverse=True)
    sides = place[: len(held[0])], place[len(held[0]) :]
    vectors = {**more, "body": encoded.base[space][pool], "tuned": encoded.fold[space][pool]}
    encoded.judged[space] = {
        **{name: metrics.interval(pair_recall(v, sides, _K)).to_dict() for name, v in vectors.items()},
        "chance": _K / (len(pool) - 1),
        "pairs": len(held[0]),
        "k": _K,
    }


def _judge_text(
    stages: Stages, frozen: Path, texts: list[str], behaviour: _Behaviour, encoded: Encoded
) -> None:
    """The same with the base as it came beside it."""
    held = behaviour.during.held_out(_HELD_OUT)
    if not len(held[0]):
        return
    pool = np.unique(np.concatenate(held))

    def build(directory: Path) -> None:
        np.save(directory / "vectors.npy", encode_texts(frozen, [texts[at] for at in pool]))

    chosen = digest_of(*(texts[at].encode() for at in pool))
    made = stages.run("text-frozen-vectors", [encoders.digest(frozen), chosen], [encoders], build)
    _judge("text", behaviour.during, {"frozen": np.load(made / "vectors.npy")}, encoded)


def _seen(learned: Pairs, described: str, used: bool = True) -> list[str]:
    """What a stage that learns from pairs depends on; nothing of them when they are not used."""
    return [described, digest_of(learned.item.tobytes(), learned.start.tobytes())] if used else []
