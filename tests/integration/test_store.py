"""The writer groups commits, isolates failures and loses nothing acknowledged to SIGKILL."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.core.errors import FailedPrecondition, ResourceExhausted, Unavailable
from services.ranking.events.event_store import EventStore
from services.storage import store
from services.storage.sqlite_version import has_wal_reset_bug

_notes = sa.Table("test_notes", store.metadata, sa.Column("n", sa.Integer, primary_key=True))

_WRITE_UNTIL_KILLED = """
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from services.storage import store
from services.ranking.events.event_store import EventStore
from services.ranking.events.events import Event, EventItem
state = EventStore(store.open_engine(sys.argv[1]), ["view"], lambda: datetime.now(UTC))
for n in range(1_000_000):
    future = state.write(Event(f"e{n}", "view", (EventItem(f"i{n % 7}"),), user_id="u"))
    if n % 5 == 0:
        future.result()
        print(n, flush=True)
"""


@pytest.fixture
def writer(engine: sa.Engine) -> Iterator[store.Writer]:
    store.create(engine, [_notes], "notes")
    writer = store.Writer(engine)
    yield writer
    writer.close()


def _insert(n: int) -> Callable[[sa.Connection], int]:
    """Write the note `n`; gives it back."""

    def operation(connection: sa.Connection) -> int:
        connection.execute(_notes.insert().values(n=n))
        return n

    return operation


def _count(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(_notes)).scalar_one()


def test_a_failing_operation_alone_is_rolled_back(engine: sa.Engine, writer: store.Writer) -> None:
    def insert_then_fail(connection: sa.Connection) -> None:
        connection.execute(_notes.insert().values(n=100))
        raise ValueError("no")

    before = [writer.submit(_insert(n)) for n in range(3)]
    bad = writer.submit(insert_then_fail)
    duplicate = writer.submit(_insert(0))
    after = writer.submit(_insert(3))
    assert [f.result() for f in [*before, after]] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no"):
        bad.result()
    with pytest.raises(sa.exc.IntegrityError):
        duplicate.result()
    assert _count(engine) == 4


def test_sequence_order_is_commit_order(engine: sa.Engine, writer: store.Writer) -> None:
    futures = [writer.submit(lambda c: store.take_sequence(c, "notes")) for _ in range(50)]
    assert [f.result() for f in futures] == list(range(1, 51))
    with engine.connect() as connection:
        assert store.current_sequence(connection, "notes") == 50


def test_small_writes_overtake_a_large_one(writer: store.Writer) -> None:
    gate = threading.Event()
    writer.submit(lambda _: gate.wait(60))
    order: list[str] = []

    def submit(name: str, n: int, rows: int) -> Future[int]:
        future = writer.submit(_insert(n), caller=name, rows=rows)
        future.add_done_callback(lambda _: order.append(name))
        return future

    futures = [submit("large", n, 1000) for n in range(50)]
    futures += [submit(f"small {n}", 50 + n, 2) for n in range(5)]
    gate.set()
    for future in futures:
        future.result()
    assert [name for name in order[:7] if name != "large"] == [f"small {n}" for n in range(5)]


def test_nothing_is_committed_during_exclusive_access(engine: sa.Engine, writer: store.Writer) -> None:
    with writer.exclusive():
        future = writer.submit(_insert(1))
        with pytest.raises(TimeoutError):
            future.result(0.2)
        assert _count(engine) == 0
    assert future.result() == 1


def test_closing_commits_queued_writes_and_refuses_more(engine: sa.Engine, writer: store.Writer) -> None:
    futures = [writer.submit(_insert(n)) for n in range(300)]
    writer.close()
    assert all(f.done() for f in futures)
    assert _count(engine) == 300
    with pytest.raises(Unavailable):
        writer.submit(lambda _: None)


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    engine = store.open_engine(f"sqlite:///{tmp_path / 'full.sqlite'}")
    store.create(engine, [_notes], "notes")
    writer = store.Writer(engine, capacity=2)
    transaction = engine.execution_options(vitrine_writes=True).begin()
    with transaction, pytest.raises(ResourceExhausted):  # the writer waits for this transaction
        for _ in range(10_000):
            writer.submit(lambda _: None)
    writer.close()


def test_a_state_of_another_version_is_refused(engine: sa.Engine) -> None:
    store.create(engine, [_notes], "notes")
    store.create(engine, [_notes], "notes")
    later = sa.Table("test_notes", sa.MetaData(), sa.Column("n", sa.Integer), sa.Column("colour", sa.Text))
    with pytest.raises(FailedPrecondition, match="test_notes has no colour"):
        store.create(engine, [later], "notes")


def test_a_sqlite_version_that_damages_databases_is_refused() -> None:
    bad_versions = [(3, 7, 0), (3, 40, 1), (3, 44, 5), (3, 45, 0), (3, 50, 6), (3, 51, 2)]
    assert all(has_wal_reset_bug(version) for version in bad_versions)
    sound = [(3, 6, 23), (3, 44, 6), (3, 50, 7), (3, 51, 3), (3, 53, 0)]
    assert not any(has_wal_reset_bug(version) for version in sound)


def test_sigkill_loses_no_acknowledged_write(database_url: str) -> None:
    command = [sys.executable, "-c", _WRITE_UNTIL_KILLED, database_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last_ack = -1
        while last_ack < 200:
            last_ack = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        last_ack = max([last_ack, *map(int, process.stdout.read().split())])
    engine = store.open_engine(database_url)
    state = EventStore(engine, ["view"], lambda: datetime.now(UTC))
    sequences = [row.sequence for row in state.history("u", "", datetime.now(UTC), 1_000_000)]
    # One event per sequence number and none skipped: what was lost was never acknowledged.
    assert sorted(sequences) == list(range(1, len(sequences) + 1))
    assert len(sequences) > last_ack
    assert state.sequence == len(sequences)
    assert state.counts() == state.recount()
    state.close()
    engine.dispose()
