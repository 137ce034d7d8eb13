"""Models of RecTools and implicit, tuned for equal times, answering a shop's questions.

    python bench/rivals/fit.py --asked DIR --minutes 5 --out RUNS [--models ease,sasrec] [--exclude-seen]

Runs in an environment of its own (bench/rivals/requirements.txt), apart from Vitrine. DIR is what
`bench/rivals/export.py` wrote. Models are fitted on what was known before the day; a person who asks is what
history and session make of them: folded in by iALS, the mean of its items' factors for BPR. Items
that a model gives no score, all of them for a stranger, are filled up in no order. Writes
RUNS/MODEL.jsonl and prints what was chosen, what its fit took and what a question takes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import BM25Recommender, CosineRecommender, TFIDFRecommender
from rectools import Columns
from rectools.dataset import Dataset, IdMap, Interactions
from rectools.models import SASRecModel
from scipy import sparse
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

K = 20
_ASKED_TO_TUNE = 2000
_AT_ONCE = 500
_NONE = -np.inf
_BLOCK = 2048

Trial = optuna.Trial
Scores = Callable[[np.ndarray], np.ndarray]
"""Scores float (B, M) over all items for some questions, int64 (B,)."""


@dataclass(frozen=True)
class Task:
    """A split: `past` has a row for every engagement before the day, `asking` for what those who ask did.

    Columns user_id, item (a code into `items`), weight and datetime; users of `asking` are questions.
    `allowed` bool (M,) may be answered; `hidden` bool (Q, M) sparse, what a question may not be answered by.
    """

    items: pd.Index
    past: pd.DataFrame
    asking: pd.DataFrame
    asked_by: list[str]
    targets: list[set[str]]
    allowed: np.ndarray
    hidden: sparse.csr_matrix

    @cached_property
    def learned(self) -> sparse.csr_matrix:
        """What people engaged with, and how much in all: float32 (U, M)."""
        users, _ = pd.factorize(self.past["user_id"])
        return self._matrix(users, self.past, users.max() + 1)

    @cached_property
    def known(self) -> sparse.csr_matrix:
        """The same of those who ask, float32 (Q, M)."""
        return self._matrix(self.asking["user_id"].to_numpy(), self.asking, len(self.targets))

    def _matrix(self, rows: np.ndarray, frame: pd.DataFrame, count: int) -> sparse.csr_matrix:
        parts = frame["weight"].to_numpy(np.float32), (rows, frame["item"].to_numpy())
        return sparse.csr_matrix(parts, shape=(count, len(self.items)))


def read_task(directory: Path, *, seen: bool) -> Task:
    """What `bench.rivals.export` wrote; what was `seen` before the session may be answered, or not."""
    past = pd.read_csv(directory / "interactions.csv", dtype={"user_id": str, "item_id": str})
    past["datetime"] = pd.to_datetime(past["datetime"])
    asked = [json.loads(line) for line in (directory / "questions.jsonl").read_text().splitlines()]
    universe = (directory / "universe.txt").read_text().splitlines()
    items = pd.Index(pd.unique(pd.concat([past["item_id"], pd.Series(universe)])))
    past["item"] = items.get_indexer(past["item_id"])
    of_user = past.groupby("user_id").indices
    parts, sessions = [], []
    for at, question in enumerate(asked):
        mine = past.iloc[of_user.get(question["user_id"], np.empty(0, int))]
        parts.append(mine.assign(user_id=at))
        sessions += [(at, items.get_loc(item), question["day"]) for item in question["session"]]
    session = pd.DataFrame(sessions, columns=["user_id", "item", "datetime"])
    session = session.astype({"user_id": "int64", "item": "int64"})  # of none as well
    session["datetime"], session["weight"] = pd.to_datetime(session["datetime"]), 1.0
    asking = pd.concat([*parts, session], ignore_index=True)
    out = session if seen else asking
    ones = np.ones(len(out), bool)
    hidden = sparse.csr_matrix((ones, (out["user_id"], out["item"])), shape=(len(asked), len(items)))
    return Task(
        items,
        past,
        asking,
        [question["user_id"] for question in asked],
        [set(question["targets"]) for question in asked],
        items.isin(universe),
        hidden,
    )


def answers(scores: Scores, task: Task, questions: np.ndarray) -> list[list[str]]:
    """The best 20 items of each question."""
    pages = []
    for begin in range(0, len(questions), _AT_ONCE):
        some = questions[begin : begin + _AT_ONCE]
        found = np.where(task.allowed, scores(some), _NONE)
        found[task.hidden[some].toarray()] = _NONE
        best = np.argpartition(-found, K, axis=1)[:, :K]
        order = np.argsort(-np.take_along_axis(found, best, 1), axis=1, kind="stable")
        pages += [task.items[page].tolist() for page in np.take_along_axis(best, order, 1)]
    return pages


def ndcg(pages: list[list[str]], targets: list[set[str]]) -> float:
    """Mean nDCG@20, ideal DCG over min(answers, 20)."""
    discount = 1 / np.log2(np.arange(2, K + 2))
    gains = [
        discount @ [item in wanted for item in page] for page, wanted in zip(pages, targets, strict=True)
    ]
    return float(np.mean([g / discount[: min(len(t), K)].sum() for g, t in zip(gains, targets, strict=True)]))


def item_knn(trial: Trial, task: Task) -> Callable[[Task], Scores]:
    """Item neighbours by cosine, TF-IDF or BM25."""
    kind = trial.suggest_categorical("kind", ["cosine", "tfidf", "bm25"])
    near = trial.suggest_int("neighbours", 20, 500, log=True)
    if kind == "bm25":
        b = trial.suggest_float("b", 0, 1)
        model = BM25Recommender(K=near, K1=trial.suggest_float("k1", 0.1, 3), B=b)
    else:
        model = (CosineRecommender if kind == "cosine" else TFIDFRecommender)(K=near)
    model.fit(task.learned, show_progress=False)
    return lambda asked: lambda some: (asked.known[some] @ model.similarity).toarray()


def ials(trial: Trial, task: Task) -> Callable[[Task], Scores]:
    """Weighted matrix factorisation (Hu et al., 2008)."""
    model = AlternatingLeastSquares(
        factors=trial.suggest_int("factors", 32, 256, log=True),
        regularization=trial.suggest_float("regularisation", 1e-3, 10, log=True),
        alpha=trial.suggest_float("alpha", 0.5, 100, log=True),
        iterations=trial.suggest_int("iterations", 5, 20),
        random_state=0,
    )
    # Its own threads call BLAS, whose threads then fight for the cores: implicit asks for this.
    with threadpool_limits(1, "blas"):
        model.fit(task.learned, show_progress=False)

    def scores(asked: Task, some: np.ndarray) -> np.ndarray:
        with threadpool_limits(1, "blas"):
            people = model.recalculate_user(np.arange(len(some)), asked.known[some])
        return np.asarray(people @ model.item_factors.T)

    return lambda asked: partial(scores, asked)


def bpr(trial: Trial, task: Task) -> Callable[[Task], Scores]:
    """Pairwise matrix factorisation (Rendle et al., 2009)."""
    model = BayesianPersonalizedRanking(
        factors=trial.suggest_int("factors", 32, 256, log=True),
        learning_rate=trial.suggest_float("learning_rate", 1e-3, 0.3, log=True),
        regularization=trial.suggest_float("regularisation", 1e-4, 0.3, log=True),
        iterations=trial.suggest_int("iterations", 20, 200, log=True),
        random_state=0,
    )
    model.fit(task.learned, show_progress=False)
    factors = model.item_factors.copy()
    factors[:, -1] = 0  # what a person has of an item's bias is one, not a mean of biases

    def of(asked: Task) -> Scores:
        size = np.maximum(np.asarray(asked.known.sum(1)), 1)
        people = np.asarray(asked.known @ factors) / size
        people[:, -1] = 1
        return lambda some: people[some] @ model.item_factors.T

    return of


def ease(trial: Trial, task: Task) -> Callable[[Task], Scores]:
    """EASE^R (Steck, 2019), its closed form inverted in place by LAPACK.

    RecTools' holds half a dozen matrices of items by items: more than 20 GB for H&M's 29,000.
    """
    regularisation = trial.suggest_float("regularisation", 1, 5000, log=True)
    # In Fortran's order, which LAPACK works on without a copy.
    weight = (task.learned.T @ task.learned).T.toarray(order="F")
    weight[np.diag_indices_from(weight)] += regularisation
    weight, failed = lapack.spotrf(weight, lower=0, overwrite_a=1)
    if not failed:
        weight, failed = lapack.spotri(weight, lower=0, overwrite_c=1)
    if failed:
        raise ArithmeticError(f"LAPACK gave up at {failed}")
    for start in range(0, len(weight), _BLOCK):  # the upper triangle is the inverse; mirror it
        end = start + _BLOCK
        weight[start:end, :start] = weight[:start, start:end].T
        corner = np.triu(weight[start:end, start:end])
        weight[start:end, start:end] = corner + np.triu(corner, 1).T
    weight = weight.T  # the same, in the order in which rows of it are summed
    weight /= -np.diag(weight).copy()
    np.fill_diagonal(weight, 0)
    return lambda asked: lambda some: np.asarray(asked.known[some] @ weight)


def sasrec(trial: Trial, task: Task) -> Callable[[Task], Scores]:
    """SASRec with a sampled softmax (Kang and McAuley, 2018)."""
    model = SASRecModel(
        n_blocks=trial.suggest_int("blocks", 1, 2),
        n_heads=1,
        n_factors=trial.suggest_categorical("factors", [64, 128]),
        dropout_rate=trial.suggest_float("dropout", 0.1, 0.6),
        session_max_len=50,
        loss="sampled_softmax",
        n_negatives=trial.suggest_categorical("negatives", [64, 256]),
        lr=trial.suggest_float("learning_rate", 5e-4, 5e-3, log=True),
        epochs=trial.suggest_int("epochs", 3, 20),
        deterministic=True,
    )
    model.fit(_dataset(task, task.past))

    def of(asked: Task) -> Scores:
        asking = _dataset(asked, asked.asking)
        known = set(asking.user_id_map.external_ids)
        allowed = asked.items[asked.allowed & (task.learned.getnnz(0) > 0)]
        most = K + int(asked.hidden.getnnz(1).max())

        def scores(some: np.ndarray) -> np.ndarray:
            found = model.recommend(
                [question for question in some if question in known],
                asking,
                most,
                filter_viewed=False,
                items_to_recommend=allowed,
                on_unsupported_targets="ignore",
            )
            place = pd.Index(some).get_indexer(found[Columns.User])
            out = np.full((len(some), len(asked.items)), -1e9, np.float32)
            out[place, asked.items.get_indexer(found[Columns.Item])] = -found[Columns.Rank].to_numpy(
                np.float32
            )
            return out

        return scores

    return of


def _dataset(task: Task, frame: pd.DataFrame) -> Dataset:
    """A dataset of RecTools over the items of a task, so that it is numbered as others of it are."""
    users, codes = IdMap.from_values(frame["user_id"].to_numpy()), IdMap(task.items.to_numpy())
    rows = pd.DataFrame(
        {
            Columns.User: users.convert_to_internal(frame["user_id"].to_numpy()),
            Columns.Item: frame["item"].to_numpy(),
            Columns.Weight: frame["weight"].to_numpy(np.float32),
            Columns.Datetime: frame["datetime"].to_numpy(),
        }
    )
    return Dataset(users, codes, Interactions(rows))


MODELS = {"item_knn": item_knn, "ials": ials, "bpr": bpr, "ease": ease, "sasrec": sasrec}


@dataclass(frozen=True)
class Tuned:
    """The best model of so many trials, what was chosen for it and the seconds its fit took."""

    model: Callable[[Task], Scores]
    chosen: dict[str, object]
    trials: int
    seconds: float


def tuned(name: str, task: Task, minutes: float) -> Tuned:
    """What so many minutes of trials on a sample of the questions found; the last trial is finished."""
    some = np.sort(np.random.default_rng(0).permutation(len(task.targets))[:_ASKED_TO_TUNE])
    targets = [task.targets[at] for at in some]
    best: list[tuple[float, Callable[[Task], Scores], float]] = []

    def objective(trial: optuna.Trial) -> float:
        began = time.perf_counter()
        model = MODELS[name](trial, task)
        seconds = time.perf_counter() - began
        value = ndcg(answers(model(task), task, some), targets)
        if not best or value > best[0][0]:
            best[:] = [(value, model, seconds)]
        return value

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, timeout=60 * minutes)
    ((_, model, seconds),) = best
    return Tuned(model, study.best_params, len(study.trials), seconds)


def main() -> None:
    """Tune every model and answer every question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--asked", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="of tuning for each model")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--exclude-seen", action="store_true", help="also leave out what was bought before")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = read_task(options.asked, seen=not options.exclude_seen)
    for name in options.models.split(","):
        best = tuned(name, task, options.minutes)
        began = time.perf_counter()
        pages = answers(best.model(task), task, np.arange(len(task.targets)))
        asked = 1e3 * (time.perf_counter() - began) / len(pages)
        took = {"fit_seconds": round(best.seconds, 1), "ms_per_query": round(asked, 2)}
        found = {"model": name, "trials": best.trials, **took, "chosen": best.chosen}
        with (options.out / f"{name}.jsonl").open("w") as file:
            for user, page in zip(task.asked_by, pages, strict=True):
                user_id = int(user) if user.isdigit() else user
                file.write(json.dumps({"user_id": user_id, "items": page}) + "\n")
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
