"""`python -m demo.shop`: write the demo shop as a directory for `vitrine train`, and its ground truth.

    OUT/shop/       items.jsonl, events.csv.gz, images/, shop.toml
    OUT/heldout/    products of the same world that the shop does not have: items.jsonl, images/
    OUT/truth.npz   the true preferences of users (`demo.tastes.Truth`)
    OUT/made.json   the seed, sizes and digest of the code

The same seed, sizes and end give the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console

from demo.behavior import TYPES, Rows, simulate
from demo.catalog import Product, make_catalog
from demo.drawing import render_jpeg
from demo.tastes import make_truth

END = datetime(2026, 3, 1, tzinfo=UTC)
HELD_OUT = "new-"
"""What the ids of held-out products begin with."""

SHOP_TOML = """\
# How the made-up shop reads. `vitrine train` finds this file next to the items.
[items]
text_attributes = ["type", "colour", "pattern", "style", "material", "brand"]

[event_types]
impression = 0.0
click = 0.25
cart = 0.5
purchase = 1.0

[time]
granularity = "hour"

[split]
test_days = 7

# Small enough for two cores and a few minutes.
[text]
trainable_layers = 2
steps = 60
batch = 64
learning_rate = 1e-4
projection_steps = 150

[image]
projection_steps = 300

[ranking]
ranking_days = 28
max_queries = 2000
candidates_per_query = 100
eval_queries = 400
trees = 100
ctr_epochs = 2
"""


_MIN_ITEMS = 50


@dataclass(frozen=True)
class Recipe:
    """What a shop is made from: `users` counts the brand-new ones, who did nothing yet."""

    seed: int = 7
    items: int = 3000
    users: int = 5000
    new_users: int = 60
    held_out: int = 200
    end: datetime = END

    def document(self) -> dict[str, str | int]:
        """As kept in made.json, with a digest of the code."""
        return {**asdict(self), "end": self.end.isoformat(), "code": _code()}


def write_shop(out: Path, recipe: Recipe) -> dict[str, int]:
    """Write everything under `out`, in place of what was there; counts of what was written."""
    for name in ("made.json", "truth.npz"):
        (out / name).unlink(missing_ok=True)
    products = make_catalog(recipe.seed, recipe.items, recipe.end)
    rng = np.random.default_rng([recipe.seed, 1])
    truth = make_truth(rng, products, recipe.users, recipe.new_users)
    rows = simulate(rng, truth, products, int(recipe.end.timestamp()))
    _write_products(out / "shop", products)
    _write_events(out / "shop" / "events.csv.gz", rows, truth.user_ids, products)
    (out / "shop" / "shop.toml").write_text(SHOP_TOML)
    held_out = make_catalog(recipe.seed, recipe.held_out, recipe.end, HELD_OUT)
    _write_products(out / "heldout", held_out)
    truth.save(out / "truth.npz")
    (out / "made.json").write_text(json.dumps(recipe.document(), indent=1) + "\n")
    counts = np.bincount(rows.kind, minlength=len(TYPES))
    return {"item": len(products), **{name: int(n) for name, n in zip(TYPES, counts, strict=True)}}


def is_current(out: Path, recipe: Recipe) -> bool:
    """Whether `out` already holds what this recipe and this code would write."""
    manifest = out / "made.json"
    return manifest.is_file() and json.loads(manifest.read_text()) == recipe.document()


def shop_end(out: Path) -> datetime | None:
    """The end of the shop that `out` holds, None when it holds none."""
    manifest = out / "made.json"
    return datetime.fromisoformat(json.loads(manifest.read_text())["end"]) if manifest.is_file() else None


def _code() -> str:
    """A digest of the files that decide what is written."""
    names = (
        "behavior catalog drawing phrases sampling shapes_home shapes_worn shop strokes surfaces tastes world"
    )
    state = hashlib.blake2b(digest_size=8)
    for name in names.split():
        state.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return state.hexdigest()


def _write_products(directory: Path, products: Sequence[Product]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "images").mkdir(parents=True)
    with (directory / "items.jsonl").open("w", encoding="utf-8") as lines:
        for product in products:
            lines.write(json.dumps(product.document(), ensure_ascii=False) + "\n")
            (directory / "images" / f"{product.id}.jpg").write_bytes(render_jpeg(product.sketch))


def _write_events(path: Path, rows: Rows, user_ids: Sequence[str], products: Sequence[Product]) -> None:
    times = np.datetime_as_string(rows.time.astype("datetime64[s]"), unit="s")
    purchase, listed = TYPES.index("purchase"), (TYPES.index("impression"), TYPES.index("click"))
    with gzip.GzipFile(path, "wb", compresslevel=5, mtime=0) as out:
        out.write(b"event_id,user_id,session_id,type,item_id,time,price,position\n")
        columns = (rows.user, rows.session, rows.kind, rows.item, times, rows.position)
        events = zip(*(column.tolist() for column in columns), strict=True)
        for n, (user, session, kind, item, time, position) in enumerate(events):
            product = products[item]
            price = f"{product.price:.2f}" if kind == purchase else ""
            cell = position if kind in listed else ""
            prefix = f"e{n:07},{user_ids[user]},s{session:06}"
            line = f"{prefix},{TYPES[kind]},{product.id},{time}Z,{price},{cell}\n"
            out.write(line.encode())


def _at_least(minimum: int) -> Callable[[str], int]:
    """An argument's type: a whole number that a shop of any use needs."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}: a whole number of {minimum} or more is needed")
        return int(text)

    return read


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The options that a recipe is made of."""
    defaults = Recipe()
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--items", type=_at_least(_MIN_ITEMS), default=defaults.items)
    parser.add_argument("--users", type=_at_least(2 * defaults.new_users), default=defaults.users)


def main(arguments: list[str] | None = None) -> None:
    """Write a shop as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m demo.shop", description="Write the made-up shop.")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    add_recipe(parser)
    parser.add_argument("--end", type=_day, default=END, help="the day before which everything happened")
    options = parser.parse_args(arguments)
    recipe = Recipe(options.seed, options.items, options.users, end=options.end)
    counts = write_shop(options.out, recipe)
    console = Console()
    console.print(", ".join(f"{count:,} {name}s" for name, count in counts.items()))
    console.print(
        f"vitrine train --data {options.out / 'shop'} --out {options.out / 'bundles'}", soft_wrap=True
    )


def _day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


if __name__ == "__main__":
    main()
