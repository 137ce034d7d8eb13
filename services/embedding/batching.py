"""Threads that run models, fed in batches by bounded queues.

Rows of many calls share a batch, rows of like length first. A thread takes what waits as soon as it
is free: a lone call is not delayed, and while batches run the next one fills. Small calls overtake
large ones. A call that was cancelled or whose deadline passed is dropped before it costs a batch.
Knows nothing of what rows and models are.
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

from services.errors import DeadlineExceeded, ResourceExhausted, Unavailable, VitrineError

Rows = Sequence[Any]
_OVERTAKES = 8
_PADDING = 8
_SHARES = 4  # idle threads get no less than a quarter of a batch each: a small one costs more a row


class Lane(IntEnum):
    """Whose turn comes first: someone waits, a batch job waits, nobody waits."""

    INTERACTIVE = 0
    BULK = 1
    BACKGROUND = 2


@dataclass(frozen=True)
class Model:
    """`begin` turns rows into what waits for float32 (B, D).

    A batch has at most `budget` units of padded length, unless it is a single row. `capacity` units may
    wait in the lane of small calls; callers of the other lanes see to it themselves that not too much
    waits. Models of one `kind` are counted together.
    Where it `overlaps`, `begin` returns before its batch is done, as a GPU's does: the next one may begin.
    """

    name: str
    begin: Callable[[Rows], Callable[[], np.ndarray]]
    budget: int
    capacity: int
    kind: str = ""
    overlaps: bool = False


class _Call:
    """Rows that came together, and where their results gather. Its future is a caller's to cancel."""

    def __init__(self, rows: Rows, lengths: np.ndarray, ends: float | None) -> None:
        self.rows, self.lengths, self.ends = rows, lengths, ends
        self.future: Future[np.ndarray] = Future()
        self.taken = bytearray(len(rows))
        self.longest_first = np.argsort(-lengths, kind="stable").tolist()
        self.next = 0
        self._left = len(rows)
        self._out: np.ndarray | None = None
        self._putting = threading.Lock()

    def alive(self, now: float) -> bool:
        """Whether someone still waits for it."""
        if self.ends is not None and now > self.ends:
            self.fail(DeadlineExceeded("the deadline passed while the model was busy"))
        return not self.future.done()

    def longest(self) -> int | None:
        """Its longest row that is in no batch yet."""
        while self.next < len(self.rows) and self.taken[self.longest_first[self.next]]:
            self.next += 1
        return self.longest_first[self.next] if self.next < len(self.rows) else None

    def put(self, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Keep some rows' vectors; the last ones complete the call."""
        with self._putting:
            if self._out is None:
                self._out = np.empty((len(self.rows), vectors.shape[1]), np.float32)
            self._out[rows] = vectors
            self._left -= len(rows)
            done = not self._left
        if done:
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                self.future.set_result(self._out)

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


Batch = list[tuple[_Call, int]]
_Started = tuple[Model, Batch, Callable[[], np.ndarray]]


class _Queue:
    """The rows that wait for one model in one lane, by length."""

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
        """The next batch, empty when nobody waits: the oldest call's longest row, then shorter ones.

        Shorter rows join while padding them stays below a share of the budget. Where all
        that waits fits that way, all of it is taken; by so many `takers` a part each.
        """
        anchor = self._oldest(now)
        if anchor is None:
            return []
        lengths = sorted(self._by_length)
        longest, whole = lengths[-1], self.model.budget
        budget = min(whole, max(whole // _SHARES, -(-self.waiting // takers)))
        padded = longest * self.count
        if padded <= budget and padded - self.waiting <= budget // _PADDING:
            return self._fill([], lengths[::-1], longest, budget, now)
        call, row = anchor
        length = int(call.lengths[row])
        batch = [(call, row)]
        self._remove(call, row, length)
        return self._fill(batch, lengths[: bisect.bisect_right(lengths, length)][::-1], length, budget, now)

    def refuse(self, error: VitrineError) -> None:
        """End the calls that wait."""
        for call in self._calls:
            call.fail(error)

    def _oldest(self, now: float) -> tuple[_Call, int] | None:
        while self._calls:
            call = self._calls[0]
            row = call.longest()
            if row is not None and call.alive(now):
                return call, row
            self._calls.popleft()
        if self._by_length:  # what is left belongs to calls that nobody waits for
            self._by_length.clear()
            self.waiting = self.count = 0
        return None

    def _fill(self, batch: Batch, lengths: Sequence[int], padded: int, budget: int, now: float) -> Batch:
        padding, living = 0, dict[_Call, bool]()
        for length in lengths:
            rows = self._by_length[length]
            while rows and padded * (len(batch) + 1) <= budget:
                call, row = rows[0]
                if call not in living:
                    living[call] = call.alive(now)
                if not call.taken[row] and living[call]:
                    padding += padded - length
                    if padding > budget // _PADDING:
                        return batch
                    batch.append((call, row))
                rows.popleft()
                self._remove(call, row, length)
            if not rows:
                del self._by_length[length]
        return batch

    def _remove(self, call: _Call, row: int, length: int) -> None:
        if not call.taken[row]:
            call.taken[row] = True
            self.waiting -= length
            self.count -= 1


class Batcher:
    """So many threads that run `models`, nobody else does; each calls `prepare` before its first batch."""

    def __init__(
        self, models: Sequence[Model], threads: int = 1, prepare: Callable[[], None] | None = None
    ) -> None:
        self._queues: dict[tuple[str, Lane], _Queue] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.finished: dict[str, int] = {}
        """How many rows each model has run."""
        self.totals: Counter[str] = Counter()
        """How many rows models of each kind have run, those that are gone included."""
        self.add(models)
        self._passed_over = dict.fromkeys(Lane, 0)
        self._idle = 0
        names = (f"encoder-{number}" for number in range(threads))
        self._threads = [threading.Thread(None, self._work, name, (prepare,), daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def add(self, models: Sequence[Model]) -> None:
        """Run these as well; each by a name of its own."""
        with self._changed:
            for lane in Lane:
                bounded = lane is Lane.INTERACTIVE
                self._queues |= {(m.name, lane): _Queue(m, m.capacity if bounded else None) for m in models}
            self.finished |= {model.name: 0 for model in models}

    def remove(self, names: Iterable[str]) -> None:
        """Run some no more; what waits for them is refused."""
        with self._changed:
            for name in names:
                del self.finished[name]
                for lane in Lane:
                    self._queues.pop((name, lane)).refuse(Unavailable("these encoders are served no more"))

    def submit(
        self, model: str, rows: Rows, lengths: np.ndarray, lane: Lane, seconds: float | None = None
    ) -> Future[np.ndarray]:
        """Queue rows of a call, `lengths` int (B,) each; its future holds float32 (B, D), in their order.

        Cancelling the future, or `seconds` passing, drops what has not begun.

        Raises:
            ResourceExhausted: too much waits already.
            Unavailable: the batcher was closed.
        """
        ends = None if seconds is None else time.monotonic() + seconds
        call = _Call(rows, lengths, ends)
        if not len(rows):
            raise ValueError("a call needs a row")
        with self._changed:
            if self._closed:
                raise Unavailable("the service is shutting down")
            if (model, lane) not in self._queues:
                raise Unavailable("these encoders are served no more")
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
        """Run what was accepted, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, prepare: Callable[[], None] | None) -> None:
        if prepare is not None:
            prepare()
        running: _Started | None = None
        while True:
            with self._changed:
                while not (taken := self._next()) and running is None:
                    if self._closed:
                        return
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
                if self._idle and any(queue.count for queue in self._queues.values()):
                    self._changed.notify()  # another takes what is left
            begun = self._begin(*taken) if taken else None
            if running is not None:
                self._finish(*running)
            running, begun, taken = begun, None, None  # a batch that is done is not kept
            if running is not None and not running[0].overlaps:
                self._finish(*running)
                running = None

    def _next(self) -> tuple[Model, Batch] | None:
        """The next batch: of the first lane where someone waits, though no lane is passed over for ever."""
        now = time.monotonic()
        waiting = [lane for lane in Lane if any(self._queues[key].count for key in self._keys(lane))]
        for lane in sorted(waiting, key=lambda lane: (self._passed_over[lane] < _OVERTAKES, lane)):
            for key in self._keys(lane):
                if batch := self._queues[key].take(now, self._idle + 1):
                    for other in waiting:
                        self._passed_over[other] += 1
                    self._passed_over[lane] = 0
                    # Next time another model's rows come first.
                    self._queues[key] = self._queues.pop(key)
                    return self._queues[key].model, batch
        return None

    def _keys(self, lane: Lane) -> list[tuple[str, Lane]]:
        return [key for key in self._queues if key[1] is lane]

    def _begin(self, model: Model, batch: Batch) -> _Started | None:
        try:
            return model, batch, model.begin([call.rows[row] for call, row in batch])
        except BaseException as error:  # its callers get it; the thread goes on
            _fail(batch, error)
            return None

    def _finish(self, model: Model, batch: Batch, wait: Callable[[], np.ndarray]) -> None:
        try:
            vectors = wait()
            if len(vectors) != len(batch):
                raise ValueError(
                    f"the {model.name} encoder gave {len(vectors)} vectors for {len(batch)} rows"
                )
            with self._changed:  # before anybody has an answer
                self.totals[model.kind or model.name] += len(batch)
                if model.name in self.finished:  # else it was removed meanwhile
                    self.finished[model.name] += len(batch)
            _hand_out(batch, vectors)
        except BaseException as error:
            _fail(batch, error)


def _hand_out(batch: Batch, vectors: np.ndarray) -> None:
    places = defaultdict[_Call, tuple[list[int], list[int]]](lambda: ([], []))
    for at, (call, row) in enumerate(batch):
        rows, ats = places[call]
        rows.append(row)
        ats.append(at)
    for call, (rows, ats) in places.items():
        call.put(rows, vectors[ats])


def _fail(batch: Batch, error: BaseException) -> None:
    for call, _ in batch:
        call.fail(error)
