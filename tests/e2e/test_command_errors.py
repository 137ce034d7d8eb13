"""Errors that an operator can fix end in one line and an exit code, without a traceback."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cli.main import main
from services.catalog.bundle import MANIFEST, SCHEMA
from services.core import command_errors
from services.core.addresses import listen_problem
from tests.conftest import skip_without
from tests.e2e import test_resume as shops
from tests.support.models import make_image_encoder, make_text_encoder
from tests.support.processes import free_port

CLI = [sys.executable, "-m", "cli.main"]


def check(code: int, stderr: str, expected: int, *parts: str) -> None:
    """The exit code, and one line for the operator that has these parts; besides it there are log lines."""
    lines = [line for line in stderr.splitlines() if line.startswith("vitrine: ")]
    assert (code, len(lines)) == (expected, 1), stderr
    assert "Traceback" not in stderr
    for part in parts:
        assert re.search(part, lines[0]), lines[0]


def vitrine(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    """The exit code and stderr of a process."""
    run = subprocess.run(
        [*CLI, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        env=os.environ | environment,
    )
    return run.returncode, run.stderr


def here(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """The same within this process: for what ends before anything is served."""
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--address", "127.0.0.1", "no port"),
        ("--address", "127.0.0.1:99999", "out of range"),
        ("--grace", "soon", "'soon'.*valid number"),
        ("--grace", "-1", "'-1'.*greater than or equal to 0"),
        ("--index-storage", "fp8", "'fp8'.*'fp16', 'sq8'"),
        ("--device", "tpu", "'tpu'"),
        ("--fixed-time", "noon", "'noon'"),
        ("--fetch-networks", "10.1.0.0/99", "fetch-networks"),
        ("--max-attribute-names", "0", "greater than or equal to 1"),
        ("--embedding-database", "nonsense", "not a database URL.*postgresql"),
        ("--ranking-database", "oracle://a:confidential@b/c", "oracle is not supported"),
        ("--state", "/etc/passwd", "a directory is needed"),
        ("--bundle", "/nowhere", "contains no bundle.*vitrine train"),
    ],
)
def test_an_invalid_flag_is_named_with_its_value_and_the_allowed_ones(
    flag: str, value: str, reason: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, str | Path] = {"--bundle": bundle, "--state": tmp_path / "state"}
    flags |= {"--address": "127.0.0.1:0", flag: value}
    code, stderr = here(capsys, "serve", *(part for pair in flags.items() for part in pair))
    check(code, stderr, command_errors.FAILED, reason)
    assert "confidential" not in stderr


def test_an_invalid_environment_variable_is_named(bundle: Path) -> None:
    code, stderr = vitrine(
        "serve",
        "--bundle",
        bundle,
        VITRINE_GRACE="abc",
        VITRINE_ADRESS="x:1",
        VITRINE_SERVICE_HOST="10.0.0.1",
    )
    check(code, stderr, 1, "VITRINE_GRACE.*'abc'.*valid number")
    assert "VITRINE_ADRESS is not a setting and has no effect; did you mean VITRINE_ADDRESS?" in stderr
    assert "SERVICE_HOST" not in stderr


@pytest.mark.parametrize("flag", ["--address", "--metrics"])
def test_a_port_in_use_is_named(flag: str, bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        addresses = {"--address": "127.0.0.1:0", flag: f"127.0.0.1:{port}"}
        flags = [part for pair in addresses.items() for part in pair]
        code, stderr = vitrine("serve", "--bundle", bundle, "--state", tmp_path / "state", *flags)
    check(code, stderr, 1, f"127.0.0.1:{port} .*in use.*ss -ltnp.*{flag}")
    assert len([line for line in stderr.splitlines() if not re.match("20|[EWI][0-9]|vitrine: ", line)]) == 0


def test_an_address_that_cannot_be_bound_has_a_reason() -> None:
    assert "not an address of this machine" in listen_problem("192.0.2.1:5005", "--address")
    assert "'nowhere.invalid' is unknown" in listen_problem("nowhere.invalid:5005", "--address")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated manifest": (lambda b: _truncate(b / MANIFEST), "manifest.json is damaged.*train again"),
    "empty manifest": (lambda b: (b / MANIFEST).write_text("{}") and None, "manifest.json is damaged"),
    "another schema": (
        lambda b: (
            (b / MANIFEST).write_text(
                (b / MANIFEST).read_text().replace(f'"schema": {SCHEMA}', '"schema": 99')
            )
            and None
        ),
        "has schema 99",
    ),
    "missing file": (
        lambda b: (b / "popular/numbers.npy").unlink(),
        "numbers.npy is missing from the bundle",
    ),
    "truncated array": (lambda b: _truncate(b / "popular/numbers.npy"), "numbers.npy is not the file"),
    "truncated weights": (
        lambda b: _truncate(next((b / "text").rglob("*.safetensors"))),
        "safetensors is not the file that was published",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_named(
    damage: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, reason = DAMAGES[damage]
    copy = tmp_path / bundle.name
    shutil.copytree(bundle, copy)
    apply(copy)
    code, stderr = here(capsys, "serve", "--bundle", copy, "--state", tmp_path / "state")
    check(code, stderr, 1, reason)


def _damage_state(state: Path) -> str:
    (state / "embedding.sqlite").write_bytes(b"no database at all" * 1000)
    return "is damaged|not a database"


def _of_another_version(state: Path) -> str:
    engine = sa.create_engine(f"sqlite:///{state / 'embedding.sqlite'}")
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE items (number INTEGER PRIMARY KEY, name TEXT)"))
    engine.dispose()
    return "from another version.*start from an empty state"


def _malform_state(state: Path) -> str:
    _of_another_version(state)
    with (state / "embedding.sqlite").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 4000)
    return "is damaged|malformed"


@pytest.mark.parametrize("prepare", [_damage_state, _of_another_version, _malform_state])
def test_an_unreadable_state_is_named(prepare: Callable[[Path], str], bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    reason = prepare(state)
    flags = "--bundle", bundle, "--state", state, "--address", "127.0.0.1:0"
    check(*vitrine("serve", *flags), 1, reason)


def test_a_postgresql_that_is_down_is_named_without_its_password(bundle: Path, tmp_path: Path) -> None:
    url = f"postgresql+psycopg://shop:confidential@127.0.0.1:{free_port()}/shop"
    flags = "--bundle", bundle, "--state", tmp_path / "state", "--embedding-database", url
    code, stderr = vitrine("serve", *flags)
    check(code, stderr, 1, "database")
    assert "confidential" not in stderr


def test_an_interpreter_or_scenarios_that_do_not_load_are_named(bundle: Path, tmp_path: Path) -> None:
    flags: list[str | Path] = ["--bundle", bundle, "--state", tmp_path / "state"]
    flags += ["--address", "127.0.0.1:0"]
    check(*vitrine("serve", *flags, "--interpreter", "nothing:Nobody"), 1, "interpreter 'nothing:Nobody'")
    wrong = tmp_path / "scenarios.toml"
    wrong.write_text("[home]\nunknown_field = 3\n")
    check(*vitrine("serve", *flags, "--scenarios", wrong), 1, "scenarios.home.*unknown_field")


def as_command(body: str, *arguments: str) -> tuple[int, str]:
    """A process that changes what is installed before it runs the command."""
    code = f"import sys\nfrom cli import main as cli\n{body}\nsys.exit(cli.main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=180
    )
    return run.returncode, run.stderr


@pytest.mark.parametrize(("module", "extra"), [("faiss", "embedding"), ("psycopg", "postgres")])
def test_a_missing_package_names_the_extra_to_install(
    module: str, extra: str, bundle: Path, tmp_path: Path
) -> None:
    url = "postgresql+psycopg://127.0.0.1/x" if module == "psycopg" else ""
    flags = "--bundle", str(bundle), "--state", str(tmp_path / "state"), "--embedding-database", url
    code, stderr = as_command(f"sys.modules[{module!r}] = None", "serve", *flags, "--address", "127.0.0.1:0")
    check(code, stderr, 1, f"'{module}'.*vitrine\\[{extra}\\]")


def test_a_bug_is_reported_as_one_with_an_optional_traceback() -> None:
    body = "def fail(options): {}['x']\ncli._evaluate = fail"
    arguments = "evaluate", "--data=d", "--bundle=b", "--split=val", "--out=o"
    code, stderr = as_command(body, *arguments)
    check(code, stderr, command_errors.BUG, "bug of Vitrine.*KeyError: 'x'.*VITRINE_TRACEBACK=1")
    code, stderr = as_command(body, "--traceback", *arguments)
    assert "Traceback" in stderr
    assert code == command_errors.BUG


def test_wrong_usage_exits_with_2_and_the_help_lists_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--no-such-flag"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "130 interrupted by Ctrl-C" in " ".join(capsys.readouterr().out.split())


def test_a_reader_that_closes_the_output_is_no_error() -> None:
    body = (
        "def print_much(options):\n    for n in range(100_000): print('line', n)\ncli._evaluate = print_much"
    )
    code = f"import sys\nfrom cli import main as cli\n{body}\nsys.exit(cli.main(sys.argv[1:]))"
    arguments = "evaluate", "--data=d", "--bundle=b", "--split=val", "--out=o"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == command_errors.CLOSED_PIPE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB with nothing left."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)], check=False, capture_output=True
    )
    if mount.returncode:
        skip_without("mount", "only root mounts file systems")
    try:
        (folder / "filler").write_bytes(b"x" * 190_000)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_at_the_start_is_named(small_disk: Path, bundle: Path) -> None:
    flags = "--bundle", bundle, "--state", small_disk / "state", "--address", "127.0.0.1:0"
    check(*vitrine("serve", *flags), 1, "disk.*full")


READ_ONLY_TEMPORARY = """
mount --make-rprivate /
for folder in /tmp /var/tmp; do mount --bind $folder $folder; mount -o remount,ro,bind $folder; done
cd /proc
exec "$@"
"""


def test_without_a_temporary_directory_the_line_names_tmpdir() -> None:
    """As in a container whose root file system is read only; a packed archive of images needs room."""
    alone = ["unshare", "--mount", "sh", "-ec", READ_ONLY_TEMPORARY, "sh"]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        skip_without("mount", "only root mounts file systems")
    # Not the variables of this process: torch has set some that name its own directories.
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shop:
        Path(shop, "items.csv").write_text("id,title\na,mug\n")
        Path(shop, "images").mkdir()
        with tarfile.open(Path(shop, "images", "all.tar.gz"), "w:gz") as archive:
            archive.add(Path(shop, "items.csv"), "a.jpg")
        run = subprocess.run(
            [*alone, *CLI, "inspect", "--data", shop],
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
            env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    check(run.returncode, run.stderr, 1, "TMPDIR")


def signal_process(command: list[str], number: int, when: Callable[[str], bool]) -> tuple[int, str]:
    """Send a signal once a line of stderr says that it is time; the exit code and all of stderr."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if when(line):
            break
    time.sleep(0.2)
    process.send_signal(number)
    rest = process.stderr.read()
    return process.wait(60), "".join(lines) + rest


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, command_errors.INTERRUPTED), (signal.SIGTERM, command_errors.TERMINATED)],
)
def test_an_interrupted_start_ends_in_one_line(
    number: int, expected: int, bundle: Path, tmp_path: Path
) -> None:
    """The interrupt comes while the encoders load."""
    body = (
        "import logging\nfrom services.embedding.encoders import encoders\n"
        "before = encoders.TextEncoder.__init__\n"
        "def slow(self, *rest):\n    logging.getLogger('test').info('loading')\n    import time\n"
        "    time.sleep(2)\n    before(self, *rest)\nencoders.TextEncoder.__init__ = slow"
    )
    code = f"import sys\nfrom cli import main as cli\n{body}\nsys.exit(cli.main(sys.argv[1:]))"
    flags = ["serve", "--bundle", str(bundle), "--state", str(tmp_path / "state"), "--address", "127.0.0.1:0"]
    code_and_stderr = signal_process(
        [sys.executable, "-c", code, *flags], number, lambda line: "loading" in line
    )
    check(*code_and_stderr, expected, "stopped before the services were ready")


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, command_errors.INTERRUPTED), (signal.SIGTERM, command_errors.TERMINATED)],
)
def test_interrupted_training_reports_what_it_kept(number: int, expected: int, tmp_path: Path) -> None:
    make_text_encoder(tmp_path / "bases" / "text")
    make_image_encoder(tmp_path / "bases" / "image")
    shop = shops.write(tmp_path / "shop", shops.items(), shops.events())
    command = [*CLI, *shops.command(shop, tmp_path / "bases", tmp_path / "out")]
    code_and_stderr = signal_process(command, number, lambda line: ": done in" in line)
    check(*code_and_stderr, expected, "interrupted: no bundle was published; .*in .stages")
    assert shops.finished_stages(tmp_path / "out")
    assert shops.version(tmp_path / "out") == []
