"""A web site on loopback with good, broken and slow responses."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from urllib.parse import unquote

import pytest

from services.catalog.items import MAX_IMAGE_BYTES

LOOPBACK = (ip_network("127.0.0.0/8"),)
FILE = b"a photograph"


class Site(ThreadingHTTPServer):
    """A web site on loopback; `requested_paths` records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Pages)
        self.requested_paths: list[str] = []
        self.files: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Pages(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requested_paths.append(self.path)
        name, _, rest = self.path.lstrip("/").partition("/")
        times = self.server.requested_paths.count(self.path)
        if name == "to":
            self._answer(302, location="/" + rest)
        elif name == "away":
            self._answer(302, location="http://" + unquote(rest))
        elif name == "AWAY":
            self._answer(302, location="HTTP://" + unquote(rest))
        elif name == "status":
            self._answer(int(rest))
        elif name == "second" and times == 1:
            self._answer(503)
        elif name == "torn":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(FILE)
            self.close_connection = True
        elif name == "drip":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b".")
                time.sleep(0.05)
        elif name == "large":
            self.send_response(200)
            if rest == "declared":
                self.send_header("content-length", str(MAX_IMAGE_BYTES + 1))
            self.end_headers()
            for _ in range(MAX_IMAGE_BYTES // (1 << 20) + 1 if rest != "declared" else 0):
                self.wfile.write(b"." * (1 << 20))
            self.close_connection = True
        else:
            self._answer(200, self.server.files.get(self.path, FILE))

    def _answer(self, status: int, body: bytes = b"", location: str = "") -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        if location:
            self.send_header("location", location)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True).start()
    yield site
    site.shutdown()
    site.server_close()
