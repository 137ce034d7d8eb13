"""What a GPU does against what it could: encoders against its measured peak, scans against its bandwidth.

    python -m bench.gpu [--rows 1000000] [--parts encoders,photographs,search,faiss] [--compile] [--json FILE]

Weights and photographs are drawn, and vectors as for bench.index. The peak is the best of a few square matrix
products in bfloat16, the bandwidth that of adding up a large array. FAISS' indices take part where its GPU
build is installed (faiss-gpu-cuvs). Without a GPU nothing is measured; `--device cpu --rows 2000` runs the
same code, at small batches, to try it.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import open_clip
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.io import decode_jpeg  # type: ignore[import-untyped]
from torchvision.transforms.v2 import InterpolationMode, functional  # type: ignore[import-untyped]
from transformers import BertConfig, BertModel

from services.embedding import images, jpegs
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
    parser.add_argument("--parts", default="encoders,photographs,search,faiss")
    parser.add_argument("--compile", action="store_true", help="BERT by torch.compile as well: a minute more")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured")  # noqa: T201 - the answer
        return
    device, rows, found = options.device, options.rows, {}
    runs: dict[str, tuple[str, Callable[[], Rows]]] = {
        "encoders": (
            "encoders, random weights, bfloat16",
            lambda: _encoders(device, compiled=options.compile),
        ),
        "photographs": ("JPEG files into what ViT-B/32 reads", lambda: _photographs(device)),
        "search": (
            f"the {_LIMIT} nearest of {rows} x {_DIMENSION}, float16",
            lambda: _searches(device, rows),
        ),
        "faiss": (f"FAISS, the {_LIMIT} nearest of {rows} x {_DIMENSION}", lambda: _faiss(device, rows)),
    }
    for name in options.parts.split(","):
        title, run = runs[name]
        with torch.inference_mode():
            found[name] = run()
        _show(title, found[name])
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


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


def _encoders(device: str, *, compiled: bool) -> Rows:
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
    ways = {"": bert}
    if compiled:
        ways[", compiled"] = torch.compile(bert, dynamic=True)
    for batch in (2,) if small else (1, 64, 256, 1024):
        tokens = torch.randint(1000, 20_000, (batch, _TOKENS), device=device)
        for way, model in ways.items():
            seconds = _seconds(partial(model, tokens), device)
            what = f"BERT-base{way}, {batch} texts of {_TOKENS} tokens"
            told.append(_speed(what, batch, seconds, per_text, peak))
    for batch in (2,) if small else (1, 64, 256, 1024):
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


def _photographs(device: str) -> Rows:
    """Threads that decode and resize, against nvJPEG and resizing on the GPU."""
    random, told = np.random.default_rng(0), Rows()
    for side, count in ((400, 4), (1000, 4)) if device == "cpu" else ((400, 512), (1000, 256), (2000, 64)):
        files = []
        for _ in range(min(count, 16)):
            drawn = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
            file = io.BytesIO()
            drawn.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
            files.append(file.getvalue())
        files *= count // len(files)
        name = f"{count} of {side} x {side}"
        for threads in sorted({2, 4, os.cpu_count() or 1}):
            with ThreadPoolExecutor(threads) as pool:

                def decode(files: list[bytes] = files, pool: ThreadPoolExecutor = pool) -> list[torch.Tensor]:
                    return list(pool.map(_resized, files))

                told.append(
                    {"what": f"{name}, {threads} threads", "a_second": count / _seconds(decode, device)}
                )
        raw = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        seconds = _seconds(partial(decode_jpeg, raw, device=device), device)
        told.append({"what": f"{name}, torchvision's decode_jpeg alone", "a_second": count / seconds})
        seconds = _seconds(partial(jpegs.decoded, files, _fitted, device), device)
        told.append({"what": f"{name}, as Vitrine decodes there", "a_second": count / seconds})
    return told


def _resized(file: bytes) -> torch.Tensor:
    return _fitted(torch.from_numpy(np.array(images.load(file, 224))).permute(2, 0, 1))


def _fitted(picture: torch.Tensor) -> torch.Tensor:
    seen: torch.Tensor = functional.resize(picture, [224], InterpolationMode.BICUBIC, antialias=True)
    return seen


def _drawn(device: str, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Vectors float16 (count, D) there and queries float32 (4096, D) here, of the recipe of bench.index."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator)
    centres, mixing = draw(2000, 32), draw(32, _DIMENSION) / 32**0.5
    most = max(_BATCHES)
    rows = torch.empty(count + most, _DIMENSION, dtype=torch.float16, device=device)
    for start in range(0, len(rows), 100_000):
        some = rows[start : start + 100_000]
        which = torch.randint(len(centres), (len(some),), device=device, generator=generator)
        factors = centres[which] + 0.5 * draw(len(some), 32)
        drawn = factors @ mixing + 0.02 * draw(len(some), _DIMENSION)
        some.copy_(torch.nn.functional.normalize(drawn, dim=1))
    return rows[most:], rows[:most].float().cpu().numpy()


def _searches(device: str, count: int) -> Rows:
    vectors, asked = _drawn(device, count)
    bandwidth = vectors.numel() * 2 / _seconds(lambda: vectors.sum(dtype=torch.float32), device)
    floor = vectors.numel() * 2 / bandwidth
    told: Rows = [{"what": "reading it once", "ms": 1000 * floor, "gb_a_second": bandwidth / 1e9}]
    here, began = vectors.cpu().numpy(), time.perf_counter()
    segment = DeviceBuilder(device)(np.arange(count, dtype=np.int64), here)
    told[0]["build_s"] = time.perf_counter() - began
    exact = _exact(vectors, asked[:64], None)
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
        told.append(row | {"recall": _recall(segment, asked, live, _exact(vectors, asked[:64], live))})
    return told


def _exact(vectors: torch.Tensor, queries: np.ndarray, live: np.ndarray | None) -> np.ndarray:
    """The nearest rows (Q, K) by float32 products."""
    scores = torch.from_numpy(queries).to(vectors.device) @ vectors.float().T
    if live is not None:
        scores[:, torch.from_numpy(~live).to(scores.device)] = -torch.inf
    count = _LIMIT if live is None else min(_LIMIT, int(live.sum()))
    found: np.ndarray = scores.topk(count).indices.cpu().numpy()
    return found


def _recall(segment: DeviceSegment, asked: np.ndarray, live: np.ndarray | None, exact: np.ndarray) -> float:
    found = segment.search(asked[: len(exact)], _LIMIT, live)[1]
    return _share_of(exact, found)


def _timed(what: str, run: Callable[[], Any], device: str) -> dict[str, Any]:
    return {"what": what, "ms": 1000 * _seconds(run, device)}


def _faiss(device: str, count: int) -> Rows:
    """FAISS' own indices on the GPU, cuVS' where it has them, asked for all rows and for some."""
    gpu: Any = faiss  # the type stubs are of the build without a GPU
    if not hasattr(gpu, "StandardGpuResources"):
        return [{"what": "FAISS' build for GPUs is not installed"}]
    there, asked = _drawn(device, count)
    exact, vectors = _exact(there, asked[:64], None), there.float().cpu().numpy()
    lives = {share: np.random.default_rng(1).random(count) < share for share in _SHARES}
    wanted = {share: _exact(there, asked[:64], live) for share, live in lives.items()}
    told: Rows = []
    for name, make, parameters in _kinds(gpu, gpu.StandardGpuResources(), count):
        try:
            began = time.perf_counter()
            index = make()
            index.train(vectors)
            if not index.ntotal:  # CAGRA is built by training
                index.add(vectors)
            built = time.perf_counter() - began
            for batch in _BATCHES:
                search = partial(index.search, asked[:batch], _LIMIT, params=parameters())
                row = _timed(f"FAISS {name}, {batch} at once", search, device)
                found = search()[1][:64]
                told.append(row | {"recall": _share_of(exact[: len(found)], found), "build_s": built})
            for share, live in lives.items():
                selector = gpu.IDSelectorBitmap(np.packbits(live, bitorder="little"))
                search = partial(index.search, asked[:1], _LIMIT, params=parameters(sel=selector))
                row = _timed(f"FAISS {name}, 1 at once, {share:.1%} qualify", search, device)
                found = index.search(asked[:64], _LIMIT, params=parameters(sel=selector))[1]
                obeyed = bool(live[found[found >= 0]].all())
                told.append(row | {"recall": _share_of(wanted[share], found), "obeyed": str(obeyed)})
        except RuntimeError as error:  # one kind's refusal is a finding, not the end
            told.append({"what": f"FAISS {name}: {str(error).splitlines()[0][-100:]}"})
    return told


def _kinds(gpu: Any, resources: Any, count: int) -> list[tuple[str, Callable[[], Any], Callable[..., Any]]]:
    """Name, maker, and maker of what a search is told."""
    product, lists = gpu.METRIC_INNER_PRODUCT, int(4 * count**0.5)

    def flat(*, cuvs: bool) -> Any:
        config = gpu.GpuIndexFlatConfig()
        config.useFloat16, config.use_cuvs = True, cuvs
        return gpu.GpuIndexFlatIP(resources, _DIMENSION, config)

    def inverted() -> Any:
        config = gpu.GpuIndexIVFFlatConfig()
        config.use_cuvs = True
        return gpu.GpuIndexIVFFlat(resources, _DIMENSION, lists, product, config)

    def graph() -> Any:
        config = gpu.GpuIndexCagraConfig()
        config.graph_degree, config.intermediate_graph_degree = 64, 128
        config.build_algo = gpu.graph_build_algo_NN_DESCENT
        return gpu.GpuIndexCagra(resources, _DIMENSION, product, config)

    kinds: list[tuple[str, Callable[[], Any], Callable[..., Any]]] = [
        ("flat", partial(flat, cuvs=False), gpu.SearchParameters),
        ("flat by cuVS", partial(flat, cuvs=True), gpu.SearchParameters),
        ("IVF by cuVS, 64 lists", inverted, partial(gpu.SearchParametersIVF, nprobe=64)),
    ]
    for width in (128, 512):
        kinds.append((f"CAGRA, {width} kept", graph, partial(gpu.SearchParametersCagra, itopk_size=width)))
    return kinds


def _share_of(exact: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)]))


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
