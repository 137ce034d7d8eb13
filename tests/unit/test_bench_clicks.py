"""The benchmark of logged pages: metrics by hand, times of publication, recent click rates."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench.clicks.baselines import baseline_scores
from bench.clicks.logs import ClickLog, Page, Period, Read, by_rising_id
from bench.clicks.scoring import per_page
from bench.clicks.shops import write_events

START = datetime(2023, 5, 18, 7, tzinfo=UTC)


def page(number: int, hours: float, shown: str, clicked: str) -> Page:
    return Page(str(number), "u", START + timedelta(hours=hours), tuple(shown), frozenset(clicked))


def test_metrics_equal_those_by_hand() -> None:
    pages = [page(0, 0, "abcd", "c"), page(1, 0, "abcd", "ab")]
    figures = per_page([np.array([3.0, 1, 2, 0]), np.array([5.0, 1, 1, 0])], pages)
    assert figures["auc"].tolist() == pytest.approx([2 / 3, 3.5 / 4])
    assert figures["mrr"][0] == pytest.approx(1 / 2)
    assert figures["ndcg@5"][0] == figures["ndcg@10"][0] == pytest.approx(1 / np.log2(3))
    assert figures["mrr"][1] in (pytest.approx((1 + 1 / 2) / 2), pytest.approx((1 + 1 / 3) / 2))  # a tie


def test_an_item_is_no_younger_than_one_with_a_higher_id() -> None:
    times = {"9": START, "10": START + timedelta(hours=5), "11": START + timedelta(hours=2)}
    published = by_rising_id(times)
    assert published == {"9": START, "10": START + timedelta(hours=2), "11": START + timedelta(hours=2)}


def test_recent_click_rates_know_earlier_pages_only() -> None:
    pages = [page(0, 0, "12", "1"), page(1, 7, "12", "2"), page(2, 8, "12", "1"), page(3, 8, "12", "1")]
    period = Period(pages[2].time, pages[3].time + timedelta(hours=1))
    log = ClickLog({}, [], [], pages, {"val": period})
    rates = baseline_scores("ebnerd", log, period, pages[2:])["click rate of the last six hours"]
    for rate in rates:  # of the page an hour earlier: neither the first nor one at the same time counts
        np.testing.assert_allclose(rate, [10 / 2 / 11, (1 + 10 / 2) / 11])


def test_a_click_follows_its_page_in_the_same_session(tmp_path: Path) -> None:
    read = Read("u", "b", START - timedelta(days=1))
    write_events(tmp_path / "events.parquet", [read], [page(7, 1, "ab", "b")])
    rows = [tuple(row.values()) for row in pq.read_table(tmp_path / "events.parquet").to_pylist()]
    shown = START + timedelta(hours=1)
    assert rows == [
        ("u", "b", None, "click", read.time),
        ("u", "a", "7", "impression", shown),
        ("u", "b", "7", "impression", shown),
        ("u", "b", "7", "click", shown + timedelta(seconds=1)),
    ]
