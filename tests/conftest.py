"""Fixtures of the whole suite: databases, clocks and the small shop."""

import gc
import os
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
import torch

from services.core import gc_tuning
from services.storage import store
from tests.support.prediction_models import write_prediction_models
from tests.support.shop_server import Shop, Stub
from tests.support.shops import make_bundle

# A shell that runs the suite in the background makes it and its children ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
_REQUIRED = frozenset(filter(None, os.environ.get("VITRINE_REQUIRE", "").split(",")))
_END_TO_END = Path(__file__).parent / "e2e"


def skip_without(what: str, reason: str) -> None:
    """Skip the test; fail it instead if VITRINE_REQUIRE lists what is missing."""
    if what in _REQUIRED:
        pytest.fail(f"{what} is in VITRINE_REQUIRE: {reason}")
    pytest.skip(f"{what}: {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the end-to-end tests as slow."""
    for item in items:
        if item.path.is_relative_to(_END_TO_END):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End the summary with the number of skips and their reasons."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    line = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common()) or "none"
    terminalreporter.write_line(f"skipped: {line}")


class Clock:
    """A clock that moves only when a test advances it."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **span: float) -> None:
        self.now += timedelta(**span)


@pytest.fixture
def tuned_gc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tune the garbage collector as a server does, and undo it after the test."""
    thresholds = gc.get_threshold()
    monkeypatch.setattr(gc_tuning, "_enabled", False)
    gc_tuning.enable()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.fixture(scope="module")
def single_thread() -> Iterator[None]:
    """Use one thread in torch: threads slow the small batches of tests down when cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL template of a PostgreSQL server of the suite, on a socket in a private folder."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    pg_ctl = str(installed[-1]) if installed else shutil.which("pg_ctl")
    if pg_ctl is None:
        skip_without("postgres", "pg_ctl is not installed")
        return
    # Pytest makes its own temporary folder unreadable for other users, such as postgres.
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
    """An empty database: the test runs once on SQLite and once on PostgreSQL."""
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
    """The bundle of the small shop; tests only read it."""
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(params=["one", "three"])
def shop(request: pytest.FixtureRequest, bundle: Path, tmp_path: Path) -> Shop:
    """The small shop, served by one app with all services and by three apps."""
    return Shop(bundle, tmp_path / "state", request.param)


@pytest.fixture
def all_in_one(bundle: Path, tmp_path: Path) -> Shop:
    """The small shop, served by one app with all services."""
    return Shop(bundle, tmp_path / "state", "one")


@pytest.fixture
async def stub(shop: Shop) -> AsyncIterator[Stub]:
    """A stub of the small shop, served by one app and by three apps."""
    async with shop.serve() as stub:
        yield stub


@pytest.fixture
async def all_in_one_stub(all_in_one: Shop) -> AsyncIterator[Stub]:
    """A stub of the small shop, served by one app."""
    async with all_in_one.serve() as stub:
        yield stub


@pytest.fixture(scope="session")
def prediction_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the small shop with prediction models; tests only read it."""
    return make_bundle(tmp_path_factory.mktemp("prediction_shop"), more=write_prediction_models)


@pytest.fixture(params=["one", "three"])
def prediction_shop(prediction_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Shop:
    """The shop with prediction models, with the real clock."""
    return Shop(prediction_bundle, tmp_path / "state", request.param, clock=None)


@pytest.fixture
async def prediction_stub(prediction_shop: Shop) -> AsyncIterator[Stub]:
    """A stub of the shop with prediction models, served by one app and by three apps."""
    async with prediction_shop.serve() as stub:
        yield stub
