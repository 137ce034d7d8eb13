"""The two encoders: texts by a Hugging Face BERT, photographs by an open_clip model.

An encoder is a directory: the text encoder as `save_pretrained` writes it, the image
encoder as open_clip's `local-dir:` reads it, each with an `encoder.json` beside and, where
one was fitted, a `head.npy`: a projection (D, D) of what the model gives. Its digest covers
every file, the precision included, because vectors belong to a digest.
Knows nothing of items, storage or transport; one thread at a time may call an encoder.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

_SETTINGS_FILE = "encoder.json"
_HEAD_FILE = "head.npy"
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TextSettings:
    """How a text encoder reads: at most `max_tokens` tokens a text, `batch_tokens` padded ones a batch."""

    max_tokens: int = 96
    batch_tokens: int = 8192
    precision: str = "fp32"


@dataclass(frozen=True)
class ImageSettings:
    """How an image encoder reads: `batch` pictures at a time."""

    batch: int = 64
    precision: str = "fp32"


@dataclass(frozen=True)
class EncodedTexts:
    """`vectors` float32 (B, D) of unit length; `truncated` bool (B,): only the beginning was read."""

    vectors: np.ndarray
    truncated: np.ndarray


def attention(device: str) -> str:
    """Which attention code of transformers a device is best at.

    On a CPU the plain products in bfloat16 took a third of the time of the fused kernel.
    """
    return "eager" if device == "cpu" else "sdpa"


def write_settings(directory: Path, settings: TextSettings | ImageSettings) -> None:
    """Put an encoder's settings beside its weights."""
    (directory / _SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n")


def write_head(directory: Path, weight: np.ndarray) -> None:
    """Put a projection, float32 (D, D), beside an encoder's weights."""
    np.save(directory / _HEAD_FILE, weight.astype(np.float32))


def _read_head(directory: Path, device: str) -> torch.Tensor | None:
    path = directory / _HEAD_FILE
    return torch.from_numpy(np.load(path)).to(device) if path.is_file() else None


def _read_settings(directory: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((directory / _SETTINGS_FILE).read_text())
    return settings


def digest(directory: Path) -> str:
    """What identifies an encoder: BLAKE2b over the names and contents of its files, as 32 hex digits."""
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        state.update(f"{path.relative_to(directory).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    return state.hexdigest()


class TextEncoder:
    """Mean of a BERT's last hidden states over real tokens, scaled to unit length (Sentence-BERT, 2019)."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self.settings = TextSettings(**_read_settings(directory))
        self.digest = digest(directory)
        self._device = device
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        precision = _PRECISIONS[self.settings.precision]
        model = AutoModel.from_pretrained(directory, dtype=precision, attn_implementation=attention(device))
        self._model = model.to(device).eval()
        self._head = _read_head(directory, device)
        self.dimension = int(model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Vectors of `texts`, in their order."""
        if not texts:
            return EncodedTexts(np.empty((0, self.dimension), np.float32), np.empty(0, bool))
        # A token is a character at least, so nothing past this can be read: no megabytes are tokenised.
        reach = self.settings.max_tokens * 32
        rows = self._tokenizer([text[:reach] for text in texts], add_special_tokens=True, truncation=False)
        limit = self.settings.max_tokens
        lengths = np.array([len(ids) for ids in rows["input_ids"]])
        cut = np.array([len(text) > reach for text in texts]) | (lengths > limit)
        kept = [self._cut(ids, limit) for ids in rows["input_ids"]]
        vectors = np.empty((len(texts), self.dimension), np.float32)
        for batch in _batches(np.minimum(lengths, limit), self.settings.batch_tokens):
            vectors[batch] = self._forward([kept[row] for row in batch])
        return EncodedTexts(vectors, cut)

    @staticmethod
    def _cut(ids: list[int], limit: int) -> list[int]:
        # The closing special token stays.
        return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]

    @torch.inference_mode()
    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        batch = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self._device)
        hidden = self._model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return _unit((hidden * mask).sum(1) / mask.sum(1), self._head)


class ImageEncoder:
    """An open_clip model: pictures and texts in one space, scaled to unit length (CLIP, 2021).

    `preprocess` makes a picture what the model reads; `side` is the side it looks at, in pixels.
    """

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self.settings = ImageSettings(**_read_settings(directory))
        self.digest = digest(directory)
        self._device = device
        name = f"local-dir:{directory}"
        self._model, _, self.preprocess = open_clip.create_model_and_transforms(
            name, device=device, precision=self.settings.precision
        )
        self._model.eval()
        self._head = _read_head(directory, device)
        self._tokenize = open_clip.get_tokenizer(name)
        size = self._model.visual.image_size
        self.side = int(size if isinstance(size, int) else size[0])  # open_clip's ResNets have one number
        self.dimension = int(self._model.encode_text(self._tokenize([""]).to(device)).shape[-1])

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Vectors float32 (B, D) of RGB pictures, in their order."""
        dtype = _PRECISIONS[self.settings.precision]
        vectors = [np.empty((0, self.dimension), np.float32)]
        for start in range(0, len(pictures), self.settings.batch):
            pixels = torch.stack([self.preprocess(p) for p in pictures[start : start + self.settings.batch]])
            vectors.append(_unit(self._model.encode_image(pixels.to(self._device, dtype)), self._head))
        return np.concatenate(vectors)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors float32 (B, D) of texts in the space of pictures; the model reads its context length."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        return _unit(self._model.encode_text(self._tokenize(list(texts)).to(self._device)), self._head)


def _unit(vectors: torch.Tensor, head: torch.Tensor | None) -> np.ndarray:
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    if head is not None:
        unit = torch.nn.functional.normalize(unit @ head.T, dim=-1)
    values: np.ndarray = unit.cpu().numpy()
    return values


def _batches(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Rows in batches of like length, none with more than `budget` padded tokens unless it is one row."""
    batches, batch = [], list[int]()
    for row in np.argsort(-lengths, kind="stable"):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            batches.append(np.array(batch))
            batch = []
        batch.append(int(row))
    return [*batches, np.array(batch)]
