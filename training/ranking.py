"""The trained part of ranking: CTR head and reranker, judged on the last days, then fitted on all."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from services.ranking.ctr import write_ctr
from services.ranking.reranker import write_reranker
from training import judging, queries
from training.dataset import Shop
from training.lesson import first_day, make_lesson
from training.queries import DAY
from training.rankers import fit_models
from training.replay import Replay
from training.shop_settings import ShopSettings

CTR, RERANKER = "ctr", "reranker"
PARTS = (CTR, RERANKER)
_log = logging.getLogger(__name__)


def fit(
    past: Replay, shop: Shop, settings: ShopSettings, vectors: Mapping[str, np.ndarray], directory: Path
) -> None:
    """Fit, judge and write the models, and beside them what judging found."""
    since = first_day(shop.events, settings) * DAY
    judged_from = (int(shop.events.time[-1] // DAY) - settings.split.test_days + 1) * DAY
    weights = dict(settings.event_types)
    engaged = tuple(name for name, weight in weights.items() if weight > 0)
    # Every engagement teaches, graded by its weight; only the shop's targets are judged by.
    bare = settings.ranking.bare
    teaching = queries.make_questions(shop.events, weights, engaged, since, bare=bare)
    lesson = make_lesson(past, shop, settings, teaching, since)
    questions = queries.make_questions(shop.events, weights, tuple(settings.targets), since, bare=bare)
    if lesson is None:
        _log.warning("no past basket can be learned from: hand-set weights will rank")
        judging.write_nothing(directory)
        return
    judging.judge(past, shop, settings, lesson, questions, vectors, judged_from, directory)
    fitted = fit_models(lesson, settings, vectors)
    if fitted.head is not None:
        (directory / CTR).mkdir()
        write_ctr(directory / CTR, fitted.head)
    (directory / RERANKER).mkdir()
    write_reranker(directory / RERANKER, fitted.model)
