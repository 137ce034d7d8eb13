"""The untrained item graph: the baseline of a bundle, fitted on the same events.

Cosines of co-engagement (Linden et al., 2003), in one basket and from one basket to the next, summed over the
user's history, with a higher weight of recent items if the order is known. No exponent, weight or number of
neighbors is tuned.
"""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
from scipy import sparse

from cli.evaluation_queries import read_queries
from training.data.dataset import read_shop
from training.examples.queries import baskets
from training.retrieval.item_graph import RELATIONS, Baskets, Weighting

PAGE = 20
# As in `services.ranking.state.user_query`: the weight of an item relative to the next newer one.
_DECAY = 0.7


def run_untrained(
    shop: Path, split: str, until: datetime, out: Path, *, ordered: bool, limit: int = 0
) -> None:
    """Write the best 20 new items of each query of a split, or of the first `limit`.

    The graph is of the events before `until`; a user's history is of all events before the query.
    """
    day, queries = read_queries(shop, None, split)
    training_events, past_events = (
        read_shop(shop, None, until=until_time).events for until_time in (until, day)
    )
    place = {item: index for index, item in enumerate(past_events.item_ids)}
    codes = np.array([place[item] for item in training_events.item_ids])[training_events.item]
    users = training_events.user.astype(np.int64)
    groups = Baskets.of(users, baskets(training_events), training_events.time, codes, len(place))
    weights = sum(groups.weights(relation, Weighting()) for relation in RELATIONS)
    order = np.lexsort((-past_events.time, past_events.user))
    user, start = np.unique(past_events.user[order], return_index=True)
    user_rows = np.split(order, start[1:])
    history = {past_events.user_ids[p]: index for p, index in zip(user, user_rows, strict=True)}
    with out.open("w") as file:
        for query in queries[: limit or None]:
            index = history.get(query.user_id, np.empty(0, np.int64))
            page = _page(
                weights, past_events.item[index], past_events.time[index] if ordered else np.zeros(len(index))
            )
            items = [past_events.item_ids[item] for item in page]
            file.write(json.dumps({"user_id": query.user_id, "items": items}) + "\n")


def _page(weights: sparse.csr_matrix, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The best items for a history, newest first; events of one time have the same weight."""
    if not len(items):
        return items
    age = np.unique(-times, return_inverse=True)[1]
    scores = np.asarray(np.float32(_DECAY) ** age @ weights[items]).ravel()
    scores[items] = 0
    best = np.argsort(-scores, kind="stable")[:PAGE]
    return np.asarray(best[scores[best] > 0])
