"""What a process tells an operator's Prometheus: calls as they end, and the rest when somebody asks.

Names and units follow Prometheus' conventions (https://prometheus.io/docs/practices/naming).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.errors import FailedPrecondition, VitrineError

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_log = logging.getLogger(__name__)

Values = Mapping[str, float]


@dataclass(frozen=True)
class Reading:
    """A figure that `read` tells when it is asked for, one for each value of a label.

    One that only grows `counts`, and its name ends in _total.
    """

    name: str
    description: str
    label: str
    read: Callable[[], Values]
    counts: bool = False


class Telemetry:
    """The figures of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._calls = Histogram(
            "vitrine_call_seconds",
            "From a call's arrival to its status",
            ("method", "code"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._readings = _Readings()
        self._registry.register(self._readings)

    def called(self, method: str, code: str, seconds: float) -> None:
        """A call of a full method name has ended with a status code's name."""
        self._calls.labels(method, code).observe(seconds)

    def add(self, *readings: Reading) -> None:
        """Tell these as well."""
        self._readings.all.extend(readings)

    def serve(self, address: str) -> tuple[int, Callable[[], None]]:
        """Answer HTTP at host:port, on a thread of its own: the port, and what ends it.

        Raises:
            FailedPrecondition: the address is none, or cannot be had.
        """
        host, _, port = address.rpartition(":")
        try:
            server, thread = start_http_server(int(port), host.strip("[]") or "0.0.0.0", self._registry)  # noqa: S104 - as gRPC reads it
        except (OSError, ValueError, OverflowError) as error:
            raise FailedPrecondition(f"metrics cannot be served at {address!r}: {error}") from None

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, close


class _Readings(Collector):
    def __init__(self) -> None:
        self.all: list[Reading] = []

    def describe(self) -> Iterable[Metric]:
        return []  # nothing is read before somebody asks

    def collect(self) -> Iterator[Metric]:
        for reading in list(self.all):
            kind = CounterMetricFamily if reading.counts else GaugeMetricFamily
            family = kind(reading.name, reading.description, labels=[reading.label])
            try:
                for value, figure in reading.read().items():
                    family.add_metric([value], figure)
            except VitrineError as error:  # what it is read from is away; the other figures are told
                _log.info("%s cannot be read: %s", reading.name, error)
            yield family
