"""Fits Cornac's BPR model on interactions and saves it for Cornac's serving app.

    python bench/serving/cornac_fit.py --interactions FILE --out DIR

Runs in its own environment (bench/serving/cornac.txt), without Vitrine. FILE has a JSON array of a
user id and an item id per line. Prints JSON: the path of the model, and what it was fitted on. Cornac drops
repeated interactions of a user with an item. How good the pages are does not matter here: a page costs the
same for any values of the factors.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from cornac.data import Dataset
from cornac.models import BPR

_FACTORS, _EPOCHS = 64, 20


def main() -> None:
    """Fit and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--interactions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with options.interactions.open() as file:
        pairs = [json.loads(line) for line in file]
    data = Dataset.build([(user, item, 1.0) for user, item in pairs])
    model = BPR(k=_FACTORS, max_iter=_EPOCHS, seed=0).fit(data)
    answer = {
        "model": model.save(str(options.out), save_trainset=True),
        "version": version("cornac"),
        "users": data.num_users,
        "items": data.num_items,
        "interactions": data.num_ratings,
    }
    print(json.dumps(answer))  # noqa: T201 - the answer


if __name__ == "__main__":
    main()
