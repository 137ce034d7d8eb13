"""When calls are due, and what their latencies say. Pure: knows no server and no clock.

Load is open-loop: calls are due by a clock, whether or not earlier ones were answered, and a latency counts
from the time at which its call was due. A closed loop of callers that wait for their answers sends nothing
while the server stalls, and leaves the stall out of all calls but one (coordinated omission, Tene, 2013).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILES = (50, 95, 99)


def arrivals(rate: float, seconds: float, *, poisson: bool = True, seed: int = 0) -> np.ndarray:
    """The times at which calls are due, ascending, float64 seconds in [0, `seconds`).

    Poisson arrivals have independent exponential gaps of mean 1 / `rate`, as many independent users do;
    otherwise all gaps are 1 / `rate`, and the first call is due at 0.
    """
    if rate <= 0 or seconds <= 0:
        raise ValueError("rate and seconds must be positive")
    if not poisson:
        return np.arange(round(rate * seconds)) / rate
    random, times, last = np.random.default_rng(seed), [np.empty(0)], 0.0
    while last < seconds:
        gaps = random.exponential(1 / rate, max(16, int(rate * seconds / 4)))
        times.append(last + np.cumsum(gaps))
        last = float(times[-1][-1])
    due = np.concatenate(times)
    return due[due < seconds]


@dataclass(frozen=True)
class Calls:
    """The outcomes of calls in columns of one length.

    `due` float64, the seconds after the start at which a call was due; `sent` and `done` likewise, when it
    was sent and when it ended; `code` int64, the gRPC status code, 0 for OK; `degraded` bool, whether the
    page lacks a stage or a write was refused in part; `units` int64, the items of a page or the recorded
    events of a write. `cpu_seconds` is the CPU time that the client spent on all of them.
    """

    due: np.ndarray
    sent: np.ndarray
    done: np.ndarray
    code: np.ndarray
    degraded: np.ndarray
    units: np.ndarray
    cpu_seconds: float = 0.0

    @property
    def latency(self) -> np.ndarray:
        """Seconds from the time at which a call was due to its end."""
        return np.asarray(self.done - self.due)


@dataclass(frozen=True)
class Latencies:
    """A summary of calls. Times are milliseconds of the calls that were answered; rates are per second.

    `offered` are calls due, `goodput` are complete pages answered within a limit, `units` the items
    of pages or the recorded events of all answers. `late_ms` is the 99th percentile of the time by which the
    client itself sent calls late: latencies contain it.
    """

    calls: int
    offered: float
    goodput: float
    errors: int
    degraded: int
    units: float
    p50: float
    p95: float
    p99: float
    max: float
    late_ms: float
    client_cpu_ms: float


def summarize(calls: Calls, seconds: float, limit: float) -> Latencies:
    """Summarize calls that were due within `seconds`; goodput counts answers within `limit` seconds.

    Without answers the percentiles are NaN.
    """
    answered = calls.code == 0
    latency = 1e3 * calls.latency[answered]
    good = answered & ~calls.degraded & (calls.latency <= limit)
    p50, p95, p99 = percentiles(latency)
    count = len(calls.due)
    return Latencies(
        calls=count,
        offered=count / seconds,
        goodput=float(good.sum() / seconds),
        errors=int((~answered).sum()),
        degraded=int((answered & calls.degraded).sum()),
        units=float(calls.units.sum() / max(seconds, float(calls.done.max(initial=0.0)))),
        p50=p50,
        p95=p95,
        p99=p99,
        max=float(latency.max()) if len(latency) else float("nan"),
        late_ms=1e3 * percentiles(calls.sent - calls.due)[2],
        client_cpu_ms=1e3 * calls.cpu_seconds / max(count, 1),
    )


def percentiles(values: np.ndarray, which: Sequence[float] = PERCENTILES) -> tuple[float, ...]:
    """Percentiles by nearest rank: the smallest value that at least that share of all values does not exceed.

    Each is a measured value, not an interpolation. NaN for no values.
    """
    if not len(values):
        return (float("nan"),) * len(which)
    ordered = np.sort(values)
    # The product may lie just above a whole number: 0.07 * 100 is 7.000000000000001.
    ranks = np.ceil(np.round(np.array(which) / 100 * len(ordered), 9)).astype(int)
    return tuple(float(ordered[max(rank, 1) - 1]) for rank in ranks)
