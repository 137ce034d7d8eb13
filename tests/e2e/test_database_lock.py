"""One process at a time writes a database, and a second one is refused."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from services.core.errors import FailedPrecondition, Unavailable
from services.serving.loaded_bundle import ALL, EMBEDDING, GATEWAY, RANKING
from services.storage import store
from services.storage.database_lock import lock_database
from tests.support.processes import free_port, wait_until_serving

_HOLD = """
import sys
from services.storage import store
from services.storage.database_lock import lock_database
lock = lock_database(store.open_engine(sys.argv[1]), sys.argv[2], "a test")
print("held", flush=True)
sys.stdin.readline()
"""


@contextmanager
def _holder(url: str, service: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds a lock."""
    command = [sys.executable, "-c", _HOLD, url, service]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_until_the_first_is_killed(database_url: str, engine: sa.Engine) -> None:
    with _holder(database_url, RANKING) as process:
        lock_database(engine, EMBEDDING, "another service").release() if "postgres" in database_url else None
        with pytest.raises(FailedPrecondition, match=rf"in use by process {process.pid} on .*a test"):
            lock_database(engine, RANKING, "the second")
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock = lock_database(engine, RANKING, "the second")
    with pytest.raises(FailedPrecondition, match="in use by this process"):
        lock_database(engine, RANKING, "the second")
    lock.release()
    lock_database(engine, RANKING, "the second").release()


def test_the_lock_belongs_to_the_file_and_not_to_its_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    lock = lock_database(store.open_engine(f"sqlite:///{tmp_path}/a.sqlite"), RANKING, "the first")
    with pytest.raises(
        FailedPrecondition, match=f"in use by process|in use by this process {os.getpid()}|in"
    ):
        lock_database(store.open_engine(f"sqlite:///{tmp_path}/link/a.sqlite"), RANKING, "the second")
    lock.release()


def test_a_process_without_its_session_stops_writing(
    postgres: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = postgres.format(database="postgres")
    engine, admin = store.open_engine(url), sa.create_engine(url, isolation_level="AUTOCOMMIT")
    lock = lock_database(engine, RANKING, "the first")
    store.create(engine, [], "locks")
    writer = store.Writer(engine)
    kill = sa.text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND granted"
    )

    def write() -> BaseException | None:
        return writer.submit(lambda c: store.take_sequence(c, "locks")).exception()

    try:
        assert write() is None
        with admin.connect() as connection:
            assert connection.execute(kill).scalar() == 1
        assert write() is None  # nobody else was there: it is taken again
        with admin.connect() as connection:
            connection.execute(kill)
        with _holder(url, RANKING) as process:
            error = write()
            assert isinstance(error, FailedPrecondition)
            assert f"process {process.pid}" in str(error)
        assert "restart this one" in str(write())  # for what is in memory here is not the truth
    finally:
        writer.close()
        lock.release()
        engine.dispose()
        admin.dispose()


def test_a_lock_is_taken_again_once_the_database_takes_connections_again(
    postgres: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"test_lock_{uuid4().hex}"
    url = postgres.format(database=name)
    server = sa.create_engine(postgres.format(database="postgres"), isolation_level="AUTOCOMMIT")
    admin = server.connect()
    admin.execute(sa.text(f"CREATE DATABASE {name}"))
    engine = store.open_engine(url)
    lock = lock_database(engine, RANKING, "the first")
    store.create(engine, [], "locks")
    writer = store.Writer(engine)
    writer.health.probe_seconds = 0.05

    def write() -> BaseException | None:
        return writer.submit(lambda c: store.take_sequence(c, "locks")).exception()

    try:
        assert write() is None
        admin.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        kill = sa.text(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_locks JOIN pg_database d ON d.oid = database "
            "WHERE locktype = 'advisory' AND granted AND datname = :name"
        )
        assert admin.execute(kill, {"name": name}).scalar() == 1
        for _ in range(3):  # the writer's own connection is still there
            error = write()
            assert isinstance(error, Unavailable)
            assert "cannot be taken again: " in str(error)
            assert "not currently accepting connections" in str(error)
        assert isinstance(writer.health.refusal, Unavailable)
        admin.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        assert write() is None
        assert "was lost with its connection, and taken again" in caplog.text
        with pytest.raises(FailedPrecondition, match="in use by this process"):
            lock_database(engine, RANKING, "the first")
        deadline = time.monotonic() + 60
        while writer.health.refusal is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert writer.health.refusal is None
    finally:
        writer.close()
        lock.release()
        engine.dispose()
        admin.close()
        server.dispose()


def test_a_database_that_cannot_be_reached_is_named(postgres: str) -> None:
    with pytest.raises(
        FailedPrecondition, match=r"'nowhere' of PostgreSQL \(ranking\) cannot be used: .*does not exist"
    ):
        lock_database(store.open_engine(postgres.format(database="nowhere")), "ranking", "the first")


def _command(bundle: Path, state: Path, service: str, port: int, **flags: str) -> list[str]:
    command = [sys.executable, "-m", "cli.main", "serve", *([service] if service else [])]
    command += ["--bundle", str(bundle), "--state", str(state), "--address", f"127.0.0.1:{port}"]
    return command + [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def _assert_refused(command: list[str], what: str, by: int) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("vitrine: ")
    assert what in last
    assert f"in use by process {by} on" in last
    assert "Traceback" not in result.stderr


@asynccontextmanager
async def _running(command: list[str], port: int, service: str) -> AsyncIterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command)
    try:
        await wait_until_serving(port, service)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["sqlite", "postgres"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The flags that name both databases: of one state by themselves, or one of PostgreSQL."""
    if request.param == "sqlite":
        return {
            "embedding_database": f"sqlite:///{tmp_path}/state/embedding.sqlite",
            "ranking_database": f"sqlite:///{tmp_path}/state/ranking.sqlite",
        }
    template: str = request.getfixturevalue("postgres")
    name = f"test_lock_{os.getpid()}"
    admin = sa.create_engine(template.format(database="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    admin.dispose()
    url = template.format(database=name)
    return {"embedding_database": url, "ranking_database": url}


async def test_split_processes_are_refused_next_to_an_all_in_one_process(
    bundle: Path, tmp_path: Path, databases: dict[str, str]
) -> None:
    state, port = tmp_path / "state", free_port()
    assert set(ALL) == {EMBEDDING, RANKING, GATEWAY}
    async with _running(_command(bundle, state, "", port, **databases), port, GATEWAY) as one:
        elsewhere = tmp_path / "elsewhere"
        near = {"embedding": f"127.0.0.1:{port}"}
        _assert_refused(_command(bundle, state, EMBEDDING, free_port(), **databases), str(state), one.pid)
        _assert_refused(
            _command(bundle, elsewhere, EMBEDDING, free_port(), **databases), "embedding", one.pid
        )
        _assert_refused(
            _command(bundle, elsewhere, RANKING, free_port(), **databases, **near), "ranking", one.pid
        )


async def test_an_all_in_one_process_is_refused_next_to_split_processes(
    bundle: Path, tmp_path: Path, databases: dict[str, str]
) -> None:
    state, ports = tmp_path / "state", (free_port(), free_port())
    near = {"embedding": f"127.0.0.1:{ports[0]}"}
    async with AsyncExitStack() as stack:
        embedding = await stack.enter_async_context(
            _running(_command(bundle, state, EMBEDDING, ports[0], **databases), ports[0], EMBEDDING)
        )
        ranking = await stack.enter_async_context(
            _running(_command(bundle, state, RANKING, ports[1], **databases, **near), ports[1], RANKING)
        )
        _assert_refused(_command(bundle, state, "", free_port(), **databases), str(state), embedding.pid)
        only_ranking = {"ranking_database": databases["ranking_database"]}
        _assert_refused(
            _command(bundle, tmp_path / "elsewhere", "", free_port(), **only_ranking), "ranking", ranking.pid
        )
