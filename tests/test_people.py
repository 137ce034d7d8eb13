"""Profiles against a plain count of the same events, and over the real services."""

import itertools
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog import item_number
from services.item_table import ItemTable
from services.ranking.moment import DAY, moment
from services.ranking.people import Buyers, Rfm, UserProfile, profile, segment
from services.ranking.state import BehaviourState, Columns
from tests.recommending import Shop, purchase, violations
from tests.shops import EVENT_TYPES, PER_WORLD, UNTIL, items, make_bundle

TABLE = ItemTable.of(items(), {}, {}, [UNTIL] * (2 * PER_WORLD))
TARGETS = np.array([list(EVENT_TYPES).index("purchase")])
NOW = 400 * DAY
deeds = st.lists(
    st.tuples(
        st.integers(1, 4),  # who
        st.integers(0, 2 * PER_WORLD - 1),  # which item
        st.integers(0, len(EVENT_TYPES) - 1),
        st.integers(0, 399),  # the day
        st.none() | st.floats(0.5, 50),
    ),
    max_size=40,
)


def profiled(done: list[tuple[int, int, int, int, float | None]]) -> dict[int, UserProfile]:
    state = BehaviourState(EVENT_TYPES)
    done = sorted(done, key=lambda deed: deed[3])
    when = np.array([day for *_, day, _ in done], np.int64) * DAY
    columns = Columns(
        user=np.array([who for who, *_ in done], np.int64),
        number=np.array([item_number(items()[item].id) for _, item, *_ in done], np.int64),
        kind=np.array([kind for _, _, kind, *_ in done], np.int16),
        channel=np.full(len(done), -1, np.int16),
        occurred=when,
        recorded=when,
        price=np.array([np.nan if price is None else price for *_, price in done], np.float64),
        quantity=np.full(len(done), 2),
        sequence=np.arange(1, len(done) + 1),
    )
    state.append(columns, {("user", str(who)): who for who in range(1, 5)})
    now = moment(state, TABLE, NOW)
    buyers = Buyers.of(state.all(), TARGETS, NOW)
    return {
        who: profile(
            state.everything(str(who), "", NOW, 1000),
            state,
            TABLE,
            now,
            NOW,
            ("world", "colour"),
            TARGETS,
            buyers,
        )
        for who in range(1, 6)
    }


@given(deeds)
@settings(max_examples=80, deadline=None)
def test_profiles_are_what_a_plain_count_says(done: list[tuple[int, int, int, int, float | None]]) -> None:
    found = profiled(done)
    weights = list(EVENT_TYPES.values())
    bought = defaultdict(set)
    for who, _, kind, day, _ in done:
        if kind in TARGETS:
            bought[who].add(day)
    for who in range(1, 6):
        mine = [deed for deed in done if deed[0] == who]
        worth: dict[tuple[str, str], float] = defaultdict(float)
        for _, item, kind, day, _ in mine:
            weight = weights[kind] * 0.5 ** ((400 - day) / 30)
            for attribute in items()[item].attributes:
                worth[attribute.name, attribute.texts[0]] += weight
        for name in ("world", "colour"):
            total = sum(value for (attribute, _), value in worth.items() if attribute == name)
            wanted = {text: value / total for (a, text), value in worth.items() if a == name and value > 0}
            told = {a.text: a.share for a in found[who].affinities if a.attribute == name}
            assert told == pytest.approx(wanted, rel=1e-6)
        assert sum(one.items for one in found[who].activity) == len(mine)
        assert found[who].active_days == len({day for *_, day, _ in mine if day > 370})
        rfm = found[who].rfm
        assert (rfm is None) == (who not in bought)
        if rfm is not None:
            assert rfm.frequency == len(bought[who])
            assert rfm.recency == pytest.approx(400 - max(bought[who]))
            paid = [price or 0 for w, _, kind, _, price in mine if kind in TARGETS]
            assert rfm.monetary == pytest.approx(2 * sum(paid))
            assert all(score in range(1, 6) for score in rfm.scores)
        else:
            assert found[who].segment == ("prospect" if mine else "stranger")

    ranked = [one.rfm for one in found.values() if one.rfm is not None]
    for one, other in itertools.permutations(ranked, 2):
        for at, better in enumerate(
            (one.recency < other.recency, one.frequency > other.frequency, one.monetary > other.monetary)
        ):
            assert not better or one.scores[at] > other.scores[at]


def test_equal_buyers_are_in_the_middle_and_the_latest_is_above_who_was_counted_before() -> None:
    equal = profiled([(who, who, 2, 300, 10.0) for who in range(1, 5)])
    assert {one.rfm.scores for one in equal.values() if one.rfm} == {(3, 3, 3)}
    state = BehaviourState(EVENT_TYPES)
    columns = Columns(
        user=np.array([1, 2]),
        number=np.array([item_number("garden-00")] * 2),
        kind=np.array([2, 2], np.int16),
        channel=np.full(2, -1, np.int16),
        occurred=np.array([NOW - DAY, NOW + 60_000_000]),
        recorded=np.array([NOW - DAY, NOW + 60_000_000]),
        price=np.array([1.0, 2.0]),
        quantity=np.ones(2, np.int64),
        sequence=np.array([1, 2]),
    )
    state.append(columns, {("user", "1"): 1, ("user", "2"): 2})
    buyers, later = Buyers.of(state.all(), TARGETS, NOW), NOW + 120_000_000
    known = state, TABLE, moment(state, TABLE, NOW), later, ("world",), TARGETS, buyers
    found = [profile(state.everything(who, "", later, 9), *known).rfm for who in ("1", "2")]
    assert [rfm.scores[0] for rfm in found if rfm] == [3, 4]


def test_segments_follow_recency_and_frequency() -> None:
    def named(recency: int, frequency: int, days: int = 3) -> str:
        return segment(Rfm(1.0, days, 1.0, (recency, frequency, 3)), seen=True)

    assert named(5, 5) == "champion"
    assert named(5, 2, days=1) == "new"
    assert named(4, 2) == "loyal"
    assert named(3, 3) == "loyal"
    assert named(3, 1) == "promising"
    assert named(1, 5) == "cannot_lose"
    assert named(2, 4) == "at_risk"
    assert named(2, 2) == "sleeping"
    assert named(1, 1) == "lost"
    every = {named(r, f) for r in range(1, 6) for f in range(1, 6)}
    assert len(every) == 7


def test_what_somebody_favours_has_a_lift_and_much_of_it_a_higher_one() -> None:
    often = [(1, item, 2, 390, None) for item in range(8)]
    once = [(2, 0, 2, 390, None)]
    rest = [(3, item, 2, 100, None) for item in range(2 * PER_WORLD)]
    found = profiled([*often, *once, *rest])
    lifts = {who: {a.text: a.lift for a in found[who].affinities}["garden"] for who in (1, 2, 3)}
    assert lifts[1] > lifts[2] > lifts[3]
    assert lifts[3] < 1.3


def test_a_profile_over_grpc(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "shop")

    async def body(stub: Any) -> None:
        events = [purchase(f"e{n}", "ann", f"garden-{n:02}") for n in range(3)]
        events += [purchase("e9", "ann", "kitchen-19", kind="click"), purchase("b", "bob", "kitchen-01")]
        for event in events:
            event.channel = "web"
            event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(hours=2))
        await stub.WriteEvents(pb.WriteEventsRequest(events=events))
        found = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
        assert list(found.user_ids) == ["ann"]
        first = found.affinities[0]
        assert (first.attribute, first.text) == ("world", "garden")
        assert first.share == pytest.approx(3 / 3.3)
        assert found.price.band == "low"
        assert {a.type: a.items for a in found.activity} == {"purchase": 3, "click": 1}
        assert found.active_days in (1, 2)
        assert found.rfm.frequency in (1, 2)
        assert [(c.channel, c.share) for c in found.channels] == [("web", 1.0)]
        stranger = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="nobody"))).profile
        assert (stranger.segment, len(stranger.affinities)) == ("stranger", 0)
        assert not stranger.HasField("price")
        assert await violations(stub.GetUserProfile(pb.GetUserProfileRequest())) == ["user_id"]
        await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann"))
        gone = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
        assert gone == stranger

    for layout in ("one", "three"):
        Shop(bundle, tmp_path / layout, layout, clock=None).run(body)
