"""Addresses are parsed, and an invalid one is refused with a reason."""

import pytest

from services.core.addresses import Address, parse_address
from services.core.errors import InvalidArgument
from services.serving.settings import settings_of


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:50051", ("127.0.0.1", 50051)), ("[::1]:0", ("::1", 0)), ("db.shop-1.eu:65535", None)],
)
def test_valid_addresses_are_parsed(text: str, address: tuple[str, int] | None) -> None:
    assert parse_address(text) == (address or ("db.shop-1.eu", 65535))
    assert isinstance(parse_address(text), Address)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("127.0.0.1", "no port"),
        ("[::1]", "no port"),
        ("127.0.0.1:99999", "out of range, 0 to 65535"),
        ("127.0.0.1:-1", "not a port"),
        ("127.0.0.1:http", "not a port"),
        ("127.0.0.1:", "not a port"),
        (":50051", "0.0.0.0:50051"),
        ("::1:50051", "needs brackets"),
        ("a b:1", "not a host name"),
        ("unix:/tmp/socket", "Unix sockets"),
        ("", "no port"),
    ],
)
def test_an_invalid_address_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_address(text)
    with pytest.raises(InvalidArgument, match=f"--address.*{reason}"):
        settings_of({"bundle": "b", "address": text})
    if text:
        for flag in ("embedding", "ranking", "metrics"):
            with pytest.raises(InvalidArgument, match=f"--{flag}.*{reason}"):
                settings_of({"bundle": "b", flag: text})


def test_a_peer_can_be_a_dns_name_and_needs_a_port() -> None:
    assert settings_of({"bundle": "b", "embedding": "dns:///items:50051"}).embedding == "dns:///items:50051"
    with pytest.raises(InvalidArgument, match="port 0"):
        settings_of({"bundle": "b", "ranking": "127.0.0.1:0"})
