"""Candidates for exploration: items that are new or have few impressions, for some slots of a page.

The impressions of each item are bounded in all, the exploration slots of each scenario by day. If more items
qualify than a request asks for, half are those nearest to the user, and the rest is a uniform draw by the
seed of the request, the same in every process.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from services.catalog.item_table import ItemTable
from services.ranking.events.exploration_counts import ExplorationCounts
from services.ranking.state.item_stats import DAY, WINDOWS, ItemStats

_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


@dataclass(frozen=True)
class ExplorationQuery:
    """The conditions: at most `limit` items, each with less than `max_impressions` exploration impressions.

    `max_age_days` 0 is any age. `max_slots_per_day` bounds the slots of the scenario, `max_interactions` the
    weighted interactions of an item; None is no bound. Impressions count up to `log_position` in the
    impression log, None for its end, which the ranking service looks up before it retrieves.
    """

    scenario: str
    limit: int
    seed: int
    max_age_days: int
    max_impressions: int
    max_slots_per_day: int | None = None
    max_interactions: float | None = None
    log_position: int | None = None


@dataclass(frozen=True)
class ExplorationCandidates:
    """Items in columns, ordered by `item_hashes` int64 (E,); `log_position` is the end of the counted log.

    `impressions` int64 (E,), for exploration so far; `interactions` float32 (E,), of the last 30 days.
    """

    item_hashes: np.ndarray
    impressions: np.ndarray
    interactions: np.ndarray
    log_position: int


def exploration_candidates(
    query: ExplorationQuery,
    allowed: np.ndarray,
    stats: ItemStats,
    table: ItemTable,
    counts: ExplorationCounts,
    before: int,
    nearest: Callable[[np.ndarray, int], np.ndarray],
) -> ExplorationCandidates:
    """The rows to explore of those that are `allowed`, bool (N,), at `before`, microseconds since 1970.

    `counts` have followed the log up to the query's position. `nearest` takes a mask and a limit and gives
    rows of the mask, int64, the nearest to the user first.
    """
    log_position = query.log_position
    assert log_position is not None  # noqa: S101 - the ranking service has looked it up
    eligible = np.ones(len(allowed), bool)
    if query.max_age_days:
        eligible = table.arrivals[: len(allowed)] >= before - query.max_age_days * DAY
    if (
        query.max_slots_per_day is not None
        and counts.slots(query.scenario, before // DAY, log_position) >= query.max_slots_per_day
    ):
        eligible[:] = False
    if query.max_interactions is not None:
        eligible &= stats.popular[: len(eligible), -1] <= query.max_interactions
    rows = np.flatnonzero(allowed & eligible)
    candidates = rows[counts.of(table.item_hashes[rows], log_position) < query.max_impressions]
    selected = candidates
    if len(candidates) > query.limit:
        mask = np.zeros(len(allowed), bool)
        mask[candidates] = True
        nearest_rows = nearest(mask, query.limit // 2)
        mask[nearest_rows] = False
        others = np.flatnonzero(mask)
        keys = random_keys(table.item_hashes[others], query.seed)
        remaining = query.limit - len(nearest_rows)
        selected = np.concatenate([nearest_rows, others[np.argpartition(keys, remaining - 1)[:remaining]]])
    selected = selected[np.argsort(table.item_hashes[selected])]
    item_hashes = table.item_hashes[selected]
    interactions = stats.popular[selected, len(WINDOWS) - 1]
    return ExplorationCandidates(
        item_hashes, counts.of(item_hashes, log_position), interactions, log_position
    )


def random_keys(item_hashes: np.ndarray, seed: int) -> np.ndarray:
    """A random key for each item hash, uint64 (N,): SplitMix64 (Steele et al., 2014) of hash and seed."""
    keys = item_hashes.astype(np.uint64) + np.uint64(seed)
    for multiplier, shift in zip(_MULTIPLIERS, _SHIFTS, strict=False):
        keys = (keys ^ (keys >> shift)) * multiplier
    return np.asarray(keys ^ (keys >> _SHIFTS[2]))
