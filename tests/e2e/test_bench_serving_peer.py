"""The load of a peer against real processes and sockets."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from bench.serving import cornac_server, procfs
from bench.serving.cornac_server import FittedModel, PeerError, page_items
from bench.serving.http_load import HttpClient

_PAGE = json.dumps({"recommendations": ["a", "b"]}).encode()
_MODEL = FittedModel("missing.pkl", "0", 0, 0, 0, 0.0)


class PageServer(ThreadingHTTPServer):
    """Answers by path: a page, an empty page, an error, or a page that waits until it is let go."""

    def __init__(self) -> None:
        self.let_go, self.connections = threading.Event(), set[int]()
        super().__init__(("127.0.0.1", 0), PageHandler)


class PageHandler(BaseHTTPRequestHandler):
    """One connection of a `PageServer`."""

    protocol_version = "HTTP/1.1"
    server: PageServer

    def do_GET(self) -> None:
        self.server.connections.add(self.client_address[1])
        if self.path == "/late":
            self.server.let_go.wait(10)
        body = b'{"recommendations": []}' if self.path == "/empty" else _PAGE
        self.send_response(500 if self.path == "/error" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def pages() -> Iterator[PageServer]:
    with PageServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.let_go.set()
        server.shutdown()
        thread.join()


def test_calls_in_turn_share_a_connection_and_count_errors_and_empty_pages(pages: PageServer) -> None:
    client = HttpClient(pages.server_port, page_items)
    calls = client.in_turn(["/page", "/empty", "/error", "/page"])
    assert (calls.code == 0).tolist() == [True, True, False, True]
    assert calls.units.tolist() == [2, 0, 0, 2]
    assert calls.degraded.tolist() == [False, True, True, False]
    assert np.all(calls.sent[1:] >= calls.done[:-1])
    assert len(pages.connections) == 1


def test_calls_that_are_due_do_not_wait_for_earlier_ones(pages: PageServer) -> None:
    client = HttpClient(pages.server_port, page_items, timeout=10)
    threading.Timer(0.5, pages.let_go.set).start()
    calls = client.when_due(["/late", "/page", "/page"], np.array([0.0, 0.01, 0.02]))
    assert not calls.code.any()
    assert calls.done[0] > calls.done[1]
    assert calls.done[0] > calls.done[2]
    assert calls.latency[0] >= 0.4


def test_a_call_without_an_answer_is_an_error_and_the_next_one_is_not(pages: PageServer) -> None:
    calls = HttpClient(pages.server_port, page_items, timeout=0.2).in_turn(["/late", "/page"])
    assert (calls.code == 0).tolist() == [False, True]


def test_a_peer_that_cannot_fit_or_start_says_why(tmp_path: Path) -> None:
    """This Python has no Cornac."""
    with pytest.raises(PeerError, match="No module named 'cornac'"):
        cornac_server.fit(Path(sys.executable), ['["u", "i"]'], tmp_path)
    with (
        pytest.raises(PeerError, match="does not start"),
        cornac_server.running(Path(sys.executable), _MODEL, tmp_path),
    ):
        pass


def test_a_peer_and_its_worker_are_stopped_on_an_error(tmp_path: Path) -> None:
    """A program that ignores SIGTERM and starts another stands in for gunicorn and its worker."""
    python = tmp_path / "python"
    program = (
        "import signal, socket, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "port = int(next(a for a in sys.argv if a.startswith('--bind')).rpartition(':')[2])\n"
        "server = socket.create_server(('127.0.0.1', port))\n"
        "subprocess.Popen(['sleep', '60'])\n"
        "time.sleep(60)\n"
    )
    python.write_text(f"#!{sys.executable}\n{program}")
    python.chmod(0o755)
    processes: list[int] = []
    with (
        pytest.raises(KeyboardInterrupt),
        cornac_server.running(python, _MODEL, tmp_path) as server,
    ):
        end = time.monotonic() + 10
        while len(processes) < 2 and time.monotonic() < end:
            processes = procfs.with_descendants([server.process_id])
        raise KeyboardInterrupt
    assert len(processes) == 2
    end = time.monotonic() + 10
    while any(map(_runs, processes)) and time.monotonic() < end:  # the kernel needs a moment to end them
        time.sleep(0.01)
    assert not any(map(_runs, processes))


def _runs(process: int) -> bool:
    """Whether a process runs: one that has ended and is not reaped yet has no command line."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False
