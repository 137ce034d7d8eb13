"""Questions with known answers, made of past baskets: what came next, given what came first."""

from dataclasses import dataclass, field

import numpy as np

from training.dataset import Events

DAY = 86_400_000_000
_SESSION_SHARE = 0.5


@dataclass(frozen=True)
class Question:
    """A person at a moment, microseconds since 1970, and what they went on to engage with.

    `session` holds (item number, event type), oldest first; `targets` int64 (T,) item numbers
    and `grades` float32 (T,), how much each was engaged with: the weight of the strongest type,
    or none at all for equal ones.
    """

    user_id: str
    as_of: int
    session: tuple[tuple[int, str], ...]
    targets: np.ndarray
    grades: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


def baskets(events: Events) -> np.ndarray:
    """The basket of each event, int64 (N,): its session, or what its person did that day."""
    day = events.time // DAY
    of_day = events.user.astype(np.int64) * (1 << 31) + day
    return np.where(events.session >= 0, -1 - events.session.astype(np.int64), of_day)


def make_questions(
    events: Events,
    weights: dict[str, float],
    targets: tuple[str, ...],
    since: int,
    seed: int = 0,
    bare: float = 0.0,
) -> list[Question]:
    """One question for each basket from `since` on, microseconds since 1970, that can be asked.

    The first half of a basket, in time and among equal times at random, is the session, the
    target types of the rest the answer. A basket of one item is asked for with an empty session,
    if its person has a past. The moment is the beginning of the basket: what of it is
    known comes with the session alone. A share `bare` of the baskets of people with a past is asked
    for with an empty session, as when they have only just arrived.
    """
    generator = np.random.default_rng(seed)
    kinds = list(weights)
    wanted = np.array([name in targets for name in kinds])
    engaged = np.array([weights[name] > 0 for name in kinds])
    rows = np.flatnonzero(engaged[events.kind])
    first_of_user = np.full(len(events.user_ids), np.iinfo(np.int64).max)
    np.minimum.at(first_of_user, events.user[rows], events.time[rows])
    rows = rows[events.time[rows] >= since]
    group = baskets(events)[rows]
    order = np.lexsort((generator.random(len(rows)), events.time[rows], group))
    rows, group = rows[order], group[order]
    found, weight = [], np.array([weights[name] for name in kinds], np.float32)
    for mine in np.split(rows, np.flatnonzero(np.diff(group)) + 1) if len(rows) else []:
        known = bool(first_of_user[events.user[mine[0]]] < events.time[mine].min())
        arriving = known and generator.random() < bare
        question = _question(events, kinds, np.where(wanted, weight, 0), mine, known, arriving)
        if question is not None:
            found.append(question)
    return sorted(found, key=lambda q: (q.as_of, q.user_id))


def make_pages(
    events: Events, weights: dict[str, float], since: int, most: int, seed: int = 0
) -> tuple[list[Question], list[np.ndarray], list[str]]:
    """Pages shown from `since` on, at most `most`; what was done, float32 (S, T); the T event types.

    A page is what one person was shown at one time in one session; an item of it was engaged
    with when an event of the session says so afterwards, on the same day: what came later is
    not known to who learns from that day. What was engaged with before, on that day in the
    session, comes with a half of the pages, drawn at random, as the session, and the moment is that of
    the first engagement, as in a question; with the others it is part of the history. Nothing when the
    shop logs no impressions, which are the types that weigh nothing; those without a session
    are left out.
    """
    kinds = list(weights)
    shown_kinds = [at for at, name in enumerate(kinds) if weights[name] == 0]
    types = [name for name in kinds if weights[name] > 0]
    late = events.time >= since
    shown = np.flatnonzero(np.isin(events.kind, shown_kinds) & late & (events.session >= 0))
    if not len(shown):
        return [], [], types
    done = np.flatnonzero(~np.isin(events.kind, shown_kinds) & late & (events.session >= 0))
    when: dict[tuple[int, int, int, int], int] = {}
    visits: dict[tuple[int, int], list[int]] = {}
    for row in done.tolist():
        time, visit = int(events.time[row]), (int(events.session[row]), int(events.time[row]) // DAY)
        key = *visit, int(events.number[row]), int(events.kind[row])
        when[key] = max(time, when.get(key, 0))
        visits.setdefault(visit, []).append(row)
    order = np.lexsort((events.position[shown], events.time[shown], events.session[shown]))
    shown = shown[order]
    border = (np.diff(events.session[shown]) != 0) | (np.diff(events.time[shown]) != 0)
    pages = np.split(shown, np.flatnonzero(border) + 1)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(len(pages))[:most])
    questions, labels = [], []
    for at in chosen:
        page = pages[at]
        session, time = int(events.session[page[0]]), int(events.time[page[0]])
        numbers = list(dict.fromkeys(events.number[page].tolist()))
        here = session, time // DAY
        label = [[when.get((*here, n, kinds.index(t)), -1) >= time for t in types] for n in numbers]
        user, as_of = events.user_ids[events.user[page[0]]], time
        told: tuple[tuple[int, str], ...] = ()
        if generator.random() < _SESSION_SHARE:
            earlier = [row for row in visits.get(here, []) if events.time[row] < time]
            told = tuple((int(events.number[row]), kinds[events.kind[row]]) for row in earlier)
            as_of = int(min(events.time[row] for row in earlier)) if earlier else time
        questions.append(Question(user, as_of, told, np.array(numbers, np.int64)))
        labels.append(np.array(label, np.float32))
    in_time = sorted(range(len(questions)), key=lambda n: (questions[n].as_of, questions[n].user_id))
    return [questions[n] for n in in_time], [labels[n] for n in in_time], types


def _question(
    events: Events, kinds: list[str], grade: np.ndarray, mine: np.ndarray, known: bool, arriving: bool
) -> Question | None:
    numbers = events.number[mine]
    _, first = np.unique(numbers, return_index=True)
    half = (len(first) + 1) // 2 if len(first) > 1 and not arriving else 0
    firsts = np.sort(first)
    cut = firsts[half] if half < len(firsts) else len(mine)
    head, tail = mine[:cut], mine[cut:]
    seen = set(events.number[head].tolist())
    answer: dict[int, float] = {}
    for number, worth in zip(events.number[tail].tolist(), grade[events.kind[tail]].tolist(), strict=True):
        if worth > 0 and number not in seen:
            answer[number] = max(worth, answer.get(number, 0.0))
    if not answer or not (len(head) or known):
        return None
    user, start = events.user[mine[0]], int(events.time[mine].min())
    session = tuple((int(events.number[row]), kinds[events.kind[row]]) for row in head)
    targets = np.array(sorted(answer), np.int64)
    grades = np.array([answer[n] for n in targets.tolist()], np.float32)
    return Question(events.user_ids[user], start, session, targets, grades)
