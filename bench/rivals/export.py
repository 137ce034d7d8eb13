"""What other libraries are given: a shop's engagements and a split's questions, as plain files.

DIR/interactions.csv holds user_id, item_id, weight and datetime of what was known before the day of the
questions; DIR/questions.jsonl the questions as the shop has them, DIR/universe.txt the items
that may be answered.
"""

import csv
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from services import filters
from services.catalog import item_number
from services.item_table import ItemTable
from services.replay import read_queries
from training.dataset import read_shop

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def export(data: Path, settings: Path | None, split: str, out: Path) -> None:
    """Write the three files of a shop directory's split into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    day, queries = read_queries(data, settings, split)
    shop = read_shop(data, settings, until=day)
    events, task = shop.events, shop.settings.task
    weights = np.array(list(shop.settings.event_types.values()))[events.kind]
    with (out / "interactions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("user_id", "item_id", "weight", "datetime"))
        for at in np.flatnonzero(weights > 0).tolist():
            when = _EPOCH + timedelta(microseconds=int(events.time[at]))
            who, what = events.user_ids[events.user[at]], events.item_ids[events.item[at]]
            rows.writerow((who, what, weights[at], f"{when:%Y-%m-%dT%H:%M:%S}"))
    with (out / "questions.jsonl").open("w") as file:
        for query in queries:
            asked = {"user_id": query.user_id, "session": query.session, "targets": query.targets}
            file.write(json.dumps({**asked, "day": f"{day:%Y-%m-%d}"}) + "\n")
    table = ItemTable.of(shop.items, {}, {}, [day] * len(shop.items))
    condition = filters.AllOf(tuple(filters.Equals(name, text) for name, text in task.filter.items()))
    allowed = filters.evaluate(condition, table)
    names = [item.id for item in shop.items if allowed[table.rows([item_number(item.id)])[0]]]
    (out / "universe.txt").write_text("".join(f"{name}\n" for name in names))
