"""The two taste models of a training run: one without the ranking days, one on all events."""

import logging
from pathlib import Path

import numpy as np

from services.catalog.bundle import creation_time
from services.catalog.item_table import ItemTable
from services.ranking.models.taste import write_taste
from training.data.config import TasteTraining
from training.data.shop import ShopData
from training.examples.shop_state import state_of
from training.ranking.taste import TasteFit, fit_taste

BEFORE, FINAL = "before", "final"
_log = logging.getLogger(__name__)


def write_models(directory: Path, shop: ShopData, training: TasteTraining, split_time: int) -> None:
    """Fit and write one model on the events before `split_time` and one, of the same variances, on all.

    None is written if the first one cannot be fitted, or predicts nothing.
    """
    users = _users(shop, training.users, split_time)
    if not users:
        return
    settings, state = shop.settings, state_of(shop)
    table = ItemTable.of(shop.items, {}, {}, [creation_time(item) for item in shop.items])
    targets = np.array([state.kinds[name] for name in settings.targets], np.int16)
    fit = TasteFit(state, table, users, settings.items.text_attributes, targets)
    before = fit_taste(fit, split_time)
    if before is None:
        return
    write_taste(directory / BEFORE, before)
    final = fit_taste(fit, int(shop.events.time[-1]) + 1, like=before)
    if final is not None:
        write_taste(directory / FINAL, final)


def _users(shop: ShopData, limit: int, split_time: int) -> list[str]:
    """The users who were shown something before `split_time`, at most `limit` of them at random."""
    events, weights = shop.events, np.array(list(shop.settings.event_types.values()))
    users = np.unique(events.user[(weights[events.kind] == 0) & (events.time < split_time)])
    if len(users) > limit:
        _log.info("the taste model is learned from %d of %d users", limit, len(users))
        users = np.sort(np.random.default_rng(0).permutation(users)[:limit])
    return [events.user_ids[user] for user in users.tolist()]
