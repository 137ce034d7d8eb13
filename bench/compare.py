"""Compares two runs on one split: paired 95 % intervals over queries.

python -m bench.compare --data DIR --split val ONE.jsonl OTHER.jsonl
"""

import argparse
import json
from pathlib import Path

import numpy as np

from training.core.metrics import paired_interval, per_query


def main() -> None:
    """Print the difference, the first run minus the second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", choices=("val", "test"), required=True)
    parser.add_argument("runs", type=Path, nargs=2)
    options = parser.parse_args()
    queries = _lines(options.data / f"queries_{options.split}.jsonl")
    code: dict[str, int] = {}

    def coded(items: list[str]) -> np.ndarray:
        return np.array([code.setdefault(item, len(code)) for item in items], np.int64)

    targets = [coded(query["targets"]) for query in queries]
    first, second = (
        per_query([coded(line["items"]) for line in _lines(run)], targets, 20) for run in options.runs
    )
    differences = {name: paired_interval(first[name], second[name]).to_dict() for name in ("recall", "ndcg")}
    print(json.dumps(differences, indent=1))  # noqa: T201 - the command's answer


def _lines(path: Path) -> list[dict[str, list[str]]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
