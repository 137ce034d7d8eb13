"""The two encoders: a Hugging Face BERT for texts, an open_clip model for images.

An encoder is a directory: the text encoder as `save_pretrained` writes it, the image
encoder as open_clip's `local-dir:` reads it. Each also has an `encoder.json` and, if one was
fitted, a `head.npy`: a projection (D, D) of the model's output. The digest covers every file,
including the precision, because vectors belong to a digest.
The module depends on no items, storage or transport.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from services.core.errors import FailedPrecondition
from services.embedding.encoders.int8 import Int8Model
from services.embedding.images import nvjpeg
from services.embedding.runtime.devices import (
    PendingArray,
    host_buffer,
    is_gpu,
    map_batches,
    to_device,
    to_host,
)

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
_SETTINGS_FILE = "encoder.json"
_HEAD_FILE = "head.npy"
_CLIP_CONFIG_FILE = "open_clip_config.json"
THIS_DIRECTORY = "."
"""Stands for the encoder's own directory where open_clip's configuration names a Hugging Face model."""
S = TypeVar("S", "TextSettings", "ImageSettings")
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_INT8 = "int8"

# On a CPU a batch fits a core's caches; on a GPU it is large enough to use it fully.
_BATCH_TOKENS = {"cpu": 512, "cuda": 65_536}
_BATCH_IMAGES = {"cpu": 8, "cuda": 256}


@dataclass(frozen=True)
class TextSettings:
    """Settings of a text encoder: at most `max_tokens` tokens per text; precision fp32, bf16 or int8."""

    max_tokens: int = 96
    precision: str = "fp32"


@dataclass(frozen=True)
class ImageSettings:
    """Settings of an image encoder: precision fp32 or bf16."""

    precision: str = "fp32"


@dataclass(frozen=True)
class TokenizedTexts:
    """Token `ids` of each text, with special tokens; `truncated` bool (B,): the text is cut to a prefix."""

    ids: list[list[int]]
    truncated: np.ndarray


@dataclass(frozen=True)
class EncodedTexts:
    """`vectors` float32 (B, D) of unit length; `truncated` bool (B,): only a prefix was encoded."""

    vectors: np.ndarray
    truncated: np.ndarray


def attention_implementation(device: str) -> str:
    """The fastest attention implementation of transformers for a device.

    On a CPU plain matrix products in bfloat16 took a third of the time of the fused kernel.
    """
    return "eager" if device == "cpu" else "sdpa"


def write_settings(directory: Path, settings: TextSettings | ImageSettings) -> None:
    """Write an encoder's settings next to its weights."""
    (directory / _SETTINGS_FILE).write_text(json.dumps(asdict(settings), indent=2) + "\n")


def write_head(directory: Path, weight: np.ndarray) -> None:
    """Write a projection, float32 (D, D), next to an encoder's weights."""
    np.save(directory / _HEAD_FILE, weight.astype(np.float32))


def _read_head(directory: Path, device: str) -> torch.Tensor | None:
    path = directory / _HEAD_FILE
    return torch.from_numpy(np.load(path)).to(device) if path.is_file() else None


def _read_settings(directory: Path, kind: type[S]) -> S:
    document: dict[str, Any] = json.loads((directory / _SETTINGS_FILE).read_text())
    # Older bundles also have a batch size, which the server now chooses.
    return kind(**{field.name: document[field.name] for field in fields(kind) if field.name in document})


def is_int8(directory: Path) -> bool:
    """Whether a text encoder has precision int8."""
    return _read_settings(directory, TextSettings).precision == _INT8


def digest(directory: Path) -> str:
    """The identity of an encoder: BLAKE2b over the names and contents of its files, as 32 hex digits."""
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        state.update(f"{path.relative_to(directory).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    return state.hexdigest()


class TextEncoder:
    """Mean of a BERT's last hidden states over real tokens, scaled to unit length (Sentence-BERT, 2019).

    Any thread may call it, but only one at a time may call `encode`, and on a GPU `run` and `start`. The best
    batch size is `budget` padded tokens.

    Raises:
        FailedPrecondition: the precision is int8 and the device is not a CPU, or this version does not know
            the precision.
    """

    def __init__(self, directory: Path, device: str = "cpu", budget: int = 0) -> None:
        self.settings = _read_settings(directory, TextSettings)
        in_int8 = self.settings.precision == _INT8
        if in_int8 and is_gpu(device):
            raise FailedPrecondition(
                f"{directory} has precision int8, which runs on CPUs only: use the device cpu, "
                "or train without that precision"
            )
        self.digest = digest(directory)
        self.device = device
        self.budget = budget or _BATCH_TOKENS[torch.device(device).type]
        tokenizer = AutoTokenizer.from_pretrained(directory)
        self._pad = int(tokenizer.pad_token_id)
        # transformers' own calls change the tokenizer's settings back and forth: no two threads could.
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._network = Int8Model(directory) if in_int8 else self._torch(directory)
        self._head = _read_head(directory, device)
        self.dimension = int(AutoConfig.from_pretrained(directory).hidden_size)

    @property
    def overlaps(self) -> bool:
        """Whether `start` returns before the vectors are computed."""
        return is_gpu(self.device)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Vectors of `texts`, in their order."""
        tokens = self.tokenize(texts)
        vectors = np.empty((len(texts), self.dimension), np.float32)
        batches = batches_by_length(np.array([len(ids) for ids in tokens.ids], np.int64), self.budget)
        inputs = ([tokens.ids[row] for row in batch] for batch in batches)
        outputs = map_batches(self.run, inputs, self.device)
        for batch, output in zip(batches, outputs, strict=True):
            vectors[batch] = output
        return EncodedTexts(vectors, tokens.truncated)

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """The input of `run` for each text."""
        limit = self.settings.max_tokens
        # A token has at least one character. Cutting the text first avoids tokenizing megabytes.
        max_characters = limit * 32
        rows = [e.ids for e in self._tokenizer.encode_batch_fast([text[:max_characters] for text in texts])]
        truncated = [
            len(ids) > limit or len(text) > max_characters for ids, text in zip(rows, texts, strict=True)
        ]
        # The closing special token stays.
        ids = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows]
        return TokenizedTexts(ids, np.array(truncated, bool))

    def run(self, ids: Sequence[list[int]]) -> np.ndarray:
        """Vectors float32 (B, D) of one batch."""
        return self.start(ids)()

    @torch.inference_mode()
    def start(self, ids: Sequence[list[int]]) -> PendingArray:
        """Start computing one batch; the result waits for the vectors."""
        tokens, attention_mask = self.pad(ids)
        if isinstance(self._network, Int8Model):
            return _unit(torch.from_numpy(self._network(tokens, attention_mask)), self._head)
        mask = to_device(attention_mask, self.device)
        model_mask: torch.Tensor | None = mask
        if self.overlaps:
            # For a 2-d mask transformers checks on the GPU whether it is all ones, and waits for the result.
            model_mask = None if attention_mask.all() else mask[:, None, None, :].bool()
        hidden = self._network(
            input_ids=to_device(tokens, self.device), attention_mask=model_mask
        ).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        return _unit((hidden.float() * weights).sum(1) / weights.sum(1), self._head)

    def pad(self, ids: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens padded to one length, and the attention mask (0 for padding); both int64 (B, T)."""
        lengths = np.array([len(row) for row in ids])
        tokens = np.full((len(ids), lengths.max()), self._pad, np.int64)
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        tokens[mask] = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
        return tokens, mask.astype(np.int64)

    def _torch(self, directory: Path) -> torch.nn.Module:
        name, device = self.settings.precision, self.device
        if name not in _PRECISIONS:
            raise FailedPrecondition(f"{directory} has precision {name!r}, which this version does not know")
        precision = _PRECISIONS[name]
        model = AutoModel.from_pretrained(
            directory, dtype=precision, attn_implementation=attention_implementation(device)
        )
        network: torch.nn.Module = model.to(device).eval()
        return network


class ImageEncoder:
    """An open_clip model: images and texts in one space, scaled to unit length (CLIP, 2021).

    `preprocess` converts an image to the model's input; `side` is the input's side in pixels.
    Any thread may call it, but only one at a time may call `encode` and `encode_texts`, and on a GPU every
    method except `pixels` and `tokenize`. The best batch size is `budget` images.
    """

    def __init__(self, directory: Path, device: str = "cpu", budget: int = 0) -> None:
        # Imported here, because a shop without images does not need their memory.
        import open_clip  # noqa: PLC0415
        from open_clip.transform import MaybeConvertMode  # noqa: PLC0415
        from torchvision.transforms import Compose, ToTensor  # type: ignore[import-untyped]  # noqa: PLC0415

        self.settings = _read_settings(directory, ImageSettings)
        self.digest = digest(directory)
        self.budget = budget or _BATCH_IMAGES[torch.device(device).type]
        self.device = device
        name = f"local-dir:{directory}"
        self._model, _, self.preprocess = open_clip.create_model_and_transforms(
            name, device=device, precision=self.settings.precision, **_text_tower(directory)
        )
        self._model.eval()
        if hasattr(self._model.visual, "trunk") and not is_gpu(device):
            # Convolutions of a CPU take two thirds of the time then, and pixels come in this order.
            self._model.visual.to(memory_format=torch.channels_last)
        self._head = _read_head(directory, device)
        self._tokenize = open_clip.get_tokenizer(name)
        text_tower: Any = getattr(self._model, "text", None)
        self._pad = text_tower.config.pad_token_id if hasattr(text_tower, "config") else None
        size = self._model.visual.image_size
        self.side = int(size if isinstance(size, int) else size[0])  # an int for open_clip's ResNets
        *fit, normalize = self.preprocess.transforms
        steps = [step for step in fit if not isinstance(step, ToTensor | MaybeConvertMode)]
        self._fit, self._fit_fast = Compose(steps), _by_torch(steps)
        self._mean, self._deviation = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (normalize.mean, normalize.std)
        )
        self.dimension = int(self.encode_texts([""]).shape[-1])

    @property
    def overlaps(self) -> bool:
        """Whether `start` returns before the vectors are computed."""
        return is_gpu(self.device)

    def encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Vectors float32 (B, D) of RGB images, in their order."""
        starts = range(0, len(images), self.budget)
        batches = (images[start : start + self.budget] for start in starts)
        vectors = map_batches(lambda batch: self.run([self.pixels(p) for p in batch]), batches, self.device)
        return np.concatenate([np.empty((0, self.dimension), np.float32), *vectors])

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The input of `run` for an RGB image: uint8 (S, S, 3)."""
        if self._fit_fast is None:
            return np.asarray(self._fit(image))
        raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return np.ascontiguousarray(self._fit_fast(raw).permute(1, 2, 0).numpy())

    def pixels_on_gpu(self, files: Sequence[bytes]) -> list[torch.Tensor | None]:
        """Decode files in GPU memory to inputs of `run`, uint8 (3, S, S); None for other files."""
        if self._fit_fast is None or not self.overlaps:
            return [None] * len(files)
        with torch.inference_mode():
            return nvjpeg.decode_jpegs(files, self._fit_fast, self.device)

    def run(self, pixels: Sequence[np.ndarray | torch.Tensor]) -> np.ndarray:
        """Vectors float32 (B, D) of one batch."""
        return self.start(pixels)()

    @torch.inference_mode()
    def start(self, pixels: Sequence[np.ndarray | torch.Tensor]) -> PendingArray:
        """Start computing one batch; the result waits for the vectors."""
        host_rows = [row for row in pixels if isinstance(row, np.ndarray)]
        raw = torch.empty(0, 3, self.side, self.side, dtype=torch.uint8, device=self.device)
        if host_rows:
            stacked = host_buffer((len(host_rows), *host_rows[0].shape), torch.uint8, self.device)
            np.stack(host_rows, out=stacked.numpy())
            raw = stacked.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        if len(host_rows) < len(pixels):
            copies = iter(raw)
            raw = torch.stack([row if isinstance(row, torch.Tensor) else next(copies) for row in pixels])
        normalized = (raw.float() / 255 - self._mean) / self._deviation
        return _unit(
            self._model.encode_image(normalized.to(_PRECISIONS[self.settings.precision])), self._head
        )

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors float32 (B, D) of texts in the image space, each cut to the context length."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        batches = (texts[start : start + self.budget] for start in range(0, len(texts), self.budget))
        vectors = map_batches(lambda batch: self.start_texts(self.tokenize(batch))(), batches, self.device)
        return np.concatenate(list(vectors))

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The input of `start_texts` for each text: int64 (context length,)."""
        return list(self._tokenize(list(texts)).numpy())

    def _without_padding(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens int64 (B, T) up to the longest text, where the text tower is a BERT and takes any length."""
        if self._pad is None:
            return tokens
        longest = int(np.flatnonzero((tokens != self._pad).any(0)).max(initial=0)) + 1
        return np.asarray(tokens[:, :longest])

    @torch.inference_mode()
    def start_texts(self, tokens: Sequence[np.ndarray]) -> PendingArray:
        """Start computing vectors float32 (B, D) of one batch of texts."""
        return _unit(
            self._model.encode_text(to_device(self._without_padding(np.stack(tokens)), self.device)),
            self._head,
        )


def _text_tower(directory: Path) -> dict[str, Any]:
    """The `text_cfg` of an open_clip model whose text tower's configuration lies in the same directory."""
    text: dict[str, Any] = json.loads((directory / _CLIP_CONFIG_FILE).read_text())["model_cfg"]["text_cfg"]
    if text.get("hf_model_name") != THIS_DIRECTORY:
        return {}
    return {"text_cfg": {**text, "hf_model_name": str(directory), "hf_model_pretrained": False}}


def _by_torch(steps: Sequence[Any]) -> Any:
    """The same steps for tensors (3, H, W), or None: within two levels of Pillow, in a third of the time."""
    from torchvision.transforms import CenterCrop, Resize, v2  # noqa: PLC0415

    fast = [
        v2.Resize(step.size, step.interpolation, antialias=True)
        if isinstance(step, Resize)
        else v2.CenterCrop(step.size)
        for step in steps
        if isinstance(step, Resize | CenterCrop)
    ]
    return v2.Compose(fast) if len(fast) == len(steps) else None


def _unit(vectors: torch.Tensor, head: torch.Tensor | None) -> PendingArray:
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    if head is not None:
        unit = torch.nn.functional.normalize(unit @ head.T, dim=-1)
    return to_host(unit)


def batches_by_length(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Rows grouped by similar length: at most `budget` padded tokens per batch, unless it is a single row."""
    batches, batch = [], list[int]()
    for row in np.argsort(-lengths, kind="stable"):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            batches.append(np.array(batch))
            batch = []
        batch.append(int(row))
    return [*batches, np.array(batch)] if batch else batches
