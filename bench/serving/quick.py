"""A check of three minutes: has a page become more expensive than it was?

    python -m bench.serving.quick            # exit status 1 for a regression
    python -m bench.serving.quick --update   # makes this run the one to compare with

The services are started several times over a small synthetic shop. Each start gives the CPU time of a page,
of one caller and at one rate, divided by that of an empty call on the same server, and by that of a fixed
loop on the same machine (`reference.py`). The noise is that between starts: a ratio is a regression if the
whole 95% interval of its change lies above the tolerance.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.runs import ROOT
from bench.serving.client import write_requests
from bench.serving.driver import Driver, LoadPlan, Phase, client
from bench.serving.reference import ReferenceLoop
from bench.serving.regression import compare, interval
from bench.serving.requests import recommend_requests
from bench.serving.shops import Shop
from bench.serving.synthetic import synthetic_shop

BASELINE = Path(__file__).parent / "quick.json"
_ITEMS, _REQUESTS = 10_000, 1500
_MAX_STARTS, _MIN_STARTS, _SECONDS = 5, 2, 160.0
_ROUNDS, _COUNT, _PILOT = 5, 40, 20
_CHECKS = 500
_RATE_SHARE = 0.25
_TOLERANCE = 0.02


def main() -> None:
    """Measure, compare, and exit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help=f"write {BASELINE.name}")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "bench-serving-shops")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    values = measured(synthetic_shop(_ITEMS, options.cache), options.cache)
    if options.update:
        options.baseline.write_text(json.dumps({"machine": _machine(), "values": values}, indent=1) + "\n")
    baseline = json.loads(options.baseline.read_text()) if options.baseline.is_file() else {"values": {}}
    regressions = show(values, baseline["values"], Console(width=130))
    if baseline.get("machine") not in {None, _machine()}:
        print(f"the baseline was measured on another machine: {baseline['machine']}")  # noqa: T201 - the answer
    if regressions:
        sys.exit(f"more expensive than {options.baseline.name}: {', '.join(regressions)}")


def measured(shop: Shop, folder: Path) -> dict[str, list[float]]:
    """The figures of several starts of the services, by name, one for each start."""
    values: dict[str, list[float]] = {}
    reference, begin = ReferenceLoop(), time.monotonic()
    for start in range(_MAX_STARTS):
        elapsed = time.monotonic() - begin
        if start >= _MIN_STARTS and elapsed * (start + 1) / start > _SECONDS:
            break
        with tempfile.TemporaryDirectory(dir=folder) as name:
            for figure, value in _one_start(shop, Path(name), reference).items():
                values.setdefault(figure, []).append(value)
    return values


def _one_start(shop: Shop, folder: Path, reference: ReferenceLoop) -> dict[str, float]:
    requests = folder / "requests.bin"
    write_requests(requests, recommend_requests(shop, _REQUESTS))
    with shop.served(folder) as services, client(services.address, folder) as load_client:
        driver = Driver(services, load_client, requests, LoadPlan())
        driver.warm_up()
        pilot = driver.one_caller(_PILOT)
        rate = _RATE_SHARE * 1e3 * (os.cpu_count() or 1) / pilot.cpu_ms
        driver.rewind()  # the same requests after each start, and in each version
        # In turns, because the processor is slower in one second than in another.
        rounds = [
            _Round(
                unit=reference.milliseconds(),
                floor=driver.floor(_CHECKS),
                one=driver.one_caller(_COUNT),
                busy=driver.measured("at a rate", rate=rate, seconds=_COUNT / rate, poisson=False),
            )
            for _ in range(_ROUNDS)
        ]
        memory = services.memory()["all"]
    unit = float(np.mean([part.unit for part in rounds]))
    floor, one, busy = (
        sum(p.cpu_ms * p.latencies.calls for p in phases) / sum(p.latencies.calls for p in phases)
        for phases in zip(*((part.floor, part.one, part.busy) for part in rounds), strict=True)
    )
    return {
        "page / unit": one / unit,
        "page at a rate / unit": busy / unit,
        "page / empty call": one / floor,
        "CPU ms of a page": one,
        "CPU ms of an empty call": floor,
        "CPU ms of the unit": unit,
        "p50 ms of a page": float(np.median([part.one.latencies.p50 for part in rounds])),
        "anonymous MiB": memory.anonymous,
        "CPU seconds until SERVING": services.start_cpu_seconds,
        "used by other processes": float(np.mean([part.one.others for part in rounds])),
    }


@dataclass(frozen=True)
class _Round:
    unit: float
    floor: Phase
    one: Phase
    busy: Phase


COMPARED = ("page / unit", "page at a rate / unit", "page / empty call")
"""The figures whose regressions count; the others depend on the machine and on what else it does."""


def show(
    values: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]], console: Console
) -> list[str]:
    """Print the figures and their changes; returns the names of those that regressed."""
    table = Table(title=f"{_ITEMS:,} items, mean and 95% interval of {len(values[COMPARED[0]])} starts")
    table.add_column("figure")
    for name in ("now", "interval", "before", "now / before", "interval", ""):
        table.add_column(name, justify="right")
    regressions = []
    for name, new in values.items():
        mean, low, high = interval(new)
        cells = [f"{mean:.3g}", f"{low:.3g} to {high:.3g}"]
        if name in baseline:
            change, verdict = compare(baseline[name], new), ""
            if name in COMPARED:
                verdict = "better" if change.is_improvement() else "same"
                if change.is_regression(_TOLERANCE):
                    verdict = "WORSE"
                    regressions.append(name)
            cells += [f"{interval(baseline[name])[0]:.3g}", f"{change.ratio:.3f}"]
            cells += [f"{change.low:.3f} to {change.high:.3f}", verdict]
        table.add_row(name, *cells)
    console.print(table)
    return regressions


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores, {model or platform.machine()}"


if __name__ == "__main__":
    main()
