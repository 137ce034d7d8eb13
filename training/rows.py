"""Feature rows with labels: candidates of past questions, as the ranking service would have seen them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.ranking.blend import blend
from services.ranking.query import Query
from training.progress import track
from training.queries import Question
from training.replay import Replay


@dataclass(frozen=True)
class Rows:
    """Rows of Q questions one after the other.

    `matrix` float32 (N, F); `items` int64 (N,) table rows; `label` float32 (N,) the grade of an
    answer, 0 for others; `weight` float32 (N,);
    `size` int64 (Q,) rows of each question, which are `questions` and, in rows of the table,
    `queries`; `unsold` bool (N,) rows shown without their item's behaviour; `targets` int64
    (Q,) how many answers each question has; `sources` int64 (N,) bits of who proposed a row.
    """

    names: Sequence[str]
    matrix: np.ndarray
    items: np.ndarray
    sources: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    unsold: np.ndarray
    size: np.ndarray
    questions: Sequence[Question]
    queries: Sequence[Query]
    targets: np.ndarray

    def take(self, chosen: np.ndarray) -> "Rows":
        """The rows of some questions, int64 (K,)."""
        start = np.cumsum(self.size) - self.size
        spans = [np.arange(start[q], start[q] + self.size[q]) for q in chosen]
        rows = np.concatenate([np.empty(0, np.int64), *spans])
        return Rows(
            self.names,
            self.matrix[rows],
            self.items[rows],
            self.sources[rows],
            self.label[rows],
            self.weight[rows],
            self.unsold[rows],
            self.size[chosen],
            [self.questions[q] for q in chosen],
            [self.queries[q] for q in chosen],
            self.targets[chosen],
        )

    def group(self) -> np.ndarray:
        """The question of each row, int64 (N,)."""
        return np.repeat(np.arange(len(self.size)), self.size)


def learning_rows(
    replay: Replay, questions: Sequence[Question], kept: int, unsold: float, seed: int = 0
) -> Rows | None:
    """Rows to learn from: of each question its answers and `kept` other candidates.

    Half of the others are the best by hand-set weights; the rest are drawn at random and weigh
    for those left out. Items nobody had engaged with are left out, because that they are
    there at all may betray that somebody would; instead a share of the rows, `unsold`, is shown
    without its item's behaviour. Questions without an answer among the candidates teach
    nothing and are left out; None when all are.
    """
    generator = np.random.default_rng(seed)
    parts = []
    for question in track(questions, "rows"):
        now, query = replay.at(question.as_of), replay.query(question)
        allowed = replay.live(question.as_of) & ~np.isnan(now.age)
        items, sources = replay.candidates(query, now, allowed)
        answer = replay.table.rows(question.targets.tolist())
        label = _grades(items, answer, question.grades)
        if not label.any():
            continue
        features = replay.features(now)
        matrix = features.matrix(query, items, now)
        chosen, weight = _chosen(label, blend(replay.names, matrix), kept, generator)
        matrix, blank = matrix[chosen], generator.random(len(chosen)) < unsold
        matrix[blank] = features.unsold(matrix[blank], items[chosen][blank], now)
        parts.append(
            (
                question,
                query,
                matrix,
                items[chosen],
                sources[chosen],
                label[chosen],
                weight,
                blank,
                len(answer),
            )
        )
    return _joined(replay, parts) if parts else None


def judging_rows(replay: Replay, questions: Sequence[Question], allowed: np.ndarray) -> Rows:
    """Rows to judge by: every candidate among `allowed`, bool (M,), of every question."""
    parts = []
    for question in track(questions, "questions"):
        now, query = replay.at(question.as_of), replay.query(question)
        items, sources = replay.candidates(query, now, allowed & replay.live(question.as_of))
        label = _grades(items, replay.table.rows(question.targets.tolist()), question.grades)
        matrix = replay.features(now).matrix(query, items, now)
        ones, never = np.ones(len(items), np.float32), np.zeros(len(items), bool)
        parts.append((question, query, matrix, items, sources, label, ones, never, len(question.targets)))
    return _joined(replay, parts)


def shown_rows(
    replay: Replay,
    pages: Sequence[Question],
    labels: Sequence[np.ndarray],
    worth: np.ndarray,
    unsold: float,
) -> tuple[Rows, np.ndarray] | None:
    """Rows of what people were shown, and what they did, float32 (N, T), one column per event type.

    A page is a question whose targets are the items shown; its labels are float32 (S, T). What is in the
    session is left out, as it is of candidates. A row's grade is that of the weightiest of its
    labels by `worth`, float32 (T,). Here too a share `unsold` is shown without its item's behaviour.
    None when no page shows an item that the catalogue knows.
    """
    generator = np.random.default_rng(0)
    parts, kept = [], []
    for page, label in zip(track(pages, "pages"), labels, strict=True):
        now, query = replay.at(page.as_of), replay.query(page)
        items = replay.table.rows(page.targets.tolist())
        known = (items >= 0) & ~np.isin(items, query.session)
        items = items[known]
        if not len(items):
            continue
        features = replay.features(now)
        matrix, blank = features.matrix(query, items, now), generator.random(len(items)) < unsold
        matrix[blank] = features.unsold(matrix[blank], items[blank], now)
        zeros, ones = np.zeros(len(items), np.int64), np.ones(len(items), np.float32)
        grade = (label[known] * worth).max(1)
        parts.append((page, query, matrix, items, zeros, grade, ones, blank, len(items)))
        kept.append(label[known])
    return (_joined(replay, parts), np.concatenate(kept).astype(np.float32)) if parts else None


def _grades(items: np.ndarray, answer: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """The grade of each of `items`, rising int64 (C,), 0 for what is no answer: float32 (C,)."""
    label = np.zeros(len(items), np.float32)
    if not len(items):
        return label
    at = np.minimum(np.searchsorted(items, answer), len(items) - 1)
    held = items[at] == answer
    label[at[held]] = grades[held] if len(grades) else 1
    return label


def _chosen(
    label: np.ndarray, score: np.ndarray, kept: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    others = np.flatnonzero(label == 0)
    order = others[np.argsort(-score[others], kind="stable")]
    best, rest = order[: kept // 2], order[kept // 2 :]
    drawn = generator.permutation(rest)[: kept - len(best)]
    chosen = np.concatenate([np.flatnonzero(label), best, drawn])
    weight = np.ones(len(chosen), np.float32)
    if len(drawn):
        weight[len(chosen) - len(drawn) :] = len(rest) / len(drawn)
    return chosen, weight


def _joined(replay: Replay, parts: Sequence[tuple[object, ...]]) -> Rows:
    questions, queries, matrix, items, sources, label, weight, unsold, targets = zip(*parts, strict=True)
    return Rows(
        replay.names,
        np.concatenate(matrix),
        np.concatenate(items),
        np.concatenate(sources),
        np.concatenate(label).astype(np.float32),
        np.concatenate(weight),
        np.concatenate(unsold),
        np.array([len(i) for i in items], np.int64),
        questions,
        queries,
        np.array(targets, np.int64),
    )
