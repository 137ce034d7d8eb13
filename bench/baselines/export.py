"""Exports a shop's engagements and a split's queries as plain files for other libraries.

DIR/interactions.csv has user_id, item_id, weight and datetime of the events before the day of the queries;
DIR/queries.jsonl has the queries; DIR/universe.txt has the items that may be recommended.
"""

import csv
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from cli.evaluation_queries import read_queries
from services.catalog import filters
from services.catalog.item_table import ItemTable
from services.catalog.items import item_hash
from training.data.dataset import read_shop

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
        for row in np.flatnonzero(weights > 0).tolist():
            time = _EPOCH + timedelta(microseconds=int(events.time[row]))
            user_id, item_id = events.user_ids[events.user[row]], events.item_ids[events.item[row]]
            rows.writerow((user_id, item_id, weights[row], f"{time:%Y-%m-%dT%H:%M:%S}"))
    with (out / "queries.jsonl").open("w") as file:
        for query in queries:
            line = {"user_id": query.user_id, "session": query.session, "targets": query.targets}
            file.write(json.dumps({**line, "day": f"{day:%Y-%m-%d}"}) + "\n")
    table = ItemTable.of(shop.items, {}, {}, [day] * len(shop.items))
    condition = filters.AllOf(tuple(filters.Equals(name, text) for name, text in task.filter.items()))
    allowed = filters.evaluate(condition, table)
    names = [item.id for item in shop.items if allowed[table.rows([item_hash(item.id)])[0]]]
    (out / "universe.txt").write_text("".join(f"{name}\n" for name in names))
