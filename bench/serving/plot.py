"""The results as a plot: latency by rate, and what a page costs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bench.serving.driver import ONE_CALLER
from bench.serving.report import ShopResult


def draw(path: Path, results: Sequence[ShopResult]) -> None:
    """Write a plot: p50 and p99 by the offered rate on the left, CPU ms of a page on the right."""
    figure = Figure(figsize=(12, 4.5), layout="tight")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for index, result in enumerate(results):
        color, label = f"C{index}", f"{result.items:,} items, {result.layout}"
        rising = [phase.latencies for phase in result.phases if phase.name.endswith("/s")]
        rates = [latencies.offered for latencies in rising]
        left.plot(rates, [latencies.p50 for latencies in rising], color=color, marker=".", label=label)
        left.plot(rates, [latencies.p99 for latencies in rising], color=color, marker=".", linestyle="--")
        left.axvline(result.peak, color=color, linewidth=0.7, linestyle=":")
    left.set(xlabel="pages/s, offered", ylabel="ms from the time a call is due", yscale="log")
    left.set_title("p50 (solid), p99 (dashed), peak (dotted)", fontsize=10)
    left.legend(fontsize=8)
    places = np.arange(len(results))
    served = [result.phase(ONE_CALLER).cpu_ms for result in results]
    right.bar(places - 0.2, served, 0.4, label="served, one caller")
    right.bar(places + 0.2, [result.bare_cpu_ms for result in results], 0.4, label="bare")
    right.set_xticks(places, [f"{result.items:,}\n{result.layout}" for result in results], fontsize=8)
    right.set(ylabel="CPU ms of a page")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
