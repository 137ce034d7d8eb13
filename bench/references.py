"""The simple references of basket completion, nothing trained.

    python -m bench.references --data DIR --shop bench/hm/shop.toml --split val --out RUNS [--universe all]

Writes RUNS/NAME.jsonl for popular, item_item, family, text and mix, or those that `--names` names, and prints
what each scores and costs a query; what test says goes into docs/test-ledger.jsonl as well. Text vectors are
of MiniLM as it comes. With `--universe all` every item of the catalogue may be answered, otherwise those
of the events file.
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
from services.catalog import item_text
from services.embedding.encoders import TextSettings
from services.replay import Query, read_queries
from training import text_encoder
from training.dataset import read_shop
from training.encoding import encode_texts, precision
from training.queries import DAY, baskets

_POPULAR_DAYS = 3
_FAMILY, _TEXT, _POPULAR = 0.2, 0.1, 1e-3
NAMES = ("popular", "item_item", "family", "text", "mix")


class References:
    """Scores of every item of the universe for a query: float32 (M,)."""

    def __init__(self, data: Path, shop_file: Path, split: str, universe: str) -> None:
        self.day, self.queries = read_queries(data, shop_file, split)
        everything = read_shop(data, shop_file)
        catalogue = {item.id: item for item in everything.items}
        self.items = everything.events.item_ids if universe == "sold" else list(catalogue)
        place = {item: at for at, item in enumerate(self.items)}
        past = read_shop(data, shop_file, until=self.day)
        at = np.array([place[item] for item in past.events.item_ids])[past.events.item]
        days = past.events.time // DAY
        recent = days >= days.max() - _POPULAR_DAYS + 1
        self._popularity = np.bincount(at[recent], minlength=len(self.items)).astype(np.float32)
        self._cosine = _cosine(baskets(past.events), at, len(self.items))
        self._history: dict[str, np.ndarray] = {}
        order = np.argsort(past.events.user, kind="stable")
        users, start = np.unique(past.events.user[order], return_index=True)
        for user, mine in zip(users, np.split(order, start[1:]), strict=True):
            self._history[past.events.user_ids[user]] = np.unique(at[mine][-30:])
        self._place = place
        families = [catalogue[item].family_id for item in self.items]
        _, self._family = np.unique(families, return_inverse=True)
        with TemporaryDirectory() as folder:
            text_encoder.save_frozen("minilm", Path(folder), TextSettings(64, precision=precision()))
            texts = [item_text(catalogue[item]) for item in self.items]
            self._text = encode_texts(Path(folder), texts).astype(np.float32)

    def seeds(self, query: Query) -> np.ndarray:
        """The session and the history, as places in the universe."""
        session = [self._place[item] for item in query.session]
        past = self._history.get(query.user_id, np.empty(0, np.int64))
        return np.unique(np.concatenate([np.array(session, np.int64), past]))

    def popular(self, query: Query) -> np.ndarray:
        """Most bought of the last days."""
        return self._popularity

    def item_item(self, query: Query) -> np.ndarray:
        """Cosine of co-occurrence in baskets, summed over the seeds."""
        return np.asarray(self._cosine[self.seeds(query)].sum(0)).ravel()

    def family(self, query: Query) -> np.ndarray:
        """Item-item, and other colours of the same product."""
        mine = np.isin(self._family, self._family[self.seeds(query)])
        return self.item_item(query) + np.float32(_FAMILY) * mine

    def text(self, query: Query) -> np.ndarray:
        """Highest text similarity to a seed."""
        seeds = self.seeds(query)
        if not len(seeds):
            return self._popularity
        return np.asarray((self._text @ self._text[seeds].T).max(1))

    def mix(self, query: Query) -> np.ndarray:
        """All three with hand-set weights, popularity to break ties."""
        popular = np.float32(_POPULAR) * np.log1p(self._popularity)
        return self.family(query) + np.float32(_TEXT) * self.text(query) + popular

    def run(self, score: Callable[[Query], np.ndarray], out: Path, count: int = 20) -> None:
        """Write the best `count` items of every query, its session left out."""
        with out.open("w") as file:
            for query in self.queries:
                scores = np.array(score(query), np.float32)
                scores[[self._place[item] for item in query.session]] = -np.inf
                best = np.argpartition(-scores, count)[:count]
                best = best[np.lexsort((best, -scores[best]))]
                items = [self.items[at] for at in best]
                file.write(json.dumps({"user_id": int(query.user_id), "items": items}) + "\n")


def _cosine(groups: np.ndarray, items: np.ndarray, count: int) -> sparse.csr_matrix:
    _, rows = np.unique(groups, return_inverse=True)
    ones = np.ones(len(items), np.float32)
    held = sparse.csr_matrix((ones, (rows, items)), shape=(rows.max() + 1, count))
    held.data[:] = 1
    together = (held.T @ held).tocsr()
    scale = sparse.diags(1 / np.sqrt(np.maximum(together.diagonal(), 1)))
    cosine = (scale @ (together - sparse.diags(together.diagonal())) @ scale).tocsr()
    return cosine.astype(np.float32)


def main() -> None:
    """Write and score every reference's run."""
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
    references = References(options.data, options.shop, options.split, options.universe)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names.split(","):
        began, run = time.perf_counter(), options.out / f"{name}.jsonl"
        references.run(getattr(references, name), run)
        spent = 1000 * (time.perf_counter() - began) / len(references.queries)
        score = scored(options.data, options.split, options.universe, run)
        found = {"name": name, "milliseconds": round(spent, 2), **summary(score)}
        print(json.dumps(found), flush=True)  # noqa: T201 - the answer
        if options.split == "test":  # nothing is chosen by it
            record(f"hm-{options.universe}-{name}", "untrained", {}, summary(score))


if __name__ == "__main__":
    main()
