"""What CTR head and reranker learn from: rows of past questions, and of pages that were shown."""

from dataclasses import dataclass

import numpy as np

from training import queries
from training.dataset import Events, Shop
from training.queries import DAY, Question
from training.replay import Replay
from training.rows import Rows, learning_rows, shown_rows
from training.shop_settings import ShopSettings


@dataclass(frozen=True)
class Lesson:
    """What the rankers learn from.

    `rows` are candidates of past questions; `seen` with `labels`, float32 (N, T), what the CTR head learns
    from: pages that were `shown`, which lead the reranker too, or the same rows when the shop logs none.
    """

    rows: Rows
    seen: Rows
    labels: np.ndarray
    types: list[str]
    shown: bool

    def before(self, moment: int) -> "Lesson":
        """The part of it that happened before a moment, microseconds since 1970."""
        early = np.flatnonzero([q.as_of < moment for q in self.rows.questions])
        seen = np.flatnonzero([q.as_of < moment for q in self.seen.questions])
        kept = np.isin(self.seen.group(), seen)
        rows = self.rows.take(early)
        return Lesson(rows, self.seen.take(seen), self.labels[kept], self.types, self.shown)

    def some(self, most: int) -> "Lesson":
        """At most so many of its questions and of its pages, drawn at random, in their order."""
        mine = _drawn(len(self.rows.size), most)
        theirs = _drawn(len(self.seen.size), most)  # the same where they are the same rows
        kept = np.isin(self.seen.group(), theirs)
        return Lesson(self.rows.take(mine), self.seen.take(theirs), self.labels[kept], self.types, self.shown)


def first_day(events: Events, settings: ShopSettings) -> int:
    """The first of the ranking days, in days since 1970."""
    return int(events.time[-1] // DAY) - settings.ranking.days + 1


def make_lesson(
    past: Replay, shop: Shop, settings: ShopSettings, questions: list[Question], since: int
) -> Lesson | None:
    """The lesson of questions and pages from `since` on; None when no answer was among the candidates."""
    chosen = _some(questions, settings.ranking.queries)
    rows = learning_rows(past, chosen, settings.ranking.candidates, settings.ranking.unsold)
    if rows is None:
        return None
    pages, done, types = queries.make_pages(
        shop.events, dict(settings.event_types), since, settings.ranking.queries
    )
    worth = np.array([settings.event_types[name] for name in types], np.float32)
    shown = shown_rows(past, pages, done, worth, settings.ranking.unsold)
    if shown is not None:
        return Lesson(rows, *shown, types, shown=True)
    target = "_or_".join(settings.targets)
    return Lesson(rows, rows, (rows.label[:, None] > 0).astype(np.float32), [target], shown=False)


def _some(questions: list[Question], most: int) -> list[Question]:
    return [questions[at] for at in _drawn(len(questions), most)]


def _drawn(count: int, most: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(count)[:most])
