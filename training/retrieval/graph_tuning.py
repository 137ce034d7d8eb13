"""Tunes how the item graph weighs co-occurrence counts, by how well earlier graphs predict later engagements.

The exponents are searched with optuna's tree-structured Parzen estimator (Bergstra et al., 2011), with a
fixed seed and number of trials. The queries precede all events that the rankers are trained on.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import optuna
from scipy import sparse

from services.ranking.state.user_query import recency
from training.data.config import ShopConfig
from training.data.events import Events
from training.examples import queries
from training.examples.queries import DAY, EvalQuery
from training.retrieval.item_graph import RELATIONS, Baskets, Weighting

_MAX_QUERIES = 5000
_SEEDS = 30
_K = 20
_MIN_SHRINK = 0.1
_Row = tuple[np.ndarray, np.ndarray]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphQueries:
    """The queries of a graph: the items of Q users and their next engagements.

    `profile` float32 (Q, M) holds the weights of a user's items; `targets` (Q, M) holds ones; `excluded` (Q,
    M) holds ones at the session's items, which are not recommended.
    """

    profile: sparse.csr_matrix
    targets: sparse.csr_matrix
    excluded: sparse.csr_matrix

    def ndcg(self, weights: sparse.csr_matrix) -> float:
        """Mean nDCG@20 of ranking all items by edges with these weights; ties by item."""
        scores = (self.profile @ weights).tocsr()
        discount = 1 / np.log2(np.arange(2, _K + 2))
        ideal = np.cumsum(discount)
        total = 0.0
        for index in range(scores.shape[0]):
            row = slice(scores.indptr[index], scores.indptr[index + 1])
            items, score = scores.indices[row], scores.data[row]
            targets = self.targets.indices[self.targets.indptr[index] : self.targets.indptr[index + 1]]
            excluded = self.excluded.indices[self.excluded.indptr[index] : self.excluded.indptr[index + 1]]
            score = np.where(np.isin(items, excluded), -np.inf, score)
            if len(score) > 4 * _K:
                best = np.argpartition(-score, 4 * _K)[: 4 * _K]
                items, score = items[best], score[best]
            page = items[np.lexsort((items, -score))[:_K]]
            total += float(discount[: len(page)] @ np.isin(page, targets)) / ideal[min(len(targets), _K) - 1]
        return float(total / max(scores.shape[0], 1))


@dataclass(frozen=True)
class TunedGraph:
    """A weighting with its nDCG@20, and the nDCG@20 of the cosine."""

    weighting: Weighting
    ndcg: float
    ndcg_as_cosine: float

    def to_dict(self) -> dict[str, float]:
        """The form used in reports."""
        return {"ndcg": self.ndcg, "ndcg_as_cosine": self.ndcg_as_cosine, **asdict(self.weighting)}


def graph_queries(
    events: Events,
    is_engagement: np.ndarray,
    weights: Sequence[float],
    eval_queries: Sequence[EvalQuery],
    nodes: np.ndarray,
    seed: int = 0,
) -> GraphQueries:
    """A random sample of at most 5,000 queries over the items `nodes`, rising int64 (M,).

    A user's items are the session and the latest thirty engagements (`is_engagement`, bool (N,)) of earlier
    days; older ones weigh less.
    """
    sample = np.sort(np.random.default_rng(seed).permutation(len(eval_queries))[:_MAX_QUERIES])
    selected = [eval_queries[index] for index in sample]
    place = {user: code for code, user in enumerate(events.user_ids)}
    rows = np.flatnonzero(is_engagement)
    rows = rows[np.lexsort((events.time[rows], events.user[rows]))]
    start = np.searchsorted(events.user[rows], np.arange(len(events.user_ids) + 1))
    profile, targets, excluded = list[_Row](), list[_Row](), list[_Row]()
    kind_weights = np.asarray(weights, np.float32)
    for query in selected:
        user = place[query.user_id]
        history = rows[start[user] : start[user + 1]]
        history = history[events.time[history] < query.as_of - query.as_of % DAY][-_SEEDS:]
        session = np.array([item_hash for item_hash, _ in query.session], np.int64)
        age = (query.as_of - events.time[history]) / DAY
        items = np.concatenate([session, events.number[history]])
        value = np.concatenate([np.ones(len(session)), recency(age) * kind_weights[events.kind[history]]])
        profile.append((items, value))
        targets.append((query.targets, np.ones(len(query.targets))))
        excluded.append((session, np.ones(len(session))))
    return GraphQueries(*(_matrix(rows, nodes) for rows in (profile, targets, excluded)))


def _matrix(rows: Sequence[_Row], nodes: np.ndarray) -> sparse.csr_matrix:
    start = np.concatenate([[0], np.cumsum([len(hashes) for hashes, _ in rows], dtype=np.int64)])
    hashes, values = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    parts = np.asarray(values, np.float32), np.searchsorted(nodes, hashes), start
    return sparse.csr_matrix(parts, shape=(len(rows), len(nodes)))


def tune_graph(
    events: Events, settings: ShopConfig, nodes: np.ndarray, since: int, until: int
) -> dict[str, TunedGraph]:
    """The best weighting of each relation of a graph over the items `nodes`, rising int64 (M,).

    Of the events before `until`, those from `since` on make the queries and the earlier ones the graphs; both
    are microseconds since 1970. Empty without queries or without earlier events.
    """
    weights = dict(settings.event_types)
    is_engagement = np.array(list(weights.values()))[events.kind] > 0
    past, no_session_share = (
        events.take(np.flatnonzero(events.time < until)),
        settings.ranking.no_session_share,
    )
    eval_queries = queries.make_eval_queries(
        past, weights, tuple(settings.targets), since, no_session_share=no_session_share
    )
    early = is_engagement & (events.time < since)
    if not eval_queries or not early.any() or not settings.graph.trials:
        return {}
    graph_input = graph_queries(events, early, list(weights.values()), eval_queries, nodes)
    basket_rows = Baskets.of(
        events.user[early].astype(np.int64),
        queries.baskets(events)[early],
        events.time[early],
        np.searchsorted(nodes, events.number[early]),
        len(nodes),
    )
    related = [name for name in RELATIONS if basket_rows.counts(name, Weighting()).nnz]
    return {name: tune(basket_rows, name, graph_input, settings.graph.trials) for name in related}


def tune(
    baskets: Baskets, relation: str, eval_queries: GraphQueries, trials: int, seed: int = 0
) -> TunedGraph:
    """The best weighting of a relation in so many trials; the first trial is close to the cosine."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(asdict(Weighting(shrink=_MIN_SHRINK)))
    ordered = relation == "people"
    study.optimize(
        lambda trial: eval_queries.ndcg(baskets.weights(relation, _suggest(trial, ordered))), trials
    )
    tuned = TunedGraph(Weighting(**study.best_params), study.best_value, study.trials[0].value or 0.0)
    _log.info("%s: %s", relation, tuned)
    return tuned


def _suggest(trial: optuna.Trial, ordered: bool) -> Weighting:
    order = {"decay": (0.2, 1.0), "back": (0.0, 1.0)} if ordered else {}
    return Weighting(
        source=trial.suggest_float("source", 0, 1),
        target=trial.suggest_float("target", 0, 1),
        shrink=trial.suggest_float("shrink", _MIN_SHRINK, 100, log=True),
        group=trial.suggest_float("group", 0, 1),
        **{name: trial.suggest_float(name, *limits) for name, limits in order.items()},
    )
