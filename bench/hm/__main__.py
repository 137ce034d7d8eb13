"""Trains on H&M before a day, answers that day's queries with the services, and scores the answers.

    python -m bench.hm --split val
    python -m bench.hm --split test     # appends to docs/test-ledger.jsonl; needs a val run before
    python -m bench.hm --split val --universe all    # also ranks articles without sales
    python -m bench.hm --split val --training-config bench/hm/smaller.toml --out build/hm-smaller

All output is under --out: bundles, RUN.jsonl and SCORE.json of each split.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.runs import ROOT, record, vitrine
from cli.evaluation_queries import read_queries
from training.core import metrics

SHOP = Path(__file__).parent / "shop.toml"


def main() -> None:
    """Run the benchmark on one split."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--universe", choices=("sold", "all"), default="sold")
    default = os.environ.get("VITRINE_HM", str(ROOT.parent / "shared" / "data" / "hm"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hm")
    parser.add_argument("--training-config", dest="training", type=Path, help="as `vitrine train` takes it")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} does not exist: set VITRINE_HM to the H&M data")
    validated = options.out / f"{_name('val', options.universe)}-score.json"
    if options.split == "test" and not (validated.is_file() and "map12" in json.loads(validated.read_text())):
        sys.exit("configurations are selected on val: run --split val first, with this code")
    options.out.mkdir(parents=True, exist_ok=True)
    day, _ = read_queries(options.data, SHOP, options.split)
    shop = [f"--data={options.data}", f"--shop={SHOP}"]
    bundles = options.out / "bundles"
    # The ablation belongs to val, not to test.
    evaluation_flags = ["--skip-evaluation"] if options.split == "test" else []
    training = [f"--training-config={options.training}"] if options.training else []
    until = f"--until={day:%Y-%m-%d}"
    bundle = vitrine("train", *shop, *training, *evaluation_flags, f"--out={bundles}", until).split()[-1]
    name = _name(options.split, options.universe)
    run, score_file = options.out / f"{name}.jsonl", options.out / f"{name}-score.json"
    filter_flags = ["--unfiltered"] if options.universe == "all" else []
    run_flags = f"--bundle={bundle}", f"--split={options.split}", f"--out={run}"
    report = vitrine("evaluate", *shop, *run_flags, *filter_flags)
    score = scored(options.data, options.split, options.universe, run)
    score_file.write_text(json.dumps(score, indent=1) + "\n")
    print(report, json.dumps(score, indent=1), sep="\n")  # noqa: T201 - the benchmark's answer
    if options.split == "test":
        record(
            _name("hm", options.universe),
            bundle,
            summary(json.loads(validated.read_text())),
            summary(score),
        )


def _name(of: str, universe: str) -> str:
    return of if universe == "sold" else f"{of}-{universe}"


def scored(data: Path, split: str, universe: str, run: Path) -> dict[str, Any]:
    """The score of a run by the script that defines the task, and MAP@12."""
    script = data.parents[1] / "bench" / "score_run.py"
    command = [sys.executable, str(script), str(data), split, str(run), "--universe", universe]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - the task's scorer
    score: dict[str, Any] = json.loads(process.stdout)
    score["map12"] = metrics.interval(_average_precision(data, split, run)).to_dict()
    return score


def _average_precision(data: Path, split: str, run: Path) -> np.ndarray:
    """The average precision of the first 12 items of each page, float64 (Q,), as in H&M's own competition."""
    queries = [json.loads(line) for line in (data / f"queries_{split}.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in run.read_text().splitlines()]
    pages = [np.array([int(item) for item in answer["items"]], np.int64) for answer in answers]
    targets = [np.array([int(item) for item in query["targets"]], np.int64) for query in queries]
    return metrics.per_query(pages, targets, 12)["map"]


def summary(score: dict[str, Any]) -> dict[str, float]:
    """The means of a score."""
    bands = score["target_recall"]
    return {
        "recall": score["recall"]["mean"],
        "ndcg": score["ndcg"]["mean"],
        "map12": score["map12"]["mean"],
        "new_users": score["recall_new_users"]["mean"],
        **{band: bands[band]["mean"] for band in ("head", "mid", "tail", "strict_cold")},
    }


if __name__ == "__main__":
    main()
