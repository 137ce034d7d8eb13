"""Fetching over real HTTP: limits, retries, and every way into a private network that we know of."""

import asyncio
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from services.embedding.fetching import Fetcher, FetchFailed
from tests.conftest import skip_without
from tests.sites import FILE, LOOPBACK, Site, site

__all__ = ["site"]  # a fixture


def fetched(fetcher: Callable[[], Fetcher], uri: str) -> bytes:
    async def main() -> bytes:
        mine = fetcher()
        try:
            return await mine.fetch(uri)
        finally:
            await mine.close()

    return asyncio.run(main())


def test_a_file_comes_after_redirects_and_a_failure_that_passes(site: Site) -> None:
    def fetcher() -> Fetcher:
        return Fetcher(allowed=LOOPBACK)

    assert fetched(fetcher, f"{site.url}/red.png?size=2&name=a%20b#top") == FILE
    assert site.asked == ["/red.png?size=2&name=a%20b"]
    assert fetched(fetcher, f"{site.url}/to/to/to/red.png") == FILE
    assert fetched(fetcher, f"{site.url}/second/time") == FILE
    assert fetched(fetcher, f"{site.url}/écharpe rouge.png") == FILE
    assert site.asked[-1] == "/%C3%A9charpe%20rouge.png"


@pytest.mark.parametrize(
    ("path", "reason", "times"),
    [
        ("/status/404", "status 404", 1),
        ("/away/%5B::1", "redirects to no address", 1),
        ("/status/500", "status 500", 2),
        ("/status/429", "status 429", 2),
        ("/to" * 7 + "/a", "redirects more than 5 times", 1),
        ("/torn", "cannot be reached", 2),
        ("/drip", "took more than 0.5 seconds", 2),
        ("/large/said", "bytes, at most", 1),
        ("/large/unsaid", "has more than", 1),
    ],
)
def test_what_cannot_be_had_says_why_and_is_tried_again_only_if_that_may_help(
    site: Site, path: str, reason: str, times: int
) -> None:
    with pytest.raises(FetchFailed, match=reason):
        fetched(lambda: Fetcher(allowed=LOOPBACK, seconds=0.5, tries=2), site.url + path)
    assert site.asked.count(path) == times


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "0.0.0.0",  # noqa: S104 - an address to be refused
        "2130706433",
        "0x7f.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "169.254.169.254",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "[fe80::1]",
        "[fc00::1]",
        "[ff02::1]",
        "168.63.129.16",
        "[::ffff:0:7f00:1]",
    ],
)
def test_no_spelling_of_a_private_address_is_reached(site: Site, host: str) -> None:
    port = site.url.rpartition(":")[2]
    with pytest.raises(FetchFailed, match="private network"):
        fetched(Fetcher, f"http://{host}:{port}/a")
    assert site.asked == []


async def _loopback(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


def test_a_redirect_into_a_private_network_is_refused(site: Site) -> None:
    for inside in ("10.0.0.1/a", "169.254.169.254/latest/meta-data", "[::1]/a"):
        with pytest.raises(FetchFailed, match="private network"):
            fetched(lambda: Fetcher(allowed=LOOPBACK), f"{site.url}/away/{inside}")


def test_a_name_is_looked_up_once_for_a_connection(site: Site) -> None:
    """Rebinding: a name that turns private later finds nobody who asks again."""
    port = site.url.rpartition(":")[2]
    asked: list[str] = []

    async def resolve(host: str, _: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"]

    with pytest.raises(FetchFailed, match="private network"):
        fetched(lambda: Fetcher(resolve=resolve), f"http://shop.example:{port}/a")
    assert asked == ["shop.example"]
    assert (
        fetched(lambda: Fetcher(allowed=LOOPBACK, resolve=resolve), f"http://shop.example:{port}/b") == FILE
    )
    assert asked == ["shop.example"] * 2
    assert site.asked == ["/b"]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("ftp://example.org/a", "no http"),
        ("file:///etc/passwd", "no http"),
        ("http://", "no http"),
        ("http://user:secret@127.0.0.1/a", "credentials"),
        ("http://127.0.0.1:99999/a", "no address"),
        ("http://[::1/a", "no address"),
        ("http://" + "a" * 70 + ".example/", "no address"),
        ("http://127.0.0.1:1/a", "cannot be reached"),
    ],
)
def test_a_wrong_address_says_what_is_wrong(uri: str, reason: str) -> None:
    with pytest.raises(FetchFailed, match=reason):
        fetched(lambda: Fetcher(allowed=LOOPBACK, tries=1), uri)


def test_tls_asks_for_the_name_and_is_not_left_by_a_redirect(site: Site, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        skip_without("openssl", "openssl is not installed")
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=shop.example",
    ]
    made += ["-addext", "subjectAltName=DNS:shop.example", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(made, check=True, cwd=tmp_path, capture_output=True)
    secure, context = Site(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    threading.Thread(target=secure.serve_forever, args=(0.01,), daemon=True).start()

    def fetcher() -> Fetcher:
        trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        return Fetcher(allowed=LOOPBACK, tries=1, resolve=_loopback, ssl_context=trusting)

    port = secure.server_address[1]
    assert fetched(fetcher, f"https://shop.example:{port}/a") == FILE
    with pytest.raises(FetchFailed, match="cannot be reached"):
        fetched(fetcher, f"https://other.example:{port}/a")
    with pytest.raises(FetchFailed, match="https to http"):
        fetched(fetcher, f"https://shop.example:{port}/away/{site.url.removeprefix('http://')}/a")
    with pytest.raises(FetchFailed, match="https to http"):
        fetched(fetcher, f"https://shop.example:{port}/AWAY/{site.url.removeprefix('http://')}/a")
    assert site.asked == []
    secure.shutdown()
    secure.server_close()
