"""Models of RecTools and implicit, tuned for the same time, that answer a shop's queries.

    python bench/baselines/fit.py --task DIR --minutes 5 --out RUNS [--models ease,sasrec] [--exclude-viewed]

Runs in its own environment (bench/baselines/requirements.txt), without Vitrine. DIR is the output of
`bench/baselines/export.py`. Models are fitted on the events before the day. A user is represented by history
and session: folded in by iALS, the mean of the items' factors for BPR. Items without a score, which are all
items for an unknown user, fill the page in any order. Writes RUNS/MODEL.jsonl and prints the chosen
parameters, the time of the fit and the time per query.
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
_TUNING_QUERIES = 2000
_BATCH = 500
_EXCLUDED = -np.inf
_BLOCK = 2048

Trial = optuna.Trial
Scores = Callable[[np.ndarray], np.ndarray]
"""Scores float (B, M) over all items for some queries, int64 (B,)."""


@dataclass(frozen=True)
class BaselineTask:
    """A split: `past` has all events before the day, `user_events` those of the querying users.

    Columns are user_id, item (a code into `items`), weight and datetime; users of `user_events` are query
    numbers. `allowed` bool (M,) marks items that may be recommended; `hidden` bool (Q, M) sparse, items that
    may not be recommended to a query.
    """

    items: pd.Index
    past: pd.DataFrame
    user_events: pd.DataFrame
    user_ids: list[str]
    targets: list[set[str]]
    allowed: np.ndarray
    hidden: sparse.csr_matrix

    @cached_property
    def training(self) -> sparse.csr_matrix:
        """The total weight of each user's engagements with each item: float32 (U, M)."""
        users, _ = pd.factorize(self.past["user_id"])
        return self._matrix(users, self.past, users.max() + 1)

    @cached_property
    def profiles(self) -> sparse.csr_matrix:
        """The same of the querying users, float32 (Q, M)."""
        return self._matrix(self.user_events["user_id"].to_numpy(), self.user_events, len(self.targets))

    def _matrix(self, rows: np.ndarray, frame: pd.DataFrame, count: int) -> sparse.csr_matrix:
        parts = frame["weight"].to_numpy(np.float32), (rows, frame["item"].to_numpy())
        return sparse.csr_matrix(parts, shape=(count, len(self.items)))


def read_task(directory: Path, *, recommend_viewed: bool) -> BaselineTask:
    """Read the output of `bench.baselines.export`; `recommend_viewed` allows items of the history."""
    past = pd.read_csv(directory / "interactions.csv", dtype={"user_id": str, "item_id": str})
    past["datetime"] = pd.to_datetime(past["datetime"])
    queries = [json.loads(line) for line in (directory / "queries.jsonl").read_text().splitlines()]
    universe = (directory / "universe.txt").read_text().splitlines()
    items = pd.Index(pd.unique(pd.concat([past["item_id"], pd.Series(universe)])))
    past["item"] = items.get_indexer(past["item_id"])
    of_user = past.groupby("user_id").indices
    parts, sessions = [], []
    for index, query in enumerate(queries):
        history = past.iloc[of_user.get(query["user_id"], np.empty(0, int))]
        parts.append(history.assign(user_id=index))
        sessions += [(index, items.get_loc(item), query["day"]) for item in query["session"]]
    session = pd.DataFrame(sessions, columns=["user_id", "item", "datetime"])
    session = session.astype({"user_id": "int64", "item": "int64"})  # also if empty
    session["datetime"], session["weight"] = pd.to_datetime(session["datetime"]), 1.0
    user_events = pd.concat([*parts, session], ignore_index=True)
    excluded = session if recommend_viewed else user_events
    ones = np.ones(len(excluded), bool)
    hidden = sparse.csr_matrix(
        (ones, (excluded["user_id"], excluded["item"])), shape=(len(queries), len(items))
    )
    return BaselineTask(
        items,
        past,
        user_events,
        [query["user_id"] for query in queries],
        [set(query["targets"]) for query in queries],
        items.isin(universe),
        hidden,
    )


def answers(scores: Scores, task: BaselineTask, queries: np.ndarray) -> list[list[str]]:
    """The best 20 items of each query."""
    pages = []
    for start in range(0, len(queries), _BATCH):
        batch = queries[start : start + _BATCH]
        batch_scores = np.where(task.allowed, scores(batch), _EXCLUDED)
        batch_scores[task.hidden[batch].toarray()] = _EXCLUDED
        best = np.argpartition(-batch_scores, K, axis=1)[:, :K]
        order = np.argsort(-np.take_along_axis(batch_scores, best, 1), axis=1, kind="stable")
        pages += [task.items[page].tolist() for page in np.take_along_axis(best, order, 1)]
    return pages


def ndcg(pages: list[list[str]], targets: list[set[str]]) -> float:
    """Mean nDCG@20, ideal DCG over min(targets, 20)."""
    discount = 1 / np.log2(np.arange(2, K + 2))
    gains = [
        discount @ [item in target for item in page] for page, target in zip(pages, targets, strict=True)
    ]
    return float(np.mean([g / discount[: min(len(t), K)].sum() for g, t in zip(gains, targets, strict=True)]))


def item_knn(trial: Trial, task: BaselineTask) -> Callable[[BaselineTask], Scores]:
    """Item neighbors by cosine, TF-IDF or BM25."""
    kind = trial.suggest_categorical("kind", ["cosine", "tfidf", "bm25"])
    neighbors = trial.suggest_int("neighbours", 20, 500, log=True)
    if kind == "bm25":
        b = trial.suggest_float("b", 0, 1)
        model = BM25Recommender(K=neighbors, K1=trial.suggest_float("k1", 0.1, 3), B=b)
    else:
        model = (CosineRecommender if kind == "cosine" else TFIDFRecommender)(K=neighbors)
    model.fit(task.training, show_progress=False)
    return lambda other_task: lambda batch: (other_task.profiles[batch] @ model.similarity).toarray()


def ials(trial: Trial, task: BaselineTask) -> Callable[[BaselineTask], Scores]:
    """Weighted matrix factorization (Hu et al., 2008)."""
    model = AlternatingLeastSquares(
        factors=trial.suggest_int("factors", 32, 256, log=True),
        regularization=trial.suggest_float("regularisation", 1e-3, 10, log=True),
        alpha=trial.suggest_float("alpha", 0.5, 100, log=True),
        iterations=trial.suggest_int("iterations", 5, 20),
        random_state=0,
    )
    # implicit recommends one BLAS thread, because its own threads call BLAS.
    with threadpool_limits(1, "blas"):
        model.fit(task.training, show_progress=False)

    def scores(other_task: BaselineTask, batch: np.ndarray) -> np.ndarray:
        with threadpool_limits(1, "blas"):
            users = model.recalculate_user(np.arange(len(batch)), other_task.profiles[batch])
        return np.asarray(users @ model.item_factors.T)

    return lambda other_task: partial(scores, other_task)


def bpr(trial: Trial, task: BaselineTask) -> Callable[[BaselineTask], Scores]:
    """Pairwise matrix factorization (Rendle et al., 2009)."""
    model = BayesianPersonalizedRanking(
        factors=trial.suggest_int("factors", 32, 256, log=True),
        learning_rate=trial.suggest_float("learning_rate", 1e-3, 0.3, log=True),
        regularization=trial.suggest_float("regularisation", 1e-4, 0.3, log=True),
        iterations=trial.suggest_int("iterations", 20, 200, log=True),
        random_state=0,
    )
    model.fit(task.training, show_progress=False)
    factors = model.item_factors.copy()
    factors[:, -1] = 0  # a user has the constant 1 for the item bias, not a mean of biases

    def of(other_task: BaselineTask) -> Scores:
        size = np.maximum(np.asarray(other_task.profiles.sum(1)), 1)
        users = np.asarray(other_task.profiles @ factors) / size
        users[:, -1] = 1
        return lambda batch: users[batch] @ model.item_factors.T

    return of


def ease(trial: Trial, task: BaselineTask) -> Callable[[BaselineTask], Scores]:
    """EASE^R (Steck, 2019), in closed form, inverted in place by LAPACK.

    RecTools' version holds half a dozen item-by-item matrices: more than 20 GB for H&M's 29,000 items.
    """
    regularization = trial.suggest_float("regularisation", 1, 5000, log=True)
    # In Fortran order, so that LAPACK makes no copy.
    weight = (task.training.T @ task.training).T.toarray(order="F")
    weight[np.diag_indices_from(weight)] += regularization
    weight, failed = lapack.spotrf(weight, lower=0, overwrite_a=1)
    if not failed:
        weight, failed = lapack.spotri(weight, lower=0, overwrite_c=1)
    if failed:
        raise ArithmeticError(f"LAPACK failed at {failed}")
    for start in range(0, len(weight), _BLOCK):  # the upper triangle is the inverse; mirror it
        end = start + _BLOCK
        weight[start:end, :start] = weight[:start, start:end].T
        corner = np.triu(weight[start:end, start:end])
        weight[start:end, start:end] = corner + np.triu(corner, 1).T
    weight = weight.T  # the same matrix in C order, for products with its rows
    weight /= -np.diag(weight).copy()
    np.fill_diagonal(weight, 0)
    return lambda other_task: lambda batch: np.asarray(other_task.profiles[batch] @ weight)


def sasrec(trial: Trial, task: BaselineTask) -> Callable[[BaselineTask], Scores]:
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

    def of(other_task: BaselineTask) -> Scores:
        dataset = _dataset(other_task, other_task.user_events)
        known_queries = set(dataset.user_id_map.external_ids)
        allowed = other_task.items[other_task.allowed & (task.training.getnnz(0) > 0)]
        limit = K + int(other_task.hidden.getnnz(1).max())

        def scores(batch: np.ndarray) -> np.ndarray:
            recommendations = model.recommend(
                [query for query in batch if query in known_queries],
                dataset,
                limit,
                filter_viewed=False,
                items_to_recommend=allowed,
                on_unsupported_targets="ignore",
            )
            row = pd.Index(batch).get_indexer(recommendations[Columns.User])
            matrix = np.full((len(batch), len(other_task.items)), -1e9, np.float32)
            matrix[row, other_task.items.get_indexer(recommendations[Columns.Item])] = -recommendations[
                Columns.Rank
            ].to_numpy(np.float32)
            return matrix

        return scores

    return of


def _dataset(task: BaselineTask, frame: pd.DataFrame) -> Dataset:
    """A RecTools dataset over the items of a task, so that all datasets of a task share item codes."""
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
class TunedModel:
    """The best model of some trials, its parameters and the seconds of its fit."""

    model: Callable[[BaselineTask], Scores]
    parameters: dict[str, object]
    trials: int
    seconds: float


def tuned(name: str, task: BaselineTask, minutes: float) -> TunedModel:
    """The best model after some minutes of trials on a sample of the queries; the last trial is finished."""
    sample = np.sort(np.random.default_rng(0).permutation(len(task.targets))[:_TUNING_QUERIES])
    targets = [task.targets[index] for index in sample]
    best: list[tuple[float, Callable[[BaselineTask], Scores], float]] = []

    def objective(trial: optuna.Trial) -> float:
        start = time.perf_counter()
        model = MODELS[name](trial, task)
        seconds = time.perf_counter() - start
        value = ndcg(answers(model(task), task, sample), targets)
        if not best or value > best[0][0]:
            best[:] = [(value, model, seconds)]
        return value

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, timeout=60 * minutes)
    ((_, model, seconds),) = best
    return TunedModel(model, study.best_params, len(study.trials), seconds)


def main() -> None:
    """Tune every model and answer every query."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5, help="of tuning for each model")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--exclude-viewed", action="store_true", help="also exclude items of the history")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = read_task(options.task, recommend_viewed=not options.exclude_viewed)
    for name in options.models.split(","):
        best = tuned(name, task, options.minutes)
        start = time.perf_counter()
        pages = answers(best.model(task), task, np.arange(len(task.targets)))
        milliseconds = 1e3 * (time.perf_counter() - start) / len(pages)
        took = {"fit_seconds": round(best.seconds, 1), "ms_per_query": round(milliseconds, 2)}
        result = {"model": name, "trials": best.trials, **took, "parameters": best.parameters}
        with (options.out / f"{name}.jsonl").open("w") as file:
            for user, page in zip(task.user_ids, pages, strict=True):
                user_id = int(user) if user.isdigit() else user
                file.write(json.dumps({"user_id": user_id, "items": page}) + "\n")
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
