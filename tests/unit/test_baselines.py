"""Exports for other libraries contain nothing of the evaluation days."""

import csv
import json
from pathlib import Path

from bench.baselines.export import export

TOML = """
[event_types]
impression = 0
click = 0.5
purchase = 1
[time]
granularity = "day"
[task]
queries = { val = "queries.jsonl" }
filter = { _kind = "hat" }
[items]
filter_only = ["kind"]
"""


def test_an_export_contains_the_past_the_queries_and_the_eligible_items(tmp_path: Path) -> None:
    shop, out = tmp_path / "shop", tmp_path / "out"
    shop.mkdir()
    (shop / "shop.toml").write_text(TOML)
    items = [{"id": f"i{n}", "title": f"t{n}", "kind": ("hat", "coat")[n % 2]} for n in range(4)]
    (shop / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    rows = [
        ("ann", "i0", "click", "2026-01-01"),
        ("ann", "i1", "impression", "2026-01-01"),
        ("bob", "i2", "purchase", "2026-01-02"),
        ("ann", "i2", "purchase", "2026-01-03"),
    ]
    names = ("user_id", "item_id", "type", "time")
    (shop / "events.jsonl").write_text(
        "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    )
    query = {"user_id": "ann", "date": "2026-01-03", "session": ["i0"], "targets": ["i2"]}
    (shop / "queries.jsonl").write_text(json.dumps(query) + "\n")
    export(shop, None, "val", out)
    with (out / "interactions.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(row["user_id"], row["item_id"], float(row["weight"])) for row in lines] == [
        ("ann", "i0", 0.5),
        ("bob", "i2", 1.0),
    ]
    assert [row["datetime"] for row in lines] == ["2026-01-01T00:00:00", "2026-01-02T00:00:00"]
    (question,) = (json.loads(line) for line in (out / "queries.jsonl").read_text().splitlines())
    assert question == {"user_id": "ann", "session": ["i0"], "targets": ["i2"], "day": "2026-01-03"}
    assert (out / "universe.txt").read_text().split() == ["i0", "i2"]
