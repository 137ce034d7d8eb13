"""The image fetcher enforces limits, retries and blocks private networks."""

import shutil
import ssl
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.embedding.images.fetcher import FetchFailed, ImageFetcher
from tests.conftest import skip_without
from tests.support.image_site import FILE, LOOPBACK, Site, site

__all__ = ["site"]  # a fixture


async def fetch(fetcher: ImageFetcher, uri: str) -> bytes:
    """The file, by a fetcher that is closed afterwards."""
    try:
        return await fetcher.fetch(uri)
    finally:
        await fetcher.close()


async def test_a_file_is_fetched_after_redirects_and_a_transient_failure(site: Site) -> None:
    def fetcher() -> ImageFetcher:
        return ImageFetcher(allowed=LOOPBACK)

    assert await fetch(fetcher(), f"{site.url}/red.png?size=2&name=a%20b#top") == FILE
    assert site.requested_paths == ["/red.png?size=2&name=a%20b"]
    assert await fetch(fetcher(), f"{site.url}/to/to/to/red.png") == FILE
    assert await fetch(fetcher(), f"{site.url}/second/time") == FILE
    assert await fetch(fetcher(), f"{site.url}/écharpe rouge.png") == FILE
    assert site.requested_paths[-1] == "/%C3%A9charpe%20rouge.png"


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
        ("/large/declared", "bytes, at most", 1),
        ("/large/unsaid", "has more than", 1),
    ],
)
async def test_a_failure_has_a_reason_and_only_transient_ones_are_retried(
    site: Site, path: str, reason: str, times: int
) -> None:
    with pytest.raises(FetchFailed, match=reason):
        await fetch(ImageFetcher(allowed=LOOPBACK, seconds=0.5, tries=2), site.url + path)
    assert site.requested_paths.count(path) == times


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
async def test_no_spelling_of_a_private_address_is_reached(site: Site, host: str) -> None:
    port = site.url.rpartition(":")[2]
    with pytest.raises(FetchFailed, match="private network"):
        await fetch(ImageFetcher(), f"http://{host}:{port}/a")
    assert site.requested_paths == []


async def _loopback(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


async def test_a_redirect_into_a_private_network_is_refused(site: Site) -> None:
    for inside in ("10.0.0.1/a", "169.254.169.254/latest/meta-data", "[::1]/a"):
        with pytest.raises(FetchFailed, match="private network"):
            await fetch(ImageFetcher(allowed=LOOPBACK), f"{site.url}/away/{inside}")


async def test_a_host_is_resolved_once_for_a_connection(site: Site) -> None:
    """Rebinding: a name that turns private later finds nobody who asks again."""
    port = site.url.rpartition(":")[2]
    hosts: list[str] = []

    async def resolve(host: str, _: int) -> Sequence[str]:
        hosts.append(host)
        return ["127.0.0.1"]

    with pytest.raises(FetchFailed, match="private network"):
        await fetch(ImageFetcher(resolve=resolve), f"http://shop.example:{port}/a")
    assert hosts == ["shop.example"]
    assert (
        await fetch(ImageFetcher(allowed=LOOPBACK, resolve=resolve), f"http://shop.example:{port}/b") == FILE
    )
    assert hosts == ["shop.example"] * 2
    assert site.requested_paths == ["/b"]


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
async def test_an_invalid_url_is_refused_with_the_reason(uri: str, reason: str) -> None:
    with pytest.raises(FetchFailed, match=reason):
        await fetch(ImageFetcher(allowed=LOOPBACK, tries=1), uri)


async def test_tls_verifies_the_host_and_a_redirect_keeps_tls(site: Site, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        skip_without("openssl", "openssl is not installed")
    command = [
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
    command += ["-addext", "subjectAltName=DNS:shop.example", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    secure, context = Site(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    threading.Thread(target=secure.serve_forever, args=(0.01,), daemon=True).start()

    def fetcher() -> ImageFetcher:
        trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        return ImageFetcher(allowed=LOOPBACK, tries=1, resolve=_loopback, ssl_context=trusting)

    port = secure.server_address[1]
    assert await fetch(fetcher(), f"https://shop.example:{port}/a") == FILE
    with pytest.raises(FetchFailed, match="cannot be reached"):
        await fetch(fetcher(), f"https://other.example:{port}/a")
    with pytest.raises(FetchFailed, match="https to http"):
        await fetch(fetcher(), f"https://shop.example:{port}/away/{site.url.removeprefix('http://')}/a")
    with pytest.raises(FetchFailed, match="https to http"):
        await fetch(fetcher(), f"https://shop.example:{port}/AWAY/{site.url.removeprefix('http://')}/a")
    assert site.requested_paths == []
    secure.shutdown()
    secure.server_close()
