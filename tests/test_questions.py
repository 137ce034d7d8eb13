"""Questions made of past baskets, and pages that were shown, against plain loops over random events."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.dataset import Events
from training.queries import DAY, Question, baskets, make_pages, make_questions

WEIGHTS = {"impression": 0.0, "click": 0.25, "purchase": 1.0}
KINDS = list(WEIGHTS)
PURCHASE, EITHER = ("purchase",), ("click", "purchase")
TARGETS = st.sampled_from([PURCHASE, EITHER])
HOUR = DAY // 24


class Deed(NamedTuple):
    """A row of events; `session` -1 is none."""

    user: int
    item: int
    kind: int
    time: int
    session: int


def deeds(sessions: st.SearchStrategy[int], hours: int) -> st.SearchStrategy[list[Deed]]:
    """Up to 40 deeds within so many hours, in the order of time."""
    time = st.integers(0, hours).map(lambda hour: hour * HOUR)
    row = st.builds(Deed, st.integers(0, 2), st.integers(0, 5), st.integers(0, 2), time, sessions)
    return st.lists(row, max_size=40).map(lambda rows: sorted(rows, key=lambda deed: deed.time))


def number(item: int) -> int:
    return 1000 + item * 7


def events_of(rows: list[Deed]) -> Events:
    item = np.array([deed.item for deed in rows], np.int32)
    return Events(
        event_ids=np.array([f"e{n}" for n in range(len(rows))], object),
        user=np.array([deed.user for deed in rows], np.int32),
        user_ids=["ann", "bob", "cid"],
        item=item,
        item_ids=[f"i{n}" for n in range(6)],
        number=1000 + item.astype(np.int64) * 7,
        kind=np.array([deed.kind for deed in rows], np.int16),
        time=np.array([deed.time for deed in rows], np.int64),
        price=np.full(len(rows), np.nan),
        position=np.arange(len(rows), dtype=np.int32),
        session=np.array([deed.session for deed in rows], np.int32),
        session_ids=[f"s{n}" for n in range(4)],
        channel=np.full(len(rows), -1, np.int32),
        channel_names=[],
    )


def by_basket(rows: list[Deed], since: int) -> dict[tuple[int, int], list[Deed]]:
    """What was engaged with from `since` on, by person's session or day."""
    found: dict[tuple[int, int], list[Deed]] = {}
    for deed in rows:
        if deed.kind > 0 and deed.time >= since:
            key = (deed.session, -1) if deed.session >= 0 else (deed.user, deed.time // DAY)
            found.setdefault(key, []).append(deed)
    return found


ENGAGED = deeds(st.just(-1), 5 * 24)


@given(ENGAGED, st.integers(0, 4 * 24), st.integers(0, 3), TARGETS)
@settings(deadline=None, max_examples=200)
def test_a_question_is_half_a_basket_and_its_answer_comes_from_the_rest(
    rows: list[Deed], hour: int, seed: int, targets: tuple[str, ...]
) -> None:
    since = hour * HOUR
    asked = make_questions(events_of(rows), WEIGHTS, targets, since, seed)
    groups = by_basket(rows, since)
    at = {(("ann", "bob", "cid")[mine[0].user], min(d.time for d in mine)): mine for mine in groups.values()}
    assert [(q.as_of, q.user_id) for q in asked] == sorted((q.as_of, q.user_id) for q in asked)
    assert len({(q.user_id, q.as_of) for q in asked}) == len(asked)
    for question in asked:
        assert question.as_of >= since
        mine = at[question.user_id, question.as_of]
        seen, answer = {n for n, _ in question.session}, question.targets.tolist()
        assert answer == sorted(set(answer))
        assert answer
        assert not seen & set(answer)
        different = {number(deed.item) for deed in mine}
        assert len(seen) == ((len(different) + 1) // 2 if len(different) > 1 else 0)
        bought = {number(deed.item) for deed in mine if KINDS[deed.kind] in targets}
        assert set(answer) <= bought
        engaged = {(number(deed.item), KINDS[deed.kind]) for deed in mine}
        assert set(question.session) <= engaged
        # In time: nothing of the session comes after anything that is an answer began.
        first = {n: min(d.time for d in mine if number(d.item) == n) for n in different}
        assert all(first[s] <= first[rest] for s in seen for rest in different - seen)
        # Everything bought that was not in the session is an answer.
        assert set(answer) == bought - seen
        worth = {d: [WEIGHTS[KINDS[x.kind]] for x in mine if number(x.item) == d] for d in answer}
        assert question.grades.tolist() == [
            max(w for w in worth[n] if w in {WEIGHTS[t] for t in targets}) for n in answer
        ]
    told = {(q.user_id, q.as_of) for q in asked}
    for key, mine in at.items():
        if key in told:
            continue
        past = [d for d in rows if d.user == mine[0].user and d.kind > 0 and d.time < key[1]]
        different = {deed.item for deed in mine}
        if len(different) == 1:
            assert not past or all(KINDS[deed.kind] not in targets for deed in mine)


@given(ENGAGED, st.integers(0, 3))
@settings(deadline=None)
def test_a_single_item_is_asked_for_of_people_with_a_past_alone(rows: list[Deed], seed: int) -> None:
    single = {key: mine for key, mine in by_basket(rows, 0).items() if len({deed.item for deed in mine}) == 1}
    asked = make_questions(events_of(rows), WEIGHTS, PURCHASE, 0, seed)
    got = {(q.user_id, q.as_of) for q in asked if not q.session}
    expected = set()
    for mine in single.values():
        begin = min(deed.time for deed in mine)
        past = any(d.user == mine[0].user and d.kind > 0 and d.time < begin for d in rows)
        if past and any(KINDS[deed.kind] in PURCHASE for deed in mine):
            expected.add((("ann", "bob", "cid")[mine[0].user], begin))
    assert got == expected


@given(ENGAGED, st.integers(0, 3))
@settings(deadline=None)
def test_who_has_only_just_arrived_is_asked_about_the_whole_basket(rows: list[Deed], seed: int) -> None:
    events, groups = events_of(rows), by_basket(rows, 0)
    halved = make_questions(events, WEIGHTS, PURCHASE, 0, seed)
    arrived = make_questions(events, WEIGHTS, PURCHASE, 0, seed, bare=1.0)
    expected = {}
    for mine in groups.values():
        user, begin = mine[0].user, min(deed.time for deed in mine)
        bought = {number(deed.item) for deed in mine if KINDS[deed.kind] in PURCHASE}
        if bought and any(d.user == user and d.kind > 0 and d.time < begin for d in rows):
            expected[("ann", "bob", "cid")[user], begin] = bought
    assert {(q.user_id, q.as_of): set(q.targets.tolist()) for q in arrived if not q.session} == expected
    # Whoever is new is asked about as ever.
    assert {(q.user_id, q.as_of) for q in arrived if q.session} == {
        (q.user_id, q.as_of) for q in halved if (q.user_id, q.as_of) not in expected
    }


@given(ENGAGED, st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_the_same_seed_asks_the_same(rows: list[Deed], seed: int) -> None:
    def told(questions: list[Question]) -> list[tuple[object, ...]]:
        return [(q.user_id, q.as_of, q.session, q.targets.tolist()) for q in questions]

    first, again = (make_questions(events_of(rows), WEIGHTS, PURCHASE, 0, seed) for _ in range(2))
    assert told(first) == told(again)


def test_what_was_bought_at_one_time_is_halved_at_random() -> None:
    rows = [Deed(0, item, 2, HOUR, -1) for item in range(6)]
    halves = [make_questions(events_of(rows), WEIGHTS, PURCHASE, 0, seed)[0].session for seed in range(12)]
    assert len({frozenset(half) for half in halves}) > 5


def test_a_session_is_a_basket_across_midnight_and_two_of_a_day_are_two() -> None:
    rows = [Deed(0, 1, 2, DAY - HOUR, 0), Deed(0, 2, 2, DAY + HOUR, 0), Deed(0, 3, 2, DAY + 2 * HOUR, 1)]
    rows += [Deed(0, 4, 2, DAY + 3 * HOUR, -1), Deed(0, 5, 2, DAY + 4 * HOUR, -1)]
    found = baskets(events_of(rows)).tolist()
    assert found[0] == found[1]
    assert found[3] == found[4]
    assert len({found[0], found[2], found[3]}) == 3


@given(deeds(st.integers(-1, 1), 5), st.integers(0, 3))
@settings(deadline=None, max_examples=200)
def test_a_page_says_what_was_done_with_it_afterwards(rows: list[Deed], hour: int) -> None:
    evening = 21 * HOUR  # so that some sessions go on after midnight
    since = evening + hour * HOUR
    rows = [deed._replace(time=deed.time + evening) for deed in rows]
    # A session is one person's.
    rows = [deed._replace(user=deed.session % 3) if deed.session >= 0 else deed for deed in rows]
    pages, labels, types = make_pages(events_of(rows), WEIGHTS, since, most=1000)
    assert types == ["click", "purchase"]
    expected: dict[tuple[int, int], dict[int, list[float]]] = {}
    for deed in rows:
        if deed.kind == 0 and deed.session >= 0 and deed.time >= since:
            expected.setdefault((deed.session, deed.time), {})[number(deed.item)] = [
                float(
                    any(
                        later.session == deed.session
                        and later.item == deed.item
                        and KINDS[later.kind] == name
                        and deed.time <= later.time < (deed.time // DAY + 1) * DAY
                        for later in rows
                    )
                )
                for name in types
            ]
    found = Counter(
        (q.as_of, q.session, q.user_id, tuple(q.targets.tolist()), tuple(map(tuple, label.tolist())))
        for q, label in zip(pages, labels, strict=True)
    )
    for (session, time), page in expected.items():
        earlier = [
            d
            for d in rows
            if d.session == session and d.kind > 0 and max(since, time // DAY * DAY) <= d.time < time
        ]
        begun = earlier[0].time if earlier else time
        told = tuple((number(d.item), KINDS[d.kind]) for d in earlier)
        rest = (("ann", "bob", "cid")[session % 3], tuple(page), tuple(map(tuple, page.values())))
        found[(time, (), *rest) if (time, (), *rest) in +found else (begun, told, *rest)] -= 1
    assert set(found.values()) <= {0}
    assert [(q.as_of, q.user_id) for q in pages] == sorted((q.as_of, q.user_id) for q in pages)


def test_of_half_the_pages_what_was_done_before_comes_as_the_session() -> None:
    rows = [Deed(0, 0, 1, 0, 0), *(Deed(0, n % 6, 0, (1 + n) * DAY // 1000, 0) for n in range(400))]
    pages, _, _ = make_pages(events_of(rows), WEIGHTS, 0, most=1000)
    told = [page for page in pages if page.session]
    assert {page.session for page in told} == {((number(0), "click"),)}
    assert {page.as_of for page in told} == {0}
    assert 150 < len(told) < 250


def test_at_most_so_many_pages_are_taken_and_none_without_impressions() -> None:
    shown = [Deed(0, n % 6, 0, n * HOUR, n % 4) for n in range(30)]
    some, labels, _ = make_pages(events_of(shown), WEIGHTS, 0, most=7)
    assert (len(some), len(labels)) == (7, 7)
    bought = [deed._replace(kind=2) for deed in shown]
    assert make_pages(events_of(bought), WEIGHTS, 0, most=7) == ([], [], ["click", "purchase"])


def test_an_answer_is_worth_the_strongest_that_was_done_with_it() -> None:
    kinds = {0: [2], 1: [2, 1], 2: [1, 2, 1], 3: [1]}
    rows = [
        Deed(0, item, kind, item * HOUR + n, -1) for item, of in kinds.items() for n, kind in enumerate(of)
    ]
    (question,) = make_questions(events_of(rows), WEIGHTS, EITHER, 0)
    assert {n for n, _ in question.session} == {number(0), number(1)}
    assert dict(zip(question.targets.tolist(), question.grades.tolist(), strict=True)) == {
        number(2): 1.0,
        number(3): 0.25,
    }
