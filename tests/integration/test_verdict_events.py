"""The verdict on a shop's events: times, types, users and returns."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from services.core.errors import FailedPrecondition
from tests.support.shop_files import LAST, TOML, events, items, judge, refusal, rename_column, write
from training.data.dataset import read_shop, survey_shop
from training.data.inspection.verdict import Verdict, assess_shop


def test_undeclared_event_types_are_refused_with_counts(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, items(), events(), toml=None))
    assert "events.csv: 900 of 1,200 rows are lost (75%)" in message
    assert "'view' (600), 'cart' (300)" in message
    assert "write view = 0.2, cart = 0.5, purchase = 1.0 under [event_types]" in message
    shop = survey_shop(tmp_path)
    assess_shop(shop).require(allow_losses=True)
    assert len(shop.events) == 300


def test_event_types_that_differ_in_case_are_accepted_and_noted(tmp_path: Path) -> None:
    rows = [row | {"type": row["type"].upper()} for row in events()]
    shop, verdict = judge(write(tmp_path, items(), rows))
    assert len(shop.events) == 1200
    assert not verdict.reasons
    assert any("'VIEW' (600 rows) is read as 'view'" in note for note in shop.reports["events"].notes)


def test_a_type_column_of_another_name_is_refused_with_its_name(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, items(), rename_column(events(), "type", "event_type")))
    assert 'write type = "event_type" under [events]' in message.replace("Write", "write")
    (tmp_path / "shop.toml").write_text(TOML + '[events]\ntype = ""\n')
    assert set(survey_shop(tmp_path).events.kind.tolist()) == {2}


def test_an_event_of_2037_is_dropped_and_sets_no_last_day(tmp_path: Path) -> None:
    rows = events()
    rows[100]["time"] = "2037-05-01T00:00:00Z"
    rows[200]["time"] = "1970-01-01"
    shop, verdict = judge(write(tmp_path, items(), rows))
    assert len(shop.events) == 1198
    assert shop.events.time.max() < LAST.timestamp() * 1e6
    assert not verdict.reasons
    (warning,) = verdict.warnings
    assert "line 102, line 202" in warning
    assert "2037-05-01T00:00:00Z" in warning


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_every_unit_of_time_gives_the_same_shop(unit: int, tmp_path: Path) -> None:
    plain = events()
    seconds = [
        row | {"time": int(datetime.fromisoformat(row["time"]).timestamp() * unit)} for row in events()
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = (
        read_shop(write(tmp_path / "a", items(), plain)),
        read_shop(write(tmp_path / "b", items(), seconds)),
    )
    assert one.events.time.tolist() == other.events.time.tolist()


def test_ambiguous_dates_are_refused_until_the_format_is_set(tmp_path: Path) -> None:
    rows = events(time=lambda n: f"{n % 12 + 1:02}/{n // 120 + 1:02}/2026 10:00")
    message = refusal(write(tmp_path, items(), rows))
    assert "day and month may be in either order: 1,200" in message
    assert "'01/01/2026 10:00'" in message
    assert 'write time_format = "%d/%m/%Y %H:%M" or "%m/%d/%Y %H:%M" under [events]' in message
    (tmp_path / "shop.toml").write_text(TOML + '[events]\ntime_format = "%d/%m/%Y %H:%M"\n')
    assert len(read_shop(tmp_path).events) == 1200


def test_unreadable_times_show_an_example_and_the_formats(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, items(), events(time=lambda n: "Nov 12th, 2026")))
    assert "'Nov 12th, 2026'" in message
    assert "ISO 8601" in message
    assert "time_format" in message
    with pytest.raises(FailedPrecondition, match="Nov 12th"):
        read_shop(tmp_path)


def test_sparse_last_days_are_refused_with_a_cutoff(tmp_path: Path) -> None:
    rows = [*events(), {"user_id": "u1", "item_id": "sku-001", "type": "view", "time": "2026-11-28T10:00:00"}]
    rows = [row for row in rows if row["time"] < "2026-11-20" or row["time"] > "2026-11-28"]
    message = refusal(write(tmp_path, items(), rows))
    assert "the last 2 days, up to 2026-11-28, have 1 events" in message
    assert "--until 2026-11-20 leaves them out" in message
    shop = survey_shop(tmp_path, until=datetime(2026, 11, 20, tzinfo=UTC))
    assert not assess_shop(shop).reasons


def test_a_quiet_last_day_of_a_shop_with_busy_evenings_is_no_gap(tmp_path: Path) -> None:
    """An evening of sixty events every seventh day, and three events on the last day."""
    start = datetime(2026, 1, 1, 20, tzinfo=UTC)
    times = [start + timedelta(days=7 * week, seconds=n) for week in range(20) for n in range(60)]
    times += [start + timedelta(days=7 * 20, seconds=n) for n in range(3)]
    rows = [
        {"user_id": f"u{n % 50}", "item_id": f"sku-{n % 40:03}", "type": "view", "time": time.isoformat()}
        for n, time in enumerate(times)
    ]
    _, verdict = judge(write(tmp_path, items(), rows))
    assert not verdict.reasons
    assert not [warning for warning in verdict.warnings if "the last 2 days" in warning]


def test_a_user_id_null_is_no_user(tmp_path: Path) -> None:
    rows = events(user_id=lambda n: ("NULL", "\\N", f"u{n % 50}", f"u{n % 40}", "u1")[n % 5])
    shop, verdict = judge(write(tmp_path, items(), rows))
    assert len(shop.events) == 720
    assert not {"NULL", "\\N"} & {shop.events.user_ids[user] for user in shop.events.user}
    assert any("480 of 1,200 rows are lost: no user" in warning for warning in verdict.warnings)


def test_a_user_with_a_large_share_is_reported_and_can_be_excluded(tmp_path: Path) -> None:
    rows = events(user_id=lambda n: "0" if n % 2 else f"u{n % 50}")
    _, verdict = judge(write(tmp_path, items(), rows))
    assert any('write guests = ["0"] under [events]' in warning for warning in verdict.warnings)
    (tmp_path / "shop.toml").write_text(TOML + '[events]\nguests = ["0"]\n')
    assert len(read_shop(tmp_path).events) == 600


def test_cancellations_and_returns_are_no_purchases(tmp_path: Path) -> None:
    rows = events(
        quantity=lambda n: -2 if n % 8 == 3 else 0 if n % 4 == 0 else 1,
        session_id=lambda n: f"C{n}" if n % 16 == 7 else str(n),
    )
    shop, _ = judge(write(tmp_path, items(), rows))
    reasons = shop.reports["events"].reasons
    assert reasons["note: a cancellation or return, not a purchase"] == 150 + 75
    assert len(shop.events) == 1200 - 225  # a view of quantity 0 stays one


@pytest.mark.parametrize("negative", ["-9.5", "(9.50)", "9.50-"])
def test_a_purchase_of_a_negative_price_is_a_return(negative: str, tmp_path: Path) -> None:
    rows = events(price=lambda n: negative if n % 8 in (2, 3) else "9.50")
    reasons = judge(write(tmp_path, items(), rows))[0].reports["events"].reasons
    assert reasons["note: a cancellation or return, not a purchase"] == 150
    assert reasons["value dropped: price is negative"] == 150  # of carts, which stay


@pytest.mark.parametrize("text", ["%d.%m.%Y", "%d/%m/%Y %H:%M", "%m-%d-%Y, %H:%M:%S", "%m/%d/%Y %I:%M %p"])
def test_following_the_advice_on_times_loses_no_event(text: str, tmp_path: Path) -> None:
    def time(n: int) -> str:
        return (LAST - timedelta(minutes=20 * (1200 - n))).strftime(text)

    _, verdict = judge(write(tmp_path, items(), events(time=time)))
    advice = re.search(
        r'write (time_format = ".*?" under \[events\])', " ".join([*verdict.warnings, *verdict.reasons])
    )
    assert advice
    line, section = advice[1].split(" under ")
    (tmp_path / "shop.toml").write_text(f"{TOML}{section}\n{line}\n")
    shop, verdict = judge(tmp_path)
    assert len(shop.events) == 1200
    assert not verdict.reasons


def test_a_time_of_zeros_is_missing(tmp_path: Path) -> None:
    rows = events(time=lambda n: "0000-00-00 00:00:00" if n == 7 else (LAST - timedelta(hours=n)).isoformat())
    goods = [row | {"available_until": "0000-00-00 00:00:00"} for row in items()]
    shop, _ = judge(write(tmp_path, goods, rows))
    assert shop.reports["events"].reasons["time: no value"] == 1
    assert len(shop.events) == 1199
    assert all(item.available_until is None for item in shop.items)
    assert not [reason for reason in shop.reports["items"].reasons if reason.startswith("value")]


@pytest.mark.parametrize("blank", ["", "  "])
def test_an_event_without_a_type_is_lost_unless_there_is_a_default(blank: str, tmp_path: Path) -> None:
    rows = events(type=lambda n: blank if n % 4 == 0 else "view")
    shop, verdict = judge(write(tmp_path, items(), rows))
    assert shop.reports["events"].reasons["no event type"] == 300
    assert any("300 of 1,200 rows are lost: no event type" in warning for warning in verdict.warnings)
    assert any('default_type = "purchase"' in warning for warning in verdict.warnings)
    (tmp_path / "shop.toml").write_text(TOML + '[events]\ndefault_type = "cart"\n')
    assert np.bincount(survey_shop(tmp_path).events.kind).tolist() == [900, 300]


def test_a_shop_needs_no_type_called_purchase(tmp_path: Path) -> None:
    rows = events(type=lambda n: "view" if n % 4 else "buy")
    shop, verdict = judge(write(tmp_path, items(), rows, "[event_types]\nview = 0.2\nbuy = 1.0\n"))
    assert not verdict.reasons
    assert np.bincount(shop.events.kind).tolist() == [900, 300]
    typeless_rows = [{name: value for name, value in row.items() if name != "type"} for row in events()]
    message = refusal(write(tmp_path, items(), typeless_rows, "[event_types]\nview = 0.2\nbuy = 1.0\n"))
    assert "without it the type of every event is 'buy'" in message
    (tmp_path / "shop.toml").write_text('[events]\ntype = ""\n[event_types]\nview = 0.2\nbuy = 1.0\n')
    assert set(survey_shop(tmp_path).events.kind.tolist()) == {1}


@pytest.mark.parametrize("name", ["refund", "order_returned", "Cancelled order"])
def test_a_reversed_purchase_is_no_interest(name: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, items(), events(type=lambda n: name if n % 3 else "purchase")))
    assert f"{name} = 0.0" in message.replace('"', "")


def test_lines_of_one_order_are_separate_events(tmp_path: Path) -> None:
    rows = events(event_id=lambda n: f"order-{n // 3}")
    shop, verdict = judge(write(tmp_path, items(), rows))
    assert verdict == Verdict()
    assert len(shop.events) == len(set(shop.events.event_ids)) == 1200
    assert set(survey_shop(tmp_path).events.event_ids) == set(shop.events.event_ids)
    assert any("event_id: 800 rows" in note for note in shop.reports["events"].notes)
    shop, verdict = judge(write(tmp_path, items(), [*rows, rows[0]]))
    assert len(shop.events) == 1200
    assert any('write event_id = "" under [events]' in warning for warning in verdict.warnings)


def test_a_lost_row_does_not_drop_others_with_its_event_id(tmp_path: Path) -> None:
    twins = [row | {"event_id": f"e{n}", "type": kind}
             for n, row in enumerate(events(300)) for kind in ("page", "view")]  # fmt: skip
    shop, _ = judge(write(tmp_path, items(), twins))
    assert len(shop.events) == 300
    late = [
        row | {"event_id": f"e{n % 600}", "item_id": "sku-001", "type": "view"}
        for n, row in enumerate(events())
    ]
    write(tmp_path, items(), late[::-1])
    until = datetime.fromisoformat(late[600]["time"])
    assert len(survey_shop(tmp_path, until=until).events) == 600
