"""Databases and clocks for the suite; a skip of something in VITRINE_REQUIRE is a failure."""

import gc
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
import torch

from services import heap, runtime, store
from tests.foretelling import components
from tests.recommending import Shop
from tests.shops import make_bundle

runtime.prepare()
_REQUIRED = frozenset(filter(None, os.environ.get("VITRINE_REQUIRE", "").split(",")))


def skip_without(what: str, reason: str) -> None:
    if what in _REQUIRED:
        pytest.fail(f"{what} is in VITRINE_REQUIRE: {reason}")
    pytest.skip(f"{what}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A skip must not hide: the summary ends in how many there were, and why."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    line = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common()) or "none"
    terminalreporter.write_line(f"skipped: {line}")


class Clock:
    """A time that moves only when told to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **span: float) -> None:
        self.now += timedelta(**span)


@pytest.fixture
def own_heap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The heap as of a process that serves; the collector has it back afterwards."""
    thresholds = gc.get_threshold()
    monkeypatch.setattr(heap, "_owned", False)
    heap.own()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Batches as small as a test's gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, on a socket in a folder that only we know."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    pg_ctl = str(found[-1]) if found else shutil.which("pg_ctl")
    if pg_ctl is None:
        skip_without("postgres", "pg_ctl is not installed")
        return
    # Not under pytest's own folder, which another run of pytest closes to other users.
    binaries, root = Path(pg_ctl).parent, Path(tempfile.mkdtemp(prefix="vitrine-postgres-"))
    # The server refuses to run as root.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(root, "postgres")

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, cwd=root, stdout=subprocess.DEVNULL)

    data = str(root / "data")
    run(str(binaries / "initdb"), "-D", data, "-A", "trust", "-U", "vitrine", "-E", "UTF8", "--locale=C")
    run(pg_ctl, "-D", data, "-w", "-l", str(root / "log"), "-o", f"-k {root} -c listen_addresses=''", "start")
    try:
        yield f"postgresql+psycopg://vitrine@/{{database}}?host={root}"
    finally:
        run(pg_ctl, "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(root)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.sqlite'}"
    template: str = request.getfixturevalue("postgres")
    name = f"test_{uuid4().hex}"
    admin = sa.create_engine(template.format(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return template.format(database=name)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = store.open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small shop's bundle, which nobody changes."""
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(params=["one", "three"])
def shop(request: pytest.FixtureRequest, bundle: Path, tmp_path: Path) -> Shop:
    """The small shop in one process' worth of services, and in three."""
    return Shop(bundle, tmp_path / "state", request.param)


@pytest.fixture
def one(bundle: Path, tmp_path: Path) -> Shop:
    """The same in one alone."""
    return Shop(bundle, tmp_path / "state", "one")


@pytest.fixture(scope="session")
def foretelling_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small shop's with models that foretell, which nobody changes."""
    return make_bundle(tmp_path_factory.mktemp("foretelling"), more=components)


@pytest.fixture(params=["one", "three"])
def foretelling(foretelling_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Shop:
    """A shop over it, whose clock runs."""
    return Shop(foretelling_bundle, tmp_path / "state", request.param, clock=None)
