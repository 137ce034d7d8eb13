"""What a GPU does against what it could: encoders against its measured peak, scans against its bandwidth.

    python -m bench.gpu [--rows 1000000] [--json FILE]

Weights and vectors are drawn. The peak is the best of a few square matrix products in bfloat16, the bandwidth
that of adding up a large array. FAISS' indices take part where its GPU build is installed (faiss-gpu-cuvs).
Without a GPU nothing is measured; `--device cpu --rows 2000` runs the same code, at small batches, to try it.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import open_clip
import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel

from services.embedding.on_device import DeviceBuilder, DeviceSegment

_DIMENSION, _LIMIT = 384, 100
_BATCHES = (1, 16, 64, 256, 1024, 4096)
_SHARES = (0.5, 0.1, 0.01, 0.001)
_TOKENS = 64
_REPEATS = 5
Rows = list[dict[str, Any]]


def main() -> None:
    """Measure encoders and search, and print tables and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured")  # noqa: T201 - the answer
        return
    with torch.inference_mode():
        encoded = _encoders(options.device)
        searched = _searches(options.device, options.rows)
    _show("encoders, random weights, bfloat16", encoded)
    _show(f"the {_LIMIT} nearest of {options.rows} x {_DIMENSION}, float16", searched)
    if options.json:
        options.json.write_text(json.dumps({"encoders": encoded, "search": searched}, indent=1) + "\n")


def _seconds(run: Callable[[], Any], device: str) -> float:
    """The least of a few times of one run, after one that does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _encoders(device: str) -> Rows:
    small = device == "cpu"
    side = 256 if small else 8192
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    peak = 2 * side**3 / _seconds(lambda: square @ square, device)
    told: Rows = [{"what": f"product of {side} x {side}", "tflops": peak / 1e12}]
    bert: Any = BertModel(BertConfig(), add_pooling_layer=False)
    bert = bert.to(device, torch.bfloat16).eval()
    clip = open_clip.create_model("ViT-B-32", precision="bf16", device=device).eval()
    per_text = _flops(bert.encoder, _TOKENS, 768, 12)
    per_picture = _flops(clip.visual.transformer, 50, 768, 12)
    for batch in (2,) if small else (64, 256, 1024):
        tokens = torch.randint(1000, 20_000, (batch, _TOKENS), device=device)
        seconds = _seconds(partial(bert, tokens), device)
        told.append(_speed(f"BERT-base, {batch} texts of {_TOKENS} tokens", batch, seconds, per_text, peak))
    for batch in (2,) if small else (64, 256, 1024):
        pictures = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.bfloat16)
        seconds = _seconds(partial(clip.encode_image, pictures), device)
        told.append(_speed(f"ViT-B/32, {batch} photographs", batch, seconds, per_picture, peak))
    return told


def _flops(transformer: torch.nn.Module, length: int, width: int, layers: int) -> float:
    """Of one sequence: its products with the weights, and those of attention."""
    weights = sum(p.numel() for p in transformer.parameters() if p.dim() == 2)  # noqa: PLR2004 - matrices
    return 2.0 * weights * length + 4.0 * layers * length**2 * width


def _speed(what: str, batch: int, seconds: float, flops: float, peak: float) -> dict[str, Any]:
    done = batch * flops / seconds
    return {"what": what, "a_second": batch / seconds, "tflops": done / 1e12, "of_peak": done / peak}


def _searches(device: str, count: int) -> Rows:
    generator = torch.Generator(device).manual_seed(0)
    vectors = torch.randn(count, _DIMENSION, device=device, generator=generator)
    vectors = torch.nn.functional.normalize(vectors, dim=1).half()
    queries = torch.randn(max(_BATCHES), _DIMENSION, device=device, generator=generator)
    asked = torch.nn.functional.normalize(queries, dim=1).cpu().numpy()
    bandwidth = vectors.numel() * 2 / _seconds(lambda: vectors.sum(dtype=torch.float32), device)
    floor = vectors.numel() * 2 / bandwidth
    told: Rows = [{"what": "reading it once", "ms": 1000 * floor, "gb_a_second": bandwidth / 1e9}]
    segment = DeviceBuilder(device)(np.arange(count, dtype=np.int64), vectors.cpu().numpy())
    exact = _exact(segment, asked[:64], None)
    for batch in _BATCHES[: 2 if device == "cpu" else None]:
        row = _timed(
            f"Vitrine, {batch} at once", partial(segment.search, asked[:batch], _LIMIT, None), device
        )
        told.append(
            row | {"to_floor": row["ms"] / 1000 / floor, "recall": _recall(segment, asked, None, exact)}
        )
    for share in _SHARES:
        live = np.random.default_rng(1).random(count) < share
        row = _timed(
            f"Vitrine, 1 at once, {share:.1%} qualify",
            partial(segment.search, asked[:1], _LIMIT, live),
            device,
        )
        found = segment.search(asked[:64], _LIMIT, live)[1]
        assert live[found].all()  # noqa: S101 - a benchmark of wrong answers is none
        told.append(row | {"recall": _recall(segment, asked, live, _exact(segment, asked[:64], live))})
    if device != "cpu" and hasattr(faiss, "StandardGpuResources"):
        told += _faiss(vectors.float().cpu().numpy(), asked, exact, device)
    return told


def _exact(segment: DeviceSegment, queries: np.ndarray, live: np.ndarray | None) -> np.ndarray:
    """The nearest rows (Q, K) by float32 products."""
    scores = torch.from_numpy(queries).to(segment.values.device) @ segment.values.float().T
    if live is not None:
        scores[:, torch.from_numpy(~live).to(scores.device)] = -torch.inf
    count = _LIMIT if live is None else min(_LIMIT, int(live.sum()))
    found: np.ndarray = scores.topk(count).indices.cpu().numpy()
    return found


def _recall(segment: DeviceSegment, asked: np.ndarray, live: np.ndarray | None, exact: np.ndarray) -> float:
    found = segment.search(asked[: len(exact)], _LIMIT, live)[1]
    return float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]))


def _timed(what: str, run: Callable[[], Any], device: str) -> dict[str, Any]:
    return {"what": what, "ms": 1000 * _seconds(run, device)}


def _faiss(vectors: np.ndarray, asked: np.ndarray, exact: np.ndarray, device: str) -> Rows:
    """FAISS' own indices on the GPU at the same batches."""
    gpu: Any = faiss  # the type stubs are of the build without a GPU
    resources = gpu.StandardGpuResources()
    flat = gpu.GpuIndexFlatConfig()
    flat.useFloat16 = True
    indices = {"flat": gpu.GpuIndexFlatIP(resources, _DIMENSION, flat)}
    lists = int(4 * len(vectors) ** 0.5)
    indices["IVF, 64 lists"] = gpu.GpuIndexIVFFlat(
        resources, _DIMENSION, lists, gpu.METRIC_INNER_PRODUCT, gpu.GpuIndexIVFFlatConfig()
    )
    if hasattr(gpu, "GpuIndexCagra"):
        indices["CAGRA"] = gpu.GpuIndexCagra(
            resources, _DIMENSION, gpu.METRIC_INNER_PRODUCT, gpu.GpuIndexCagraConfig()
        )
    told: Rows = []
    for name, index in indices.items():
        began = time.perf_counter()
        index.train(vectors)
        if name != "CAGRA":  # which is built by training
            index.add(vectors)
        built = time.perf_counter() - began
        if hasattr(index, "nprobe"):
            index.nprobe = 64
        found = index.search(asked[: len(exact)], _LIMIT)[1]
        recall = float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]))
        for batch in _BATCHES:
            search = partial(index.search, asked[:batch], _LIMIT)
            row = _timed(f"FAISS {name}, {batch} at once", search, device)
            told.append(row | {"recall": recall, "build_s": built})
    return told


def _show(title: str, rows: Rows) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        values = (row.get(column, "") for column in columns)
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
