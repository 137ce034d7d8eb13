"""Reports whether the databases of a process take writes: as health entries and as metrics.

A service whose database refuses writes can still read, so its own health stays SERVING.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from services.core.telemetry import Gauge
from services.storage.write_health import WriteHealth

_POLL_SECONDS = 0.5

Healths = Callable[[], Mapping[str, WriteHealth]]
"""Returns the health of each database of this process, by service."""


def gauges(healths: Healths) -> list[Gauge]:
    """The metrics."""

    def writable() -> Mapping[str, float]:
        return {name: float(health.refusal is None) for name, health in healths().items()}

    def refused() -> Mapping[str, float]:
        return {name: health.refused for name, health in healths().items()}

    return [
        Gauge("vitrine_store_writable", "1 while the database takes writes, else 0", "store", writable),
        Gauge(
            "vitrine_store_refused_total",
            "Writes that the database refused, for example because the disk is full",
            "store",
            refused,
            counts=True,
        ),
    ]


async def report_changes(healths: Healths, report: Callable[[str, bool], Awaitable[None]]) -> None:
    """Call `report` with a service and whether its database takes writes: first, and after each change."""
    last: dict[str, bool] = {}
    while True:
        for name, health in healths().items():
            writable = health.refusal is None
            if last.get(name) != writable:
                await report(name, writable)
                last[name] = writable
        await asyncio.sleep(_POLL_SECONDS)
