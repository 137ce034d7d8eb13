"""What was measured, as a table, as lines and as JSON."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.serving.driver import FLOOR, ONE_CALLER, Phase
from bench.serving.peer import PeerResult
from bench.serving.procfs import Memory
from bench.serving.stages import StageTime
from bench.serving.writes import WriteResult

PUBLISHED_PEER = (
    "published, not measured here: Serenade (session-based, Rust, 6.5 M items) answers 1,000 requests/s on "
    "two virtual CPUs with p90 under 7 ms (Kersbergen et al., SIGMOD 2022). It ranks by a session's "
    "neighbors alone: no vectors, no models, no rules"
)
NOISE = (
    "CPU ms are the CPU time of the server's processes and are the figure to compare. Latencies and rates "
    "are those of this machine with all that ran on it at the time"
)
_COLUMNS = ("calls", "offered", "goodput", "errors", "degraded", "p50", "p95", "p99", "max")


@dataclass
class ShopResult:
    """The measurements of one shop in one layout."""

    shop: str
    layout: str
    items: int
    interactions: int
    start_seconds: float
    start_cpu_seconds: float
    first_start_seconds: float
    memory: Mapping[str, Memory]
    phases: list[Phase]
    peak: float
    stages: Mapping[str, StageTime] = field(default_factory=dict)
    bare_cpu_ms: float = float("nan")
    writes: list[WriteResult] = field(default_factory=list)
    peer: PeerResult | str | None = None
    """What a peer's pages cost; a text says why they were not measured."""

    @property
    def title(self) -> str:
        """The shop, its size and the layout."""
        return f"{self.shop}: {self.items:,} items, {self.interactions:,} events, {self.layout} process(es)"

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)


def ratios(results: Sequence[ShopResult]) -> dict[str, float | str]:
    """Ratios of what was measured in one run, by what they are; a text says why a ratio is missing."""
    ratios: dict[str, float | str] = {}
    for result in results:
        floor, one = result.phase(FLOOR), result.phase(ONE_CALLER)
        name = f"{result.shop}, {result.items:,} items, {result.layout}"
        ratios[f"{name}: CPU of a page over that of an empty call (floor)"] = one.cpu_ms / floor.cpu_ms
        ratios[f"{name}: p50 of a page over that of an empty call"] = one.latencies.p50 / floor.latencies.p50
        if not math.isnan(result.bare_cpu_ms):
            ratios[f"{name}: CPU of a bare page over that of a served one (bare)"] = (
                result.bare_cpu_ms / one.cpu_ms
            )
        if result.peer:
            ratios |= {f"{name}: {row}": value for row, value in _peer_ratios(result.peer).items()}
        ratios[f"{name}: pages/s if the CPU were all theirs"] = 1e3 * (os.cpu_count() or 1) / one.cpu_ms
    for layout in dict.fromkeys(result.layout for result in results):
        sizes = sorted((r for r in results if r.layout == layout), key=lambda result: result.items)
        if sizes[0].items < sizes[-1].items:
            small, large = (result.phase(ONE_CALLER) for result in (sizes[0], sizes[-1]))
            name = f"growth from {sizes[0].items:,} to {sizes[-1].items:,} items, {layout}"
            ratios[f"{name}: p50"] = large.latencies.p50 / small.latencies.p50
            ratios[f"{name}: CPU of a page"] = large.cpu_ms / small.cpu_ms
    return ratios


def _peer_ratios(peer: PeerResult | str) -> dict[str, float | str]:
    if isinstance(peer, str):
        return {"CPU and p50 of a page over those of the peer (peer)": f"not measured. {peer}"}
    name, other = f"for requests with a user, over {peer.name}'s (peer)", peer.phases[0]
    return {
        f"CPU of a page {name}": peer.own.cpu_ms / other.cpu_ms,
        f"p50 of a page {name}": peer.own.latencies.p50 / other.latencies.p50,
    }


def show(result: ShopResult, console: Console) -> None:
    """Print a result."""
    console.print(_phase_table(f"{result.title}; times in ms", result.phases))
    for phase in result.phases:
        if phase.stage_cpu_ms and phase.latencies.calls:
            stages = ", ".join(f"{stage} {ms:.2f}" for stage, ms in phase.stage_cpu_ms.items())
            console.print(f"CPU ms by stage, {phase.name}: {stages}", soft_wrap=True)
    stages = ", ".join(f"{name} {cell(stage.milliseconds)}" for name, stage in result.stages.items())
    console.print(f"wall ms by stage, median of one caller: {stages}", soft_wrap=True)
    for name, memory in result.memory.items():
        console.print(
            f"memory of {name}, MiB: {memory.resident:,.0f} resident, {memory.anonymous:,.0f} of them "
            f"anonymous, {memory.peak:,.0f} at most"
        )
    console.print(
        f"SERVING after {result.start_seconds:.1f} s, {result.start_cpu_seconds:.1f} s of CPU time; "
        f"{result.first_start_seconds:.1f} s at the first start, which imports the items"
    )
    if not math.isnan(result.bare_cpu_ms):
        console.print(f"a bare page, without RPC and store: {cell(result.bare_cpu_ms)} CPU ms")
    if result.writes:
        _show_writes(result.writes, console)
    if isinstance(result.peer, PeerResult):
        _show_peer(result.peer, console)


def _phase_table(title: str, phases: Sequence[Phase]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("load")
    for name in (*_COLUMNS, "CPU ms", "late p99", "client CPU ms", "others"):
        table.add_column(name, justify="right")
    for phase in phases:
        values = asdict(phase.latencies)
        cells = [values[name] for name in _COLUMNS]
        cells += [phase.cpu_ms, phase.latencies.late_ms, phase.latencies.client_cpu_ms]
        table.add_row(phase.name, *(cell(value) for value in cells), f"{phase.others:.0%}")
    return table


def _show_peer(peer: PeerResult, console: Console) -> None:
    model, memory = peer.model, peer.memory
    own = replace(peer.own, name=f"Vitrine, {peer.own.name}")
    phases = [own, *(replace(phase, name=f"{peer.name}, {phase.name}") for phase in peer.phases)]
    console.print(_phase_table(f"peer: {peer.name} {model.version}; times in ms", phases))
    calls = sum(phase.latencies.calls for phase in peer.phases)
    errors = sum(phase.latencies.errors for phase in peer.phases)
    empty = sum(phase.latencies.degraded for phase in peer.phases)
    console.print(peer.computes, soft_wrap=True)
    console.print(
        f"{peer.name}: fitted in {model.seconds:.1f} s on {model.interactions:,} different pairs of a user "
        f"and an item, of {model.users:,} users and {model.items:,} items. The other items have no event, so "
        f"they are on none of its pages. {peer.left_out:,} events of items that are not in the catalog "
        f"were left out. It has no page for the {peer.share_without_user:.0%} of requests that name no "
        f"user. Of {calls:,} calls {errors:,} failed and {empty:,} came back empty; it has no fallback. "
        f"{memory.resident:,.0f} MiB resident",
        soft_wrap=True,
    )


def _show_writes(results: Sequence[WriteResult], console: Console) -> None:
    batch, rate = results[0].batch, cell(results[0].quiet.offered)
    table = Table(
        title=f"events in writes of {batch}, next to {rate} pages/s; times in ms", title_justify="left"
    )
    for name in ("events/s", "recorded/s", "errors", "write p99", "CPU ms/event"):
        table.add_column(name, justify="right")
    for name in ("page p99 without", "with", "ratio", "new item written", "on a page", "at most", "on none"):
        table.add_column(name, justify="right")
    table.add_column("proposed by")
    for result in results:
        writes, fresh = result.writes, result.freshness
        cells = [result.event_rate, writes.units, writes.errors, writes.p99, result.cpu_ms_per_event]
        cells += [result.quiet.p99, result.busy.p99, result.p99_ratio, fresh.acknowledged_p50]
        cells += [fresh.recommended_p50, fresh.recommended_max, fresh.missing]
        table.add_row(*map(cell, cells), ", ".join(fresh.sources))
    console.print(table)


def cell(value: object) -> str:
    """A value for a table."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"  # noqa: PLR2004
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: Path, results: Sequence[ShopResult], ratios: Mapping[str, Any]) -> None:
    """Write everything as JSON."""
    document = {"ratios": dict(ratios), "published": PUBLISHED_PEER, "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")
