"""What rules and exploring cost: recall against diversity, coverage and the exposure of what nobody bought.

    python -m bench.curves --data DIR --shop bench/hm/shop.toml --bundle BUNDLES --out docs/plots

Every setting is a scenario of one served process, asked the same queries of val. Prints a table, and writes
curves.json and curves.png.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.bundle import Bundle, Catalogue
from services.replay import import_events, read_queries, request_of
from services.settings import Settings
from services.wiring import App
from training.dataset import read_shop
from training.metrics import paired_interval, per_query

_PAGE = 20
_NOON = timedelta(hours=12)
_NEVER_BOUGHT = "max_age_days = 0, max_engagements = 0.0, showings = 1000000"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "diversity": {f"{d:g}": f"diversity = {d}" for d in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)},
    "exploration": {
        f"{share:g}": f"exploration = {{ share = {share}, {_NEVER_BOUGHT} }}"
        for share in (0.05, 0.1, 0.2, 0.3, 0.5)
    },
    "one of a family among": {
        f"{among}": f'rules.caps = [{{ attribute = "family_id", most = 1, among = {among} }}]'
        for among in (5, 20)
    },
}
PLAIN = "plain"


def main() -> None:
    """Ask, measure, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shop", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300, help="only the first queries")
    options = parser.parse_args()
    found = measured(options.data, options.shop, options.bundle, options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "curves.json").write_text(json.dumps(found, indent=1) + "\n")
    _draw(found).savefig(options.out / "curves.png", dpi=144, metadata={"Software": None})
    _show(found)


def measured(data: Path, shop_file: Path | None, bundle_path: Path, limit: int) -> dict[str, Any]:
    """Figures by kind of setting and setting, those of the plain scenario by "plain"."""
    bundle = Bundle(bundle_path)
    day, queries = read_queries(data, shop_file, "val")
    queries = queries[:limit]
    shop = read_shop(data, shop_file, until=day)
    names = [(kind, at) for kind, stated in SETTINGS.items() for at in stated]
    with tempfile.TemporaryDirectory() as folder:
        scenarios = Path(folder) / "scenarios.toml"
        tables = [f'["{kind} {at}"]\n{SETTINGS[kind][at]}\n' for kind, at in names]
        scenarios.write_text("\n".join(["[home]", *tables]))
        settings = Settings(
            bundle=bundle.directory,
            state=Path(folder) / "state",
            address="127.0.0.1:0",
            clock=day + _NOON,
            exact=True,
            served_days=0,
            scenarios=scenarios,
        )
        import_events(settings, bundle, shop)
        asked = [request_of(query, shop.settings.task) for query in queries]
        pages = asyncio.run(_asked(settings, asked, [PLAIN, *(f"{kind} {at}" for kind, at in names)]))
    bought = {shop.events.item_ids[item] for item in np.unique(shop.events.item).tolist()}
    targets = [list(query.targets) for query in queries]
    judge = _Judge(bundle.catalogue(), bought, targets, pages[PLAIN])
    return {
        "bundle": bundle.version,
        "queries": len(queries),
        PLAIN: judge(pages[PLAIN]),
        **{kind: {at: judge(pages[f"{kind} {at}"]) for at in stated} for kind, stated in SETTINGS.items()},
    }


async def _asked(
    settings: Settings, requests: Sequence[pb.RecommendRequest], scenarios: Sequence[str]
) -> dict[str, list[list[str]]]:
    """The first page of every request by every scenario."""
    app = App(settings)
    await app.start()
    assert app.gateway is not None  # noqa: S101 - all services are hosted
    pages: dict[str, list[list[str]]] = {scenario: [] for scenario in scenarios}
    try:
        for request in requests:
            for scenario in scenarios:
                request.scenario, request.page_size = "" if scenario == PLAIN else scenario, _PAGE
                answer = await app.gateway.Recommend(request, None)
                pages[scenario].append([item.item_id for item in answer.items])
    finally:
        await app.stop()
    return pages


class _Judge:
    def __init__(
        self,
        catalogue: Catalogue,
        bought: set[str],
        targets: Sequence[Sequence[str]],
        plain: Sequence[Sequence[str]],
    ) -> None:
        self._code = {item.id: at for at, item in enumerate(catalogue.items)}
        self._vectors = catalogue.vectors["text"].astype(np.float32)
        self._bought = bought
        self._targets = [self._coded(mine) for mine in targets]
        self._plain = self._recalls(plain)

    def __call__(self, pages: Sequence[Sequence[str]]) -> dict[str, Any]:
        """Recall with its difference from the plain pages, likeness within a page, coverage, exposure."""
        recalls = self._recalls(pages)
        slots = [item for page in pages for item in page]
        return {
            "recall": float(recalls.mean()),
            "less_than_plain": paired_interval(recalls, self._plain).to_dict(),
            "likeness": float(np.mean([self._likeness(page) for page in pages])),
            "different_items": len(set(slots)),
            "never_bought": float(np.mean([item not in self._bought for item in slots])),
            "never_bought_items": len({item for item in slots if item not in self._bought}),
        }

    def _coded(self, items: Sequence[str]) -> np.ndarray:
        return np.array([self._code.setdefault(item, len(self._code)) for item in items], np.int64)

    def _recalls(self, pages: Sequence[Sequence[str]]) -> np.ndarray:
        return per_query([self._coded(page) for page in pages], self._targets, _PAGE)["recall"]

    def _likeness(self, page: Sequence[str]) -> float:
        """The mean cosine of two of its items, by text."""
        mine = self._vectors[self._coded(page)]
        return float((mine @ mine.T)[np.triu_indices(len(mine), 1)].mean())


def _show(found: Mapping[str, Any]) -> None:
    table = Table(
        "", "recall@20", "from plain", "likeness", "different items", "slots never bought", "of items"
    )
    rows = [(PLAIN, found[PLAIN])]
    rows += [(f"{kind} {at}", figures) for kind in SETTINGS for at, figures in found[kind].items()]
    for name, one in rows:
        step = one["less_than_plain"]
        low, high = step["ci95"]
        table.add_row(
            name,
            f"{one['recall']:.3f}",
            f"{step['mean']:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{one['likeness']:.3f}",
            str(one["different_items"]),
            f"{one['never_bought']:.1%}",
            str(one["never_bought_items"]),
        )
    Console(width=140).print(table)


def _draw(found: Mapping[str, Any]) -> Figure:
    """Recall over each of three figures, a line for each kind of setting, from plain on."""
    panels = (
        ("likeness", "mean cosine of two items of a page"),
        ("different_items", f"different items on {found['queries']} pages"),
        ("never_bought", "share of slots for items that nobody bought"),
    )
    figure = Figure(figsize=(11, 3.8), layout="constrained", facecolor="white")
    colours = dict(zip(SETTINGS, ("#0072B2", "#D55E00", "#009E73"), strict=True))
    for axes, (name, label) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for kind in SETTINGS:
            points = [found[PLAIN], *found[kind].values()]
            x, y = [one[name] for one in points], [one["recall"] for one in points]
            axes.plot(x, y, "o-", color=colours[kind], label=kind, markersize=4)
            for at, one in found[kind].items():
                spot = one[name], one["recall"]
                axes.annotate(at, spot, (4, 3), textcoords="offset points", fontsize=7, color="#333333")
        axes.plot(found[PLAIN][name], found[PLAIN]["recall"], "s", color="black", markersize=6, label=PLAIN)
        axes.set_xlabel(label)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("recall@20")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
