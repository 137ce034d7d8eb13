"""What the shop looked like at a moment: popularity, age and price of every item.

Computed from behaviour recorded before the moment and nothing else; a moment is a tick of
the shop's granularity, so that training and serving see the same one.
"""

from dataclasses import dataclass

import numpy as np

from services.item_table import ItemTable
from services.ranking.graph import find
from services.ranking.state import BehaviourState

HOUR = 3_600_000_000
DAY = 24 * HOUR
TICKS = {"hour": HOUR, "day": DAY}
WINDOWS = (1, 3, 7, 30)


@dataclass(frozen=True)
class Moment:
    """Columns over the N rows of an item table, float32, NaN for unknown.

    `popular` (N, 5): weight of the engagements in the last 1, 3, 7 and 30 days and ever;
    `age` and `idle` (N,): days since the first and the last engagement; `price` (N,): the
    last one paid, or the catalogue's where none was; `highest` (N,): the highest one paid;
    `channels` (N, K): weight of the engagements of the last 30 days in each of the shop's channels.
    """

    tick: int
    popular: np.ndarray
    age: np.ndarray
    idle: np.ndarray
    price: np.ndarray
    highest: np.ndarray
    channels: np.ndarray


def moment(state: BehaviourState, table: ItemTable, tick: int) -> Moment:
    """The moment `tick`, microseconds since 1970."""
    events = state.all()
    weights = np.where(events.kind >= 0, state.weights[np.maximum(events.kind, 0)], 0)
    seen = np.flatnonzero((events.recorded < tick) & (weights > 0))
    events, weights = events.take(seen), weights[seen]
    count = table.length  # the feed may write more meanwhile
    numbers = table.item_numbers[:count]
    order = np.argsort(numbers)
    at = find(numbers[order], events.number)
    known = at >= 0
    events, weights, rows = events.take(np.flatnonzero(known)), weights[known], order[at[known]]
    popular = np.zeros((count, len(WINDOWS) + 1), np.float32)
    for column, days in enumerate((*WINDOWS, None)):
        recent = slice(None) if days is None else events.recorded >= tick - days * DAY
        popular[:, column] = np.bincount(rows[recent], weights[recent], count)
    first, last = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(first, rows, events.recorded)
    np.maximum.at(last, rows, events.recorded)
    price = _price(table, count, rows, events.price)
    highest = _highest(count, rows, events.price)
    lately = (events.channel >= 0) & (events.recorded >= tick - WINDOWS[-1] * DAY)
    channels = np.zeros((count, len(state.channels)), np.float32)
    np.add.at(channels, (rows[lately], events.channel[lately]), weights[lately])
    return Moment(tick, popular, _days(tick - first), _days(tick - last), price, highest, channels)


def _days(span: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(span), span / DAY, np.nan).astype(np.float32)


def _price(table: ItemTable, count: int, rows: np.ndarray, paid: np.ndarray) -> np.ndarray:
    stated = table.numbers("price")
    price = np.full(count, np.nan) if stated is None else stated[:count, 0].copy()
    known = ~np.isnan(paid)
    price[rows[known]] = paid[known]  # rows come in time order: the last one stays
    return price.astype(np.float32)


def _highest(count: int, rows: np.ndarray, paid: np.ndarray) -> np.ndarray:
    highest = np.full(count, np.nan)
    np.fmax.at(highest, rows, np.where(paid > 0, paid, np.nan))
    return highest.astype(np.float32)
