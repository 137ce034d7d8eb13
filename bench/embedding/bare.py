"""The models alone, in a process of their own: what no service can be faster than.

    python -m bench.embedding.bare --text DIR --image DIR --given FILE [--device cuda]

FILE is an npz of texts and files. For each line read, "tokens BUDGET THREADS", "pixels BATCH THREADS",
"decode" or "loop", does that once over everything, or over a part for "try tokens BUDGET THREADS", and
prints the seconds it took. One of THREADS runs a batch at a time on all cores; else, as in the service, as
many as the device's models have each run batches of their own.
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

from services.embedding import images
from services.embedding.devices import Running, share_cores, side_by_side
from services.embedding.encoders import ImageEncoder, TextEncoder

_PLAIN_BATCH, _PIECE = 32, 64
_TRIED = 300
LOOPED = 200


class Bare:
    """Prepared inputs and the models they go through."""

    def __init__(self, text: Path, image: Path, device: str, texts: list[str], files: list[bytes]) -> None:
        self._text, self._image = TextEncoder(text, device), ImageEncoder(image, device)
        self._files, self._device = files, device
        self._tokens = sorted(self._text.tokenise(texts).ids, key=len)
        self._seen: list[Any] = []
        self.decode()

    def tokens(self, budget: int, threads: int, part: bool) -> None:
        """Texts through BERT, sorted by length, `budget` padded tokens a batch."""
        rows = self._tokens[:: max(1, len(self._tokens) // _TRIED)] if part else self._tokens
        start, batches = 0, []
        for end in range(1, len(rows) + 1):
            if end == len(rows) or len(rows[end]) * (end + 1 - start) > budget:
                batches.append(rows[start:end])
                start = end
        self._finish(self._text.begin, batches, threads)

    def pixels(self, batch: int, threads: int, part: bool) -> None:
        """Decoded photographs through CLIP."""
        rows = self._seen[: _TRIED // 4] if part else self._seen
        batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        self._finish(self._image.begin, batches, threads)

    def _finish(self, begin: Callable[[Any], Running], batches: list[Any], threads: int) -> None:
        if threads == 1:  # and of a GPU, which has all batches at once
            for wait in [begin(batch) for batch in batches]:
                wait()
            return
        for _ in side_by_side(lambda batch: begin(batch)(), batches, self._device):
            pass

    def decode(self) -> None:
        """Files into what CLIP reads, a thread for each core, by a GPU where it can."""
        encoder, seen = self._image, list[Any]()
        for start in range(0, len(self._files), _PIECE):
            seen += encoder.pixels_there(self._files[start : start + _PIECE])
        left = [row for row, pixels in enumerate(seen) if pixels is None]
        threads = os.cpu_count() or 1
        with ThreadPoolExecutor(threads, initializer=partial(share_cores, threads)) as pool:
            files = [self._files[row] for row in left]
            loaded = pool.map(lambda data: encoder.pixels(images.load(data, encoder.side)), files)
            for row, pixels in zip(left, loaded, strict=True):
                seen[row] = pixels
        self._seen = seen
        if self._device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def loop(self) -> None:
        """What open_clip's examples do, on the first files: open, preprocess, stack, encode."""
        files = self._files[:LOOPED]
        for start in range(0, len(files), _PLAIN_BATCH):
            some = files[start : start + _PLAIN_BATCH]
            pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in some]
            batch = torch.stack([self._image.preprocess(picture) for picture in pictures]).to(self._device)
            if self._image.settings.precision == "bf16":
                batch = batch.bfloat16()
            self._image._model.encode_image(batch, normalize=True).cpu()


def main() -> None:
    """Do what is asked, line by line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("text", "image", "given"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with np.load(options.given, allow_pickle=True) as given:
        rows = (given[name].tolist() for name in ("texts", "files"))
        bare = Bare(options.text, options.image, options.device, *rows)
    for line in sys.stdin:
        words = line.split()
        part = words[0] == "try" and options.device == "cpu"  # of a GPU a part would not be a batch
        what, *size = words[words[0] == "try" :]
        run: Callable[..., None] = getattr(bare, what)
        began = time.perf_counter()
        run(int(size[0]), int(size[1]), part) if size else run()
        print(time.perf_counter() - began, flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
