"""The groups of a user's items that vectors are searched by, and how many candidates are retrieved.

The gateway retrieves by them, and training repeats that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

CANDIDATES_PER_SOURCE = 400
HITS_PER_GROUP = 150
MAX_SINGLE_ITEMS = 8


@dataclass(frozen=True)
class QueryGroup:
    """Items, by hash, whose weighted mean is one query vector; no weights means equal weights."""

    item_hashes: Sequence[int]
    weights: Sequence[float] = ()


def query_groups(item_hashes: Sequence[int], weights: Sequence[float]) -> list[QueryGroup]:
    """The query groups of a history, newest item first: each of the 8 latest items, then all of them."""
    latest = list(dict.fromkeys(item_hashes))[:MAX_SINGLE_ITEMS]
    groups = [QueryGroup([item_hash]) for item_hash in latest]
    if len(item_hashes) > 1:
        groups.append(QueryGroup(item_hashes, weights))
    return groups
