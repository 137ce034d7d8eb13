"""The models alone, in their own process: the upper bound of a service's speed.

    python -m bench.embedding.bare --text DIR --image DIR --inputs FILE [--device cuda]

FILE is an npz of texts and files. Each line of input is "tokens BUDGET THREADS", "pixels BATCH THREADS",
"decode" or "loop". The command runs once over all inputs, or over a part for "try tokens BUDGET THREADS", and
prints its seconds. With one thread, one batch at a time runs on all cores; else, as in the service, as many
batches run in parallel as the device has models.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from services.embedding.encoders.encoders import ImageEncoder, TextEncoder
from services.embedding.images import decoder
from services.embedding.runtime.devices import PendingArray, map_batches, share_cores

_PLAIN_BATCH, _PIECE = 32, 64
_TRIAL_ROWS = 300
LOOPED = 200


class Bare:
    """Prepared inputs and their models."""

    def __init__(self, text: Path, image: Path, device: str, texts: list[str], files: list[bytes]) -> None:
        self._text, self._image = TextEncoder(text, device), ImageEncoder(image, device)
        self._files, self._device = files, device
        self._tokens = sorted(self._text.tokenize(texts).ids, key=len)
        self._pixels: list[Any] = []
        self.decode()

    def tokens(self, budget: int, threads: int, part: bool) -> None:
        """Texts through BERT, sorted by length, with `budget` padded tokens a batch."""
        rows = self._tokens[:: max(1, len(self._tokens) // _TRIAL_ROWS)] if part else self._tokens
        start, batches = 0, []
        for end in range(1, len(rows) + 1):
            if end == len(rows) or len(rows[end]) * (end + 1 - start) > budget:
                batches.append(rows[start:end])
                start = end
        self._finish(self._text.start, batches, threads)

    def pixels(self, batch: int, threads: int, part: bool) -> None:
        """Decoded images through CLIP."""
        rows = self._pixels[: _TRIAL_ROWS // 4] if part else self._pixels
        batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        self._finish(self._image.start, batches, threads)

    def _finish(self, start: Callable[[Any], PendingArray], batches: list[Any], threads: int) -> None:
        if threads == 1:  # also on a GPU, which gets all batches at once
            for wait in [start(batch) for batch in batches]:
                wait()
            return
        for _ in map_batches(lambda batch: start(batch)(), batches, self._device):
            pass

    def decode(self) -> None:
        """Decode files into CLIP's input, with a thread per core, on a GPU if it can."""
        encoder, decoded = self._image, list[Any]()
        for start in range(0, len(self._files), _PIECE):
            decoded += encoder.pixels_on_gpu(self._files[start : start + _PIECE])
        missing = [row for row, pixels in enumerate(decoded) if pixels is None]
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads, initializer=partial(share_cores, threads)) as pool:
            files = [self._files[row] for row in missing]
            loaded = pool.map(lambda data: encoder.pixels(decoder.load(data, encoder.side)), files)
            for row, pixels in zip(missing, loaded, strict=True):
                decoded[row] = pixels
        self._pixels = decoded
        if self._device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def loop(self) -> None:
        """The loop of open_clip's examples on the first files: open, preprocess, stack, encode."""
        files = self._files[:LOOPED]
        for start in range(0, len(files), _PLAIN_BATCH):
            batch_files = files[start : start + _PLAIN_BATCH]
            pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in batch_files]
            batch = torch.stack([self._image.preprocess(picture) for picture in pictures]).to(self._device)
            if self._image.settings.precision == "bf16":
                batch = batch.bfloat16()
            self._image._model.encode_image(batch, normalize=True).cpu()


def main() -> None:
    """Run the commands of the input, line by line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("text", "image", "inputs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with np.load(options.inputs, allow_pickle=True) as inputs:
        rows = (inputs[name].tolist() for name in ("texts", "files"))
        bare = Bare(options.text, options.image, options.device, *rows)
    for line in sys.stdin:
        words = line.split()
        part = words[0] == "try" and options.device == "cpu"  # on a GPU a part is smaller than a batch
        action, *size = words[words[0] == "try" :]
        run: Callable[..., None] = getattr(bare, action)
        start = time.perf_counter()
        run(int(size[0]), int(size[1]), part) if size else run()
        print(time.perf_counter() - start, flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
