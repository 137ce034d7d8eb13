"""The writer: grouped commits, failures that stay alone, nothing acknowledged lost to SIGKILL."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from services import store
from services.errors import FailedPrecondition, ResourceExhausted, Unavailable
from services.ranking.behaviour import BehaviourStore

_notes = sa.Table("test_notes", store.metadata, sa.Column("n", sa.Integer, primary_key=True))

_WRITE_UNTIL_KILLED = """
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from services import store
from services.ranking.behaviour import BehaviourStore, Event, EventItem
state = BehaviourStore(store.open_engine(sys.argv[1]), ["view"], lambda: datetime.now(UTC))
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


def test_a_failing_operation_is_undone_alone(engine: sa.Engine, writer: store.Writer) -> None:
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


def test_closing_commits_what_is_queued_and_refuses_more(engine: sa.Engine, writer: store.Writer) -> None:
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


def test_a_state_of_another_version_says_so(engine: sa.Engine) -> None:
    store.create(engine, [_notes], "notes")
    store.create(engine, [_notes], "notes")
    later = sa.Table("test_notes", sa.MetaData(), sa.Column("n", sa.Integer), sa.Column("colour", sa.Text))
    with pytest.raises(FailedPrecondition, match="test_notes has no colour"):
        store.create(engine, [later], "notes")


def test_a_state_directory_has_one_owner(tmp_path: Path) -> None:
    lock = store.StateLock(tmp_path)
    with pytest.raises(FailedPrecondition, match=r"in use by process \d+"):
        store.StateLock(tmp_path)
    lock.release()
    store.StateLock(tmp_path).release()


def test_sigkill_loses_nothing_acknowledged(database_url: str) -> None:
    command = [sys.executable, "-c", _WRITE_UNTIL_KILLED, database_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = -1
        while acknowledged < 200:
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
    engine = store.open_engine(database_url)
    state = BehaviourStore(engine, ["view"], lambda: datetime.now(UTC))
    sequences = [row.sequence for row in state.history("u", "", datetime.now(UTC), 1_000_000)]
    # One event per sequence number and none skipped: what was lost was never acknowledged.
    assert sorted(sequences) == list(range(1, len(sequences) + 1))
    assert len(sequences) > acknowledged
    assert state.sequence == len(sequences)
    assert state.counts() == state.recount()
    state.close()
    engine.dispose()
