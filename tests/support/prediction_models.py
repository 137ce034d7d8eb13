"""Prediction models for the small shop: a CTR head and two purchase propensity models."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.ranking.models.ctr import CtrModel, CtrSettings, write_ctr
from services.ranking.models.ctr_head import CtrHead, history_rows
from services.ranking.models.propensity import PropensityModel, columns_of, write_propensity
from services.ranking.models.scaler import FeatureScaler
from services.ranking.state.user_query import UserQuery
from tests.support.models import DIMENSION
from tests.support.shop_server import Stub, purchase
from tests.support.shops import EVENT_TYPES, items

COLUMNS = columns_of(list(EVENT_TYPES))
ITEMS = [item.id for item in items()]


def purchase_days_model(days: int, bias: float) -> PropensityModel:
    """A model that depends only on the number n of days with a purchase: sigmoid(log(1 + n) + bias)."""
    weights = [float(name == "purchase_days") for name in COLUMNS]
    return PropensityModel(days, COLUMNS, [0.0] * len(COLUMNS), [1.0] * len(COLUMNS), weights, bias)


def purchase_probability(purchase_days: int, bias: float) -> float:
    return 1 / (1 + math.exp(-math.log1p(purchase_days) - bias))


def write_prediction_models(staging: Path) -> None:
    """Write a CTR head with random weights and two propensity models."""
    torch.manual_seed(0)
    shape = CtrSettings(
        {"text": DIMENSION}, ("click", "purchase"), ("popular_7d",), FeatureScaler.plain(1), shown=True,
        slope=(1.0, 1.0), offset=(-1.0, -2.0),
    )  # fmt: skip
    (staging / "ctr").mkdir()
    write_ctr(staging / "ctr", CtrModel(shape))
    (staging / "propensity").mkdir()
    write_propensity(staging / "propensity", [purchase_days_model(7, -2.0), purchase_days_model(30, -1.0)])


async def write_history(stub: Stub) -> None:
    """Write events: Ann purchases on two days, Bob clicks once."""
    events = [("a1", "ann", "garden-01", "purchase", 3), ("a2", "ann", "garden-02", "purchase", 2)]
    events += [("b1", "bob", "kitchen-01", "click", 1)]
    for event_id, user_id, item_id, kind, days in events:
        event = purchase(event_id, user_id, item_id, kind=kind)
        event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(days=days))
        await stub.WriteEvents(pb.WriteEventsRequest(events=[event]))


def served_logits(
    head: CtrHead, query: UserQuery, rows: np.ndarray, matrix: np.ndarray, vectors: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The logits (C, T) of a head for candidate rows (C,) with features (C, F); `vectors` (N, D) by space."""
    items, past = (
        {space: np.asarray(vectors[space][of], np.float32) for space in head.settings.spaces}
        for of in (rows, history_rows(query))
    )
    return head.logits(query, matrix, items, past)
