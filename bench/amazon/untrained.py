"""The item graph with nothing learned: what a bundle must be worth more than, fitted on the same events.

Cosines of co-engagement (Linden et al., 2003), in one basket and from one to the next, summed over what
the person did before the question, the latest the most where order is known. No exponent, weight or number
of neighbours is chosen by any answer.
"""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
from scipy import sparse

from services.replay import read_queries
from training.dataset import read_shop
from training.item_graph import RELATIONS, Groups, Weighting
from training.queries import baskets

PAGE = 20
# As in `services.ranking.query`: of the latest items each counts so much of the one after it.
_FADING = 0.7


def run_untrained(
    shop: Path, split: str, until: datetime, out: Path, *, ordered: bool, limit: int = 0
) -> None:
    """Write the best 20 items of each question of a split, or of the first `limit`.

    None of them is its person's already. The graph is of the events before `until`, what a person did
    of all before the question.
    """
    day, questions = read_queries(shop, None, split)
    learned, known = (read_shop(shop, None, until=moment).events for moment in (until, day))
    place = {item: at for at, item in enumerate(known.item_ids)}
    codes = np.array([place[item] for item in learned.item_ids])[learned.item]
    users = learned.user.astype(np.int64)
    groups = Groups.of(users, baskets(learned), learned.time, codes, len(place))
    weights = sum(groups.weights(relation, Weighting()) for relation in RELATIONS)
    order = np.lexsort((-known.time, known.user))
    person, start = np.unique(known.user[order], return_index=True)
    mine = np.split(order, start[1:])
    history = {known.user_ids[p]: at for p, at in zip(person, mine, strict=True)}
    with out.open("w") as file:
        for question in questions[: limit or None]:
            at = history.get(question.user_id, np.empty(0, np.int64))
            page = _page(weights, known.item[at], known.time[at] if ordered else np.zeros(len(at)))
            items = [known.item_ids[item] for item in page]
            file.write(json.dumps({"user_id": question.user_id, "items": items}) + "\n")


def _page(weights: sparse.csr_matrix, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The best items for what somebody did, newest first; what was done at one time counts alike."""
    if not len(items):
        return items
    age = np.unique(-times, return_inverse=True)[1]
    scores = np.asarray(np.float32(_FADING) ** age @ weights[items]).ravel()
    scores[items] = 0
    best = np.argsort(-scores, kind="stable")[:PAGE]
    return np.asarray(best[scores[best] > 0])
