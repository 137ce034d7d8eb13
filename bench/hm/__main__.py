"""Train on H&M before a day, answer that day's queries through the serving path, and score them.

    python -m bench.hm --split val
    python -m bench.hm --split test     # appends to docs/test-ledger.jsonl; needs a val run before

Everything lands under --out: bundles, RUN.jsonl and SCORE.json of each split.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.replay import read_queries

_ROOT = Path(__file__).parents[2]
_SHOP = Path(__file__).parent / "shop.toml"
_LEDGER = _ROOT / "docs" / "test-ledger.jsonl"


def main() -> None:
    """Run the benchmark on one split."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("val", "test"), default="val")
    default = os.environ.get("VITRINE_HM", str(_ROOT.parent / "shared" / "data" / "hm"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--out", type=Path, default=_ROOT / "build" / "hm")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} is not there: set VITRINE_HM to the H&M data")
    validated = options.out / "val-score.json"
    if options.split == "test" and not validated.is_file():
        sys.exit("a configuration is chosen on val: run --split val first")
    options.out.mkdir(parents=True, exist_ok=True)
    day, _ = read_queries(options.data, _SHOP, options.split)
    shop = [f"--data={options.data}", f"--shop={_SHOP}"]
    bundles = options.out / "bundles"
    bundle = _vitrine("train", *shop, f"--out={bundles}", f"--until={day:%Y-%m-%d}").split()[-1]
    run, score = options.out / f"{options.split}.jsonl", options.out / f"{options.split}-score.json"
    report = _vitrine("evaluate", *shop, f"--bundle={bundle}", f"--split={options.split}", f"--out={run}")
    found = _scored(options.data, options.split, run)
    score.write_text(json.dumps(found, indent=1) + "\n")
    print(report, json.dumps(found, indent=1), sep="\n")  # noqa: T201 - the benchmark's answer
    if options.split == "test":
        _record(bundle, json.loads(validated.read_text()), found)


def _vitrine(*arguments: str) -> str:
    command = [sys.executable, "-m", "services.cli", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own command
    return done.stdout.strip()


def _scored(data: Path, split: str, run: Path) -> dict[str, Any]:
    """The answers' score, by the script that defines the task."""
    script = data.parents[1] / "bench" / "score_run.py"
    command = [sys.executable, str(script), str(data), split, str(run)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - the task's scorer
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _record(bundle: str, val: dict[str, Any], test: dict[str, Any]) -> None:
    """One more line of what was ever run on test: nothing is tried there in secret."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - the git that is there
        check=True,
        capture_output=True,
        text=True,
        cwd=_ROOT,
    ).stdout.strip()
    line = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit,
        "bundle": Path(bundle).name,
        "val": _summary(val),
        "test": _summary(test),
    }
    with _LEDGER.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _summary(score: dict[str, Any]) -> dict[str, float]:
    bands = score["target_recall"]
    return {
        "recall": score["recall"]["mean"],
        "ndcg": score["ndcg"]["mean"],
        "new_users": score["recall_new_users"]["mean"],
        **{band: bands[band]["mean"] for band in ("head", "mid", "tail", "strict_cold")},
    }


if __name__ == "__main__":
    main()
