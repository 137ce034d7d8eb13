"""User profiles equal a plain count of events, also over the real services."""

import itertools
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog.item_table import ItemTable
from services.catalog.items import item_hash
from services.ranking.state.event_columns import EventColumns, EventState
from services.ranking.state.item_stats import DAY, item_stats
from services.ranking.users.profiles import Rfm, RfmReference, UserProfile, profile, segment
from tests.support.shop_server import Shop, purchase, violations
from tests.support.shops import EVENT_TYPES, PER_WORLD, UNTIL, items, make_bundle

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


def profiles_of(deeds: list[tuple[int, int, int, int, float | None]]) -> dict[int, UserProfile]:
    state = EventState(EVENT_TYPES)
    deeds = sorted(deeds, key=lambda deed: deed[3])
    when = np.array([day for *_, day, _ in deeds], np.int64) * DAY
    columns = EventColumns(
        user=np.array([who for who, *_ in deeds], np.int64),
        item_hash=np.array([item_hash(items()[item].id) for _, item, *_ in deeds], np.int64),
        kind=np.array([kind for _, _, kind, *_ in deeds], np.int16),
        channel=np.full(len(deeds), -1, np.int16),
        occurred=when,
        recorded=when,
        price=np.array([np.nan if price is None else price for *_, price in deeds], np.float64),
        quantity=np.full(len(deeds), 2),
        sequence=np.arange(1, len(deeds) + 1),
    )
    state.append(columns, {("user", str(who)): who for who in range(1, 5)})
    now = item_stats(state, TABLE, NOW)
    buyers = RfmReference.of(state.all(), TARGETS, NOW)
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
def test_profiles_equal_a_plain_count(events: list[tuple[int, int, int, int, float | None]]) -> None:
    profiles = profiles_of(events)
    weights = list(EVENT_TYPES.values())
    purchases = defaultdict(set)
    for who, _, kind, day, _ in events:
        if kind in TARGETS:
            purchases[who].add(day)
    for who in range(1, 6):
        own_deeds = [deed for deed in events if deed[0] == who]
        worth: dict[tuple[str, str], float] = defaultdict(float)
        for _, item, kind, day, _ in own_deeds:
            weight = weights[kind] * 0.5 ** ((400 - day) / 30)
            for attribute in items()[item].attributes:
                worth[attribute.name, attribute.texts[0]] += weight
        for name in ("world", "colour"):
            total = sum(value for (attribute, _), value in worth.items() if attribute == name)
            expected = {text: value / total for (a, text), value in worth.items() if a == name and value > 0}
            shares = {a.text: a.share for a in profiles[who].affinities if a.attribute == name}
            assert shares == pytest.approx(expected, rel=1e-6)
        assert sum(one.items for one in profiles[who].activity) == len(own_deeds)
        assert profiles[who].active_days == len({day for *_, day, _ in own_deeds if day > 370})
        rfm = profiles[who].rfm
        assert (rfm is None) == (who not in purchases)
        if rfm is not None:
            assert rfm.frequency == len(purchases[who])
            assert rfm.recency == pytest.approx(400 - max(purchases[who]))
            paid = [price or 0 for w, _, kind, _, price in own_deeds if kind in TARGETS]
            assert rfm.monetary == pytest.approx(2 * sum(paid))
            assert all(score in range(1, 6) for score in rfm.scores)
        else:
            assert profiles[who].segment == ("prospect" if own_deeds else "unknown")

    scores = [one.rfm for one in profiles.values() if one.rfm is not None]
    for one, other in itertools.permutations(scores, 2):
        for at, better in enumerate(
            (one.recency < other.recency, one.frequency > other.frequency, one.monetary > other.monetary)
        ):
            assert not better or one.scores[at] > other.scores[at]


def test_equal_buyers_score_in_the_middle_and_later_ones_above_earlier() -> None:
    equal = profiles_of([(who, who, 2, 300, 10.0) for who in range(1, 5)])
    assert {one.rfm.scores for one in equal.values() if one.rfm} == {(3, 3, 3)}
    state = EventState(EVENT_TYPES)
    columns = EventColumns(
        user=np.array([1, 2]),
        item_hash=np.array([item_hash("garden-00")] * 2),
        kind=np.array([2, 2], np.int16),
        channel=np.full(2, -1, np.int16),
        occurred=np.array([NOW - DAY, NOW + 60_000_000]),
        recorded=np.array([NOW - DAY, NOW + 60_000_000]),
        price=np.array([1.0, 2.0]),
        quantity=np.ones(2, np.int64),
        sequence=np.array([1, 2]),
    )
    state.append(columns, {("user", "1"): 1, ("user", "2"): 2})
    buyers, later = RfmReference.of(state.all(), TARGETS, NOW), NOW + 120_000_000
    context = state, TABLE, item_stats(state, TABLE, NOW), later, ("world",), TARGETS, buyers
    scores = [profile(state.everything(who, "", later, 9), *context).rfm for who in ("1", "2")]
    assert [rfm.scores[0] for rfm in scores if rfm] == [3, 4]


def test_segments_follow_recency_and_frequency() -> None:
    def segment_of(recency: int, frequency: int, days: int = 3) -> str:
        return segment(Rfm(1.0, days, 1.0, (recency, frequency, 3)), has_events=True)

    assert segment_of(5, 5) == "champion"
    assert segment_of(5, 2, days=1) == "new"
    assert segment_of(4, 2) == "loyal"
    assert segment_of(3, 3) == "loyal"
    assert segment_of(3, 1) == "promising"
    assert segment_of(1, 5) == "cannot_lose"
    assert segment_of(2, 4) == "at_risk"
    assert segment_of(2, 2) == "sleeping"
    assert segment_of(1, 1) == "lost"
    every = {segment_of(r, f) for r in range(1, 6) for f in range(1, 6)}
    assert len(every) == 7


def test_favored_attributes_have_a_lift_that_grows_with_use() -> None:
    often = [(1, item, 2, 390, None) for item in range(8)]
    once = [(2, 0, 2, 390, None)]
    rest = [(3, item, 2, 100, None) for item in range(2 * PER_WORLD)]
    profiles = profiles_of([*often, *once, *rest])
    lifts = {who: {a.text: a.lift for a in profiles[who].affinities}["garden"] for who in (1, 2, 3)}
    assert lifts[1] > lifts[2] > lifts[3]
    assert lifts[3] < 1.3


async def test_a_profile_is_served_over_grpc(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "shop")

    for layout in ("one", "three"):
        async with Shop(bundle, tmp_path / layout, layout, clock=None).serve() as stub:
            events = [purchase(f"e{n}", "ann", f"garden-{n:02}") for n in range(3)]
            events += [purchase("e9", "ann", "kitchen-19", kind="click"), purchase("b", "bob", "kitchen-01")]
            for event in events:
                event.channel = "web"
                event.occurred_at.FromDatetime(datetime.now(UTC) - timedelta(hours=2))
            await stub.WriteEvents(pb.WriteEventsRequest(events=events))
            user_profile = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
            assert list(user_profile.user_ids) == ["ann"]
            first = user_profile.affinities[0]
            assert (first.attribute, first.text) == ("world", "garden")
            assert first.share == pytest.approx(3 / 3.3)
            assert user_profile.price.band == "low"
            assert {a.type: a.items for a in user_profile.activity} == {"purchase": 3, "click": 1}
            assert user_profile.active_days in (1, 2)
            assert user_profile.rfm.frequency in (1, 2)
            assert [(c.channel, c.share) for c in user_profile.channels] == [("web", 1.0)]
            anonymous = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="nobody"))).profile
            assert (anonymous.segment, len(anonymous.affinities)) == ("unknown", 0)
            assert not anonymous.HasField("price")
            assert await violations(stub.GetUserProfile(pb.GetUserProfileRequest())) == ["user_id"]
            await stub.DeleteUser(pb.DeleteUserRequest(user_id="ann"))
            profile_after = (await stub.GetUserProfile(pb.GetUserProfileRequest(user_id="ann"))).profile
            assert profile_after == anonymous
