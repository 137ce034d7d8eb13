"""The two sequence models of a training run: one without the ranking days, one on all events."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from services.catalog.bundle import creation_time
from services.catalog.item_table import ItemTable
from services.ranking.models.sequence import write_sequence
from training.data.config import SequenceTraining
from training.data.shop import ShopData
from training.retrieval.sequence import Engagements, fit_sequence

BEFORE, FINAL = "before", "final"


def write_models(
    directory: Path,
    shop: ShopData,
    training: SequenceTraining,
    before: Mapping[str, np.ndarray],
    final: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    split_time: int,
) -> None:
    """Fit and write one model on the events before `split_time` and one on all, each with its own vectors.

    A model is not written if there are too few events.
    """
    attributes, weights = shop.settings.items.text_attributes, dict(shop.settings.event_types)
    since = [creation_time(item) for item in shop.items]
    end = int(shop.events.time[-1]) + 1 if len(shop.events) else 0
    for name, vectors, until in ((BEFORE, before, split_time), (FINAL, final, end)):
        table = ItemTable.of(shop.items, vectors, present, since)
        engagements = Engagements.of(shop.events, weights, table, until)
        net = fit_sequence(engagements, table, training, attributes)
        if net is not None:
            write_sequence(directory / name, net)
