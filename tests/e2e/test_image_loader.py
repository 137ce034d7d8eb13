"""Expensive image files are decoded in processes that can fail without harm to other calls."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from vitrine.gateway.v1 import recommendation_service_pb2, recommendation_service_pb2_grpc

from services.core.errors import InvalidArgument, Unavailable
from services.embedding.images import decoder, decoder_processes, decoder_worker
from services.embedding.images.decoder_processes import DecoderProcesses
from services.embedding.images.decoder_worker import MAX_SECONDS, MEMORY_LIMIT
from services.embedding.images.headers import MAX_MEMORY, read_header
from services.embedding.images.loader import ByteBudget, ImageLoader
from tests.support.image_bombs import encode_image, plain_png, progressive_jpeg, smooth_image
from tests.support.processes import free_port, running_process

COSTLY = {
    "AVIF": encode_image(smooth_image(300, 200), "AVIF"),
    "HEIF": encode_image(smooth_image(300, 200), "HEIF"),
    "WEBP": encode_image(smooth_image(2400, 2000), "WEBP"),
    "PNG": plain_png(5000, 4000, 6, value=100),
    "JPEG": progressive_jpeg(3000, 2000, 90),
}
SLOW = progressive_jpeg(10_000, 9900, 100)
"""Takes several seconds of processor time, within all limits."""


@pytest.fixture
def loader() -> Iterator[ImageLoader]:
    with closing(ImageLoader()) as loader:
        yield loader


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process took so far; -1 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def change_worker(patch: pytest.MonkeyPatch, code: str) -> None:
    """Let each decoder process run a line of code before it serves."""
    start = subprocess.Popen
    code = f"from services.embedding.images import decoder_worker\n{code}\ndecoder_worker.main()"
    patch.setattr(
        subprocess, "Popen", lambda command, **rest: start([command[0], "-c", code, command[-1]], **rest)
    )


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


@pytest.mark.parametrize("form", list(COSTLY))
def test_a_process_decodes_the_same_pixels_as_a_thread(loader: ImageLoader, form: str) -> None:
    data = COSTLY[form]
    assert read_header(data, 64, "").is_costly
    apart = loader.load(data, 64, interactive=form == "AVIF")
    assert np.array_equal(np.asarray(apart), np.asarray(decoder.load(data, 64)))
    assert loader.outcomes == {"thread": 0, "process": 1}
    assert len(loader.pids) == 1


def test_an_ordinary_file_starts_no_process(loader: ImageLoader) -> None:
    for form in ("JPEG", "PNG", "GIF", "WEBP"):
        data = encode_image(smooth_image(900, 700), form, **({"progressive": True} if form == "JPEG" else {}))
        assert np.array_equal(np.asarray(loader.load(data, 64)), np.asarray(decoder.load(data, 64)))
    assert (loader.outcomes, loader.pids) == ({"thread": 4}, [])


def test_a_damaged_file_fails_with_the_message_of_its_decoder(loader: ImageLoader) -> None:
    data = COSTLY["AVIF"][:-200] + bytes(200)
    with pytest.raises(InvalidArgument) as here:
        decoder.load(data, 64, "items[3].image")
    with pytest.raises(InvalidArgument) as apart:
        loader.load(data, 64, "items[3].image")
    assert str(apart.value) == str(here.value)
    assert len(loader.pids) == 1  # it was not ended for that


def test_a_killed_process_fails_its_image_and_is_replaced(loader: ImageLoader) -> None:
    with ThreadPoolExecutor() as pool:
        future = pool.submit(loader.load, SLOW, 64, "image")
        until(lambda: bool(loader.pids) and cpu_seconds(loader.pids[0]) > 1)
        pid = loader.pids[0]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InvalidArgument, match=r"image: .*ended with SIGKILL"):
            future.result()
    assert loader.load(COSTLY["HEIF"], 64).size == (300, 200)
    assert (loader.outcomes["crash"], loader.outcomes["process"]) == (1, 1)
    assert loader.pids != [pid]


def test_a_process_killed_during_its_reply_fails_its_image(
    loader: ImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = decoder_worker.receive

    def killing(connection: socket.socket, size: int) -> bytearray:
        data = receive(connection, size)
        if size == decoder_worker.REPLY.size:  # the pixels are more than a socket's buffer holds
            [pid] = loader.pids
            os.kill(pid, signal.SIGKILL)
            until(lambda: not loader.pids)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(decoder_worker, "receive", killing)
        with pytest.raises(InvalidArgument, match=r"image: .*ended with SIGKILL"):
            loader.load(COSTLY["JPEG"], 2000, "image")
    assert loader.outcomes["crash"] == 1
    assert loader.load(COSTLY["HEIF"], 64).size == (300, 200)


def test_a_stop_tolerates_a_process_that_is_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(DecoderProcesses(1)) as processes:
        processes.load(COSTLY["AVIF"], 64, "image")
        [worker] = processes._workers
        process = worker._process

        def once(_: object) -> Any:
            """The process at the first look; whoever waits for it has dropped it by the second."""
            return looks.pop() if looks else None

        for look in (lambda: processes.pids, worker.stop):
            looks = [process]
            with monkeypatch.context() as patch:
                patch.setattr(type(worker), "_process", property(once), raising=False)
                look()


def test_a_killed_idle_process_fails_no_image(loader: ImageLoader) -> None:
    loader.load(COSTLY["AVIF"], 64)
    os.kill(loader.pids[0], signal.SIGKILL)
    until(lambda: not loader.pids)
    assert loader.load(COSTLY["AVIF"], 64).size == (300, 200)
    assert loader.outcomes == {"thread": 0, "process": 2}


def test_the_system_ends_a_decoder_that_takes_too_long() -> None:
    endless = progressive_jpeg(10_000, 9900, 400)  # beyond the limit of scans, which is tested elsewhere
    code = (
        "from services.embedding.images import file_segments\n"
        "file_segments.MAX_SCANS = 1000; file_segments._MAX_SEGMENTS['JPEG'] = 10_000\n"
        "decoder_worker.MAX_SECONDS = 1"
    )
    with closing(DecoderProcesses(1)) as processes, pytest.MonkeyPatch.context() as patch:
        change_worker(patch, code)
        with pytest.raises(InvalidArgument, match=f"more than {MAX_SECONDS} seconds of processor time"):
            processes.load(endless, 64, "image")
        assert processes.outcomes == {"timeout": 1}
        assert processes.load(COSTLY["AVIF"], 64, "image").size == (300, 200)


def test_a_silent_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_processes, "MAX_WALL_SECONDS", 5)
    with closing(DecoderProcesses(1)) as processes:
        processes.load(COSTLY["AVIF"], 64, "image")
        os.kill(processes.pids[0], signal.SIGSTOP)
        with pytest.raises(InvalidArgument, match="takes more than 5 seconds to decode"):
            processes.load(COSTLY["AVIF"], 64, "image")
        assert processes.outcomes == {"process": 1, "timeout": 1}
        assert processes.pids == []


def test_memory_stays_within_the_limit(loader: ImageLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    change_worker(monkeypatch, "decoder_worker.MAX_SECONDS = 600")  # a busy processor takes more than 10
    for data in (plain_png(10_000, 9900, 6), plain_png(9900, 10_000, 4, 16), SLOW, COSTLY["WEBP"]):
        loader.load(data, 64)
    assert loader.outcomes["process"] == 4
    peaks = [
        int(line.split()[1]) << 10
        for pid in loader.pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    assert max(peaks) < MAX_MEMORY + (64 << 20)  # Python and the decoders themselves


def test_a_decoder_above_its_memory_estimate_fails_its_image() -> None:
    code = (
        "from PIL import Image\nfrom services.embedding.images import decoder\n"
        f"decoder.load = lambda *_: Image.new('RGBA', (20_000, {MEMORY_LIMIT} // 80_000))"
    )
    with closing(DecoderProcesses(1)) as processes, pytest.MonkeyPatch.context() as patch:
        change_worker(patch, code)
        with pytest.raises(InvalidArgument, match=f"more than {MEMORY_LIMIT >> 20} MiB"):
            processes.load(COSTLY["PNG"], 64, "image")
        assert processes.outcomes == {"out_of_memory": 1}


def test_a_search_waits_for_no_other_lane(loader: ImageLoader) -> None:
    bulk = [threading.Thread(target=lambda: _quietly(loader, SLOW)) for _ in range(12)]
    for thread in bulk:
        thread.start()
    until(lambda: bool(loader.pids))
    for data in (COSTLY["AVIF"], encode_image(smooth_image(90, 90), "JPEG")):
        assert loader.load(data, 64, interactive=True).mode == "RGB"
    assert loader.outcomes == {"thread": 1, "process": 1}  # of the others none is done
    loader.close()
    for thread in bulk:
        thread.join()


def test_after_close_no_process_is_left_and_none_is_started(loader: ImageLoader) -> None:
    with ThreadPoolExecutor() as pool:
        future = pool.submit(loader.load, SLOW, 64)
        until(lambda: bool(loader.pids))
        pids = loader.pids
        loader.close()
        with pytest.raises(Unavailable):
            future.result()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(Unavailable):
        loader.load(COSTLY["AVIF"], 64)
    assert loader.pids == []


@pytest.mark.parametrize("busy", [True, False])
def test_a_process_ends_with_a_parent_that_is_killed(busy: bool) -> None:
    data = SLOW if busy else COSTLY["AVIF"]
    code = (
        "import sys, threading, time\n"
        "from services.embedding.images.loader import ImageLoader\n"
        "loader = ImageLoader(); data = sys.stdin.buffer.read()\n"
        "threading.Thread(target=loader.load, args=(data, 64), daemon=True).start()\n"
        "while not loader.pids: time.sleep(.01)\n"
        f"while not {busy} and not loader.outcomes.get('process'): time.sleep(.01)\n"
        "print(loader.pids[0], flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin as pipe:
        pipe.write(data)
    child, last = int(parent.stdout.readline()), 0.0
    if busy:
        until(lambda: cpu_seconds(child) > 1)
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def has_ended() -> bool:
        nonlocal last
        seconds = cpu_seconds(child)
        last = max(last, seconds)
        return seconds < 0

    until(has_ended)
    assert last < 3  # of the 5 and more that the file takes


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
async def test_a_server_that_is_stopped_leaves_no_process(
    bundle: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    port = free_port()
    async with running_process(bundle, tmp_path / "state", port) as process:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = recommendation_service_pb2_grpc.RecommendationServiceStub(channel)
            search = recommendation_service_pb2.SearchItemsRequest(image=SLOW)
            call = stub.SearchItems.future(search)
            until(lambda: bool(children_of(process.pid)))
            decoding = children_of(process.pid)
            process.send_signal(stop)
            process.wait(60)
            call.cancel()
    until(lambda: all(cpu_seconds(pid) < 0 for pid in decoding))


def _quietly(loader: ImageLoader, data: bytes) -> None:
    with pytest.raises(Unavailable):
        loader.load(data, 64)


def test_bytes_taken_at_once_stay_within_the_budget() -> None:
    budget, in_use, most = ByteBudget(10), [0], [0]
    lock = threading.Lock()

    def decode(size: int) -> None:
        with budget.taking(size):
            with lock:
                in_use[0] += min(size, 10)
                most[0] = max(most[0], in_use[0])
            time.sleep(0.001)
            with lock:
                in_use[0] -= min(size, 10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [1, 6, 3, 25, 5, 5, 2, 10, 4, 7] * 5))
    assert in_use == [0]
    assert 6 < most[0] <= 10
