"""The trained ranking models: evaluate CTR head and reranker on the last days, then fit them on all days."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from services.catalog import filters
from services.ranking.models.attribute_vectors import ATTRIBUTES, attribute_vectors
from services.ranking.models.ctr import write_ctr
from services.ranking.models.first_phase import FirstPhase, write_first_phase
from services.ranking.models.reranker import write_reranker
from training.data.config import ShopConfig
from training.data.shop import ShopData
from training.evaluation import evaluate
from training.examples import queries
from training.examples.point_in_time import PointInTime
from training.examples.training_set import make_training_set
from training.examples.windows import Windows
from training.ranking import taste_models
from training.ranking.first_phase import DEPTHS, MAX_LOSS, choose_depth, fit_first_phase
from training.ranking.fit_models import fit_models
from training.retrieval import sequence_models
from training.retrieval.past_graphs import PastGraphs

CTR, RERANKER = "ctr", "reranker"
PARTS = (CTR, RERANKER)
DECISIONS = "decisions.json"
_log = logging.getLogger(__name__)


def write_rankers(
    directory: Path,
    shop: ShopData,
    settings: ShopConfig,
    vectors: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    graphs: Path,
    sequences: Path,
    tastes: Path,
    windows: Windows,
) -> None:
    """Fit, evaluate and write the models of a shop, with graphs and other models of earlier stages."""
    if not len(shop.events):
        evaluate.write_empty(directory)
        return
    sequence, taste = sequences / sequence_models.BEFORE, tastes / taste_models.BEFORE
    past = PointInTime(
        shop,
        PastGraphs(graphs),
        vectors,
        present,
        sequence if sequence.is_dir() else None,
        taste if taste.is_dir() else None,
    )
    fit(past, shop, settings, vectors, directory, windows)


def fit(
    past: PointInTime,
    shop: ShopData,
    settings: ShopConfig,
    vectors: Mapping[str, np.ndarray],
    directory: Path,
    windows: Windows,
) -> None:
    """Fit and evaluate the models; write them and the evaluation into `directory`."""
    since = windows.since
    weights = dict(settings.event_types)
    engagement_types = tuple(name for name, weight in weights.items() if weight > 0)
    # Train on all engagements, graded by weight; evaluate on the shop's targets only.
    no_session_share = settings.ranking.no_session_share
    training_queries = queries.make_eval_queries(
        shop.events, weights, engagement_types, since, no_session_share=no_session_share
    )
    eval_queries = queries.make_eval_queries(
        shop.events, weights, tuple(settings.targets), since, no_session_share=no_session_share
    )
    allowed = filters.evaluate(evaluate.task_filter(settings), past.table)
    data = make_training_set(past, shop, settings, training_queries, since, eval_queries, allowed)
    if data is None:
        _log.warning("there is no basket to train on: the bundle ranks by hand-set weights")
        evaluate.write_empty(directory)
        return
    if data.has_impressions and (attributes := settings.items.text_attributes):
        every = np.arange(past.table.length)
        vectors = {**vectors, ATTRIBUTES: attribute_vectors(past.table, every, attributes)}
    fitted, first = fit_models(data, settings, vectors), fit_first_phase(data.rows)
    for decision in fitted.decisions:
        decision.log()
    document = [decision.to_dict() for decision in fitted.decisions]
    (directory / DECISIONS).write_text(json.dumps(document, indent=1) + "\n")
    depth = choose_depth(past, eval_queries, allowed, first, fitted, vectors)
    if depth is None:
        message = (
            "a first phase of %d candidates loses more than %.3f of recall@20: none is used, which is slower"
        )
        _log.warning(message, DEPTHS[-1], MAX_LOSS)
    else:
        _log.info("the first phase passes on %d candidates", depth)
    evaluate.evaluate(past, shop, settings, data, eval_queries, vectors, windows, directory, fitted, depth)
    if fitted.head is not None:
        (directory / CTR).mkdir()
        write_ctr(directory / CTR, fitted.head)
    (directory / RERANKER).mkdir()
    write_reranker(directory / RERANKER, fitted.model)
    if depth is not None:
        write_first_phase(directory / RERANKER, FirstPhase(first, depth))
