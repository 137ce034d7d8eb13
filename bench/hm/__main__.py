"""Train on H&M before a day, answer that day's queries through the serving path, and score them.

    python -m bench.hm --split val
    python -m bench.hm --split test     # appends to docs/test-ledger.jsonl; needs a val run before
    python -m bench.hm --split val --universe all    # ranks the never-sold articles as well
    python -m bench.hm --split val --training bench/hm/smaller.toml --out build/hm-smaller

Everything lands under --out: bundles, RUN.jsonl and SCORE.json of each split.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.runs import ROOT, record, vitrine
from services.replay import read_queries

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
    parser.add_argument("--training", type=Path, help="as `vitrine train` takes it")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} is not there: set VITRINE_HM to the H&M data")
    validated = options.out / f"{_name('val', options.universe)}-score.json"
    if options.split == "test" and not validated.is_file():
        sys.exit("a configuration is chosen on val: run --split val first")
    options.out.mkdir(parents=True, exist_ok=True)
    day, _ = read_queries(options.data, SHOP, options.split)
    shop = [f"--data={options.data}", f"--shop={SHOP}"]
    bundles = options.out / "bundles"
    # What each part is worth is asked before test is.
    judged = ["--unjudged"] if options.split == "test" else []
    training = [f"--training={options.training}"] if options.training else []
    until = f"--until={day:%Y-%m-%d}"
    bundle = vitrine("train", *shop, *training, *judged, f"--out={bundles}", until).split()[-1]
    name = _name(options.split, options.universe)
    run, score = options.out / f"{name}.jsonl", options.out / f"{name}-score.json"
    more = ["--unfiltered"] if options.universe == "all" else []
    asked = f"--bundle={bundle}", f"--split={options.split}", f"--out={run}"
    report = vitrine("evaluate", *shop, *asked, *more)
    found = scored(options.data, options.split, options.universe, run)
    score.write_text(json.dumps(found, indent=1) + "\n")
    print(report, json.dumps(found, indent=1), sep="\n")  # noqa: T201 - the benchmark's answer
    if options.split == "test":
        record(
            _name("hm", options.universe),
            bundle,
            summary(json.loads(validated.read_text())),
            summary(found),
        )


def _name(of: str, universe: str) -> str:
    return of if universe == "sold" else f"{of}-{universe}"


def scored(data: Path, split: str, universe: str, run: Path) -> dict[str, Any]:
    """The score of a run, by the script that defines the task."""
    script = data.parents[1] / "bench" / "score_run.py"
    command = [sys.executable, str(script), str(data), split, str(run), "--universe", universe]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - the task's scorer
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def summary(score: dict[str, Any]) -> dict[str, float]:
    """The means of a score."""
    bands = score["target_recall"]
    return {
        "recall": score["recall"]["mean"],
        "ndcg": score["ndcg"]["mean"],
        "new_users": score["recall_new_users"]["mean"],
        **{band: bands[band]["mean"] for band in ("head", "mid", "tail", "strict_cold")},
    }


if __name__ == "__main__":
    main()
