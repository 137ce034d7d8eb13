"""What a user was shown of the candidates before: how often, and when last."""

import numpy as np

from services.ranking.state.item_stats import HOUR
from services.ranking.state.user_query import Impressions

IMPRESSION_COLUMNS = ("shown_to_user", "hours_since_shown")


def impression_columns(shown: Impressions, rows: np.ndarray) -> list[np.ndarray]:
    """The columns `IMPRESSION_COLUMNS` of table rows, int64 (C,): each float32 (C,).

    The number of the latest impressions of the user that are of a candidate, and the hours since the last of
    them, NaN for none.
    """
    if not len(shown.rows):
        return [np.zeros(len(rows), np.float32), np.full(len(rows), np.nan, np.float32)]
    order = np.argsort(shown.rows, kind="stable")  # of one row, the newest stays first
    ordered = shown.rows[order]
    start, end = np.searchsorted(ordered, rows), np.searchsorted(ordered, rows, "right")
    latest = shown.occurred[order[np.minimum(start, len(order) - 1)]]
    hours = np.where(end > start, (shown.as_of - latest) / HOUR, np.nan)
    return [(end - start).astype(np.float32), hours.astype(np.float32)]
