"""The image encoder: an open_clip model trained on a shop's own images and texts (CLIP, 2021).

Images and the texts of their items share one vector space, so that texts can retrieve images. The base
"small" is trained from scratch; a pretrained base is fine-tuned. Uses no events: the projection that is
fitted afterwards learns from co-engagement.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from services.core.errors import InvalidArgument
from services.embedding.encoders.encoders import (
    THIS_DIRECTORY,
    ImageEncoder,
    ImageSettings,
    write_settings,
)
from training.core.progress import track
from training.data.encoder_settings import ImageTraining
from training.data.images import ShopImages
from training.encoders import image_cache

SMALL = "small"
# On the demo's images, patches of 8 take twice the time and two more text layers a quarter more, and
# neither improves recall in as many epochs.
_SMALL: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 2},
}
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_PRETRAINED_RATE_FACTOR = 0.1
_WEIGHT_DECAY = 0.1
_WARM_UP = 0.1
_MAX_LOG_SCALE = float(np.log(100))
_TITLE_ONLY, _NO_SENTENCES, _SENTENCE = 0.2, 0.4, 0.5
ENCODE_BATCH = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Base:
    """A model to start from, with everything needed to write it in open_clip's format."""

    model: Any
    config: dict[str, Any]
    tokenize: Any
    preprocess: Any
    learning_rate: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def train_image_encoder(
    directory: Path,
    training: ImageTraining,
    images: ShopImages,
    items: Sequence[tuple[str, str]],
    seed: int = 0,
) -> None:
    """Train on `items`, pairs of an item's id and text, and write an encoder into `directory`.

    Symmetric cross-entropy over a batch with a learned temperature; AdamW, linear warm-up and cosine decay;
    bfloat16 autocast if the processor supports it. The same seed gives the same weights on one machine.
    Without epochs or readable images the base stays unchanged.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    base = _open(training.base, training.learning_rate)
    base.model.to(device)
    if training.epochs:
        with TemporaryDirectory(dir=directory, prefix=".images-") as scratch:
            ids = [item_id for item_id, _ in items]
            fit = image_cache.fit_of(base.preprocess)
            pixels, present = image_cache.write_image_cache(
                Path(scratch) / "images.npy", images, ids, fit, base.size
            )
            rows = np.flatnonzero(present)
            _train(base, training, pixels, [text for _, text in items], rows, device, seed)
    _save(base, directory)


def encode_images(
    encoder: ImageEncoder, images: ShopImages, ids: Sequence[str], batch: int = 512
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Vectors float16 (N, D) of the images of `ids`, and bool (N,) whether each could be read.

    A missing or unreadable image has a zero vector. The last result lists the unreadable files with reasons.
    Decoding runs ahead in threads; the pixels are the same as in the services.
    """
    vectors = np.zeros((len(ids), encoder.dimension), np.float16)
    present = np.zeros(len(ids), bool)
    unreadable: list[str] = []

    def fit(image: Image.Image) -> Image.Image:
        return Image.fromarray(encoder.pixels(image))

    batches = image_cache.decoded_images(images, ids, fit, encoder.side, batch)
    for start, decoded in zip(track(range(0, len(ids), batch), "images"), batches, strict=True):
        readable = [(start + n, p) for n, p in enumerate(decoded) if isinstance(p, Image.Image)]
        rows = [row for row, _ in readable]
        vectors[rows] = encoder.encode([image for _, image in readable])
        present[rows] = True
        unreadable += [str(image) for image in decoded if isinstance(image, InvalidArgument)]
    return vectors, present, unreadable


def _open(base: str, learning_rate: float) -> _Base:
    """The model named by `base`; a pretrained one gets a lower learning rate."""
    if base == SMALL:
        model = open_clip.CLIP(**_SMALL)
        preprocessing = PreprocessCfg(size=model.visual.image_size)
        config = {"model_cfg": _SMALL, "preprocess_cfg": asdict(preprocessing)}
        preprocess = image_transform_v2(preprocessing, is_train=False)
        tokenize = open_clip.SimpleTokenizer(context_length=_SMALL["text_cfg"]["context_length"])
        return _Base(model, config, tokenize, preprocess, learning_rate)
    name, _, tag = base.rpartition(":")
    if Path(base).is_dir():
        name, tag = f"local-dir:{base}", ""
        config = json.loads((Path(base) / CONFIG_FILE).read_text())
        if config["model_cfg"]["text_cfg"].get("hf_model_name") == THIS_DIRECTORY:
            raise InvalidArgument.of(
                "image.base",
                f"is {base!r}, made from a trunk and a text encoder, which is not trained further",
            )
    elif name not in open_clip.list_models():
        raise InvalidArgument.of(
            "image.base", f"is {base!r}: neither a directory nor an open_clip model:pretrained tag"
        )
    else:
        config = {"model_cfg": open_clip.get_model_config(name)}
        # Some pretrained weights use another activation than their architecture's configuration.
        if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False):
            config["model_cfg"]["quick_gelu"] = True
    model, _, preprocess = open_clip.create_model_and_transforms(
        name, tag or None, force_quick_gelu=config["model_cfg"].get("quick_gelu", False)
    )
    config["preprocess_cfg"] = open_clip.get_model_preprocess_cfg(model)
    return _Base(
        model, config, open_clip.get_tokenizer(name), preprocess, learning_rate * _PRETRAINED_RATE_FACTOR
    )


def _train(
    base: _Base,
    training: ImageTraining,
    pixels: np.ndarray,
    texts: Sequence[str],
    rows: np.ndarray,
    device: str,
    seed: int,
) -> None:
    """Train on the `rows` of `pixels` uint8 (N, H, W, 3) and of `texts` (N,)."""
    model, generator = base.model.train(), np.random.default_rng(seed)
    torch_generator = torch.Generator().manual_seed(seed)
    normalize = base.preprocess.transforms[-1]
    _, text_code = np.unique(np.array(texts, object), return_inverse=True)
    plan = _batches(rows, training.epochs, training.batch, generator)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model), lr=base.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, int(_WARM_UP * len(plan)), len(plan))
    loss = torch.zeros(())
    for batch in track(plan, "image encoder"):
        raw = torch.from_numpy(pixels[batch]).to(device).permute(0, 3, 1, 2).float() / 255
        tokens = base.tokenize([augment_text(texts[row], generator) for row in batch])
        with torch.autocast(device, torch.bfloat16, enabled=has_bf16()), _attention(device):
            image_vectors = model.encode_image(
                normalize(image_cache.augment(raw, torch_generator)), normalize=True
            )
            text_vectors = model.encode_text(tokens.to(device), normalize=True)
        same = same_text(tokens, torch.from_numpy(text_code[batch])).to(device)
        loss = symmetric_loss(model.logit_scale.exp() * image_vectors.float() @ text_vectors.float().T, same)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, _MAX_LOG_SCALE)
    _log.info("image encoder: %d pairs, %d steps, last loss %.3f", len(rows), len(plan), loss.item())


def symmetric_loss(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of retrieving the text of an image and the image of a text (Radford et al., 2021).

    `logits` (B, B) are images by texts, with the pairs on the diagonal. Where `same`, bool (B, B), is set,
    two items have the same text and are no negatives of each other.
    """
    other = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(other, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    loss: torch.Tensor = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    return loss


def same_text(tokens: torch.Tensor, text_code: torch.Tensor) -> torch.Tensor:
    """Which items of a batch have the same text, bool (B, B), as tokens or as the shop's text.

    `tokens` int64 (B, T) are the model's input; `text_code` int64 (B,) are codes of the different texts.
    """
    _, token_code = torch.unique(tokens, dim=0, return_inverse=True)
    same: torch.Tensor = (token_code[:, None] == token_code) | (text_code[:, None] == text_code)
    return same


def augment_text(text: str, generator: np.random.Generator) -> str:
    """A random variant of a text: the title alone, with the attributes, or also with some sentences.

    Texts are "title. sentence. sentence. attribute, attribute". Queries are short, and a model trained on
    full texts only does not understand them.
    """
    title, *rest = text.split(". ")
    draw = generator.random()
    if not rest or draw < _TITLE_ONLY:
        return title
    *sentences, attributes = rest
    if draw < _TITLE_ONLY + _NO_SENTENCES:
        sentences = []
    sample = [sentence for sentence in sentences if generator.random() < _SENTENCE]
    return ". ".join([title, *sample, attributes])


def has_bf16() -> bool:
    """Whether bfloat16 is fast on this machine's GPU, or on its CPU if it has no GPU."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def _attention(device: str) -> AbstractContextManager[None]:
    """The attention kernel for training; on a CPU plain products are faster than the fused kernel."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()


def _batches(rows: np.ndarray, epochs: int, limit: int, generator: np.random.Generator) -> list[np.ndarray]:
    """All rows once per epoch in a new order, in batches of nearly equal size, at most `limit`."""
    pieces = -(-len(rows) // limit)
    shuffled = (generator.permutation(rows) for _ in range(epochs if pieces else 0))
    return [batch for epoch in shuffled for batch in np.array_split(epoch, pieces)]


def _parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weights decay; norms, biases and the temperature do not."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def _save(base: _Base, directory: Path) -> None:
    """Write the model in open_clip's `local-dir:` format, and its settings."""
    weights = {name: value.detach().cpu().contiguous() for name, value in base.model.state_dict().items()}
    save_file(weights, directory / WEIGHTS_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(base.config, indent=2) + "\n")
    if hasattr(base.tokenize, "save_pretrained"):
        base.tokenize.save_pretrained(directory)
    write_settings(directory, ImageSettings("bf16" if has_bf16() else "fp32"))
