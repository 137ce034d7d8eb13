"""The image encoder: an open_clip model that learns from a shop's own photographs and texts (CLIP, 2021).

Photographs and the texts of their items are drawn together in one space, so that texts find
photographs. Small by default and trained from scratch; a pretrained base is fine-tuned. Knows
nothing of events: what people engage with together is left to the projection fitted afterwards.
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
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from services.embedding.encoders import ImageEncoder, ImageSettings, write_settings
from services.errors import InvalidArgument
from training import pixels
from training.photographs import Photographs
from training.progress import track
from training.shop_settings import ImageTraining

SMALL = "small"
# On drawn photographs, patches of 8 cost twice the time and two more layers of text a quarter more,
# and neither found more in as many epochs.
_SMALL: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 2},
}
_CONFIG_FILE = "open_clip_config.json"
_WEIGHTS_FILE = "open_clip_model.safetensors"
_GENTLER = 0.1
_WEIGHT_DECAY = 0.1
_WARM_UP = 0.1
_SHARPEST = float(np.log(100))
_TITLE_ONLY, _NO_SENTENCES, _SENTENCE = 0.2, 0.4, 0.5
_ENCODED_AT_ONCE = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Base:
    """A model to start from, with what is needed to write it so that open_clip reads it again."""

    model: Any
    config: dict[str, Any]
    tokenize: Any
    preprocess: Any
    learning_rate: float

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model reads."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def train_image_encoder(
    directory: Path,
    training: ImageTraining,
    photographs: Photographs,
    items: Sequence[tuple[str, str]],
    seed: int = 0,
) -> None:
    """Learn from `items`, pairs of an item's id and text, and write an encoder into `directory`.

    Symmetric cross-entropy over a batch with a learned temperature; AdamW, linear warm-up and
    cosine decay; bfloat16 autocast where the processor has it. The same seed gives the same
    weights on one machine. No epochs, or no readable photograph, leave the base as it is.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    base = _open(training.base, training.learning_rate)
    base.model.to(device)
    if training.epochs:
        with TemporaryDirectory(dir=directory, prefix=".pixels-") as scratch:
            ids = [item_id for item_id, _ in items]
            fit = pixels.fit_of(base.preprocess)
            decoded, present = pixels.write_pixels(
                Path(scratch) / "pixels.npy", photographs, ids, fit, base.size
            )
            rows = np.flatnonzero(present)
            _learn(base, training, decoded, [text for _, text in items], rows, device, seed)
    _save(base, directory)


def encode_photographs(
    encoder: ImageEncoder, photographs: Photographs, ids: Sequence[str], batch: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float16 (N, D) of the photographs of `ids`, and bool (N,) which of them could be read.

    A photograph that is missing or unreadable has a vector of zeros. Decoding runs ahead in threads.
    """
    vectors = np.zeros((len(ids), encoder.dimension), np.float16)
    present = np.zeros(len(ids), bool)
    fit = pixels.fit_of(encoder.preprocess)
    batches = pixels.pictures(photographs, ids, fit, encoder.side, batch)
    for start, pictures in zip(track(range(0, len(ids), batch), "photographs"), batches, strict=True):
        rows = [start + n for n, picture in enumerate(pictures) if picture is not None]
        vectors[rows] = encoder.encode([picture for picture in pictures if picture is not None])
        present[rows] = True
    return vectors, present


def _open(base: str, learning_rate: float) -> _Base:
    """The model that `base` names; what is pretrained gets a gentler learning rate."""
    if base == SMALL:
        model = open_clip.CLIP(**_SMALL)
        reading = PreprocessCfg(size=model.visual.image_size)
        config = {"model_cfg": _SMALL, "preprocess_cfg": asdict(reading)}
        preprocess = image_transform_v2(reading, is_train=False)
        tokenize = open_clip.SimpleTokenizer(context_length=_SMALL["text_cfg"]["context_length"])
        return _Base(model, config, tokenize, preprocess, learning_rate)
    name, _, tag = base.rpartition(":")
    if Path(base).is_dir():
        name, tag = f"local-dir:{base}", ""
        config = json.loads((Path(base) / _CONFIG_FILE).read_text())
    elif name not in open_clip.list_models():
        raise InvalidArgument.of(
            "image.base", f"is {base!r}: no directory, and no open_clip model:pretrained tag"
        )
    else:
        config = {"model_cfg": open_clip.get_model_config(name)}
        # Some weights were learned with another activation than their architecture's file says.
        if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False):
            config["model_cfg"]["quick_gelu"] = True
    model, _, preprocess = open_clip.create_model_and_transforms(
        name, tag or None, force_quick_gelu=config["model_cfg"].get("quick_gelu", False)
    )
    config["preprocess_cfg"] = open_clip.get_model_preprocess_cfg(model)
    return _Base(model, config, open_clip.get_tokenizer(name), preprocess, learning_rate * _GENTLER)


def _learn(
    base: _Base,
    training: ImageTraining,
    decoded: np.ndarray,
    texts: Sequence[str],
    rows: np.ndarray,
    device: str,
    seed: int,
) -> None:
    """Train on the `rows` of `decoded` uint8 (N, H, W, 3) and of `texts` (N,)."""
    model, choice = base.model.train(), np.random.default_rng(seed)
    shuffle = torch.Generator().manual_seed(seed)
    normalise = base.preprocess.transforms[-1]
    _, whole = np.unique(np.array(texts, object), return_inverse=True)
    plan = _batches(rows, training.epochs, training.batch, choice)
    optimiser = torch.optim.AdamW(
        _groups(model), lr=base.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimiser, int(_WARM_UP * len(plan)), len(plan))
    loss = torch.zeros(())
    for batch in track(plan, "image encoder"):
        raw = torch.from_numpy(decoded[batch]).to(device).permute(0, 3, 1, 2).float() / 255
        tokens = base.tokenize([vary(texts[row], choice) for row in batch])
        with torch.autocast(device, torch.bfloat16, enabled=has_bf16()), _attention(device):
            seen = model.encode_image(normalise(pixels.augment(raw, shuffle)), normalize=True)
            read = model.encode_text(tokens.to(device), normalize=True)
        same = same_text(tokens, torch.from_numpy(whole[batch])).to(device)
        loss = symmetric_loss(model.logit_scale.exp() * seen.float() @ read.float().T, same)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, _SHARPEST)
    _log.info("image encoder: %d pairs, %d steps, last loss %.3f", len(rows), len(plan), loss.item())


def symmetric_loss(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of finding the text of a picture and the picture of a text (Radford et al., 2021).

    `logits` (B, B), pictures by texts, the pairs on the diagonal; where `same`, bool (B, B), two
    items have one text and are no negatives of each other.
    """
    other = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(other, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    loss: torch.Tensor = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    return loss


def same_text(tokens: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Which items of a batch have one text, bool (B, B): as the model reads it, or as it is in the shop.

    `tokens` int64 (B, T) are what the model reads; `whole` int64 (B,) numbers the different texts.
    """
    _, read = torch.unique(tokens, dim=0, return_inverse=True)
    same: torch.Tensor = (read[:, None] == read) | (whole[:, None] == whole)
    return same


def vary(text: str, choice: np.random.Generator) -> str:
    """A text as somebody might have put it: the title alone, with the attributes, or with some sentences too.

    Texts are "title. sentence. sentence. attribute, attribute"; queries are short, and a model
    that learns from whole texts only does not understand them.
    """
    title, *rest = text.split(". ")
    draw = choice.random()
    if not rest or draw < _TITLE_ONLY:
        return title
    *sentences, attributes = rest
    if draw < _TITLE_ONLY + _NO_SENTENCES:
        sentences = []
    kept = [sentence for sentence in sentences if choice.random() < _SENTENCE]
    return ". ".join([title, *kept, attributes])


def has_bf16() -> bool:
    """Whether bfloat16 is fast here: on the GPU if there is one, else on the CPU."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def _attention(device: str) -> AbstractContextManager[None]:
    """Which attention code to learn with: on a CPU plain products are faster than the fused kernel."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()


def _batches(rows: np.ndarray, epochs: int, most: int, choice: np.random.Generator) -> list[np.ndarray]:
    """Every row once an epoch in a new order, in batches of nearly one size, `most` at most."""
    pieces = -(-len(rows) // most)
    shuffled = (choice.permutation(rows) for _ in range(epochs if pieces else 0))
    return [batch for epoch in shuffled for batch in np.array_split(epoch, pieces)]


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameters for AdamW: weights decay; norms, biases and the temperature do not."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def _save(base: _Base, directory: Path) -> None:
    """Write the model as open_clip's `local-dir:` reads it, and how it is to be run."""
    weights = {name: value.detach().cpu().contiguous() for name, value in base.model.state_dict().items()}
    save_file(weights, directory / _WEIGHTS_FILE)
    (directory / _CONFIG_FILE).write_text(json.dumps(base.config, indent=2) + "\n")
    if hasattr(base.tokenize, "save_pretrained"):
        base.tokenize.save_pretrained(directory)
    write_settings(directory, ImageSettings("bf16" if has_bf16() else "fp32"))
