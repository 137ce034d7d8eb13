"""Sends GET requests over HTTP, one after the other or when they are due. Knows nothing of what they ask for.

Latencies count as in the client for gRPC: from the time at which a call was due.
"""

import http.client
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bench.serving.arrivals import Calls

_OK, _FAILED = 0, 2  # 2 is gRPC's UNKNOWN
_MAX_WAITING = 64


class HttpClient:
    """Sends requests to one port of this machine over connections that stay open.

    `count_units` counts the items of a response's body. A page without items counts as degraded. A call ends
    with an error after `timeout` seconds without an answer.
    """

    def __init__(self, port: int, count_units: Callable[[bytes], int], timeout: float = 2.0) -> None:
        self._port, self._count_units, self._timeout = port, count_units, timeout
        self._local = threading.local()

    def in_turn(self, paths: Sequence[str], seconds: float = 60.0) -> Calls:
        """Request paths one after the other, for at most some seconds."""
        cpu, start = time.process_time(), time.perf_counter()
        calls: list[tuple[float, float, bytes | None]] = []
        for path in paths:
            if (sent := time.perf_counter() - start) >= seconds:
                break
            body = self._get(path)
            calls.append((sent, time.perf_counter() - start, body))
        due = np.array([sent for sent, _, _ in calls])
        return self._calls(due, calls, time.process_time() - cpu)

    def when_due(self, paths: Sequence[str], due: np.ndarray) -> Calls:
        """Request a path at each time of `due`, ascending seconds, without waiting for earlier answers.

        At most 64 calls wait for their answers at a time; the others wait in the client, which counts.
        """
        cpu, start = time.process_time(), time.perf_counter()

        def call(path: str) -> tuple[float, float, bytes | None]:
            sent = time.perf_counter() - start
            body = self._get(path)
            return sent, time.perf_counter() - start, body

        with ThreadPoolExecutor(_MAX_WAITING) as threads:
            futures = []
            for path, when in zip(paths, due.tolist(), strict=True):
                if (pause := when - (time.perf_counter() - start)) > 0:
                    time.sleep(pause)
                futures.append(threads.submit(call, path))
            calls = [future.result() for future in futures]
        return self._calls(due, calls, time.process_time() - cpu)

    def _calls(
        self, due: np.ndarray, calls: Sequence[tuple[float, float, bytes | None]], cpu_seconds: float
    ) -> Calls:
        units = np.array([self._count_units(body) if body is not None else 0 for _, _, body in calls], int)
        return Calls(
            due=due,
            sent=np.array([sent for sent, _, _ in calls]),
            done=np.array([done for _, done, _ in calls]),
            code=np.array([_FAILED if body is None else _OK for _, _, body in calls], int),
            degraded=units == 0,
            units=units,
            cpu_seconds=cpu_seconds,
        )

    def _get(self, path: str) -> bytes | None:
        """The body of a response; None if the call failed. Each thread has a connection."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout)
            self._local.connection = connection
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            connection.close()  # the next request opens it again
            return None
        return body if response.status == http.HTTPStatus.OK else None
