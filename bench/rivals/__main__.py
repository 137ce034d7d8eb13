"""RecTools and implicit beside Vitrine on H&M and Amazon Sports, on val, each model tuned for equal times.

    python -m bench.rivals --python RIVALS_PYTHON --out build/rivals --minutes 5

RIVALS_PYTHON has bench/rivals/requirements.txt installed. Test is never asked here. What Vitrine scores on
the same questions is what `bench.hm` and `bench.amazon` print. A model that fails, or has no answer in time,
is a line that says so, and the others go on; the exit status tells of the former.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.amazon.__main__ import scored as scored_amazon
from bench.amazon.shops import BENCHMARKS, write_shop
from bench.hm.__main__ import SHOP, scored
from bench.rivals.export import export
from bench.runs import ROOT

_FIT = Path(__file__).parent / "fit.py"
_SPORTS = BENCHMARKS["sports_lattice"]


def main() -> None:
    """Fit and score everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="of tuning for each model")
    parser.add_argument("--patience", type=float, default=10, help="minutes more for the last trial")
    parser.add_argument("--models", default="item_knn,ials,bpr,ease,sasrec")
    parser.add_argument("--on", default="hm,sports")
    options = parser.parse_args()
    data = ROOT.parent / "shared" / "data"
    hm = Path(os.environ.get("VITRINE_HM", str(data / "hm")))
    sports = Path(os.environ.get("VITRINE_BENCH", str(data / "bench"))) / _SPORTS.name
    shop = options.out / "sports-shop"
    write_shop(_SPORTS, sports, shop)
    failed = False
    for name, directory, settings, more in (
        ("hm", hm, SHOP, []),
        ("sports", shop, None, ["--exclude-seen"]),
    ):
        if name not in options.on.split(","):
            continue
        asked, runs = options.out / f"{name}-val", options.out / f"{name}-runs"
        export(directory, settings, "val", asked)
        for model in options.models.split(","):
            tuning = [f"--minutes={options.minutes}", *more]
            most = 60 * (options.minutes + options.patience)
            found = _fit(options.python, asked, runs, model, tuning, most)
            if "failed" in found or "late" in found:
                failed |= "failed" in found
                print(json.dumps({"data": name, **found}), flush=True)  # noqa: T201 - the answer
                continue
            run = runs / f"{model}.jsonl"
            if name == "hm":
                score = scored(hm, "val", "sold", run)
            else:
                score = scored_amazon(_SPORTS, shop / "queries_val.jsonl", run)
            figures = {figure: score[figure] for figure in ("recall", "ndcg")}
            print(json.dumps({"data": name, **found, **figures}), flush=True)  # noqa: T201 - the answer
    sys.exit(int(failed))


def _fit(python: Path, asked: Path, runs: Path, model: str, more: list[str], most: float) -> dict[str, Any]:
    command = [
        str(python.absolute()),
        str(_FIT),
        f"--asked={asked}",
        f"--out={runs}",
        f"--models={model}",
        *more,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # as `vitrine train` runs
    try:
        done = subprocess.run(  # noqa: S603 - our own script
            command, check=False, stdout=subprocess.PIPE, text=True, env=environment, timeout=most
        )
    except subprocess.TimeoutExpired:
        return {"model": model, "late": f"no answer within {most / 60:g} minutes"}
    if done.returncode:
        return {"model": model, "failed": f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
