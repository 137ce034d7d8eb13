"""RecTools and implicit on H&M and Amazon Sports, on val, each model tuned for the same time.

    python -m bench.baselines --python PYTHON --out build/baselines --minutes 5

PYTHON is an environment with bench/baselines/requirements.txt. Test is never used. `bench.hm` and
`bench.amazon` print Vitrine's scores on the same queries. If a model fails or takes too long, its line says
so and the others continue; the exit status is 1 if a model failed.
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
from bench.baselines.export import export
from bench.hm.__main__ import SHOP, scored
from bench.runs import ROOT

_FIT = Path(__file__).parent / "fit.py"
_SPORTS = BENCHMARKS["sports_lattice"]


def main() -> None:
    """Fit and score all models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="of tuning for each model")
    parser.add_argument("--patience", type=float, default=10, help="additional minutes for the last trial")
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
        ("sports", shop, None, ["--exclude-viewed"]),
    ):
        if name not in options.on.split(","):
            continue
        task_directory, runs = options.out / f"{name}-val", options.out / f"{name}-runs"
        export(directory, settings, "val", task_directory)
        for model in options.models.split(","):
            tuning = [f"--minutes={options.minutes}", *more]
            time_limit = 60 * (options.minutes + options.patience)
            result = _fit(options.python, task_directory, runs, model, tuning, time_limit)
            if "failed" in result or "late" in result:
                failed |= "failed" in result
                print(json.dumps({"data": name, **result}), flush=True)  # noqa: T201 - the answer
                continue
            run = runs / f"{model}.jsonl"
            if name == "hm":
                score = scored(hm, "val", "sold", run)
            else:
                score = scored_amazon(_SPORTS, shop / "queries_val.jsonl", run)
            figures = {figure: score[figure] for figure in ("recall", "ndcg")}
            print(json.dumps({"data": name, **result, **figures}), flush=True)  # noqa: T201 - the answer
    sys.exit(int(failed))


def _fit(
    python: Path, task_directory: Path, runs: Path, model: str, flags: list[str], time_limit: float
) -> dict[str, Any]:
    command = [
        str(python.absolute()),
        str(_FIT),
        f"--task={task_directory}",
        f"--out={runs}",
        f"--models={model}",
        *flags,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # as `vitrine train` runs
    try:
        process = subprocess.run(  # noqa: S603 - our own script
            command, check=False, stdout=subprocess.PIPE, text=True, env=environment, timeout=time_limit
        )
    except subprocess.TimeoutExpired:
        return {"model": model, "late": f"no answer within {time_limit / 60:g} minutes"}
    if process.returncode:
        return {"model": model, "failed": f"exit status {process.returncode}"}
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
