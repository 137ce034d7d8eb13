"""Trains shops of other kinds with defaults and compares them with simple methods on later baskets.

    python -m bench.shops [--names slow,small] [--out build/shops]

Needs the H&M data (VITRINE_HM) and the Amazon reviews (VITRINE_BENCH). Prints for each shop the closing
lines of `vitrine train`, its time and memory, and recall@20 and nDCG@20 of Vitrine, hand-set weights, popular
items, the cosine and EASE, with 95 % intervals; then a table of them. The numbers stay in results.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.runs import ROOT, vitrine
from bench.shops.shops import SHOPS, Sources, write_shop
from services.catalog.bundle import MANIFEST, Bundle, publish

RESULTS = "results.json"
HAND_SET = "hand-set weights"
_RANKERS = ("reranker", "ctr")
_MEGABYTE = 1 << 10  # in the kilobytes that the system counts


def main() -> None:
    """Make, train and evaluate each shop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", default=",".join(SHOPS))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "shops")
    options = parser.parse_args()
    names = options.names.split(",")
    if unknown := set(names) - set(SHOPS):
        parser.error(f"there is no shop {sorted(unknown)[0]!r} among {', '.join(SHOPS)}")
    data = ROOT.parent / "shared" / "data"
    sources = Sources(
        Path(os.environ.get("VITRINE_HM", str(data / "hm"))),
        Path(os.environ.get("VITRINE_BENCH", str(data / "bench"))),
    )
    for directory in (sources.hm, sources.amazon):
        if not directory.is_dir():
            sys.exit(f"{directory} does not exist: set VITRINE_HM and VITRINE_BENCH")
    results = {}
    for name in names:
        directory = options.out / name
        shutil.rmtree(directory, ignore_errors=True)
        queries = write_shop(SHOPS[name](sources), directory / "shop")
        results[name] = train_shop(directory) | (evaluate_shop(directory) if queries else {})
        print(json.dumps({name: results[name]}, indent=1), flush=True)  # noqa: T201 - the answer
    (options.out / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))  # noqa: T201 - the answer


def train_shop(directory: Path) -> dict[str, Any]:
    """Train a shop with defaults; the closing lines, the seconds of CPU and clock, and the peak memory."""
    queries = directory / "shop" / "queries_val.jsonl"
    until = []
    if queries.is_file():
        until = [f"--until={json.loads(queries.read_text().splitlines()[0])['date']}"]
    paths = [f"--data={directory / 'shop'}", f"--out={directory / 'bundles'}"]
    start, log = time.perf_counter(), directory / "train.log"
    command = [sys.executable, "-m", "cli.main", "train", *paths, *until]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)  # noqa: S603 - our own command
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"training failed: {log}")
    return {
        "lines": log.read_text().splitlines()[-5:],
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": usage.ru_maxrss // _MEGABYTE,
    }


def evaluate_shop(directory: Path) -> dict[str, Any]:
    """The metrics of the bundle, of hand-set weights over its candidates, and of simple methods."""
    bundle = Bundle(directory / "bundles")
    plain = without_rankers(bundle, directory / "hand-set")
    flags = [f"--data={directory / 'shop'}", "--split=val", "--json", "--over-grpc=0"]
    whole, by_hand = (
        json.loads(vitrine("evaluate", *flags, f"--bundle={path}")) for path in (bundle.directory, plain)
    )
    methods = whole["methods"]
    return {"queries": whole["queries"], "methods": methods | {HAND_SET: by_hand["methods"]["Vitrine"]}}


def without_rankers(bundle: Bundle, directory: Path) -> Path:
    """A copy of a bundle that ranks by hand-set weights."""
    staged = directory / "staged"
    shutil.copytree(bundle.directory, staged, ignore=shutil.ignore_patterns(MANIFEST, *_RANKERS))
    return publish(staged, directory / "bundles", bundle.profile, bundle.until)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Recall@20 / nDCG@20 of each method by shop, in Markdown."""
    methods = list(dict.fromkeys(name for result in results.values() for name in result.get("methods", {})))
    lines = ["| shop | queries | " + " | ".join(methods) + " | CPU s | peak MB |"]
    lines.append("|:--|--:|" + "--:|" * (len(methods) + 2))
    for name, result in results.items():
        cells = [_cell(result.get("methods", {}).get(method)) for method in methods]
        numbers = (result.get("queries", "–"), *cells, result["cpu_seconds"], result["peak_mb"])
        lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "–"
    parts = []
    for name in ("recall", "ndcg"):
        low, high = figures[name]["ci95"]
        parts.append(f"{figures[name]['mean']:.3f} [{low:.3f}, {high:.3f}]")
    return " / ".join(parts)


if __name__ == "__main__":
    main()
