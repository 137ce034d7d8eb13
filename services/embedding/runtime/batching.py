"""Dynamic batching: threads run models on batches from bounded queues.

A batch groups rows of similar length from many calls. A free thread takes the waiting rows at once: a single
call is not delayed, and the next batch fills while others run. Small calls have priority over large ones. A
call that is canceled or past its deadline is dropped before it costs a batch. The module does not depend on
the meaning of rows and models.
"""

import bisect
import contextlib
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from services.core.errors import DeadlineExceeded, ResourceExhausted, Unavailable, VitrineError

Rows = Sequence[Any]
_MAX_SKIPS = 8
_PADDING_PARTS = 8
_MIN_BATCH_PARTS = 4  # idle threads get at least a quarter of a batch each: small batches cost more per row


class Lane(IntEnum):
    """Priority of a call: a user waits, a batch job waits, nobody waits."""

    INTERACTIVE = 0
    BULK = 1
    BACKGROUND = 2


@dataclass(frozen=True)
class Model:
    """`start` starts a batch and returns a function that waits for float32 (B, D).

    A batch has at most `budget` units of padded length, unless it is a single row. At most `capacity` units
    wait in the interactive lane; callers of the other lanes limit themselves. Models of one `kind` are
    counted together. If it `overlaps`, as on a GPU, `start` returns before the batch is done and the next may
    start.
    """

    name: str
    start: Callable[[Rows], Callable[[], np.ndarray]]
    budget: int
    capacity: int
    kind: str = ""
    overlaps: bool = False


class _Call:
    """The rows of one call and their results. The caller may cancel the future."""

    def __init__(self, rows: Rows, lengths: np.ndarray, deadline: float | None) -> None:
        self.rows, self.lengths, self.deadline = rows, lengths, deadline
        self.future: Future[np.ndarray] = Future()
        self.in_batch = bytearray(len(rows))
        self.longest_first = np.argsort(-lengths, kind="stable").tolist()
        self.next = 0
        self._remaining = len(rows)
        self._out: np.ndarray | None = None
        self._put_lock = threading.Lock()

    def alive(self, now: float) -> bool:
        """Whether the caller still waits for it."""
        if self.deadline is not None and now > self.deadline:
            self.fail(DeadlineExceeded("the deadline passed while the model was busy"))
        return not self.future.done()

    def longest(self) -> int | None:
        """The longest row that is in no batch yet; None if there is none."""
        while self.next < len(self.rows) and self.in_batch[self.longest_first[self.next]]:
            self.next += 1
        return self.longest_first[self.next] if self.next < len(self.rows) else None

    def put(self, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Store the vectors of some rows; the last rows complete the call."""
        with self._put_lock:
            if self._out is None:
                self._out = np.empty((len(self.rows), vectors.shape[1]), np.float32)
            self._out[rows] = vectors
            self._remaining -= len(rows)
            done = not self._remaining
        if done:
            with contextlib.suppress(InvalidStateError):  # canceled meanwhile
                self.future.set_result(self._out)

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


Batch = list[tuple[_Call, int]]
_RunningBatch = tuple[Model, Batch, Callable[[], np.ndarray]]


class _Queue:
    """The rows that wait for one model in one lane, grouped by length."""

    def __init__(self, model: Model, capacity: int | None) -> None:
        self.model, self._capacity = model, capacity
        self._calls: deque[_Call] = deque()
        self._by_length: defaultdict[int, deque[tuple[_Call, int]]] = defaultdict(deque)
        self.waiting = 0
        self.count = 0

    def add(self, call: _Call) -> None:
        cost = int(call.lengths.sum())
        if self._capacity is not None and self.waiting and self.waiting + cost > self._capacity:
            raise ResourceExhausted(f"too much waits for the {self.model.name} encoder; try again later")
        self._calls.append(call)
        for row, length in enumerate(call.lengths.tolist()):
            self._by_length[length].append((call, row))
        self.waiting += cost
        self.count += len(call.rows)

    def take(self, now: float, takers: int) -> Batch:
        """The next batch: the longest row of the oldest call, then shorter rows; empty if no row waits.

        Shorter rows join while their padding stays below a part of the budget. If all waiting rows fit that
        way, the batch takes all of them, divided among `takers` threads.
        """
        anchor = self._oldest(now)
        if anchor is None:
            return []
        lengths = sorted(self._by_length)
        longest, full = lengths[-1], self.model.budget
        budget = min(full, max(full // _MIN_BATCH_PARTS, -(-self.waiting // takers)))
        padded = longest * self.count
        if padded <= budget and padded - self.waiting <= budget // _PADDING_PARTS:
            return self._fill([], lengths[::-1], longest, budget, now)
        call, row = anchor
        length = int(call.lengths[row])
        batch = [(call, row)]
        self._remove(call, row, length)
        return self._fill(batch, lengths[: bisect.bisect_right(lengths, length)][::-1], length, budget, now)

    def refuse(self, error: VitrineError) -> None:
        """Fail the waiting calls."""
        for call in self._calls:
            call.fail(error)

    def _oldest(self, now: float) -> tuple[_Call, int] | None:
        while self._calls:
            call = self._calls[0]
            row = call.longest()
            if row is not None and call.alive(now):
                return call, row
            self._calls.popleft()
        if self._by_length:  # the remaining rows belong to calls that ended
            self._by_length.clear()
            self.waiting = self.count = 0
        return None

    def _fill(self, batch: Batch, lengths: Sequence[int], padded: int, budget: int, now: float) -> Batch:
        padding, alive = 0, dict[_Call, bool]()
        for length in lengths:
            rows = self._by_length[length]
            while rows and padded * (len(batch) + 1) <= budget:
                call, row = rows[0]
                if call not in alive:
                    alive[call] = call.alive(now)
                if not call.in_batch[row] and alive[call]:
                    padding += padded - length
                    if padding > budget // _PADDING_PARTS:
                        return batch
                    batch.append((call, row))
                rows.popleft()
                self._remove(call, row, length)
            if not rows:
                del self._by_length[length]
        return batch

    def _remove(self, call: _Call, row: int, length: int) -> None:
        if not call.in_batch[row]:
            call.in_batch[row] = True
            self.waiting -= length
            self.count -= 1


class Batcher:
    """Runs `models` on its own `threads`; each thread calls `prepare` before its first batch."""

    def __init__(
        self, models: Sequence[Model], threads: int = 1, prepare: Callable[[], None] | None = None
    ) -> None:
        self._queues: dict[tuple[str, Lane], _Queue] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.finished: dict[str, int] = {}
        """How many rows each model has run."""
        self.totals: Counter[str] = Counter()
        """How many rows models of each kind have run, removed models included."""
        self.add(models)
        self._skips = dict.fromkeys(Lane, 0)
        self._idle = 0
        names = (f"encoder-{number}" for number in range(threads))
        self._threads = [threading.Thread(None, self._work, name, (prepare,), daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def add(self, models: Sequence[Model]) -> None:
        """Add models; their names are unique."""
        with self._changed:
            for lane in Lane:
                is_bounded = lane is Lane.INTERACTIVE
                self._queues |= {
                    (m.name, lane): _Queue(m, m.capacity if is_bounded else None) for m in models
                }
            self.finished |= {model.name: 0 for model in models}

    def remove(self, names: Iterable[str]) -> None:
        """Remove models; calls that wait for them fail with Unavailable."""
        with self._changed:
            for name in names:
                del self.finished[name]
                for lane in Lane:
                    self._queues.pop((name, lane)).refuse(Unavailable("these encoders are no longer served"))

    def submit(
        self, model: str, rows: Rows, lengths: np.ndarray, lane: Lane, seconds: float | None = None
    ) -> Future[np.ndarray]:
        """Queue the rows of a call with their `lengths`, int (B,); the future holds float32 (B, D).

        Canceling the future, or a timeout after `seconds`, drops the rows that have not started.

        Raises:
            ResourceExhausted: too much waits already.
            Unavailable: the batcher was closed.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        call = _Call(rows, lengths, deadline)
        if not len(rows):
            raise ValueError("a call needs a row")
        with self._changed:
            if self._closed:
                raise Unavailable("the service is shutting down")
            if (model, lane) not in self._queues:
                raise Unavailable("these encoders are no longer served")
            self._queues[model, lane].add(call)
            self._changed.notify()
        return call.future

    def waiting(self) -> dict[str, int]:
        """How many rows wait for each model."""
        counts: dict[str, int] = defaultdict(int)
        with self._changed:
            for (model, _), rows in self._queues.items():
                counts[model] += rows.count
        return dict(counts)

    def close(self) -> None:
        """Finish accepted calls, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, prepare: Callable[[], None] | None) -> None:
        if prepare is not None:
            prepare()
        running: _RunningBatch | None = None
        while True:
            with self._changed:
                while not (batch := self._next()) and running is None:
                    if self._closed:
                        return
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
                if self._idle and any(queue.count for queue in self._queues.values()):
                    self._changed.notify()  # another thread takes the rest
            started = self._start(*batch) if batch else None
            if running is not None:
                self._finish(*running)
            running, started, batch = started, None, None  # free the finished batch
            if running is not None and not running[0].overlaps:
                self._finish(*running)
                running = None

    def _next(self) -> tuple[Model, Batch] | None:
        """The next batch, from the first lane with waiting rows; each lane is skipped a few times at most."""
        now = time.monotonic()
        waiting = [lane for lane in Lane if any(self._queues[key].count for key in self._keys(lane))]
        for lane in sorted(waiting, key=lambda lane: (self._skips[lane] < _MAX_SKIPS, lane)):
            for key in self._keys(lane):
                if batch := self._queues[key].take(now, self._idle + 1):
                    for other in waiting:
                        self._skips[other] += 1
                    self._skips[lane] = 0
                    # Next time the rows of another model come first.
                    self._queues[key] = self._queues.pop(key)
                    return self._queues[key].model, batch
        return None

    def _keys(self, lane: Lane) -> list[tuple[str, Lane]]:
        return [key for key in self._queues if key[1] is lane]

    def _start(self, model: Model, batch: Batch) -> _RunningBatch | None:
        try:
            return model, batch, model.start([call.rows[row] for call, row in batch])
        except BaseException as error:  # the callers get the error; the thread goes on
            _fail(batch, error)
            return None

    def _finish(self, model: Model, batch: Batch, wait: Callable[[], np.ndarray]) -> None:
        try:
            vectors = wait()
            if len(vectors) != len(batch):
                raise ValueError(
                    f"the {model.name} encoder returned {len(vectors)} vectors for {len(batch)} rows"
                )
            with self._changed:  # before any caller gets its result
                self.totals[model.kind or model.name] += len(batch)
                if model.name in self.finished:  # otherwise it was removed meanwhile
                    self.finished[model.name] += len(batch)
            _deliver(batch, vectors)
        except BaseException as error:
            _fail(batch, error)


def _deliver(batch: Batch, vectors: np.ndarray) -> None:
    by_call = defaultdict[_Call, tuple[list[int], list[int]]](lambda: ([], []))
    for position, (call, row) in enumerate(batch):
        rows, positions = by_call[call]
        rows.append(row)
        positions.append(position)
    for call, (rows, positions) in by_call.items():
        call.put(rows, vectors[positions])


def _fail(batch: Batch, error: BaseException) -> None:
    for call, _ in batch:
        call.fail(error)
