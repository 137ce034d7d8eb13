"""How the item graph weighs its counts: found by asking earlier graphs what was engaged with next.

Exponents are searched for with optuna's tree-structured Parzen estimator (Bergstra et al., 2011), by a seed,
in a stated number of trials. What is asked was done before anything that rankers learn from.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import optuna
from scipy import sparse

from services.ranking.query import recency
from training import queries
from training.dataset import Events
from training.item_graph import RELATIONS, Groups, Weighting
from training.queries import DAY, Question
from training.shop_settings import ShopSettings

_QUESTIONS = 5000
_SEEDS = 30
_K = 20
_LEAST_SHRINK = 0.1
_Row = tuple[np.ndarray, np.ndarray]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What a graph is asked: Q people's items and what they went on to engage with.

    `profile` float32 (Q, M), the weights of the items that speak for a person; `targets` (Q, M) ones;
    `seen` (Q, M) ones at the session's items, which are no answer.
    """

    profile: sparse.csr_matrix
    targets: sparse.csr_matrix
    seen: sparse.csr_matrix

    def ndcg(self, weights: sparse.csr_matrix) -> float:
        """Mean nDCG@20 of the order in which edges of these weights put all items; ties by item."""
        scores = (self.profile @ weights).tocsr()
        discount = 1 / np.log2(np.arange(2, _K + 2))
        ideal = np.cumsum(discount)
        total = 0.0
        for at in range(scores.shape[0]):
            row = slice(scores.indptr[at], scores.indptr[at + 1])
            items, score = scores.indices[row], scores.data[row]
            answer = self.targets.indices[self.targets.indptr[at] : self.targets.indptr[at + 1]]
            known = self.seen.indices[self.seen.indptr[at] : self.seen.indptr[at + 1]]
            score = np.where(np.isin(items, known), -np.inf, score)
            if len(score) > 4 * _K:
                best = np.argpartition(-score, 4 * _K)[: 4 * _K]
                items, score = items[best], score[best]
            page = items[np.lexsort((items, -score))[:_K]]
            total += float(discount[: len(page)] @ np.isin(page, answer)) / ideal[min(len(answer), _K) - 1]
        return float(total / max(scores.shape[0], 1))


@dataclass(frozen=True)
class Tuned:
    """A weighting with its nDCG@20, and that of the cosine."""

    weighting: Weighting
    ndcg: float
    ndcg_as_cosine: float

    def to_dict(self) -> dict[str, float]:
        """As reports hold it."""
        return {"ndcg": self.ndcg, "ndcg_as_cosine": self.ndcg_as_cosine, **asdict(self.weighting)}


def ask(
    events: Events,
    engaged: np.ndarray,
    weights: Sequence[float],
    questions: Sequence[Question],
    nodes: np.ndarray,
    seed: int = 0,
) -> Asked:
    """Questions over items `nodes`, rising int64 (M,): at most 5,000, drawn at random.

    A person's items are the session's, and the latest thirty that were `engaged` with, bool (N,), on days
    before, which count less the longer ago they are.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(questions))[:_QUESTIONS])
    chosen = [questions[at] for at in drawn]
    place = {user: code for code, user in enumerate(events.user_ids)}
    rows = np.flatnonzero(engaged)
    rows = rows[np.lexsort((events.time[rows], events.user[rows]))]
    begin = np.searchsorted(events.user[rows], np.arange(len(events.user_ids) + 1))
    profile, targets, seen = list[_Row](), list[_Row](), list[_Row]()
    worth = np.asarray(weights, np.float32)
    for question in chosen:
        user = place[question.user_id]
        mine = rows[begin[user] : begin[user + 1]]
        mine = mine[events.time[mine] < question.as_of - question.as_of % DAY][-_SEEDS:]
        session = np.array([number for number, _ in question.session], np.int64)
        age = (question.as_of - events.time[mine]) / DAY
        speaking = np.concatenate([session, events.number[mine]])
        value = np.concatenate([np.ones(len(session)), recency(age) * worth[events.kind[mine]]])
        profile.append((speaking, value))
        targets.append((question.targets, np.ones(len(question.targets))))
        seen.append((session, np.ones(len(session))))
    return Asked(*(_matrix(rows, nodes) for rows in (profile, targets, seen)))


def _matrix(rows: Sequence[_Row], nodes: np.ndarray) -> sparse.csr_matrix:
    start = np.concatenate([[0], np.cumsum([len(numbers) for numbers, _ in rows], dtype=np.int64)])
    numbers, values = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    parts = np.asarray(values, np.float32), np.searchsorted(nodes, numbers), start
    return sparse.csr_matrix(parts, shape=(len(rows), len(nodes)))


def tune_graph(
    events: Events, settings: ShopSettings, nodes: np.ndarray, learned_until: int
) -> dict[str, Tuned]:
    """The weighting of each relation of a graph over items `nodes`, rising int64 (M,).

    By events before `learned_until`, microseconds since 1970: the last `split.test_days` of them ask, what
    came before those answers. Nothing where there is nothing to ask or to answer by.
    """
    since = (learned_until // DAY - settings.split.test_days) * DAY
    weights = dict(settings.event_types)
    engaged = np.array(list(weights.values()))[events.kind] > 0
    known, bare = events.take(np.flatnonzero(events.time < learned_until)), settings.ranking.bare
    questions = queries.make_questions(known, weights, tuple(settings.targets), since, bare=bare)
    early = engaged & (events.time < since)
    if not questions or not early.any() or not settings.graph.trials:
        return {}
    asked = ask(events, early, list(weights.values()), questions, nodes)
    groups = Groups.of(
        events.user[early].astype(np.int64),
        queries.baskets(events)[early],
        events.time[early],
        np.searchsorted(nodes, events.number[early]),
        len(nodes),
    )
    related = [name for name in RELATIONS if groups.counts(name, Weighting()).nnz]
    return {name: tune(groups, name, asked, settings.graph.trials) for name in related}


def tune(groups: Groups, relation: str, asked: Asked, trials: int, seed: int = 0) -> Tuned:
    """The weighting of a relation that answers best of so many; the first is as good as the cosine."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(asdict(Weighting(shrink=_LEAST_SHRINK)))
    ordered = relation == "people"
    study.optimize(lambda trial: asked.ndcg(groups.weights(relation, _drawn(trial, ordered))), trials)
    found = Tuned(Weighting(**study.best_params), study.best_value, study.trials[0].value or 0.0)
    _log.info("%s: %s", relation, found)
    return found


def _drawn(trial: optuna.Trial, ordered: bool) -> Weighting:
    order = {"decay": (0.2, 1.0), "back": (0.0, 1.0)} if ordered else {}
    return Weighting(
        source=trial.suggest_float("source", 0, 1),
        target=trial.suggest_float("target", 0, 1),
        shrink=trial.suggest_float("shrink", _LEAST_SHRINK, 100, log=True),
        group=trial.suggest_float("group", 0, 1),
        **{name: trial.suggest_float(name, *limits) for name, limits in order.items()},
    )
