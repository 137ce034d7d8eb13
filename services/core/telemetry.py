"""Metrics for Prometheus: a histogram of calls, and gauges that are read at each scrape.

Names and units follow Prometheus' conventions (https://prometheus.io/docs/practices/naming).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.core.addresses import listen_problem, parse_address
from services.core.errors import FailedPrecondition, VitrineError

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_log = logging.getLogger(__name__)

Values = Mapping[str, float]


@dataclass(frozen=True)
class Gauge:
    """A metric that `read` returns at each scrape, by the values of one label.

    `counts` is true for a counter, which only grows; its name ends in _total.
    """

    name: str
    description: str
    label: str
    read: Callable[[], Values]
    counts: bool = False


class Telemetry:
    """The metrics of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._calls = Histogram(
            "vitrine_rpc_duration_seconds",
            "From a call's arrival to its status",
            ("method", "code"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._gauges = _Gauges()
        self._registry.register(self._gauges)

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        """Record a call: its full method name, the name of its status code, and its duration."""
        self._calls.labels(method, code).observe(seconds)

    def add(self, *gauges: Gauge) -> None:
        """Add gauges."""
        self._gauges.all.extend(gauges)

    def serve(self, address: str) -> tuple[int, Callable[[], None]]:
        """Serve the metrics over HTTP at host:port, on a separate thread.

        Returns:
            The port, and a function that stops the server.

        Raises:
            FailedPrecondition: the address is invalid or in use.
        """
        try:
            host, port = parse_address(address)
        except ValueError as error:
            raise FailedPrecondition(f"metrics cannot be served at {address!r}: {error}") from None
        try:
            server, thread = start_http_server(port, host, self._registry)
        except OSError:
            raise FailedPrecondition(
                f"metrics cannot be served: {listen_problem(address, '--metrics')}"
            ) from None

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, close


class _Gauges(Collector):
    def __init__(self) -> None:
        self.all: list[Gauge] = []

    def describe(self) -> Iterable[Metric]:
        return []  # gauges are read at a scrape only

    def collect(self) -> Iterator[Metric]:
        for gauge in list(self.all):
            kind = CounterMetricFamily if gauge.counts else GaugeMetricFamily
            family = kind(gauge.name, gauge.description, labels=[gauge.label])
            try:
                for label, value in gauge.read().items():
                    family.add_metric([label], value)
            except VitrineError as error:  # the source is unavailable; the other metrics are served
                _log.info("%s cannot be read: %s", gauge.name, error)
            yield family
