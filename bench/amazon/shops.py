"""The Amazon benchmarks as shop directories: their rows under Vitrine's names, with days that order them.

None of them has days of its own. Where each person's order is known (leave one out), the latest item
that may be learned from lies on the day before the question, the one before it a day earlier, and so
on. Where the split is a random draw, a tenth of each person's items, one at least, is drawn once more to
lie on one of the last eight days, the same number of people on each, and the rest before; so what is
learned from a day is what the split asks, and the days are alike. A person's events are one basket.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

DAY = date(2021, 1, 1)
"""The day of the val questions."""

_TRAIN, _VAL, _TEST = 0, 1, 2
_DRAWN_DAYS, _DRAWN_SHARE = 8, 0.1
_COMMON = """
[items]
text_attributes = [{attributes}]
[time]
granularity = "day"
[task]
queries = {{ val = "queries_val.jsonl", test = "queries_test.jsonl" }}
exclude_bought = true
[text]
layers = 2
steps = 150
learning_rate = 1e-4
head_steps = 600
[sequence]
epochs = 24
dropout = 0.5
[ranking]
days = 2
queries = 10000
unsold = 0.0
judged = 500
"""
_ASKED_BARE = "bare = 1.0\n"


@dataclass(frozen=True)
class Benchmark:
    """A published split: its folder's name, the depth of its metrics, and whether order is known."""

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
    """What may be learned from, as (person, item, day, basket), and each split's answers by person."""

    events: Sequence[tuple[str, str, date, str]]
    answers: Mapping[str, Mapping[str, Sequence[str]]]


def write_shop(benchmark: Benchmark, source: Path, directory: Path) -> None:
    """Write a benchmark's folder as a shop directory."""
    directory.mkdir(parents=True, exist_ok=True)
    found = _in_order(source) if benchmark.ordered else _drawn(source)
    items = _items(source)
    _lines(directory / "items.jsonl", items)
    rows = ("user_id", "item_id", "time", "session_id")
    _lines(
        directory / "events.jsonl",
        (dict(zip(rows, (u, i, str(d), s or None), strict=True)) for u, i, d, s in found.events),
    )
    for split, answers in found.answers.items():
        day = DAY + timedelta(days=benchmark.ordered and split == "test")
        asked = [{"user_id": u, "date": str(day), "session": [], "targets": t} for u, t in answers.items()]
        # The files sort people by what they know of them: the first ones are the hardest.
        random.Random(0).shuffle(asked)  # noqa: S311 - no secret
        _lines(directory / f"queries_{split}.jsonl", asked)
    labelled = any("_labels" in item for item in items)
    text = _COMMON.format(attributes='"_labels"' if labelled else "")
    (directory / "shop.toml").write_text(text + ("" if benchmark.ordered else _ASKED_BARE))


def _items(source: Path) -> list[dict[str, object]]:
    """Titles where there are any, or the catalogue number; numbered labels are no text for BERT."""
    lines = (source / "items.tsv").read_text().splitlines()
    header = lines[0].split("\t")
    made = []
    for line in lines[1:]:
        row = dict(zip(header, line.split("\t"), strict=False))
        item: dict[str, object] = {"id": row["itemID"], "title": row.get("textual_id") or row["asin"]}
        if row.get("s3rec_attribute_ids"):
            item["_labels"] = row["s3rec_attribute_ids"].split()
        made.append(item)
    return made


def _in_order(source: Path) -> Interactions:
    """Leave one out: the last item is test's, the one before it val's, and history for test."""
    events, val, test = [], {}, {}
    for line in (source / "sequences.txt").read_text().splitlines():
        person, *items = line.split()
        *known, asked, last = items
        val[person], test[person] = [asked], [last]
        days = range(-len(known), 1)
        events += [
            (person, item, DAY + timedelta(days=day), "")
            for item, day in zip([*known, asked], days, strict=True)
        ]
    return Interactions(events, {"val": val, "test": test})


def _drawn(source: Path) -> Interactions:
    """A random draw of each person's items; everybody's events are one basket."""
    rows = np.loadtxt(source / "inter.tsv", skiprows=1, dtype=np.int64)
    learned = rows[rows[:, 2] == _TRAIN]
    generator = np.random.default_rng(0)
    learned = learned[np.lexsort((generator.random(len(learned)), learned[:, 0]))]
    _, start, size = np.unique(learned[:, 0], return_index=True, return_counts=True)
    place = np.arange(len(learned)) - np.repeat(start, size)
    drawn = place < np.repeat(np.maximum(1, size * _DRAWN_SHARE).astype(int), size)
    day = np.repeat(1 + generator.permutation(len(size)) % _DRAWN_DAYS, size)
    ago = np.where(drawn, day, _DRAWN_DAYS + 1)
    events = [
        (str(user), str(item), DAY - timedelta(days=days), str(user))
        for (user, item, _), days in zip(learned.tolist(), ago.tolist(), strict=True)
    ]
    answers: dict[str, dict[str, list[str]]] = {"val": {}, "test": {}}
    for user, item, label in rows[rows[:, 2] != _TRAIN].tolist():
        split = {_VAL: "val", _TEST: "test"}[label]
        answers[split].setdefault(str(user), []).append(str(item))
    return Interactions(events, answers)


def _lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
