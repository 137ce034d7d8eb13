"""Writes the Amazon benchmarks as shop directories, with days that order the events.

The benchmarks have no dates. If the order of a user's items is known (leave one out), the latest training
item is on the day before the query, the one before it a day earlier, and so on. If the split is random, a
random tenth of each user's items, at least one, is on one of the last eight days, with the same number of
users on each day, and the other items are before. So training days resemble the split's queries and each
other. The events of a user are one basket.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

DAY = date(2021, 1, 1)
"""The day of the val queries."""

_TRAIN, _VAL, _TEST = 0, 1, 2
_SAMPLE_DAYS, _SAMPLE_SHARE = 8, 0.1
_COMMON = """
[items]
text_attributes = [{attributes}]
[time]
granularity = "day"
[task]
queries = {{ val = "queries_val.jsonl", test = "queries_test.jsonl" }}
exclude_purchased = true
[text]
trainable_layers = 2
steps = 150
learning_rate = 1e-4
projection_steps = 600
[sequence]
epochs = 24
dropout = 0.5
[ranking]
ranking_days = 2
max_queries = 10000
cold_start_dropout = 0.0
eval_queries = 500
"""
_NO_SESSIONS = "no_session_share = 1.0\n"


@dataclass(frozen=True)
class Benchmark:
    """A published split: its folder's name, the depth of its metrics, and whether it has an order."""

    name: str
    k: int
    ordered: bool


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("sports_lattice", 20, ordered=False),
        Benchmark("baby_diffmm", 20, ordered=False),
        Benchmark("p5_beauty", 10, ordered=True),
        Benchmark("p5_sports", 10, ordered=True),
    )
}


@dataclass(frozen=True)
class Interactions:
    """The training events as (user, item, day, basket), and the targets of each split by user."""

    events: Sequence[tuple[str, str, date, str]]
    answers: Mapping[str, Mapping[str, Sequence[str]]]


def write_shop(benchmark: Benchmark, source: Path, directory: Path) -> None:
    """Write a benchmark's folder as a shop directory."""
    directory.mkdir(parents=True, exist_ok=True)
    interactions = _in_order(source) if benchmark.ordered else _random_split(source)
    items = _items(source)
    _lines(directory / "items.jsonl", items)
    rows = ("user_id", "item_id", "time", "session_id")
    _lines(
        directory / "events.jsonl",
        (dict(zip(rows, (u, i, str(d), s or None), strict=True)) for u, i, d, s in interactions.events),
    )
    for split, answers in interactions.answers.items():
        day = DAY + timedelta(days=benchmark.ordered and split == "test")
        query_rows = [
            {"user_id": u, "date": str(day), "session": [], "targets": t} for u, t in answers.items()
        ]
        # The files sort users by the length of their history: the first ones are the hardest.
        random.Random(0).shuffle(query_rows)  # noqa: S311 - no secret
        _lines(directory / f"queries_{split}.jsonl", query_rows)
    has_labels = any("_labels" in item for item in items)
    text = _COMMON.format(attributes='"_labels"' if has_labels else "")
    (directory / "shop.toml").write_text(text + ("" if benchmark.ordered else _NO_SESSIONS))


def _items(source: Path) -> list[dict[str, object]]:
    """Items with titles, or with catalog numbers as titles; numeric labels are attributes, not text."""
    lines = (source / "items.tsv").read_text().splitlines()
    header = lines[0].split("\t")
    items = []
    for line in lines[1:]:
        row = dict(zip(header, line.split("\t"), strict=False))
        item: dict[str, object] = {"id": row["itemID"], "title": row.get("textual_id") or row["asin"]}
        if row.get("s3rec_attribute_ids"):
            item["_labels"] = row["s3rec_attribute_ids"].split()
        items.append(item)
    return items


def _in_order(source: Path) -> Interactions:
    """Leave one out: the last item is the target of test, the one before it the target of val."""
    events, val, test = [], {}, {}
    for line in (source / "sequences.txt").read_text().splitlines():
        user, *items = line.split()
        *history, val_item, test_item = items
        val[user], test[user] = [val_item], [test_item]
        days = range(-len(history), 1)
        events += [
            (user, item, DAY + timedelta(days=day), "")
            for item, day in zip([*history, val_item], days, strict=True)
        ]
    return Interactions(events, {"val": val, "test": test})


def _random_split(source: Path) -> Interactions:
    """A random split of each user's items; all events of a user are one basket."""
    rows = np.loadtxt(source / "inter.tsv", skiprows=1, dtype=np.int64)
    training = rows[rows[:, 2] == _TRAIN]
    generator = np.random.default_rng(0)
    training = training[np.lexsort((generator.random(len(training)), training[:, 0]))]
    _, start, size = np.unique(training[:, 0], return_index=True, return_counts=True)
    place = np.arange(len(training)) - np.repeat(start, size)
    sampled = place < np.repeat(np.maximum(1, size * _SAMPLE_SHARE).astype(int), size)
    day = np.repeat(1 + generator.permutation(len(size)) % _SAMPLE_DAYS, size)
    age = np.where(sampled, day, _SAMPLE_DAYS + 1)
    events = [
        (str(user), str(item), DAY - timedelta(days=days), str(user))
        for (user, item, _), days in zip(training.tolist(), age.tolist(), strict=True)
    ]
    answers: dict[str, dict[str, list[str]]] = {"val": {}, "test": {}}
    for user, item, label in rows[rows[:, 2] != _TRAIN].tolist():
        split = {_VAL: "val", _TEST: "test"}[label]
        answers[split].setdefault(str(user), []).append(str(item))
    return Interactions(events, answers)


def _lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
