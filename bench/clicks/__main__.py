"""Trains on a published log of news pages as on a shop, and scores held-out pages with the ranking service.

    python -m bench.clicks mind --split val
    python -m bench.clicks ebnerd --split test     # appends to docs/test-ledger.jsonl; needs a val run before

Models are trained on what was before the split: val is the last day of the training period, test the README's
period. The items of each page are then ranked at its time, with the events before it. AUC, MRR, nDCG@5 and
nDCG@10 are means over pages, with 95 % bootstrap intervals. `--without history` and `--without freshness`
leave out the reads before the log, and the times of publication. The settings of training can be replaced:
`--training-config FILE`. All output is under --out.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from bench.clicks.baselines import baseline_scores
from bench.clicks.logs import FOLDERS, READERS, Page
from bench.clicks.scoring import FINAL, METRICS, per_page, service_scores
from bench.clicks.shops import write_events, write_shop
from bench.runs import ROOT, record, vitrine
from training.core import metrics

_PARTS = ("history", "freshness")


def main() -> None:
    """Run a benchmark on one split."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=sorted(READERS))
    parser.add_argument("--split", choices=("val", "test"), default="val")
    default = os.environ.get("VITRINE_CLICKS", str(ROOT.parent / "shared" / "data" / "clicks"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "clicks")
    parser.add_argument("--without", action="append", choices=_PARTS, default=[])
    parser.add_argument("--training-config", type=Path, help="as `vitrine train` takes it")
    parser.add_argument("--bundle", type=Path, help="score this bundle instead of training one")
    options = parser.parse_args()
    source = options.data / FOLDERS[options.benchmark]
    if not source.is_dir():
        sys.exit(f"{source} does not exist: set VITRINE_CLICKS to the data")
    name = "-".join([options.benchmark, *(f"no-{part}" for part in sorted(options.without))])
    out, log = options.out / name, READERS[options.benchmark](source)
    validated = out / "val-score.json"
    if options.split == "test" and not validated.is_file():
        sys.exit("configurations are selected on val, then test runs once: run --split val first")
    period, shop = log.periods[options.split], out / f"shop-{options.split}"
    write_shop(options.benchmark, log, period.start, shop, options.without)
    bundle = options.bundle or _train(shop, out / "bundles", f"{period.start:%Y-%m-%dT%H:%M:%S}", options)
    pages = [page for page in log.pages if period.start <= page.time < period.end]
    # What happened later is there as well: the service must not look at it.
    later = log.later_reads if options.split == "test" else []
    reads = [] if "history" in options.without else [*log.reads, *later]
    write_events(shop / "events.parquet", reads, [page for page in log.pages if page.time < period.end])
    scores = baseline_scores(options.benchmark, log, period, pages) | service_scores(bundle, shop, pages)
    score = {method: _intervals(values, pages) for method, values in scores.items()}
    (out / f"{options.split}-score.json").write_text(json.dumps(score, indent=1) + "\n")
    print(f"{options.benchmark}, {options.split}, {len(pages)} pages, {bundle}", _table(score), sep="\n")  # noqa: T201
    if options.split == "test":
        record(name, str(bundle), _means(json.loads(validated.read_text())), _means(score))


def _train(shop: Path, bundles: Path, until: str, options: argparse.Namespace) -> Path:
    configuration = [f"--training-config={options.training_config}"] if options.training_config else []
    arguments = [
        f"--data={shop}",
        f"--out={bundles}",
        f"--until={until}",
        "--skip-evaluation",
        *configuration,
    ]
    return Path(vitrine("train", *arguments).split()[-1])


def _intervals(scores: list[Any], pages: list[Page]) -> dict[str, dict[str, Any]]:
    return {name: metrics.interval(values).to_dict() for name, values in per_page(scores, pages).items()}


def _table(score: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line for each method."""
    lines = ["", f"| | {' | '.join(METRICS)} |", f"|---|{'---|' * len(METRICS)}"]
    for method, figures in score.items():
        cells = [f"{f['mean']:.4f} [{f['ci95'][0]:.4f}, {f['ci95'][1]:.4f}]" for f in figures.values()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _means(score: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    return {name: figures["mean"] for name, figures in score[FINAL].items()}


if __name__ == "__main__":
    main()
