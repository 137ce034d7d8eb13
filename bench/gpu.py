"""GPU efficiency: encoders relative to the measured peak, scans relative to the memory bandwidth.

    python -m bench.gpu [--rows 1000000] [--parts encoders,images,search,faiss] [--compile] [--json FILE]
    python -m bench.gpu --parts suite,encoders,indexes --minutes 7 --json FILE          # for a day with a GPU

Weights and images are random; vectors are those of bench.index. The peak is the best of a few square matrix
products in bfloat16; the bandwidth is that of summing a large array. FAISS indices are measured if its GPU
build (faiss-gpu-cuvs) is installed. Without a GPU nothing is measured; `--device cpu` with small `--rows` and
`--sizes` runs the same code with small batches as a test.

`suite` runs the contract suite of the indexes there. `indexes` compares what the services search with, at
each of the `--sizes` (`bench/index/on_gpu.py`). No step starts after `--minutes`, and no build that should
end later; the slowest, CAGRA at the largest size, is the last. The JSON is written after each row.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
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

from bench.index.on_gpu import (
    DIMENSION,
    LIMIT,
    Deadline,
    Rows,
    compare,
    exact_nearest,
    random_vectors,
    recall_of,
)
from bench.runs import ROOT
from services.embedding.images import decoder, nvjpeg
from services.embedding.index.gpu_flat import GpuBuilder, GpuSegment

_BATCHES = (1, 16, 64, 256, 1024, 4096)
_SHARES = (0.5, 0.1, 0.01, 0.001)
_TOKENS = 64
_REPEATS = 5
_SUITE_SECONDS = 150


def main() -> None:
    """Measure encoders and search, and print tables and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default="encoders,images,search,faiss")
    parser.add_argument("--compile", action="store_true", help="BERT by torch.compile as well: a minute more")
    parser.add_argument("--sizes", default="100000,1000000,10000000", help="of the part indexes")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("this machine has no GPU: nothing is measured")  # noqa: T201 - the answer
        return
    device, rows = options.device, options.rows
    deadline = Deadline(time.monotonic() + 60 * options.minutes)
    sizes = [int(size) for size in options.sizes.split(",")]
    runs: dict[str, tuple[str, Callable[[], Iterable[dict[str, Any]]]]] = {
        "suite": ("tests of the indexes", _suite),
        "indexes": (
            f"queries per second for the {LIMIT} nearest of {DIMENSION} components",
            lambda: compare(device, sizes, deadline),
        ),
        "encoders": (
            "encoders, random weights, bfloat16",
            lambda: _encoders(device, compiled=options.compile),
        ),
        "images": ("JPEG files to inputs of ViT-B/32", lambda: _images(device)),
        "search": (
            f"the {LIMIT} nearest of {rows} x {DIMENSION}, float16",
            lambda: _searches(device, rows),
        ),
        "faiss": (f"FAISS, the {LIMIT} nearest of {rows} x {DIMENSION}", lambda: _faiss(device, rows)),
    }
    results: dict[str, Rows] = {}
    for name in options.parts.split(","):
        title, run = runs[name]
        results[name] = []
        with torch.inference_mode():
            for row in [] if deadline.passed() else run():
                results[name].append(row)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1) + "\n")
        _show(title, results[name])


def _suite() -> Rows:
    """Run the tests of the indexes that use a GPU where there is one."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not milvus and not faiss-cpu",
    ]
    tests = ("tests/integration/test_vector_index.py", "tests/unit/test_device_index.py")
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        result = run([*command, *tests], timeout=_SUITE_SECONDS)
    except subprocess.TimeoutExpired:
        return [{"what": f"not finished after {_SUITE_SECONDS} s"}]
    print(result.stdout[-3000:])  # noqa: T201 - the answer
    return [{"what": "exit status", "of": result.returncode, "seconds": time.perf_counter() - start}]


def _seconds(run: Callable[[], Any], device: str) -> float:
    """The shortest of a few runs, after a warm-up run."""
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _encoders(device: str, *, compiled: bool) -> Rows:
    small = device == "cpu"
    side = 256 if small else 8192
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    peak = 2 * side**3 / _seconds(lambda: square @ square, device)
    rows: Rows = [{"what": f"product of {side} x {side}", "tflops": peak / 1e12}]
    bert: Any = BertModel(BertConfig(), add_pooling_layer=False)
    bert = bert.to(device, torch.bfloat16).eval()
    clip = open_clip.create_model("ViT-B-32", precision="bf16", device=device).eval()
    per_text = _flops(bert.encoder, _TOKENS, 768, 12)
    per_image = _flops(clip.visual.transformer, 50, 768, 12)
    variants = {"": bert}
    if compiled:
        variants[", compiled"] = torch.compile(bert, dynamic=True)
    for batch in (2,) if small else (1, 64, 256, 1024):
        tokens = torch.randint(1000, 20_000, (batch, _TOKENS), device=device)
        for variant, model in variants.items():
            seconds = _seconds(partial(model, tokens), device)
            label = f"BERT-base{variant}, {batch} texts of {_TOKENS} tokens"
            rows.append(_speed(label, batch, seconds, per_text, peak))
    for batch in (2,) if small else (1, 64, 256, 1024):
        images = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.bfloat16)
        seconds = _seconds(partial(clip.encode_image, images), device)
        rows.append(_speed(f"ViT-B/32, {batch} images", batch, seconds, per_image, peak))
    return rows


def _flops(transformer: torch.nn.Module, length: int, width: int, layers: int) -> float:
    """The operations of one sequence: products with the weights, and attention."""
    weights = sum(p.numel() for p in transformer.parameters() if p.dim() == 2)  # noqa: PLR2004 - matrices
    return 2.0 * weights * length + 4.0 * layers * length**2 * width


def _speed(label: str, batch: int, seconds: float, flops: float, peak: float) -> dict[str, Any]:
    rate = batch * flops / seconds
    return {"what": label, "a_second": batch / seconds, "tflops": rate / 1e12, "of_peak": rate / peak}


def _images(device: str) -> Rows:
    """Decoding and resizing in CPU threads, compared with nvJPEG and resizing on the GPU."""
    random, rows = np.random.default_rng(0), Rows()
    for side, count in ((400, 4), (1000, 4)) if device == "cpu" else ((400, 512), (1000, 256), (2000, 64)):
        files = []
        for _ in range(min(count, 16)):
            image = Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8))
            file = io.BytesIO()
            image.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
            files.append(file.getvalue())
        files *= count // len(files)
        name = f"{count} of {side} x {side}"
        for threads in sorted({2, 4, os.cpu_count() or 1}):
            with ThreadPoolExecutor(threads) as pool:

                def decode(files: list[bytes] = files, pool: ThreadPoolExecutor = pool) -> list[torch.Tensor]:
                    return list(pool.map(_resized, files))

                rows.append(
                    {"what": f"{name}, {threads} threads", "a_second": count / _seconds(decode, device)}
                )
        raw = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        seconds = _seconds(partial(decode_jpeg, raw, device=device), device)
        rows.append({"what": f"{name}, torchvision's decode_jpeg alone", "a_second": count / seconds})
        seconds = _seconds(partial(nvjpeg.decode_jpegs, files, _fitted, device), device)
        rows.append({"what": f"{name}, as Vitrine decodes there", "a_second": count / seconds})
    return rows


def _resized(file: bytes) -> torch.Tensor:
    return _fitted(torch.from_numpy(np.array(decoder.load(file, 224))).permute(2, 0, 1))


def _fitted(image: torch.Tensor) -> torch.Tensor:
    resized: torch.Tensor = functional.resize(image, [224], InterpolationMode.BICUBIC, antialias=True)
    return resized


def _searches(device: str, count: int) -> Rows:
    vectors, queries = random_vectors(device, count)
    bandwidth = vectors.numel() * 2 / _seconds(lambda: vectors.sum(dtype=torch.float32), device)
    floor = vectors.numel() * 2 / bandwidth
    rows: Rows = [{"what": "reading it once", "ms": 1000 * floor, "gb_a_second": bandwidth / 1e9}]
    host_vectors, start = vectors.cpu().numpy(), time.perf_counter()
    segment = GpuBuilder(device)(np.arange(count, dtype=np.int64), host_vectors)
    rows[0]["build_s"] = time.perf_counter() - start
    exact = exact_nearest(vectors, queries[:64], None)
    for batch in _BATCHES[: 2 if device == "cpu" else None]:
        row = _timed(
            f"Vitrine, {batch} at once", partial(segment.search, queries[:batch], LIMIT, None), device
        )
        rows.append(
            row | {"to_floor": row["ms"] / 1000 / floor, "recall": _recall(segment, queries, None, exact)}
        )
    for share in _SHARES:
        live = np.random.default_rng(1).random(count) < share
        row = _timed(
            f"Vitrine, 1 at once, {share:.1%} qualify",
            partial(segment.search, queries[:1], LIMIT, live),
            device,
        )
        hits = segment.search(queries[:64], LIMIT, live)[1]
        assert live[hits].all()  # noqa: S101 - wrong answers would invalidate the benchmark
        rows.append(
            row | {"recall": _recall(segment, queries, live, exact_nearest(vectors, queries[:64], live))}
        )
    return rows


def _recall(segment: GpuSegment, queries: np.ndarray, live: np.ndarray | None, exact: np.ndarray) -> float:
    hits = segment.search(queries[: len(exact)], LIMIT, live)[1]
    return recall_of(exact, hits)


def _timed(label: str, run: Callable[[], Any], device: str) -> dict[str, Any]:
    return {"what": label, "ms": 1000 * _seconds(run, device)}


def _faiss(device: str, count: int) -> Rows:
    """FAISS indices on the GPU, with cuVS where available, searched over all rows and over some."""
    gpu: Any = faiss  # the type stubs describe the build without GPU
    if not hasattr(gpu, "StandardGpuResources"):
        return [{"what": "FAISS' build for GPUs is not installed"}]
    device_vectors, queries = random_vectors(device, count)
    exact, vectors = exact_nearest(device_vectors, queries[:64], None), device_vectors.float().cpu().numpy()
    lives = {share: np.random.default_rng(1).random(count) < share for share in _SHARES}
    exact_filtered = {
        share: exact_nearest(device_vectors, queries[:64], live) for share, live in lives.items()
    }
    rows: Rows = []
    for name, make, parameters in _kinds(gpu, gpu.StandardGpuResources(), count):
        try:
            start = time.perf_counter()
            index = make()
            index.train(vectors)
            if not index.ntotal:  # CAGRA is built by training
                index.add(vectors)
            build_seconds = time.perf_counter() - start
            for batch in _BATCHES:
                search = partial(index.search, queries[:batch], LIMIT, params=parameters())
                row = _timed(f"FAISS {name}, {batch} at once", search, device)
                hits = search()[1][:64]
                rows.append(row | {"recall": recall_of(exact[: len(hits)], hits), "build_s": build_seconds})
            for share, live in lives.items():
                selector = gpu.IDSelectorBitmap(np.packbits(live, bitorder="little"))
                search = partial(index.search, queries[:1], LIMIT, params=parameters(sel=selector))
                row = _timed(f"FAISS {name}, 1 at once, {share:.1%} qualify", search, device)
                hits = index.search(queries[:64], LIMIT, params=parameters(sel=selector))[1]
                filter_respected = bool(live[hits[hits >= 0]].all())
                rows.append(
                    row | {"recall": recall_of(exact_filtered[share], hits), "obeyed": str(filter_respected)}
                )
        except RuntimeError as error:  # one failing index does not end the run
            rows.append({"what": f"FAISS {name}: {str(error).splitlines()[0][-100:]}"})
    return rows


def _kinds(gpu: Any, resources: Any, count: int) -> list[tuple[str, Callable[[], Any], Callable[..., Any]]]:
    """The name, the constructor and the constructor of search parameters of each index."""
    product, lists = gpu.METRIC_INNER_PRODUCT, int(4 * count**0.5)

    def flat(*, cuvs: bool) -> Any:
        config = gpu.GpuIndexFlatConfig()
        config.useFloat16, config.use_cuvs = True, cuvs
        return gpu.GpuIndexFlatIP(resources, DIMENSION, config)

    def inverted() -> Any:
        config = gpu.GpuIndexIVFFlatConfig()
        config.use_cuvs = True
        return gpu.GpuIndexIVFFlat(resources, DIMENSION, lists, product, config)

    def graph() -> Any:
        config = gpu.GpuIndexCagraConfig()
        config.graph_degree, config.intermediate_graph_degree = 64, 128
        config.build_algo = gpu.graph_build_algo_NN_DESCENT
        return gpu.GpuIndexCagra(resources, DIMENSION, product, config)

    kinds: list[tuple[str, Callable[[], Any], Callable[..., Any]]] = [
        ("flat", partial(flat, cuvs=False), gpu.SearchParameters),
        ("flat by cuVS", partial(flat, cuvs=True), gpu.SearchParameters),
        ("IVF by cuVS, 64 lists", inverted, partial(gpu.SearchParametersIVF, nprobe=64)),
    ]
    for width in (128, 512):
        kinds.append((f"CAGRA, {width} kept", graph, partial(gpu.SearchParametersCagra, itopk_size=width)))
    return kinds


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
