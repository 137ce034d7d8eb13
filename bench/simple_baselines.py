"""Simple baselines of basket completion, without training.

    python -m bench.simple_baselines --data DIR --shop bench/hm/shop.toml --split val --out RUNS

Writes RUNS/NAME.jsonl for popular, item_item, family, text and mix, or for those in `--names`, and prints the
score and the time per query of each. Scores on test are also appended to docs/test-ledger.jsonl. Text vectors
are those of pretrained MiniLM. With `--universe all` every item of the catalog is a candidate, otherwise the
items of the events file.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy import sparse

from bench.hm.__main__ import scored, summary
from bench.runs import record
from cli.evaluation_queries import EvalQuery, read_queries
from services.catalog.items import item_text
from services.embedding.encoders.encoders import TextSettings
from training.data.dataset import read_shop
from training.encoders import text_encoder
from training.encoders.fit_encoders import precision
from training.encoders.text_vectors import encode_texts
from training.examples.queries import DAY, baskets

_POPULAR_DAYS = 3
_FAMILY, _TEXT, _POPULAR = 0.2, 0.1, 1e-3
NAMES = ("popular", "item_item", "family", "text", "mix")


class SimpleBaselines:
    """Scores of every item of the universe for a query: float32 (M,)."""

    def __init__(self, data: Path, shop_file: Path, split: str, universe: str) -> None:
        self.day, self.queries = read_queries(data, shop_file, split)
        whole_shop = read_shop(data, shop_file)
        catalog = {item.id: item for item in whole_shop.items}
        self.items = whole_shop.events.item_ids if universe == "sold" else list(catalog)
        place = {item: position for position, item in enumerate(self.items)}
        past = read_shop(data, shop_file, until=self.day)
        position = np.array([place[item] for item in past.events.item_ids])[past.events.item]
        days = past.events.time // DAY
        recent = days >= days.max() - _POPULAR_DAYS + 1
        self._popularity = np.bincount(position[recent], minlength=len(self.items)).astype(np.float32)
        self._cosine = _cosine(baskets(past.events), position, len(self.items))
        self._history: dict[str, np.ndarray] = {}
        order = np.argsort(past.events.user, kind="stable")
        users, start = np.unique(past.events.user[order], return_index=True)
        for user, user_rows in zip(users, np.split(order, start[1:]), strict=True):
            self._history[past.events.user_ids[user]] = np.unique(position[user_rows][-30:])
        self._place = place
        families = [catalog[item].family_id for item in self.items]
        _, self._family = np.unique(families, return_inverse=True)
        with TemporaryDirectory() as folder:
            text_encoder.save_frozen(Path(folder), "minilm", TextSettings(64, precision=precision()))
            texts = [item_text(catalog[item]) for item in self.items]
            self._text = encode_texts(Path(folder), texts).astype(np.float32)

    def seeds(self, query: EvalQuery) -> np.ndarray:
        """The session and the history, as positions in the universe."""
        session = [self._place[item] for item in query.session]
        past = self._history.get(query.user_id, np.empty(0, np.int64))
        return np.unique(np.concatenate([np.array(session, np.int64), past]))

    def popular(self, query: EvalQuery) -> np.ndarray:
        """Purchases of the last days."""
        return self._popularity

    def item_item(self, query: EvalQuery) -> np.ndarray:
        """Cosine of co-occurrence in baskets, summed over the seeds."""
        return np.asarray(self._cosine[self.seeds(query)].sum(0)).ravel()

    def family(self, query: EvalQuery) -> np.ndarray:
        """Item-item, plus a bonus for other variants of the seeds' products."""
        same_family = np.isin(self._family, self._family[self.seeds(query)])
        return self.item_item(query) + np.float32(_FAMILY) * same_family

    def text(self, query: EvalQuery) -> np.ndarray:
        """Highest text similarity to a seed."""
        seeds = self.seeds(query)
        if not len(seeds):
            return self._popularity
        return np.asarray((self._text @ self._text[seeds].T).max(1))

    def mix(self, query: EvalQuery) -> np.ndarray:
        """The three with hand-set weights; popularity breaks ties."""
        popular = np.float32(_POPULAR) * np.log1p(self._popularity)
        return self.family(query) + np.float32(_TEXT) * self.text(query) + popular

    def run(self, score: Callable[[EvalQuery], np.ndarray], out: Path, count: int = 20) -> None:
        """Write the best `count` items of every query, without its session."""
        with out.open("w") as file:
            for query in self.queries:
                scores = np.array(score(query), np.float32)
                scores[[self._place[item] for item in query.session]] = -np.inf
                best = np.argpartition(-scores, count)[:count]
                best = best[np.lexsort((best, -scores[best]))]
                items = [self.items[index] for index in best]
                file.write(json.dumps({"user_id": int(query.user_id), "items": items}) + "\n")


def _cosine(groups: np.ndarray, items: np.ndarray, count: int) -> sparse.csr_matrix:
    _, rows = np.unique(groups, return_inverse=True)
    ones = np.ones(len(items), np.float32)
    incidence = sparse.csr_matrix((ones, (rows, items)), shape=(rows.max() + 1, count))
    incidence.data[:] = 1
    co_occurrence = (incidence.T @ incidence).tocsr()
    scale = sparse.diags(1 / np.sqrt(np.maximum(co_occurrence.diagonal(), 1)))
    cosine = (scale @ (co_occurrence - sparse.diags(co_occurrence.diagonal())) @ scale).tocsr()
    return cosine.astype(np.float32)


def main() -> None:
    """Write and score the run of every baseline."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "shop", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--split", choices=("val", "test"), required=True)
    parser.add_argument("--universe", choices=("sold", "all"), default="sold")
    parser.add_argument("--names", default=",".join(NAMES))
    options = parser.parse_args()
    if unknown := set(options.names.split(",")) - set(NAMES):
        parser.error(f"there is no {sorted(unknown)[0]!r} among {', '.join(NAMES)}")
    baselines = SimpleBaselines(options.data, options.shop, options.split, options.universe)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names.split(","):
        start, run = time.perf_counter(), options.out / f"{name}.jsonl"
        baselines.run(getattr(baselines, name), run)
        spent = 1000 * (time.perf_counter() - start) / len(baselines.queries)
        score = scored(options.data, options.split, options.universe, run)
        result = {"name": name, "milliseconds": round(spent, 2), **summary(score)}
        print(json.dumps(result), flush=True)  # noqa: T201 - the answer
        if options.split == "test":  # no choice depends on it
            record(f"hm-{options.universe}-{name}", "untrained", {}, summary(score))


if __name__ == "__main__":
    main()
