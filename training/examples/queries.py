"""Evaluation queries made of past baskets: the first items are the input, the next ones the targets."""

import zlib
from dataclasses import dataclass, field

import numpy as np

from training.data.events import Events

DAY = 86_400_000_000
_SESSION_SHARE = 0.5


@dataclass(frozen=True)
class EvalQuery:
    """A user at a time `as_of`, microseconds since 1970, and the items that the user engages with next.

    `session` holds (item hash, event type), oldest first. `targets` int64 (T,) are item hashes. `grades`
    float32 (T,) are the weights of each target's strongest event type; empty if all targets are equal.
    `positions` int32 (T,) are the places of the targets on a logged page, from 1, 0 for unknown; empty if it
    is none.
    """

    user_id: str
    as_of: int
    session: tuple[tuple[int, str], ...]
    targets: np.ndarray
    grades: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


def user_part(user_id: str, parts: int) -> int:
    """The part of a user, below `parts`: the same in every run."""
    return zlib.crc32(user_id.encode()) % parts


def baskets(events: Events) -> np.ndarray:
    """The basket of each event, int64 (N,): its session, or else the user's events of that day."""
    day = events.time // DAY
    of_day = events.user.astype(np.int64) * (1 << 31) + day
    return np.where(events.session >= 0, -1 - events.session.astype(np.int64), of_day)


def make_eval_queries(
    events: Events,
    weights: dict[str, float],
    targets: tuple[str, ...],
    since: int,
    seed: int = 0,
    no_session_share: float = 0.0,
) -> list[EvalQuery]:
    """One query for each usable basket from `since` on, microseconds since 1970.

    The first half of a basket is the session; the target types of the rest are the targets. Events are sorted
    by time, ties at random. A basket of one item makes a query with an empty session if the user has earlier
    events. `as_of` is the start of the basket, so that only the session reveals parts of it. A share
    `no_session_share` of the baskets of users with earlier events makes queries with an empty session.
    """
    generator = np.random.default_rng(seed)
    kinds = list(weights)
    is_target = np.array([name in targets for name in kinds])
    is_engagement = np.array([weights[name] > 0 for name in kinds])
    rows = np.flatnonzero(is_engagement[events.kind])
    first_of_user = np.full(len(events.user_ids), np.iinfo(np.int64).max)
    np.minimum.at(first_of_user, events.user[rows], events.time[rows])
    rows = rows[events.time[rows] >= since]
    group = baskets(events)[rows]
    order = np.lexsort((generator.random(len(rows)), events.time[rows], group))
    rows, group = rows[order], group[order]
    eval_queries, kind_weights = [], np.array([weights[name] for name in kinds], np.float32)
    for basket in np.split(rows, np.flatnonzero(np.diff(group)) + 1) if len(rows) else []:
        has_past = bool(first_of_user[events.user[basket[0]]] < events.time[basket].min())
        no_session = has_past and generator.random() < no_session_share
        eval_query = _basket_query(
            events, kinds, np.where(is_target, kind_weights, 0), basket, has_past, no_session
        )
        if eval_query is not None:
            eval_queries.append(eval_query)
    return sorted(eval_queries, key=lambda q: (q.as_of, q.user_id))


def make_pages(
    events: Events, weights: dict[str, float], since: int, max_pages: int, seed: int = 0
) -> tuple[list[EvalQuery], list[np.ndarray], list[str]]:
    """Logged pages from `since` on, at most `max_pages`; their labels, float32 (S, T); the T event types.

    A page is the list of impressions of one user at one time in one session. An item of it is engaged with if
    a later event of the same session and day says so; events of later days do not count, because a model
    trained on that day cannot use them. For half of the pages, chosen at random, the session holds the
    engagements of that day before the page, and `as_of` is the time of the first of them, as in an evaluation
    query. For the others they are part of the history. Impressions are the event types of weight 0. Without
    logged impressions the result is empty. Impressions without a session are dropped.
    """
    kinds = list(weights)
    impression_kinds = [index for index, name in enumerate(kinds) if weights[name] == 0]
    types = [name for name in kinds if weights[name] > 0]
    late = events.time >= since
    impressions = np.flatnonzero(np.isin(events.kind, impression_kinds) & late & (events.session >= 0))
    if not len(impressions):
        return [], [], types
    engagements = np.flatnonzero(~np.isin(events.kind, impression_kinds) & late & (events.session >= 0))
    last_time: dict[tuple[int, int, int, int], int] = {}
    visits: dict[tuple[int, int], list[int]] = {}
    for row in engagements.tolist():
        time, visit = int(events.time[row]), (int(events.session[row]), int(events.time[row]) // DAY)
        key = *visit, int(events.number[row]), int(events.kind[row])
        last_time[key] = max(time, last_time.get(key, 0))
        visits.setdefault(visit, []).append(row)
    order = np.lexsort((events.position[impressions], events.time[impressions], events.session[impressions]))
    impressions = impressions[order]
    border = (np.diff(events.session[impressions]) != 0) | (np.diff(events.time[impressions]) != 0)
    pages = np.split(impressions, np.flatnonzero(border) + 1)
    generator = np.random.default_rng(seed)
    selected = np.sort(generator.permutation(len(pages))[:max_pages])
    eval_queries, labels = [], []
    for index in selected:
        page = pages[index]
        session_code, time = int(events.session[page[0]]), int(events.time[page[0]])
        hashes, first = np.unique(events.number[page], return_index=True)
        in_order = np.argsort(first)
        hashes, positions = hashes[in_order].tolist(), events.position[page[first[in_order]]]
        visit = session_code, time // DAY
        label = [[last_time.get((*visit, n, kinds.index(t)), -1) >= time for t in types] for n in hashes]
        user, as_of = events.user_ids[events.user[page[0]]], time
        session: tuple[tuple[int, str], ...] = ()
        if generator.random() < _SESSION_SHARE:
            earlier = [row for row in visits.get(visit, []) if events.time[row] < time]
            session = tuple((int(events.number[row]), kinds[events.kind[row]]) for row in earlier)
            as_of = int(min(events.time[row] for row in earlier)) if earlier else time
        targets = np.array(hashes, np.int64)
        eval_queries.append(EvalQuery(user, as_of, session, targets, positions=positions))
        labels.append(np.array(label, np.float32))
    by_time = sorted(range(len(eval_queries)), key=lambda n: (eval_queries[n].as_of, eval_queries[n].user_id))
    return [eval_queries[n] for n in by_time], [labels[n] for n in by_time], types


def _basket_query(
    events: Events,
    kinds: list[str],
    kind_grades: np.ndarray,
    basket: np.ndarray,
    has_past: bool,
    no_session: bool,
) -> EvalQuery | None:
    hashes = events.number[basket]
    _, first = np.unique(hashes, return_index=True)
    half = (len(first) + 1) // 2 if len(first) > 1 and not no_session else 0
    first_rows = np.sort(first)
    cut = first_rows[half] if half < len(first_rows) else len(basket)
    head, tail = basket[:cut], basket[cut:]
    session_hashes = set(events.number[head].tolist())
    grade_of: dict[int, float] = {}
    for item_hash, grade in zip(
        events.number[tail].tolist(), kind_grades[events.kind[tail]].tolist(), strict=True
    ):
        if grade > 0 and item_hash not in session_hashes:
            grade_of[item_hash] = max(grade, grade_of.get(item_hash, 0.0))
    if not grade_of or not (len(head) or has_past):
        return None
    user, start = events.user[basket[0]], int(events.time[basket].min())
    session = tuple((int(events.number[row]), kinds[events.kind[row]]) for row in head)
    targets = np.array(sorted(grade_of), np.int64)
    grades = np.array([grade_of[n] for n in targets.tolist()], np.float32)
    return EvalQuery(events.user_ids[user], start, session, targets, grades)
