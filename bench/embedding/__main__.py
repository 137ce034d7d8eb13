"""Encoding through the service, compared with the bare models and with other servers, in one run.

    python -m bench.embedding [--texts 600] [--images 96] [--others DIR] [--json FILE]
    python -m bench.embedding --device cuda --precision bf16 --texts 20000 --images 4000 --jpeg 800

Texts and images are H&M's if available (VITRINE_HM), else the demo's. Texts are encoded by MiniLM or --base,
images by ViT-B/32 with random weights. "Bare" is the model alone on prepared inputs, at the best of several
batch sizes, on the GPU or on all cores: with one thread per core, or one batch at a time as in libraries. DIR
holds the environments `sentence-transformers` and `infinity`, which run with their defaults; a missing one is
reported. All sides use the same precision, except with int8, which only our texts use: everything else is in
fp32, and one row shows our texts in fp32. The service runs in its own process, its client in this one, on the
same cores.
"""

import argparse
import asyncio
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import open_clip
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as pb
from vitrine.embedding.v1 import embedding_service_pb2_grpc as pb_grpc

from bench.embedding import bare as bare_models
from bench.runs import ROOT
from demo.shop import Recipe, write_shop
from services.catalog.items import item_text
from services.embedding.encoders.encoders import ImageSettings, TextSettings, write_settings
from services.embedding.runtime.devices import model_threads
from services.rpc.server import CHANNEL_OPTIONS
from training.data.dataset import read_shop
from training.encoders import text_encoder

_TOKENS = 96
_BUDGETS = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (8192, 16_384, 32_768, 65_536, 131_072)}
_BATCHES = {"cpu": (2, 4, 8, 16, 32, 64), "cuda": (64, 128, 256, 512, 1024)}
_ROUNDS = 3
_MAX_WRITES = 5_000
_CONCURRENT_CALLS = {"cpu": 4, "cuda": 32}
_SERVER_ENVIRONMENT = os.environ | {
    "OMP_WAIT_POLICY": "PASSIVE"
}  # as in `vitrine serve`; the others run with their defaults
_PER_CALL_TEXTS, _PER_CALL_IMAGES = 256, 64


def main() -> None:
    """Measure texts, images and writes, and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--others", type=Path, default=ROOT / "build" / "embedding-servers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32")
    parser.add_argument(
        "--parts", default="images,others,writes", help="parts in addition to texts over gRPC"
    )
    parser.add_argument("--jpeg", type=int, help="re-encode images as JPEG files of this width")
    parser.add_argument("--base", default="minilm", help="minilm, a hub name or a directory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and options.precision == "int8":
        parser.error("int8 is for CPUs")
    if device == "cuda" and not torch.cuda.is_available():
        print("this machine has no GPU: nothing is measured")  # noqa: T201 - the answer
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plain = "fp32" if options.precision == "int8" else options.precision
        text_encoder.save_frozen(root / "text", options.base, TextSettings(_TOKENS, plain))
        _save_clip(root / "image", ImageSettings(plain))
        texts, files = _content(root, options.texts, options.images)
        if options.jpeg:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                files = list(pool.map(partial(_as_jpeg, side=options.jpeg), files))
        encoders_root = root if plain == options.precision else _in_int8(root, texts)
        np.savez(encoders_root / "inputs.npz", texts=np.array(texts, object), files=np.array(files, object))
        with _bare(encoders_root, device) as run_bare:
            results = _print_rows(_texts(encoders_root, texts, run_bare, device))
            bare_rate = results[0]["per_second"]
            if "images" in options.parts:
                results += _print_rows(_images(encoders_root, files, run_bare, device))
        if encoders_root != root:
            results += _print_rows(_in_fp32(root, encoders_root, texts, bare_rate, device))
        if "others" in options.parts:
            results += _print_rows(
                _others(root, encoders_root, texts, options.others, bare_rate, [device, plain])
            )
        if "writes" in options.parts:
            results += _print_rows(_writes(encoders_root, texts[:_MAX_WRITES], device))
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    precisions = options.precision if encoders_root == root else "our texts in int8, all else in fp32"
    table = Table(title=f"{gpu}{os.cpu_count()} cores, {precisions}")
    for column in ("what", "per second", "to bare", "note"):
        table.add_column(column)
    for row in results:
        ratio = f"{row['to_bare']:.2f}" if "to_bare" in row else ""
        table.add_row(row["what"], f"{row['per_second']:.1f}", ratio, row.get("note", ""))
    Console(width=130).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _in_int8(root: Path, texts: list[str]) -> Path:
    """A folder of the same encoders, with the text encoder in int8."""
    from training.encoders import quantization  # noqa: PLC0415 - an extra

    encoders_root = root / "int8"
    quantization.quantize(encoders_root / "text", root / "text", texts)
    (encoders_root / "image").symlink_to(root / "image")
    return encoders_root


def _in_fp32(
    root: Path, int8_root: Path, texts: list[str], bare_rate: float, device: str
) -> list[dict[str, Any]]:
    with _served(root, device) as fp32_port, _served(int8_root, device) as int8_port:
        ports: list[int] = [fp32_port, int8_port]
        runs = [
            _over(port, _embed_texts, texts, _PER_CALL_TEXTS, _CONCURRENT_CALLS[device]) for port in ports
        ]
        fp32_rate, int8_rate = (len(texts) / s for s in _in_turns(runs))
    note = f"int8, in turns with it, is {int8_rate / fp32_rate:.2f} times this"
    label = "texts: over gRPC, in fp32"
    return [{"what": label, "per_second": fp32_rate, "to_bare": fp32_rate / bare_rate, "note": note}]


def _print_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        print(json.dumps(row), file=sys.stderr)  # noqa: T201 - the next ones take minutes
    return rows


def _texts(
    root: Path, texts: list[str], run_bare: Callable[[str], float], device: str
) -> list[dict[str, Any]]:
    best, best_single = _modes(run_bare, "tokens", _BUDGETS[device], device)
    with _served(root, device) as port:
        service = _over(port, _embed_texts, texts, _PER_CALL_TEXTS, _CONCURRENT_CALLS[device])
        runs: list[Callable[[], float]] = [partial(run_bare, best), partial(run_bare, best_single), service]
        bare_rate, single_rate, service_rate = (len(texts) / s for s in _in_turns(runs))
        single_text = _single_text(port)
    return [
        {"what": "texts: the bare model", "per_second": bare_rate, "note": _note(best)},
        {
            "what": "texts: the bare model, a batch at a time",
            "per_second": single_rate,
            "to_bare": single_rate / bare_rate,
            "note": _note(best_single),
        },
        {"what": "texts: over gRPC", "per_second": service_rate, "to_bare": service_rate / bare_rate},
        {"what": "texts: over gRPC, one after the other", "per_second": 1 / single_text},
    ]


def _modes(run_bare: Callable[[str], float], unit: str, sizes: Sequence[int], device: str) -> tuple[str, str]:
    """The best mode of the bare model, and the best with one batch at a time: "UNIT SIZE THREADS"."""
    threads = dict.fromkeys((1, model_threads(device)))
    modes = [f"{unit} {size} {count}" for count in threads for size in sizes]
    seconds = dict.fromkeys(modes, math.inf)
    for mode in modes * (
        2 if device == "cpu" else 1
    ):  # on a CPU a try is short and other load may disturb it
        seconds[mode] = min(seconds[mode], run_bare(f"try {mode}"))
    return min(modes, key=seconds.__getitem__), min(modes[: len(sizes)], key=seconds.__getitem__)


def _note(mode: str) -> str:
    unit, size, threads = mode.split()
    return f"{size} {unit.replace('pixels', 'images')} a batch, {threads} at a time"


def _others(
    root: Path, encoders_root: Path, texts: list[str], environments: Path, bare_rate: float, flags: list[str]
) -> list[dict[str, Any]]:
    """Texts by other servers and libraries; our service is measured before and after."""
    text_file, results = root / "texts.json", list[dict[str, Any]]()
    text_file.write_text(json.dumps(texts))
    for name in ("sentence-transformers", "infinity"):
        row = {"what": f"texts: {name}", "per_second": 0.0}
        python = environments / name / "bin" / "python"
        if not python.is_file():
            results.append(row | {"note": f"no environment at {python}"})
            continue
        command = [str(python.absolute()), str(Path(__file__).parent / "other_server.py"), name, *flags]
        command += [f"--model={root / 'text'}", f"--texts={text_file}", f"--tokens={_TOKENS}"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        with _served(encoders_root, flags[0]) as port:
            run = _over(port, _embed_texts, texts, _PER_CALL_TEXTS, _CONCURRENT_CALLS[flags[0]])
            run()
            seconds = [run()]
            process = subprocess.run(  # noqa: S603 - our own script
                command, check=False, capture_output=True, text=True, env=environment
            )
            seconds.append(run())
        if process.returncode:
            results.append(row | {"note": f"failed: {process.stderr.strip().splitlines()[-1][:80]}"})
            continue
        rate = json.loads(process.stdout.splitlines()[-1])
        speed = rate["per_second"]
        own_rate = 2 * len(texts) / sum(seconds)
        note = f"batches of {rate['batch']}; our gRPC is {own_rate / speed:.2f} times as fast"
        results.append(row | {"per_second": speed, "to_bare": speed / bare_rate, "note": note})
    return results


def _images(
    root: Path, files: list[bytes], run_bare: Callable[[str], float], device: str
) -> list[dict[str, Any]]:
    best, _ = _modes(run_bare, "pixels", _BATCHES[device], device)
    with _served(root, device) as port:
        service = _over(port, _embed_images, files, _PER_CALL_IMAGES, _CONCURRENT_CALLS[device])
        modes = (best, "decode", "loop")
        model, decoding, loop, service_time = _in_turns(
            [*(partial(run_bare, line) for line in modes), service]
        )
    loop *= max(len(files) / bare_models.LOOPED, 1)
    on_gpu = device == "cuda"  # the GPU computes while CPU threads decode
    both = model if on_gpu else model + decoding
    return [
        {
            "what": "images: the bare model",
            "per_second": len(files) / model,
            "note": _note(best),
        },
        {
            "what": "images: decoding alone",
            "per_second": len(files) / decoding,
            "note": "all cores, and the GPU where it can" if on_gpu else "all cores",
        },
        {
            "what": "images: the model, decoding hidden" if on_gpu else "images: both in turn",
            "per_second": len(files) / both,
            "note": "bare, for the next two",
        },
        {
            "what": "images: over gRPC",
            "per_second": len(files) / service_time,
            "to_bare": both / service_time,
        },
        {
            "what": "images: open_clip's loop",
            "per_second": len(files) / loop,
            "to_bare": both / loop,
            "note": f"over gRPC is {loop / service_time:.2f} times this",
        },
    ]


def _writes(root: Path, texts: list[str], device: str) -> list[dict[str, Any]]:
    """Items written and searchable per second, encoding alone, and latency of single writes."""
    with _served(root, device) as port:
        encode = _over(port, _embed_texts, texts, _PER_CALL_TEXTS, _CONCURRENT_CALLS[device])
        names = iter(range(1_000_000))

        def write() -> None:
            first = next(names)

            async def chunks() -> AsyncIterator[pb.UpsertItemsRequest]:
                for start in range(0, len(texts), _PER_CALL_TEXTS):
                    piece = enumerate(texts[start : start + _PER_CALL_TEXTS], start)
                    # New titles, because known titles are not encoded again.
                    items = [
                        item_pb2.Item(id=f"{first}-{n}", title=f"{first} {text}"[:300]) for n, text in piece
                    ]
                    yield pb.UpsertItemsRequest(items=items)

            async def stream() -> None:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
                    async for _ in pb_grpc.EmbeddingServiceStub(channel).UpsertItems(chunks()):
                        pass

            asyncio.run(stream())

        seconds = _in_turns([encode, lambda: _seconds(write)])
        latencies, missed = asyncio.run(_visible(port, write))
    rates = [len(texts) / s for s in seconds]
    p50, p99 = np.percentile(latencies, (50, 99))
    return [
        {"what": "texts over EmbedTexts", "per_second": rates[0]},
        {
            "what": "items written and searchable",
            "per_second": rates[1],
            "note": f"{rates[1] / rates[0]:.2f} of it",
        },
        {
            "what": "single writes beside a flood of them",
            "per_second": len(latencies) / sum(latencies),
            "note": f"p50 {p50:.3f} s, p99 {p99:.3f} s until searchable; {missed} of {len(latencies)} missed",
        },
    ]


async def _visible(port: int, flood: Callable[[], None]) -> tuple[list[float], int]:
    """Seconds until an item is acknowledged during `flood`, and how many items a search then misses."""
    latencies, missed = list[float](), 0
    flooding = asyncio.ensure_future(asyncio.to_thread(flood))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        while not flooding.done():
            item = item_pb2.Item(id=f"single-{len(latencies)}", title=f"a single thing {len(latencies)}")

            async def one(item: item_pb2.Item = item) -> AsyncIterator[pb.UpsertItemsRequest]:
                yield pb.UpsertItemsRequest(items=[item])

            start = time.perf_counter()
            async for _ in stub.UpsertItems(one()):
                latencies.append(time.perf_counter() - start)
            group = pb.QueryGroup(item_ids=[item.id])
            spaces = [item_pb2.SPACE_TEXT]
            request = pb.SearchRequest(groups=[group], limit=5, spaces=spaces, view=item_pb2.VIEW_READABLE)
            hits = [hit.item_id for r in (await stub.Search(request)).results for hit in r.hits]
            missed += item.id not in hits
    await flooding
    return latencies, missed


def _in_turns(runs: Sequence[Callable[[], float]]) -> list[float]:
    """The median seconds of each over a few rounds, one after the other, after a warm-up of all."""
    rounds = [[run() for run in runs] for _ in range(_ROUNDS + 1)]
    return [statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True)]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


async def _embed_texts(stub: Any, piece: Sequence[str]) -> None:
    await stub.EmbedTexts(pb.EmbedTextsRequest(texts=piece))


async def _embed_images(stub: Any, piece: Sequence[bytes]) -> None:
    await stub.EmbedImages(pb.EmbedImagesRequest(images=piece))


def _over(
    port: int,
    call: Callable[[Any, Sequence[Any]], Awaitable[None]],
    rows: Sequence[Any],
    per_call: int,
    at_once: int,
) -> Callable[[], float]:
    """Measures the seconds of sending all rows with a few concurrent calls."""
    return lambda: _seconds(lambda: asyncio.run(_calls(port, call, rows, per_call, at_once)))


async def _calls(
    port: int,
    call: Callable[[Any, Sequence[Any]], Awaitable[None]],
    rows: Sequence[Any],
    per_call: int,
    at_once: int,
) -> None:
    semaphore = asyncio.Semaphore(at_once)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)

        async def one(start: int) -> None:
            async with semaphore:
                await call(stub, rows[start : start + per_call])

        await asyncio.gather(*(one(start) for start in range(0, len(rows), per_call)))


def _single_text(port: int, count: int = 50) -> float:
    """Seconds of one short text, the median of `count` sequential calls."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        request = pb.EmbedTextsRequest(texts=["a red scarf of soft wool"])
        return statistics.median(_seconds(lambda: stub.EmbedTexts(request)) for _ in range(count))


@contextmanager
def _served(root: Path, device: str) -> Iterator[int]:
    """The port of a new server process with the encoders of `root`."""
    with (
        tempfile.TemporaryDirectory() as state,
        _process("bench.embedding.server", _SERVER_ENVIRONMENT, root, device, f"--state={state}") as process,
    ):
        yield int((process.stdout or io.StringIO()).readline())


@contextmanager
def _bare(root: Path, device: str) -> Iterator[Callable[[str], float]]:
    """Measures the seconds of a command by the models alone, in their own process."""
    inputs = f"--inputs={root / 'inputs.npz'}"
    with _process("bench.embedding.bare", os.environ, root, device, inputs) as process:

        def ask(line: str) -> float:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("the process has no pipes")
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield ask


@contextmanager
def _process(
    module: str, environment: Mapping[str, str], root: Path, device: str, *flags: str
) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", module, f"--text={root / 'text'}", f"--image={root / 'image'}"]
    command += [f"--device={device}", *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(  # noqa: S603 - our own
        command, stdin=pipe, stdout=pipe, text=True, env=environment
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _content(root: Path, texts: int, image_count: int) -> tuple[list[str], list[bytes]]:
    default = ROOT.parent / "shared" / "data" / "hm"
    data = Path(os.environ.get("VITRINE_HM", str(default)))
    if data.is_dir():
        shop = read_shop(data, ROOT / "bench" / "hm" / "shop.toml")
    else:
        write_shop(root / "shop", Recipe())
        shop = read_shop(root / "shop")
    order = np.random.default_rng(0).permutation(len(shop.items)).tolist()
    sample = list(dict.fromkeys(item_text(shop.items[index]) for index in order))[:texts]
    with_image = [shop.items[index].id for index in order if shop.items[index].id in shop.images]
    return sample, [shop.images.read(item_id) for item_id in with_image[:image_count]]


def _as_jpeg(file: bytes, side: int) -> bytes:
    picture, out = Image.open(io.BytesIO(file)).convert("RGB"), io.BytesIO()
    height = round(side * picture.height / picture.width)
    picture.resize((side, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()


def _save_clip(directory: Path, settings: ImageSettings) -> None:
    """ViT-B/32 with random weights, as the service loads it."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32")
    directory.mkdir()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, directory / "open_clip_model.safetensors"
    )
    size = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": size}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    write_settings(directory, settings)


if __name__ == "__main__":
    main()
