"""Encoding through the service against the bare models and other servers, in one run.

    python -m bench.embedding [--texts 600] [--photographs 96] [--others DIR] [--json FILE]
    python -m bench.embedding --device cuda --precision bf16 --texts 20000 --photographs 4000 --jpeg 800

Texts and photographs are H&M's where they are (VITRINE_HM), else drawn by the demo. Texts are encoded by
MiniLM, or what --base names, photographs by ViT-B/32 with random weights. Bare means prepared inputs
through the model alone, at the best of several batch sizes, on the GPU or on all cores: by a thread for each
core, or a batch at a time as libraries do. DIR holds the environments `sentence-transformers` and `infinity`,
which run as they come; what is not there is said to be missing. All sides compute in the one precision, but
with int8 our texts alone do: all else is in fp32, and a row says what our texts are in fp32. The service runs
in a process of its own, its client here, on the same cores.
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
from services.catalog import item_text
from services.embedding.devices import model_threads
from services.embedding.encoders import ImageSettings, TextSettings, write_settings
from services.server import CHANNEL_OPTIONS
from training import text_encoder
from training.dataset import read_shop

_TOKENS = 96
_BUDGETS = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (8192, 16_384, 32_768, 65_536, 131_072)}
_BATCHES = {"cpu": (2, 4, 8, 16, 32, 64), "cuda": (64, 128, 256, 512, 1024)}
_ROUNDS = 3
_WRITTEN = 5_000
_AT_ONCE = {"cpu": 4, "cuda": 32}
_SERVED = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # as `vitrine serve` runs; the others run as they come
_PER_CALL_TEXTS, _PER_CALL_PICTURES = 256, 64


def main() -> None:
    """Measure texts, photographs and writes, and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--photographs", type=int, default=96)
    parser.add_argument("--others", type=Path, default=ROOT / "build" / "embedding-rivals")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32")
    parser.add_argument("--parts", default="photographs,others,writes", help="besides texts over gRPC")
    parser.add_argument("--jpeg", type=int, help="photographs as JPEG files of so many pixels a side")
    parser.add_argument("--base", default="minilm", help="or a hub's name, or a directory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and options.precision == "int8":
        parser.error("int8 is for processors")
    if device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured")  # noqa: T201 - the answer
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plain = "fp32" if options.precision == "int8" else options.precision
        text_encoder.save_frozen(options.base, root / "text", TextSettings(_TOKENS, plain))
        _save_clip(root / "image", ImageSettings(plain))
        texts, files = _content(root, options.texts, options.photographs)
        if options.jpeg:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                files = list(pool.map(partial(_as_jpeg, side=options.jpeg), files))
        ours = root if plain == options.precision else _in_eight_bits(root, texts)
        np.savez(ours / "given.npz", texts=np.array(texts, object), files=np.array(files, object))
        with _bare(ours, device) as bare:
            found = _told(_texts(ours, texts, bare, device))
            alone = found[0]["per_second"]
            if "photographs" in options.parts:
                found += _told(_photographs(ours, files, bare, device))
        if ours != root:
            found += _told(_in_fp32(root, ours, texts, alone, device))
        if "others" in options.parts:
            found += _told(_others(root, ours, texts, options.others, alone, [device, plain]))
        if "writes" in options.parts:
            found += _told(_writes(ours, texts[:_WRITTEN], device))
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    computed = options.precision if ours == root else "our texts in int8, all else in fp32"
    table = Table(title=f"{gpu}{os.cpu_count()} cores, {computed}")
    for column in ("what", "per second", "to bare", "note"):
        table.add_column(column)
    for row in found:
        ratio = f"{row['to_bare']:.2f}" if "to_bare" in row else ""
        table.add_row(row["what"], f"{row['per_second']:.1f}", ratio, row.get("note", ""))
    Console(width=130).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _in_eight_bits(root: Path, texts: list[str]) -> Path:
    """A folder of the same encoders, that of texts in eight bits."""
    from training import quantising  # noqa: PLC0415 - an extra

    ours = root / "int8"
    quantising.quantise(root / "text", ours / "text", texts)
    (ours / "image").symlink_to(root / "image")
    return ours


def _in_fp32(root: Path, ours: Path, texts: list[str], bare: float, device: str) -> list[dict[str, Any]]:
    with _served(root, device) as plain, _served(ours, device) as eight:
        ports: list[int] = [plain, eight]
        runs = [_over(port, _embed_texts, texts, _PER_CALL_TEXTS, _AT_ONCE[device]) for port in ports]
        exact, short = (len(texts) / s for s in _in_turns(runs))
    note = f"int8, in turns with it, is {short / exact:.2f} times this"
    what = "texts: over gRPC, in fp32"
    return [{"what": what, "per_second": exact, "to_bare": exact / bare, "note": note}]


def _told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        print(json.dumps(row), file=sys.stderr)  # noqa: T201 - the next ones take minutes
    return rows


def _texts(root: Path, texts: list[str], bare: Callable[[str], float], device: str) -> list[dict[str, Any]]:
    best, whole = _ways(bare, "tokens", _BUDGETS[device], device)
    with _served(root, device) as port:
        ours = _over(port, _embed_texts, texts, _PER_CALL_TEXTS, _AT_ONCE[device])
        runs: list[Callable[[], float]] = [partial(bare, best), partial(bare, whole), ours]
        alone, at_a_time, over = (len(texts) / s for s in _in_turns(runs))
        lone = _lone(port)
    return [
        {"what": "texts: the bare model", "per_second": alone, "note": _note(best)},
        {
            "what": "texts: the bare model, a batch at a time",
            "per_second": at_a_time,
            "to_bare": at_a_time / alone,
            "note": _note(whole),
        },
        {"what": "texts: over gRPC", "per_second": over, "to_bare": over / alone},
        {"what": "texts: over gRPC, one after the other", "per_second": 1 / lone},
    ]


def _ways(bare: Callable[[str], float], what: str, sizes: Sequence[int], device: str) -> tuple[str, str]:
    """How the bare model is best, and how it is best a batch at a time: "WHAT SIZE THREADS"."""
    threads = dict.fromkeys((1, model_threads(device)))
    ways = [f"{what} {size} {number}" for number in threads for size in sizes]
    seconds = dict.fromkeys(ways, math.inf)
    for way in ways * (2 if device == "cpu" else 1):  # where a try is a part, and other work may disturb it
        seconds[way] = min(seconds[way], bare(f"try {way}"))
    return min(ways, key=seconds.__getitem__), min(ways[: len(sizes)], key=seconds.__getitem__)


def _note(way: str) -> str:
    what, size, threads = way.split()
    return f"{size} {what.replace('pixels', 'pictures')} a batch, {threads} at a time"


def _others(
    root: Path, ours: Path, texts: list[str], environments: Path, bare: float, way: list[str]
) -> list[dict[str, Any]]:
    """Texts by other servers and libraries, with the model of `root`, ours over gRPC before and after."""
    given, found = root / "texts.json", list[dict[str, Any]]()
    given.write_text(json.dumps(texts))
    for name in ("sentence-transformers", "infinity"):
        row = {"what": f"texts: {name}", "per_second": 0.0}
        python = environments / name / "bin" / "python"
        if not python.is_file():
            found.append(row | {"note": f"no environment at {python}"})
            continue
        command = [str(python.absolute()), str(Path(__file__).parent / "rival.py"), name, *way]
        command += [f"--model={root / 'text'}", f"--texts={given}", f"--tokens={_TOKENS}"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        with _served(ours, way[0]) as port:
            run = _over(port, _embed_texts, texts, _PER_CALL_TEXTS, _AT_ONCE[way[0]])
            run()
            seconds = [run()]
            done = subprocess.run(  # noqa: S603 - our own script
                command, check=False, capture_output=True, text=True, env=environment
            )
            seconds.append(run())
        if done.returncode:
            found.append(row | {"note": f"failed: {done.stderr.strip().splitlines()[-1][:80]}"})
            continue
        rate = json.loads(done.stdout.splitlines()[-1])
        speed = rate["per_second"]
        mine = 2 * len(texts) / sum(seconds)
        note = (
            f"batches of {rate['batch']}; ours over gRPC, before and after, is {mine / speed:.2f} times this"
        )
        found.append(row | {"per_second": speed, "to_bare": speed / bare, "note": note})
    return found


def _photographs(
    root: Path, files: list[bytes], bare: Callable[[str], float], device: str
) -> list[dict[str, Any]]:
    best, _ = _ways(bare, "pixels", _BATCHES[device], device)
    with _served(root, device) as port:
        ours = _over(port, _embed_images, files, _PER_CALL_PICTURES, _AT_ONCE[device])
        asked = (best, "decode", "loop")
        model, decoding, loop, over = _in_turns([*(partial(bare, line) for line in asked), ours])
    loop *= max(len(files) / bare_models.LOOPED, 1)
    on_gpu = device == "cuda"  # which computes while others decode
    both = model if on_gpu else model + decoding
    return [
        {
            "what": "photographs: the bare model",
            "per_second": len(files) / model,
            "note": _note(best),
        },
        {
            "what": "photographs: decoding alone",
            "per_second": len(files) / decoding,
            "note": "all cores, and the GPU where it can" if on_gpu else "all cores",
        },
        {
            "what": "photographs: the model, decoding hidden" if on_gpu else "photographs: both in turn",
            "per_second": len(files) / both,
            "note": "bare, for the next two",
        },
        {"what": "photographs: over gRPC", "per_second": len(files) / over, "to_bare": both / over},
        {
            "what": "photographs: open_clip's loop",
            "per_second": len(files) / loop,
            "to_bare": both / loop,
            "note": f"over gRPC is {loop / over:.2f} times this",
        },
    ]


def _writes(root: Path, texts: list[str], device: str) -> list[dict[str, Any]]:
    """Items written and searchable a second, against their texts over EmbedTexts; lone writes beside."""
    with _served(root, device) as port:
        encode = _over(port, _embed_texts, texts, _PER_CALL_TEXTS, _AT_ONCE[device])
        names = iter(range(1_000_000))

        def write() -> None:
            first = next(names)

            async def chunks() -> AsyncIterator[pb.UpsertItemsRequest]:
                for start in range(0, len(texts), _PER_CALL_TEXTS):
                    piece = enumerate(texts[start : start + _PER_CALL_TEXTS], start)
                    # Titles of their own, or they would not be encoded again.
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
        waits, unseen = asyncio.run(_visible(port, write))
    rates = [len(texts) / s for s in seconds]
    p50, p99 = np.percentile(waits, (50, 99))
    return [
        {"what": "texts over EmbedTexts", "per_second": rates[0]},
        {
            "what": "items written and searchable",
            "per_second": rates[1],
            "note": f"{rates[1] / rates[0]:.2f} of it",
        },
        {
            "what": "single writes beside a flood of them",
            "per_second": len(waits) / sum(waits),
            "note": f"p50 {p50:.3f} s, p99 {p99:.3f} s until searchable; {unseen} of {len(waits)} missed",
        },
    ]


async def _visible(port: int, flood: Callable[[], None]) -> tuple[list[float], int]:
    """Seconds until an item is acknowledged beside `flood`, and how many a search then missed."""
    waits, unseen = list[float](), 0
    flooding = asyncio.ensure_future(asyncio.to_thread(flood))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        while not flooding.done():
            item = item_pb2.Item(id=f"single-{len(waits)}", title=f"a single thing {len(waits)}")

            async def one(item: item_pb2.Item = item) -> AsyncIterator[pb.UpsertItemsRequest]:
                yield pb.UpsertItemsRequest(items=[item])

            began = time.perf_counter()
            async for _ in stub.UpsertItems(one()):
                waits.append(time.perf_counter() - began)
            group = pb.InterestGroup(item_ids=[item.id])
            spaces = [item_pb2.SPACE_TEXT]
            request = pb.SearchRequest(groups=[group], limit=5, spaces=spaces, view=item_pb2.VIEW_READABLE)
            hits = [hit.item_id for r in (await stub.Search(request)).results for hit in r.hits]
            unseen += item.id not in hits
    await flooding
    return waits, unseen


def _in_turns(runs: Sequence[Callable[[], float]]) -> list[float]:
    """The median seconds of a few rounds of each, one after the other, after a warm-up of all."""
    rounds = [[run() for run in runs] for _ in range(_ROUNDS + 1)]
    return [statistics.median(mine) for mine in zip(*rounds[1:], strict=True)]


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


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
    """Seconds of sending all rows, a few calls at once."""
    return lambda: _seconds(lambda: asyncio.run(_calls(port, call, rows, per_call, at_once)))


async def _calls(
    port: int,
    call: Callable[[Any, Sequence[Any]], Awaitable[None]],
    rows: Sequence[Any],
    per_call: int,
    at_once: int,
) -> None:
    room = asyncio.Semaphore(at_once)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)

        async def one(start: int) -> None:
            async with room:
                await call(stub, rows[start : start + per_call])

        await asyncio.gather(*(one(start) for start in range(0, len(rows), per_call)))


def _lone(port: int, count: int = 50) -> float:
    """Seconds of one short text, the median of `count` one after the other."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = pb_grpc.EmbeddingServiceStub(channel)
        request = pb.EmbedTextsRequest(texts=["a red scarf of soft wool"])
        return statistics.median(_seconds(lambda: stub.EmbedTexts(request)) for _ in range(count))


@contextmanager
def _served(root: Path, device: str) -> Iterator[int]:
    """The port of a fresh server process over the encoders of `root`."""
    with (
        tempfile.TemporaryDirectory() as state,
        _process("bench.embedding.server", _SERVED, root, device, f"--state={state}") as process,
    ):
        yield int((process.stdout or io.StringIO()).readline())


@contextmanager
def _bare(root: Path, device: str) -> Iterator[Callable[[str], float]]:
    """Seconds of what the models alone are asked to do."""
    given = f"--given={root / 'given.npz'}"
    with _process("bench.embedding.bare", os.environ, root, device, given) as process:

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


def _content(root: Path, texts: int, photographs: int) -> tuple[list[str], list[bytes]]:
    default = ROOT.parent / "shared" / "data" / "hm"
    data = Path(os.environ.get("VITRINE_HM", str(default)))
    if data.is_dir():
        shop = read_shop(data, ROOT / "bench" / "hm" / "shop.toml")
    else:
        write_shop(root / "shop", Recipe())
        shop = read_shop(root / "shop")
    order = np.random.default_rng(0).permutation(len(shop.items)).tolist()
    chosen = list(dict.fromkeys(item_text(shop.items[at]) for at in order))[:texts]
    pictured = [shop.items[at].id for at in order if shop.items[at].id in shop.photographs]
    return chosen, [shop.photographs.read(item_id) for item_id in pictured[:photographs]]


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
