"""The published Amazon splits are read completely and without leaks from the test queries."""

import json
import os
from collections import Counter
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.amazon.__main__ import scored, statistics_of_train
from bench.amazon.shops import BENCHMARKS, DAY, write_shop
from bench.amazon.untrained import run_untrained
from services.ranking.service import RankingService
from tests.conftest import skip_without
from training.data.dataset import read_shop

ORDERED, DRAWN = BENCHMARKS["p5_beauty"], BENCHMARKS["sports_lattice"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten people; item n is called n, and in the drawn split n % 10 of 8 and 9 are val and test."""
    folder = tmp_path / "source"
    folder.mkdir()
    users = {str(p): [str(n) for n in range(p, p + 20)] for p in range(1, 11)}
    lines = [" ".join([p, *items]) for p, items in users.items()]
    (folder / "sequences.txt").write_text("\n".join(lines) + "\n")
    ratings = [(p, n, max(0, int(n) % 10 - 7)) for p, items in users.items() for n in items]
    text = "".join(f"{p}\t{n}\t{label}\n" for p, n, label in ratings)
    (folder / "inter.tsv").write_text("userID\titemID\tx_label\n" + text)
    items = "".join(f"{n}\tB{n}\t1 {n}\tthing number {n}\n" for n in range(1, 31))
    (folder / "items.tsv").write_text("itemID\tasin\ts3rec_attribute_ids\ttextual_id\n" + items)
    return folder


def test_leave_one_out_keeps_the_order_of_each_user(source: Path, tmp_path: Path) -> None:
    write_shop(ORDERED, source, tmp_path / "shop")
    events = rows(tmp_path / "shop" / "events.jsonl")
    for split, day, last in (("val", DAY, -2), ("test", DAY + timedelta(days=1), -1)):
        for query in rows(tmp_path / "shop" / f"queries_{split}.jsonl"):
            user = int(query["user_id"])
            history = [e for e in events if e["user_id"] == query["user_id"] and e["time"] < query["date"]]
            assert query["date"] == str(day)
            order = [int(e["item_id"]) for e in sorted(history, key=lambda e: e["time"])]
            whole = list(range(user, user + 20))
            assert order == whole[:last]
            assert query["targets"] == [str(whole[last])]
            days = sorted(date.fromisoformat(e["time"]) for e in history)
            assert days == [day - timedelta(days=n) for n in range(len(history), 0, -1)]


def test_a_random_split_is_repeated_within_train(source: Path, tmp_path: Path) -> None:
    write_shop(DRAWN, source, tmp_path / "shop")
    events = rows(tmp_path / "shop" / "events.jsonl")
    assert {(e["user_id"], e["item_id"]) for e in events} == {
        (str(p), str(n)) for p in range(1, 11) for n in range(p, p + 20) if n % 10 < 8
    }
    assert len(events) == len({(e["user_id"], e["item_id"]) for e in events})
    assert all(e["session_id"] == e["user_id"] and e["time"] < str(DAY) for e in events)
    late = Counter(e["user_id"] for e in events if e["time"] >= str(DAY - timedelta(days=8)))
    assert late == {str(p): 1 for p in range(1, 11)}  # a tenth of sixteen
    days = Counter(e["time"] for e in events if e["time"] >= str(DAY - timedelta(days=8)))
    assert set(days.values()) <= {1, 2}
    assert len(days) == 8
    for split, digit in (("val", 8), ("test", 9)):
        for query in rows(tmp_path / "shop" / f"queries_{split}.jsonl"):
            user = int(query["user_id"])
            expected = [str(n) for n in range(user, user + 20) if n % 10 == digit]
            assert query["targets"] == expected
            assert query["session"] == []


def test_statistics_of_train_count_no_later_events() -> None:
    """The service is asked as of the test day, and its statistics are those of the last moment of train."""
    times = list[int]()
    service = SimpleNamespace(_stats=SimpleNamespace(at=times.append))
    test_day = datetime.combine(DAY + timedelta(days=1), time(12), UTC)
    with statistics_of_train():
        RankingService.stats(service, test_day)  # type: ignore[arg-type]
        RankingService.stats(service, test_day - timedelta(days=9))  # type: ignore[arg-type]
    RankingService.stats(service, test_day)  # type: ignore[arg-type]
    days = [datetime.fromtimestamp(micros / 1e6, UTC) for micros in times]
    assert days == [datetime.combine(DAY, time(), UTC), test_day - timedelta(days=9), test_day]


def test_a_shop_is_read_as_it_is_written(source: Path, tmp_path: Path) -> None:
    write_shop(DRAWN, source, tmp_path / "shop")
    shop = read_shop(tmp_path / "shop")
    assert (len(shop.items), len(shop.events)) == (30, 160)
    assert shop.items[4].attributes[0].texts == ("1", "5")
    assert shop.settings.ranking.no_session_share == 1
    assert shop.settings.task.exclude_purchased


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_untrained_graph_sums_cosines_of_what_was_learned_from(
    split: str, source: Path, tmp_path: Path
) -> None:
    shop, run = tmp_path / "shop", tmp_path / "run.jsonl"
    write_shop(ORDERED, source, shop)
    run_untrained(shop, split, datetime.combine(DAY, time(), UTC), run, ordered=True, limit=4)
    # Nobody did the same thing twice: of items up to ten apart, how many people did both.
    training = {p: range(p, p + 18) for p in range(1, 11)}
    degree = Counter(n for items in training.values() for n in items)
    together = Counter(
        (i, j) for items in training.values() for i in items for j in items if 0 < abs(i - j) <= 10
    )
    answers = rows(run)
    assert len(answers) == 4
    for answer in answers:
        user = int(answer["user_id"])
        history = range(user, user + (19 if split == "test" else 18))
        score = Counter(
            {
                j: sum(
                    0.7 ** (history[-1] - i) * together[i, j] / (degree[i] * degree[j]) ** 0.5
                    for i in history
                    if together[i, j]
                )
                for j in degree
                if j not in history
            }
        )
        item_ids = [int(item) for item in answer["items"]]
        assert set(item_ids) == {j for j in score if score[j]}
        assert [score[j] for j in item_ids] == pytest.approx(
            sorted((score[j] for j in item_ids), reverse=True)
        )


def test_the_untrained_graph_of_a_random_split_ignores_order(source: Path, tmp_path: Path) -> None:
    shop, run = tmp_path / "shop", tmp_path / "run.jsonl"
    write_shop(DRAWN, source, shop)
    run_untrained(shop, "val", datetime.combine(DAY, time(), UTC), run, ordered=False)
    training = {p: {n for n in range(p, p + 20) if n % 10 < 8} for p in range(1, 11)}
    holders = {n: {p for p in training if n in training[p]} for n in range(1, 31)}
    for answer in rows(run):
        history = training[int(answer["user_id"])]
        score = {
            j: sum(len(holders[i] & holders[j]) / (len(holders[i]) * len(holders[j])) ** 0.5 for i in history)
            for j in holders
            if holders[j] and j not in history
        }
        item_ids = [int(item) for item in answer["items"]]
        assert set(item_ids) == {j for j in score if score[j]}
        assert [score[j] for j in item_ids] == pytest.approx(
            sorted((score[j] for j in item_ids), reverse=True)
        )


def test_a_run_is_scored_at_the_depth_of_its_protocol(tmp_path: Path) -> None:
    queries, run = tmp_path / "queries.jsonl", tmp_path / "run.jsonl"
    queries.write_text('{"targets": ["a"]}\n{"targets": ["b", "c"]}\n{"targets": ["never asked"]}\n')
    pages = [[f"x{n}" for n in range(9)] + ["a"], [f"x{n}" for n in range(10)] + ["b", "c"]]
    run.write_text("".join(json.dumps({"user_id": 1, "items": page}) + "\n" for page in pages))
    ten, twenty = (scored(BENCHMARKS[name], queries, run) for name in ("p5_beauty", "sports_lattice"))
    assert (ten["queries"], ten["recall"]["mean"]) == (2, 0.5)
    assert twenty["recall"]["mean"] == 1


@pytest.mark.parametrize(
    ("name", "items", "interactions", "target_counts"),
    [
        ("sports_lattice", 18_357, 218_409, (40_029, 37_899)),
        ("baby_diffmm", 7_050, 118_551, (21_682, 20_559)),
        ("p5_beauty", 12_101, 198_502 - 22_363, (22_363, 22_363)),
        ("p5_sports", 18_357, 296_337 - 35_598, (35_598, 35_598)),
    ],
)
def test_the_counts_equal_the_published_ones(
    name: str, items: int, interactions: int, target_counts: tuple[int, int], tmp_path: Path
) -> None:
    root = Path(os.environ.get("VITRINE_BENCH", Path(__file__).parents[3] / "shared/data/bench"))
    if not (root / name).is_dir():
        skip_without("bench", f"{root / name} is not there")
    write_shop(BENCHMARKS[name], root / name, tmp_path)
    assert len(read_shop(tmp_path).items) == items
    assert len(rows(tmp_path / "events.jsonl")) == interactions
    counts = [sum(len(q["targets"]) for q in rows(tmp_path / f"queries_{s}.jsonl")) for s in ("val", "test")]
    assert tuple(counts) == target_counts
