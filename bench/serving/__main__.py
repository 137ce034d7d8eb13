"""Loads the running services, and measures latency, CPU time, memory, peak, writes and freshness.

    python -m bench.serving                                        # synthetic shops of three sizes
    python -m bench.serving --bundle build/demo/bundles --data build/demo/shop
    python -m bench.serving --hm-bundle build/hm/bundles           # sizes drawn from the items of a bundle

docs/performance.md says what the columns and ratios mean. Results are in --out: results.json, results.png.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from bench.runs import ROOT
from bench.serving import peer, plot, report, servers
from bench.serving.driver import LoadPlan
from bench.serving.measure import measure
from bench.serving.resampled import resampled_shop
from bench.serving.shops import Shop, existing_shop
from bench.serving.synthetic import synthetic_shop
from bench.serving.writes import WritePlan


def main() -> None:
    """Measure what the command line says."""
    options = _parser().parse_args()
    console = Console(width=165)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    plan = LoadPlan(
        count=options.count,
        seconds=options.seconds,
        part_seconds=2 * options.seconds,
        max_steps=options.max_rates,
        limit=options.limit_ms / 1e3,
        poisson=options.arrivals == "poisson",
    )
    if bool(options.bundle) != bool(options.data):
        sys.exit("--bundle and --data, the shop directory that it was trained on, need each other")
    rates = [float(rate) for rate in options.event_rates.split(",") if rate]
    writes = WritePlan(rates, options.event_batch) if rates else None
    results = []
    for shop in _shops(options):
        for layout in options.layouts.split(","):
            results.append(
                measure(
                    shop,
                    layout,
                    plan,
                    writes,
                    out,
                    bare=not options.no_bare,
                    core=options.core,
                    peer_python=options.peer_python if options.peer else None,
                )
            )
            report.show(results[-1], console)
    ratios = report.ratios(results)
    for name, value in ratios.items():
        console.print(f"{name}: {report.cell(value)}", soft_wrap=True)
    console.print(f"goodput counts complete pages that came within {options.limit_ms:.0f} ms")
    console.print(report.PUBLISHED_PEER, soft_wrap=True)
    console.print(report.NOISE, soft_wrap=True)
    report.write_json(out / "results.json", results, ratios)
    plot.draw(out / "results.png", results)


def _shops(options: argparse.Namespace) -> Iterator[Shop]:
    """The shops to measure, each made when it is reached."""
    cache = options.cache
    if options.bundle:
        yield existing_shop(options.bundle, options.data, cache)
        return
    for size in map(int, options.sizes.split(",")):
        if options.hm_bundle:
            yield resampled_shop(options.hm_bundle, size, cache)
        else:
            yield synthetic_shop(size, cache)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, help="an existing bundle, or a directory of bundles")
    parser.add_argument("--data", type=Path, help="the shop directory of --bundle, whose events are imported")
    parser.add_argument("--sizes", default="10000,105542,1000000", help="items of synthetic shops")
    parser.add_argument("--hm-bundle", type=Path, help="resample the items and models of this bundle instead")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "bench-serving-shops", help="for made shops, kept"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench-serving", help="for all files")
    parser.add_argument("--layouts", default=servers.ONE, help="one, three or one,three")
    parser.add_argument("--count", type=int, default=200, help="requests of the one caller")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each rate")
    parser.add_argument("--max-rates", type=int, default=12, help="at most so many rising rates")
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson")
    parser.add_argument("--limit-ms", type=float, default=250.0, help="a good page comes within this time")
    parser.add_argument(
        "--event-rates", default="1000,5000", help="events per second next to pages; empty for none"
    )
    parser.add_argument("--event-batch", type=int, default=50, help="events in one WriteEvents")
    parser.add_argument(
        "--no-bare", action="store_true", help="without pages in one process without a server"
    )
    parser.add_argument("--peer", choices=peer.PEERS, help="another recommender to measure in the same run")
    parser.add_argument(
        "--peer-python",
        type=Path,
        default=peer.CORNAC_PYTHON,
        help="the Python that has the peer installed",
    )
    parser.add_argument("--core", type=int, help="the only core that the client may use")
    return parser


if __name__ == "__main__":
    main()
