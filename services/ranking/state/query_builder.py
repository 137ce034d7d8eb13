"""The user of a request, and the query built from their events.

Apart from `user_query`, which models read without the event columns.
"""

from dataclasses import dataclass, replace

import numpy as np

from services.catalog.item_table import ItemTable
from services.ranking.state.event_columns import EventColumns, EventState
from services.ranking.state.item_stats import DAY
from services.ranking.state.user_query import Impressions, UserQuery

MAX_IMPRESSIONS = 100


@dataclass(frozen=True)
class User:
    """The user of a request: either id may be empty; `session` has (item hash, event type), oldest first."""

    user_id: str = ""
    visitor_id: str = ""
    session: tuple[tuple[int, str], ...] = ()


def make_query(
    state: EventState,
    table: ItemTable,
    user: User,
    past: EventColumns,
    cutoff: int,
    targets: np.ndarray,
    impressions: EventColumns | None = None,
) -> UserQuery:
    """The user in rows of the table; items that the table lacks and events of weight 0 are left out."""
    session = [(h, w) for h, t in reversed(user.session) if (w := state.weights[state.kinds[t]]) > 0]
    session_rows = table.rows(h for h, _ in session)
    in_table = session_rows >= 0
    rows = table.rows(past.item_hash)
    events = rows >= 0
    kinds = past.kind[events]
    return UserQuery(
        session=session_rows[in_table],
        session_weights=np.array([w for _, w in session], np.float32)[in_table],
        history=rows[events],
        ages=((cutoff - past.occurred[events]) / DAY).astype(np.float32),
        weights=state.weights[kinds],
        purchased=np.isin(kinds, targets),
        channels=past.channel[events],
        impressions=Impressions.none()
        if impressions is None
        else replace(shown_items(state, table, impressions, past, targets), as_of=cutoff),
    )


def shown_items(
    state: EventState, table: ItemTable, impressions: EventColumns, past: EventColumns, targets: np.ndarray
) -> Impressions:
    """The impressions of a user with what followed; not those of items that the user had purchased before.

    `impressions` and `past`, the interactions, are of one user.
    """
    lightest = float(state.weights[state.weights > 0].min(initial=np.inf))
    weights = state.weights[past.kind]
    same = impressions.item_hash[:, None] == past.item_hash[None, :]
    passed = past.occurred[None, :] - impressions.occurred[:, None]
    purchased = (same & (passed < 0) & np.isin(past.kind, targets)).any(1)
    rows = table.rows(impressions.item_hash)
    used = np.flatnonzero((rows >= 0) & ~purchased)
    after = (same & (passed >= 0) & (passed < DAY))[used]
    strong = (after & (weights > lightest)).any(1)
    return Impressions(rows[used], impressions.occurred[used], after.any(1), strong, lightest)
