"""Processes share one signing secret, and a short secret is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from cli import main
from services.core.errors import FailedPrecondition, StorageFull
from services.storage.signing_secret import MIN_BYTES, signing_secret
from tests.support.disks import small_disk
from tests.support.shop_server import Shop

_START = """
import sys
from pathlib import Path
from services.storage.signing_secret import signing_secret
sys.stdin.readline()
print(signing_secret("", Path(sys.argv[1])).hex())
"""


@pytest.mark.parametrize("round_", range(2))
def test_processes_that_start_together_have_one_secret(tmp_path: Path, round_: int) -> None:
    command = [sys.executable, "-c", _START, str(tmp_path / "state")]
    starters = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("now\n")
        starter.stdin.flush()
    secrets = {starter.communicate(timeout=60)[0].strip() for starter in starters}
    assert len(secrets) == 1
    assert len(bytes.fromhex(secrets.pop())) >= MIN_BYTES
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["secret"]
    assert (tmp_path / "state" / "secret").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", ["", "\n", "changeme", "x" * (MIN_BYTES - 1) + "\n"])
def test_a_short_secret_is_refused_in_a_file_and_in_a_setting(tmp_path: Path, content: str) -> None:
    (tmp_path / "secret").write_text(content)
    with pytest.raises(FailedPrecondition, match=r"secret has \d+ bytes; at least 32 .* delete the file"):
        signing_secret("", tmp_path)
    if content.strip():
        with pytest.raises(FailedPrecondition, match=r"--secret .*openssl rand -hex 32"):
            signing_secret(content.strip(), tmp_path)
    assert (tmp_path / "secret").read_text() == content  # an operator decides


def test_a_trailing_newline_of_a_secret_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s" * MIN_BYTES + "\n")
    assert signing_secret("", tmp_path) == b"s" * MIN_BYTES
    assert signing_secret("s" * MIN_BYTES, tmp_path) == b"s" * MIN_BYTES


def test_a_full_disk_leaves_no_truncated_secret(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk.path / "state").mkdir()
        with (
            (disk.path / "ballast").open("wb", buffering=0) as ballast,
            pytest.raises(OSError, match="space"),
        ):
            while True:
                ballast.write(bytes(4096))
        with pytest.raises(StorageFull, match="is full"):
            signing_secret("", disk.path / "state")
        assert list((disk.path / "state").iterdir()) == []
        disk.resize(2)
        assert len(signing_secret("", disk.path / "state")) >= MIN_BYTES


async def test_a_short_secret_stops_the_gateway_and_the_analysis(
    all_in_one: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FailedPrecondition, match="has 5 bytes"):
        async with all_in_one.serve(secret="short"):
            pass
    async with all_in_one.serve():
        pass
    secret = tmp_path / "state" / "secret"
    secret.write_bytes(b"")
    with pytest.raises(FailedPrecondition, match="has 0 bytes"):
        async with all_in_one.serve():
            pass
    assert main.main(["analyze", "--state", str(tmp_path / "state")]) == 1
    assert "has 0 bytes" in capsys.readouterr().err
