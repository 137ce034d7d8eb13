"""The ranker of a bundle without a trained one: hand-set weights over feature columns.

Every trained ranker must beat this baseline.
"""

from collections.abc import Sequence

import numpy as np

WEIGHTS = {
    "baskets_session": 1.0,
    "baskets_history": 0.5,
    "people_history": 0.25,
    "people_latest": 0.5,
    "family_in_session": 0.10,
    "family_in_history": 0.05,
    "text_session_most": 0.10,
    "text_history_most": 0.05,
    "image_session_most": 0.05,
    "image_history_most": 0.03,
    "sequence_next": 0.06,
    "words_session_most": 0.10,
    "words_history_most": 0.04,
}
_POPULARITY, _POPULAR = 0.01, "popular_7d"
HAND_SET = "hand_set_score"
"""The column of a choice model that holds these scores."""


def baseline_scores(names: Sequence[str], matrix: np.ndarray) -> np.ndarray:
    """Scores float32 (C,) of feature rows (C, F) with columns `names`; a missing value adds nothing."""
    read = [(index, WEIGHTS[name]) for index, name in enumerate(names) if name in WEIGHTS]
    total = np.zeros(len(matrix), np.float32)
    if read:
        indices, weights = zip(*read, strict=True)
        values = matrix[:, list(indices)]
        total += np.where(np.isnan(values), 0, values) @ np.array(weights, np.float32)
    if _POPULAR in names:
        popular = matrix[:, names.index(_POPULAR)]
        total += np.float32(_POPULARITY) * np.log1p(np.where(np.isnan(popular), 0, popular))
    return total
