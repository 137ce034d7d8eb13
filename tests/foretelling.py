"""A shop whose models foretell: a CTR head as if trained with impressions, and who buys soon."""

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.ranking.ctr import CtrModel, CtrSettings, write_ctr
from services.ranking.propensity import Model, columns_of, write_propensity
from services.ranking.scales import Scales
from tests.models import DIMENSION
from tests.recommending import purchase
from tests.shops import EVENT_TYPES, items

COLUMNS = columns_of(list(EVENT_TYPES))
ITEMS = [item.id for item in items()]


def by_days_bought(days: int, bias: float) -> Model:
    """A chance that only the number of days with a purchase, n, moves: sigmoid(log(1 + n) + bias)."""
    weights = [float(name == "purchase_days") for name in COLUMNS]
    return Model(days, COLUMNS, [0.0] * len(COLUMNS), [1.0] * len(COLUMNS), weights, bias)


def chance(bought_days: int, bias: float) -> float:
    return 1 / (1 + math.exp(-math.log1p(bought_days) - bias))


def components(staged: Path) -> None:
    """A head as if trained with impressions, on chance weights, and two models of who buys."""
    torch.manual_seed(0)
    shape = CtrSettings(
        {"text": DIMENSION}, ("click", "purchase"), ("popular_7d",), Scales.plain(1), shown=True,
        slope=(1.0, 1.0), offset=(-1.0, -2.0),
    )  # fmt: skip
    (staged / "ctr").mkdir()
    write_ctr(staged / "ctr", CtrModel(shape))
    (staged / "propensity").mkdir()
    write_propensity(staged / "propensity", [by_days_bought(7, -2.0), by_days_bought(30, -1.0)])


async def remember(stub: Any) -> None:
    """Ann bought on two days, Bob only looked."""
    deeds = [("a1", "ann", "garden-01", "purchase", 3), ("a2", "ann", "garden-02", "purchase", 2)]
    deeds += [("b1", "bob", "kitchen-01", "click", 1)]
    for event_id, who, item, kind, days in deeds:
        event = purchase(event_id, who, item, kind=kind)
        event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(days=days))
        await stub.WriteEvents(pb.WriteEventsRequest(events=[event]))
