"""Cornac's HTTP server over the events of a shop: fits a model, serves it with gunicorn, and stops it.

Cornac has its own environment (bench/serving/cornac.txt); its files are in the measurement's folder.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import numpy as np

from bench.serving import procfs
from bench.serving.servers import free_port
from training.data.events import Events

FIT_SECONDS, START_SECONDS = 900.0, 120.0
"""How long Cornac may take to fit its model, and to load it."""
_STOP_SECONDS, _POLL_SECONDS = 10.0, 0.05
_FIT = Path(__file__).with_name("cornac_fit.py")
_SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # as Vitrine's own
_OUTPUT_TAIL = 2000


class PeerError(RuntimeError):
    """The peer cannot be measured; the text says why."""


@dataclass(frozen=True)
class FittedModel:
    """A saved model, and on what it was fitted: distinct pairs of a user and an item are interactions."""

    path: str
    version: str
    users: int
    items: int
    interactions: int
    seconds: float


def interaction_lines(events: Events, item_ids: list[str]) -> tuple[list[str], int]:
    """A JSON array per event, of the ids of user and item, and how many events were left out.

    Events of items that are not in `item_ids` are left out.
    """
    catalog = set(item_ids)
    present = np.array([item_id in catalog for item_id in events.item_ids], bool)
    rows = np.flatnonzero(present[events.item])
    users, items = events.user[rows].tolist(), events.item[rows].tolist()
    lines = [
        json.dumps([events.user_ids[user], events.item_ids[item]])
        for user, item in zip(users, items, strict=True)
    ]
    return lines, len(events) - len(rows)


def page_path(user_id: str, size: int) -> str:
    """The path of a page of a user, without items that the user had an event with."""
    return "/recommend?" + urlencode({"uid": user_id, "k": size, "remove_seen": "true"})


def page_items(body: bytes) -> int:
    """The items of a page."""
    return len(json.loads(body)["recommendations"])


def fit(python: Path, lines: list[str], folder: Path) -> FittedModel:
    """Fit a model on lines of interactions.

    Raises:
        PeerError: Cornac failed or took too long.
    """
    interactions = folder / "interactions.jsonl"
    interactions.write_text("".join(f"{line}\n" for line in lines))
    command = [str(python), str(_FIT), f"--interactions={interactions}", f"--out={folder}"]
    start = time.perf_counter()
    try:
        process = subprocess.run(  # noqa: S603 - our own script
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=FIT_SECONDS,
            env=os.environ | _SINGLE_THREADED,
        )
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"Cornac did not fit a model within {FIT_SECONDS:.0f} s") from error
    except subprocess.CalledProcessError as error:
        raise PeerError(f"Cornac could not fit a model: {error.stderr[-_OUTPUT_TAIL:]}") from error
    answer = json.loads(process.stdout.splitlines()[-1])
    path = answer.pop("model")
    return FittedModel(path, seconds=time.perf_counter() - start, **answer)


@dataclass(frozen=True)
class CornacServer:
    """A running server: its port, and its process, which starts the worker."""

    port: int
    process_id: int

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far."""
        return procfs.cpu_seconds([self.process_id])

    def memory(self) -> procfs.Memory:
        """The memory of all its processes."""
        return procfs.memory([self.process_id])


@contextmanager
def running(python: Path, model: FittedModel, folder: Path) -> Iterator[CornacServer]:
    """Cornac's serving app in one worker with four threads, until the end of the block.

    Raises:
        PeerError: it does not answer in time.
    """
    port, log = free_port(), folder / "cornac.log"
    command = [str(python), "-m", "gunicorn", "--workers=1", "--threads=4", "--keep-alive=75"]
    command += [f"--bind=127.0.0.1:{port}", "--no-control-socket", "cornac.serving.app:app"]
    environment = {"MODEL_PATH": model.path, "MODEL_CLASS": "cornac.models.BPR", **_SINGLE_THREADED}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - the peer's server
            command,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=os.environ | environment,
            start_new_session=True,  # a group of its own, which is stopped as a whole
        )
        try:
            _wait_until_listening(port, process, log)
            yield CornacServer(port, process.pid)
        finally:
            _stop(process)


def _wait_until_listening(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Gunicorn listens before its worker has loaded the model: the first call waits for that."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(_POLL_SECONDS)
        else:
            return
    raise PeerError(f"Cornac's server does not start: {log.read_text()[-_OUTPUT_TAIL:]}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and its worker."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what is left of the group
        process.wait()
