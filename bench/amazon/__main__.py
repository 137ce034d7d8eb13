"""Trains on a published Amazon split, answers its queries with the services, and scores the answers.

    python -m bench.amazon sports_lattice --split val
    python -m bench.amazon sports_lattice --split test     # appends to docs/test-ledger.jsonl

One bundle, trained on the protocol's train set, answers both splits. The test split of leave one out has its
statistics of items from the train set as well, as published protocols do; `--popularity past` counts the
validation items of other users, as a shop would. With --untrained the item graph of the same events answers
without training. Recall@k and nDCG@k are means over users; the ideal DCG has
min(targets, k) hits. All output is under --out: the shop directory, bundles, RUN.jsonl and SCORE.json of each
split.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.amazon.shops import BENCHMARKS, DAY, Benchmark, write_shop
from bench.amazon.untrained import run_untrained
from bench.runs import ROOT, record, vitrine
from cli.evaluate import evaluate
from services.ranking.service import RankingService
from training.core import metrics


def main() -> None:
    """Run a benchmark on one split."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--split", choices=("val", "test"), default="val")
    default = os.environ.get("VITRINE_BENCH", str(ROOT.parent / "shared" / "data" / "bench"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "amazon")
    parser.add_argument("--limit", type=int, default=0, help="only the first queries of val; 0 means all")
    parser.add_argument(
        "--popularity",
        choices=("train", "past"),
        help="what statistics of items count in the test of leave one out; train by default",
    )
    parser.add_argument("--untrained", action="store_true", help="evaluate the untrained graph only")
    options = parser.parse_args()
    benchmark = BENCHMARKS[options.benchmark]
    has_later_events = benchmark.ordered and options.split == "test"
    if options.popularity and (options.untrained or not has_later_events):
        parser.error(
            "--popularity is for bundles in the test of leave one out: only there are events after train"
        )
    if not (options.data / benchmark.name).is_dir():
        sys.exit(f"{options.data / benchmark.name} does not exist: set VITRINE_BENCH to the benchmarks' data")
    out = options.out / benchmark.name
    validated, shop = out / "val-score.json", out / "shop"
    if options.split == "test" and (options.limit or not (validated.is_file() or options.untrained)):
        sys.exit("configurations are selected on val, then test runs once, in full: run --split val first")
    write_shop(benchmark, options.data / benchmark.name, shop)
    questions = shop / f"queries_{options.split}.jsonl"
    if options.untrained:
        run, until = out / f"{options.split}-untrained.jsonl", datetime.combine(DAY, time(), UTC)
        run_untrained(shop, options.split, until, run, ordered=benchmark.ordered, limit=options.limit)
        score = scored(benchmark, questions, run)
        print(json.dumps(score, indent=1))  # noqa: T201 - the benchmark's answer
        if options.split == "test":  # no choice depends on it
            record(f"{benchmark.name}-untrained", "untrained", {}, _means(score))
        return
    bundle = vitrine("train", f"--data={shop}", f"--out={out / 'bundles'}", f"--until={DAY}").split()[-1]
    train_only = has_later_events and options.popularity != "past"
    name = (
        f"{options.split}-{'train' if train_only else 'past'}-popularity"
        if has_later_events
        else options.split
    )
    run = out / f"{name}.jsonl"
    with statistics_of_train() if train_only else nullcontext():
        evaluate(
            shop,
            Path(bundle),
            options.split,
            run,
            shop_file=None,
            limit=options.limit,
            over_grpc=0 if train_only else 200,  # other processes count all events
        )
    score = scored(benchmark, questions, run)
    (out / f"{name}-score.json").write_text(json.dumps(score, indent=1) + "\n")
    print(json.dumps(score, indent=1))  # noqa: T201 - the benchmark's answer
    if options.split == "test":
        val_score = json.loads(validated.read_text())
        record(f"{benchmark.name}{name.removeprefix('test')}", bundle, _means(val_score), _means(score))


@contextmanager
def statistics_of_train() -> Iterator[None]:
    """Serve with the statistics of items at the end of the train set; a user's own history goes on."""
    until, stats = datetime.combine(DAY, time(), UTC), RankingService.stats
    with patch.object(RankingService, "stats", lambda service, as_of: stats(service, min(as_of, until))):
        yield


def scored(benchmark: Benchmark, queries: Path, run: Path) -> dict[str, Any]:
    """Recall and nDCG of a run at the benchmark's k, with 95 % intervals over users."""
    query_lines = [json.loads(line) for line in queries.read_text().splitlines()]
    pages = [json.loads(line)["items"] for line in run.read_text().splitlines()]
    code: dict[str, int] = {}

    def coded(items: list[str]) -> np.ndarray:
        return np.array([code.setdefault(item, len(code)) for item in items], np.int64)

    targets = [coded(query["targets"]) for query in query_lines[: len(pages)]]
    figures = metrics.per_query([coded(page) for page in pages], targets, benchmark.k)
    intervals = {name: metrics.interval(figures[name]).to_dict() for name in ("recall", "ndcg")}
    return {"benchmark": benchmark.name, "k": benchmark.k, "queries": len(pages), **intervals}


def _means(score: dict[str, Any]) -> dict[str, float]:
    return {name: score[name]["mean"] for name in ("recall", "ndcg")}


if __name__ == "__main__":
    main()
