"""Makes shops of other kinds: slow, small, thin, with gaps, with ratings alone, with ten items, or new.

Each is a shop directory whose last baskets are the queries of `queries_val.jsonl`: of each user the first
basket after the cut, its first half as the session, all asked as of the day of the cut. Times of H&M's
purchases are stretched, and users and items are left out. Nothing but items and events is in a shop: training
has to choose its settings.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

_START = pd.Timestamp("2000-01-01")
_LONG = "2020-09-01"  # users with earlier purchases are those of two years
_MAX_QUERIES = 400
_MIN_BASKET = 5
_ATTRIBUTES = ["product_type_name", "colour_group_name", "graphical_appearance_name", "department_name"]
_FASHION = f"""[items]
text_attributes = {json.dumps(_ATTRIBUTES)}
[time]
granularity = "day"
[task]
queries = {{ val = "queries_val.jsonl" }}
"""
_RATINGS = """[time]
granularity = "day"
[task]
queries = { val = "queries_val.jsonl" }
exclude_purchased = true
"""


@dataclass(frozen=True)
class Sources:
    """The directories of the data."""

    hm: Path
    amazon: Path


@dataclass(frozen=True)
class Shop:
    """`items` one row per item with `id` and `title`; `events` with user_id, item_id and time; shop.toml.

    The last `held_out` of the baskets, as a share, are the queries.
    """

    items: pd.DataFrame
    events: pd.DataFrame
    settings: str
    held_out: float = 0.15


def slow(sources: Sources) -> Shop:
    """1,346 users over 22 years: H&M's customers of two years, in slow motion."""
    events = _long_events(sources)
    return _fashion(sources, _stretched(events, 11), _sold(events))


def gaps(sources: Sources) -> Shop:
    """The same customers, with a year without any event after every month."""
    events = _long_events(sources)
    age = events["time"] - events["time"].min()
    month = age.dt.days // 30
    # From 1995 on: training refuses events of the future.
    time = _START - pd.Timedelta(days=5 * 365) + age + pd.to_timedelta(365 * month, "D")
    return _fashion(sources, events.assign(time=time), _sold(events))


def thin(sources: Sources) -> Shop:
    """Every 50th user of H&M's week and of its two years."""
    events = _hm_events(sources)
    users = np.sort(events["user_id"].unique())[::50]
    return _fashion(sources, events[events["user_id"].isin(users)], _sold(events))


def small(sources: Sources) -> Shop:
    """460 baskets of about 2,000 products, each of a guest who never comes back."""
    events = _hm_events(sources)
    events = events[events["time"] >= _LONG]
    size = events.groupby(["user_id", "time"])["item_id"].transform("nunique")
    events = events[size >= _MIN_BASKET].assign(user_id=lambda e: e["user_id"] + e["time"].dt.strftime("-%d"))
    users = np.random.default_rng(0).permutation(np.sort(events["user_id"].unique()))[:460]
    day = dict(zip(users, np.arange(len(users)) // 3, strict=True))
    events = events[events["user_id"].isin(users)]
    events = events.assign(time=_START + pd.to_timedelta(events["user_id"].map(day), "D"))
    others = np.random.default_rng(1).permutation(np.setdiff1d(_sold(_hm_events(sources)), _sold(events)))
    items = np.concatenate([_sold(events), others[: max(2000 - len(_sold(events)), 0)]])
    return replace(_fashion(sources, events, items), held_out=200 / 460)


def ten(sources: Sources) -> Shop:
    """The ten items that H&M sells most, and 400 of the users who bought at least two of them."""
    events = _hm_events(sources)
    best = events["item_id"].value_counts().index[:10].to_numpy()
    events = events[events["item_id"].isin(best)]
    several = events.groupby("user_id")["item_id"].nunique()
    users = np.sort(several[several > 1].index)[:400]
    return replace(_fashion(sources, events[events["user_id"].isin(users)], best), held_out=0.5)


def new(sources: Sources) -> Shop:
    """2,000 items without any event."""
    shop = small(sources)
    return Shop(shop.items, shop.events[:0], shop.settings)


def ratings(sources: Sources) -> Shop:
    """610 users who rated what they know in one to three evenings of 22 years; items have no texts."""
    rows = np.loadtxt(sources.amazon / "baby_diffmm" / "inter.tsv", skiprows=1, dtype=np.int64)
    events = pd.DataFrame({"user": rows[:, 0], "item": rows[:, 1]})
    users = events["user"].value_counts().index[:610].to_numpy()
    events = events[events["user"].isin(users)].reset_index(drop=True)
    generator = np.random.default_rng(0)
    first = dict(zip(users, generator.integers(0, 22 * 365, len(users)), strict=True))
    evening = events["user"].map(first) + 90 * generator.integers(0, 3, len(events))
    events = pd.DataFrame(
        {
            "user_id": events["user"].astype(str),
            "item_id": events["item"].astype(str),
            "time": _START + pd.to_timedelta(evening, "D"),
        }
    )
    ids = _sold(events)
    return Shop(pd.DataFrame({"id": ids, "title": [f"No. {item}" for item in ids]}), events, _RATINGS)


SHOPS: Mapping[str, Callable[[Sources], Shop]] = {
    f.__name__: f for f in (slow, gaps, thin, small, ten, ratings, new)
}


def write_shop(shop: Shop, directory: Path) -> int:
    """Write a shop directory with its queries, and return the number of queries."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "shop.toml").write_text(shop.settings)
    _lines(directory / "items.jsonl", shop.items.to_dict("records"))
    if not len(shop.events):
        return 0
    events = shop.events.sort_values(["time", "user_id"], kind="stable")
    times = events.drop_duplicates(["user_id", "time"])["time"]
    cut = times.iloc[int(len(times) * (1 - shop.held_out))].normalize()
    rows = events.assign(time=events["time"].dt.strftime("%Y-%m-%d"))
    _lines(directory / "events.jsonl", rows.to_dict("records"))
    generator = np.random.default_rng(0)
    queries, known = [], set(events.loc[events["time"] < cut, "user_id"])
    late = events[events["time"] >= cut]
    for user, basket in late.groupby("user_id", sort=True):
        items = basket.loc[basket["time"] == basket["time"].min(), "item_id"].unique()
        items = generator.permutation(items).tolist()  # the files sort them: variants are neighbors there
        session = items[: (len(items) + 1) // 2] if len(items) > 1 else []
        if session or user in known:
            targets = items[len(session) :]
            query = {"user_id": user, "date": str(cut.date()), "session": session, "targets": targets}
            queries.append(query)
    sample = np.sort(np.random.default_rng(0).permutation(len(queries))[:_MAX_QUERIES])
    _lines(directory / "queries_val.jsonl", (queries[index] for index in sample))
    return len(sample)


def _hm_events(sources: Sources) -> pd.DataFrame:
    events = pd.read_csv(
        sources.hm / "events.csv.gz",
        dtype={"item_id": str, "user_id": str},
        usecols=["user_id", "item_id", "date"],
    )
    return events.assign(time=pd.to_datetime(events["date"])).drop(columns="date")


def _long_events(sources: Sources) -> pd.DataFrame:
    events = _hm_events(sources)
    first = events.groupby("user_id")["time"].transform("min")
    return events[first < _LONG]


def _stretched(events: pd.DataFrame, factor: int) -> pd.DataFrame:
    age = events["time"] - events["time"].min()
    return events.assign(time=_START + age * factor)


def _sold(events: pd.DataFrame) -> np.ndarray:
    return np.sort(events["item_id"].unique())


def _fashion(sources: Sources, events: pd.DataFrame, items: np.ndarray) -> Shop:
    columns = ["item_id", "product_code", "title", "description", *_ATTRIBUTES]
    catalog = pd.read_parquet(sources.hm / "items.parquet", columns=columns).set_index("item_id").loc[items]
    catalog = catalog.reset_index().rename(columns={"item_id": "id", "product_code": "family_id"})
    return Shop(catalog.astype({"family_id": str}), events, _FASHION)


def _lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
