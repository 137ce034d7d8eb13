"""Evaluation queries and page labels equal plain loops over random events."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.dataset import Events
from training.examples.queries import DAY, EvalQuery, baskets, make_eval_queries, make_pages

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
    baskets: dict[tuple[int, int], list[Deed]] = {}
    for deed in rows:
        if deed.kind > 0 and deed.time >= since:
            key = (deed.session, -1) if deed.session >= 0 else (deed.user, deed.time // DAY)
            baskets.setdefault(key, []).append(deed)
    return baskets


ENGAGED = deeds(st.just(-1), 5 * 24)


@given(ENGAGED, st.integers(0, 4 * 24), st.integers(0, 3), TARGETS)
@settings(deadline=None, max_examples=200)
def test_a_query_is_half_a_basket_and_its_targets_are_the_rest(
    rows: list[Deed], hour: int, seed: int, targets: tuple[str, ...]
) -> None:
    since = hour * HOUR
    queries = make_eval_queries(events_of(rows), WEIGHTS, targets, since, seed)
    groups = by_basket(rows, since)
    at = {
        (("ann", "bob", "cid")[deeds[0].user], min(d.time for d in deeds)): deeds for deeds in groups.values()
    }
    assert [(q.as_of, q.user_id) for q in queries] == sorted((q.as_of, q.user_id) for q in queries)
    assert len({(q.user_id, q.as_of) for q in queries}) == len(queries)
    for question in queries:
        assert question.as_of >= since
        deeds = at[question.user_id, question.as_of]
        session_hashes, answer = {n for n, _ in question.session}, question.targets.tolist()
        assert answer == sorted(set(answer))
        assert answer
        assert not session_hashes & set(answer)
        different = {number(deed.item) for deed in deeds}
        assert len(session_hashes) == ((len(different) + 1) // 2 if len(different) > 1 else 0)
        purchases = {number(deed.item) for deed in deeds if KINDS[deed.kind] in targets}
        assert set(answer) <= purchases
        interactions = {(number(deed.item), KINDS[deed.kind]) for deed in deeds}
        assert set(question.session) <= interactions
        # In time: nothing of the session comes after anything that is an answer began.
        first = {n: min(d.time for d in deeds if number(d.item) == n) for n in different}
        assert all(first[s] <= first[rest] for s in session_hashes for rest in different - session_hashes)
        # Everything bought that was not in the session is an answer.
        assert set(answer) == purchases - session_hashes
        worth = {d: [WEIGHTS[KINDS[x.kind]] for x in deeds if number(x.item) == d] for d in answer}
        assert question.grades.tolist() == [
            max(w for w in worth[n] if w in {WEIGHTS[t] for t in targets}) for n in answer
        ]
    query_keys = {(q.user_id, q.as_of) for q in queries}
    for key, deeds in at.items():
        if key in query_keys:
            continue
        past = [d for d in rows if d.user == deeds[0].user and d.kind > 0 and d.time < key[1]]
        different = {deed.item for deed in deeds}
        if len(different) == 1:
            assert not past or all(KINDS[deed.kind] not in targets for deed in deeds)


@given(ENGAGED, st.integers(0, 3))
@settings(deadline=None)
def test_single_item_baskets_become_queries_only_with_a_history(rows: list[Deed], seed: int) -> None:
    single = {
        key: deeds for key, deeds in by_basket(rows, 0).items() if len({deed.item for deed in deeds}) == 1
    }
    queries = make_eval_queries(events_of(rows), WEIGHTS, PURCHASE, 0, seed)
    query_keys = {(q.user_id, q.as_of) for q in queries if not q.session}
    expected = set()
    for deeds in single.values():
        begin = min(deed.time for deed in deeds)
        past = any(d.user == deeds[0].user and d.kind > 0 and d.time < begin for d in rows)
        if past and any(KINDS[deed.kind] in PURCHASE for deed in deeds):
            expected.add((("ann", "bob", "cid")[deeds[0].user], begin))
    assert query_keys == expected


@given(ENGAGED, st.integers(0, 3))
@settings(deadline=None)
def test_without_a_session_a_query_targets_the_whole_basket(rows: list[Deed], seed: int) -> None:
    events, groups = events_of(rows), by_basket(rows, 0)
    with_sessions = make_eval_queries(events, WEIGHTS, PURCHASE, 0, seed)
    without_sessions = make_eval_queries(events, WEIGHTS, PURCHASE, 0, seed, no_session_share=1.0)
    expected = {}
    for deeds in groups.values():
        user, begin = deeds[0].user, min(deed.time for deed in deeds)
        purchases = {number(deed.item) for deed in deeds if KINDS[deed.kind] in PURCHASE}
        if purchases and any(d.user == user and d.kind > 0 and d.time < begin for d in rows):
            expected[("ann", "bob", "cid")[user], begin] = purchases
    assert {
        (q.user_id, q.as_of): set(q.targets.tolist()) for q in without_sessions if not q.session
    } == expected
    # Whoever is new is asked about as ever.
    assert {(q.user_id, q.as_of) for q in without_sessions if q.session} == {
        (q.user_id, q.as_of) for q in with_sessions if (q.user_id, q.as_of) not in expected
    }


@given(ENGAGED, st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_the_same_seed_gives_the_same_queries(rows: list[Deed], seed: int) -> None:
    def keys_of(questions: list[EvalQuery]) -> list[tuple[object, ...]]:
        return [(q.user_id, q.as_of, q.session, q.targets.tolist()) for q in questions]

    first, again = (make_eval_queries(events_of(rows), WEIGHTS, PURCHASE, 0, seed) for _ in range(2))
    assert keys_of(first) == keys_of(again)


def test_simultaneous_purchases_are_split_at_random() -> None:
    rows = [Deed(0, item, 2, HOUR, -1) for item in range(6)]
    halves = [make_eval_queries(events_of(rows), WEIGHTS, PURCHASE, 0, seed)[0].session for seed in range(12)]
    assert len({frozenset(half) for half in halves}) > 5


def test_sessions_are_baskets_across_midnight_and_within_a_day() -> None:
    rows = [Deed(0, 1, 2, DAY - HOUR, 0), Deed(0, 2, 2, DAY + HOUR, 0), Deed(0, 3, 2, DAY + 2 * HOUR, 1)]
    rows += [Deed(0, 4, 2, DAY + 3 * HOUR, -1), Deed(0, 5, 2, DAY + 4 * HOUR, -1)]
    basket_numbers = baskets(events_of(rows)).tolist()
    assert basket_numbers[0] == basket_numbers[1]
    assert basket_numbers[3] == basket_numbers[4]
    assert len({basket_numbers[0], basket_numbers[2], basket_numbers[3]}) == 3


@given(deeds(st.integers(-1, 1), 5), st.integers(0, 3))
@settings(deadline=None, max_examples=200)
def test_a_page_is_labeled_by_later_interactions(rows: list[Deed], hour: int) -> None:
    evening = 21 * HOUR  # so that some sessions go on after midnight
    since = evening + hour * HOUR
    rows = [deed._replace(time=deed.time + evening) for deed in rows]
    # A session is one person's.
    rows = [deed._replace(user=deed.session % 3) if deed.session >= 0 else deed for deed in rows]
    pages, labels, types = make_pages(events_of(rows), WEIGHTS, since, max_pages=1000)
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
    page_counts = Counter(
        (q.as_of, q.session, q.user_id, tuple(q.targets.tolist()), tuple(map(tuple, label.tolist())))
        for q, label in zip(pages, labels, strict=True)
    )
    for (session, time), page in expected.items():
        earlier = [
            d
            for d in rows
            if d.session == session and d.kind > 0 and max(since, time // DAY * DAY) <= d.time < time
        ]
        start = earlier[0].time if earlier else time
        expected_session = tuple((number(d.item), KINDS[d.kind]) for d in earlier)
        rest = (("ann", "bob", "cid")[session % 3], tuple(page), tuple(map(tuple, page.values())))
        page_counts[
            (time, (), *rest) if (time, (), *rest) in +page_counts else (start, expected_session, *rest)
        ] -= 1
    assert set(page_counts.values()) <= {0}
    for page_query in pages:  # in the order of their places
        assert len(page_query.positions) == len(page_query.targets)
        assert (np.diff(page_query.positions) > 0).all()
    assert [(q.as_of, q.user_id) for q in pages] == sorted((q.as_of, q.user_id) for q in pages)


def test_half_of_the_pages_have_the_earlier_interactions_as_session() -> None:
    rows = [Deed(0, 0, 1, 0, 0), *(Deed(0, n % 6, 0, (1 + n) * DAY // 1000, 0) for n in range(400))]
    pages, _, _ = make_pages(events_of(rows), WEIGHTS, 0, max_pages=1000)
    with_session = [page for page in pages if page.session]
    assert {page.session for page in with_session} == {((number(0), "click"),)}
    assert {page.as_of for page in with_session} == {0}
    assert 150 < len(with_session) < 250


def test_pages_are_limited_and_need_impressions() -> None:
    impressions = [Deed(0, n % 6, 0, n * HOUR, n % 4) for n in range(30)]
    some, labels, _ = make_pages(events_of(impressions), WEIGHTS, 0, max_pages=7)
    assert (len(some), len(labels)) == (7, 7)
    purchases = [deed._replace(kind=2) for deed in impressions]
    assert make_pages(events_of(purchases), WEIGHTS, 0, max_pages=7) == ([], [], ["click", "purchase"])


def test_a_target_has_the_weight_of_its_strongest_interaction() -> None:
    kinds = {0: [2], 1: [2, 1], 2: [1, 2, 1], 3: [1]}
    rows = [
        Deed(0, item, kind, item * HOUR + n, -1) for item, of in kinds.items() for n, kind in enumerate(of)
    ]
    (question,) = make_eval_queries(events_of(rows), WEIGHTS, EITHER, 0)
    assert {n for n, _ in question.session} == {number(0), number(1)}
    assert dict(zip(question.targets.tolist(), question.grades.tolist(), strict=True)) == {
        number(2): 1.0,
        number(3): 0.25,
    }
