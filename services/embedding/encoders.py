"""The two encoders: texts by a Hugging Face BERT, photographs by an open_clip model.

An encoder is a directory: the text encoder as `save_pretrained` writes it, the image
encoder as open_clip's `local-dir:` reads it, each with an `encoder.json` beside and, where
one was fitted, a `head.npy`: a projection (D, D) of what the model gives. Its digest covers
every file, the precision included, because vectors belong to a digest.
Knows nothing of items, storage or transport.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import open_clip
import torch
from open_clip.transform import MaybeConvertMode
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor, v2  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoModel, AutoTokenizer

from services.embedding import jpegs
from services.embedding.devices import Running, brought, is_gpu, room, sent, side_by_side
from services.embedding.eight_bits import EightBits
from services.errors import FailedPrecondition

_SETTINGS_FILE = "encoder.json"
_HEAD_FILE = "head.npy"
S = TypeVar("S", "TextSettings", "ImageSettings")
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_INT8 = "int8"

# For a core's caches, which large batches leave; large enough to fill a GPU.
_BATCH_TOKENS = {"cpu": 512, "cuda": 65_536}
_BATCH_PICTURES = {"cpu": 8, "cuda": 256}


@dataclass(frozen=True)
class TextSettings:
    """How a text encoder reads, at most `max_tokens` tokens a text, and computes: fp32, bf16 or int8."""

    max_tokens: int = 96
    precision: str = "fp32"


@dataclass(frozen=True)
class ImageSettings:
    """How an image encoder computes."""

    precision: str = "fp32"


@dataclass(frozen=True)
class Tokens:
    """`ids` of each text, special ones included; `truncated` bool (B,): only the beginning is there."""

    ids: list[list[int]]
    truncated: np.ndarray


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


def _read_settings(directory: Path, kind: type[S]) -> S:
    document: dict[str, Any] = json.loads((directory / _SETTINGS_FILE).read_text())
    # Older bundles also have the size of a batch, which is the server's to choose.
    return kind(**{field.name: document[field.name] for field in fields(kind) if field.name in document})


def in_eight_bits(directory: Path) -> bool:
    """Whether a text encoder is of precision int8."""
    return _read_settings(directory, TextSettings).precision == _INT8


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
    """Mean of a BERT's last hidden states over real tokens, scaled to unit length (Sentence-BERT, 2019).

    Any thread may call it, but `encode` one at a time, as on a GPU `run` and `begin`. A batch is best at
    `budget` padded tokens.

    Raises:
        FailedPrecondition: the precision is int8, which is for processors, and the device is none, or it is
            one that this version does not know.
    """

    def __init__(self, directory: Path, device: str = "cpu", budget: int = 0) -> None:
        self.settings = _read_settings(directory, TextSettings)
        in_int8 = self.settings.precision == _INT8
        if in_int8 and is_gpu(device):
            raise FailedPrecondition(
                f"{directory} is of precision int8, which is for processors: use the device cpu, "
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
        self._network = EightBits(directory) if in_int8 else self._torch(directory)
        self._head = _read_head(directory, device)
        self.dimension = int(AutoConfig.from_pretrained(directory).hidden_size)

    @property
    def overlaps(self) -> bool:
        """Whether `begin` returns before the vectors are there."""
        return is_gpu(self.device)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Vectors of `texts`, in their order."""
        tokens = self.tokenise(texts)
        vectors = np.empty((len(texts), self.dimension), np.float32)
        batches = _batches(np.array([len(ids) for ids in tokens.ids], np.int64), self.budget)
        given = ([tokens.ids[row] for row in batch] for batch in batches)
        for batch, found in zip(batches, side_by_side(self.run, given, self.device), strict=True):
            vectors[batch] = found
        return EncodedTexts(vectors, tokens.truncated)

    def tokenise(self, texts: Sequence[str]) -> Tokens:
        """What `run` reads of each text."""
        limit = self.settings.max_tokens
        # A token is a character at least, so nothing past this can be read: no megabytes are tokenised.
        reach = limit * 32
        rows = [e.ids for e in self._tokenizer.encode_batch_fast([text[:reach] for text in texts])]
        cut = [len(ids) > limit or len(text) > reach for ids, text in zip(rows, texts, strict=True)]
        # The closing special token stays.
        ids = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows]
        return Tokens(ids, np.array(cut, bool))

    def run(self, ids: Sequence[list[int]]) -> np.ndarray:
        """Vectors float32 (B, D) of one batch."""
        return self.begin(ids)()

    @torch.inference_mode()
    def begin(self, ids: Sequence[list[int]]) -> Running:
        """The same under way."""
        tokens, real = self.padded(ids)
        if isinstance(self._network, EightBits):
            return _unit(torch.from_numpy(self._network(tokens, real)), self._head)
        mask = sent(real, self.device)
        seen: torch.Tensor | None = mask
        if self.overlaps:
            # Of a mask of two dimensions transformers asks the GPU whether all is real, and waits for it.
            seen = None if real.all() else mask[:, None, None, :].bool()
        hidden = self._network(input_ids=sent(tokens, self.device), attention_mask=seen).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        return _unit((hidden.float() * weights).sum(1) / weights.sum(1), self._head)

    def padded(self, ids: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of texts in rows of one length, and which are real, 1 or 0; both int64 (B, T)."""
        lengths = np.array([len(row) for row in ids])
        tokens = np.full((len(ids), lengths.max()), self._pad, np.int64)
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        tokens[real] = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
        return tokens, real.astype(np.int64)

    def _torch(self, directory: Path) -> torch.nn.Module:
        name, device = self.settings.precision, self.device
        if name not in _PRECISIONS:
            raise FailedPrecondition(
                f"{directory} is of precision {name!r}, which this version does not know"
            )
        precision = _PRECISIONS[name]
        model = AutoModel.from_pretrained(directory, dtype=precision, attn_implementation=attention(device))
        network: torch.nn.Module = model.to(device).eval()
        return network


class ImageEncoder:
    """An open_clip model: pictures and texts in one space, scaled to unit length (CLIP, 2021).

    `preprocess` makes a picture what the model reads; `side` is the side it looks at, in pixels.
    Any thread may call it, but `encode` and `encode_texts` one at a time, as on a GPU all but `pixels` and
    `tokenise`. A batch is best at `budget` pictures.
    """

    def __init__(self, directory: Path, device: str = "cpu", budget: int = 0) -> None:
        self.settings = _read_settings(directory, ImageSettings)
        self.digest = digest(directory)
        self.budget = budget or _BATCH_PICTURES[torch.device(device).type]
        self.device = device
        name = f"local-dir:{directory}"
        self._model, _, self.preprocess = open_clip.create_model_and_transforms(
            name, device=device, precision=self.settings.precision
        )
        self._model.eval()
        self._head = _read_head(directory, device)
        self._tokenize = open_clip.get_tokenizer(name)
        size = self._model.visual.image_size
        self.side = int(size if isinstance(size, int) else size[0])  # open_clip's ResNets have one number
        *fit, normalize = self.preprocess.transforms
        steps = [step for step in fit if not isinstance(step, ToTensor | MaybeConvertMode)]
        self._fit, self._fit_fast = Compose(steps), _by_torch(steps)
        self._mean, self._deviation = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (normalize.mean, normalize.std)
        )
        self.dimension = int(self.encode_texts([""]).shape[-1])

    @property
    def overlaps(self) -> bool:
        """Whether `begin` returns before the vectors are there."""
        return is_gpu(self.device)

    def encode(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Vectors float32 (B, D) of RGB pictures, in their order."""
        starts = range(0, len(pictures), self.budget)
        given = (pictures[start : start + self.budget] for start in starts)
        found = side_by_side(lambda batch: self.run([self.pixels(p) for p in batch]), given, self.device)
        return np.concatenate([np.empty((0, self.dimension), np.float32), *found])

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """What `run` reads of an RGB picture: uint8 (S, S, 3)."""
        if self._fit_fast is None:
            return np.asarray(self._fit(picture))
        raw = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return np.ascontiguousarray(self._fit_fast(raw).permute(1, 2, 0).numpy())

    def pixels_there(self, files: Sequence[bytes]) -> list[torch.Tensor | None]:
        """The same of image files that a GPU decodes, uint8 (3, S, S) in its memory; None for the others."""
        if self._fit_fast is None or not self.overlaps:
            return [None] * len(files)
        with torch.inference_mode():
            return jpegs.decoded(files, self._fit_fast, self.device)

    def run(self, pixels: Sequence[np.ndarray | torch.Tensor]) -> np.ndarray:
        """Vectors float32 (B, D) of one batch."""
        return self.begin(pixels)()

    @torch.inference_mode()
    def begin(self, pixels: Sequence[np.ndarray | torch.Tensor]) -> Running:
        """The same under way."""
        here = [seen for seen in pixels if isinstance(seen, np.ndarray)]
        raw = torch.empty(0, 3, self.side, self.side, dtype=torch.uint8, device=self.device)
        if here:
            stacked = room((len(here), *here[0].shape), torch.uint8, self.device)
            np.stack(here, out=stacked.numpy())
            raw = stacked.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        if len(here) < len(pixels):
            sent_rows = iter(raw)
            raw = torch.stack(
                [seen if isinstance(seen, torch.Tensor) else next(sent_rows) for seen in pixels]
            )
        seen = (raw.float() / 255 - self._mean) / self._deviation
        return _unit(self._model.encode_image(seen.to(_PRECISIONS[self.settings.precision])), self._head)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors float32 (B, D) of texts in the space of pictures; the model reads its context length."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        given = (texts[start : start + self.budget] for start in range(0, len(texts), self.budget))
        found = side_by_side(lambda batch: self.begin_texts(self.tokenise(batch))(), given, self.device)
        return np.concatenate(list(found))

    def tokenise(self, texts: Sequence[str]) -> list[np.ndarray]:
        """What `begin_texts` reads of each text: int64 (context length,)."""
        return list(self._tokenize(list(texts)).numpy())

    @torch.inference_mode()
    def begin_texts(self, tokens: Sequence[np.ndarray]) -> Running:
        """Vectors float32 (B, D) of one batch of texts, under way."""
        return _unit(self._model.encode_text(sent(np.stack(tokens), self.device)), self._head)


def _by_torch(steps: Sequence[Any]) -> v2.Compose | None:
    """The same of bytes (3, H, W), where torch can: to two levels of Pillow's, in a third of its time."""
    same = [
        v2.Resize(step.size, step.interpolation, antialias=True)
        if isinstance(step, Resize)
        else v2.CenterCrop(step.size)
        for step in steps
        if isinstance(step, Resize | CenterCrop)
    ]
    return v2.Compose(same) if len(same) == len(steps) else None


def _unit(vectors: torch.Tensor, head: torch.Tensor | None) -> Running:
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    if head is not None:
        unit = torch.nn.functional.normalize(unit @ head.T, dim=-1)
    return brought(unit)


def _batches(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Rows in batches of like length, none with more than `budget` padded tokens unless it is one row."""
    batches, batch = [], list[int]()
    for row in np.argsort(-lengths, kind="stable"):
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            batches.append(np.array(batch))
            batch = []
        batch.append(int(row))
    return [*batches, np.array(batch)] if batch else batches
