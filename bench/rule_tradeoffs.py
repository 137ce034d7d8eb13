"""The cost of rules and exploration: recall against diversity, coverage and exposure of unsold items.

    python -m bench.rule_tradeoffs --data DIR --shop bench/hm/shop.toml --bundle BUNDLES --out docs/plots

Each setting is a scenario of one served process; all scenarios answer the same queries of val. Prints a table
and writes curves.json and curves.png.
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

from cli.evaluate import request_of
from cli.evaluation_queries import read_queries
from cli.import_events import import_events
from services.catalog.bundle import Bundle, BundleCatalog
from services.serving.app import App
from services.serving.settings import Settings
from training.core.metrics import paired_interval, per_query
from training.data.dataset import read_shop

_PAGE = 20
_NOON = timedelta(hours=12)
_NEVER_PURCHASED = "max_age_days = 0, max_interactions = 0.0, max_impressions = 1000000"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "diversity": {f"{d:g}": f"diversity = {d}" for d in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)},
    "exploration": {
        f"{share:g}": f"exploration = {{ share = {share}, {_NEVER_PURCHASED} }}"
        for share in (0.05, 0.1, 0.2, 0.3, 0.5)
    },
    "one of a family per": {
        f"{window}": f'rules.caps = [{{ attribute = "family_id", max_count = 1, window = {window} }}]'
        for window in (5, 20)
    },
}
PLAIN = "plain"


def main() -> None:
    """Query, measure, print and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shop", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300, help="only the first queries")
    options = parser.parse_args()
    figures = measured(options.data, options.shop, options.bundle, options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "curves.json").write_text(json.dumps(figures, indent=1) + "\n")
    _draw(figures).savefig(options.out / "curves.png", dpi=144, metadata={"Software": None})
    _show(figures)


def measured(data: Path, shop_file: Path | None, bundle_path: Path, limit: int) -> dict[str, Any]:
    """Figures by kind of setting and setting; the key "plain" has those of the plain scenario."""
    bundle = Bundle(bundle_path)
    day, queries = read_queries(data, shop_file, "val")
    queries = queries[:limit]
    shop = read_shop(data, shop_file, until=day)
    variants = [(kind, value) for kind, options in SETTINGS.items() for value in options]
    with tempfile.TemporaryDirectory() as folder:
        scenarios = Path(folder) / "scenarios.toml"
        tables = [f'["{kind} {value}"]\n{SETTINGS[kind][value]}\n' for kind, value in variants]
        scenarios.write_text("\n".join(["[home]", *tables]))
        settings = Settings(
            bundle=bundle.directory,
            state=Path(folder) / "state",
            address="127.0.0.1:0",
            fixed_time=day + _NOON,
            exact_search=True,
            device="cpu",
            impression_log_days=0,
            scenarios=scenarios,
        )
        import_events(settings, bundle, shop)
        requests = [request_of(query, shop.settings.task) for query in queries]
        pages = asyncio.run(
            _pages(settings, requests, [PLAIN, *(f"{kind} {value}" for kind, value in variants)])
        )
    purchased = {shop.events.item_ids[item] for item in np.unique(shop.events.item).tolist()}
    targets = [list(query.targets) for query in queries]
    evaluator = _Evaluator(bundle.catalog(), purchased, targets, pages[PLAIN])
    return {
        "bundle": bundle.version,
        "queries": len(queries),
        PLAIN: evaluator(pages[PLAIN]),
        **{
            kind: {value: evaluator(pages[f"{kind} {value}"]) for value in options}
            for kind, options in SETTINGS.items()
        },
    }


async def _pages(
    settings: Settings, requests: Sequence[pb.RecommendRequest], scenarios: Sequence[str]
) -> dict[str, list[list[str]]]:
    """The first page of every request in every scenario."""
    app = App(settings)
    await app.start()
    assert app.gateway is not None  # noqa: S101 - all services are hosted
    pages: dict[str, list[list[str]]] = {scenario: [] for scenario in scenarios}
    try:
        for request in requests:
            for scenario in scenarios:
                request.scenario, request.page_size = "" if scenario == PLAIN else scenario, _PAGE
                response = await app.gateway.Recommend(request, None)
                pages[scenario].append([item.item_id for item in response.items])
    finally:
        await app.stop()
    return pages


class _Evaluator:
    def __init__(
        self,
        catalog: BundleCatalog,
        purchased: set[str],
        targets: Sequence[Sequence[str]],
        plain: Sequence[Sequence[str]],
    ) -> None:
        self._code = {item.id: index for index, item in enumerate(catalog.items)}
        self._vectors = catalog.vectors["text"].astype(np.float32)
        self._purchased = purchased
        self._targets = [self._coded(query_targets) for query_targets in targets]
        self._plain = self._recalls(plain)

    def __call__(self, pages: Sequence[Sequence[str]]) -> dict[str, Any]:
        """Recall and its difference from the plain pages, similarity within a page, coverage and exposure."""
        recalls = self._recalls(pages)
        slots = [item for page in pages for item in page]
        return {
            "recall": float(recalls.mean()),
            "minus_plain": paired_interval(recalls, self._plain).to_dict(),
            "similarity": float(np.mean([self._similarity(page) for page in pages])),
            "different_items": len(set(slots)),
            "never_purchased": float(np.mean([item not in self._purchased for item in slots])),
            "never_purchased_items": len({item for item in slots if item not in self._purchased}),
        }

    def _coded(self, items: Sequence[str]) -> np.ndarray:
        return np.array([self._code.setdefault(item, len(self._code)) for item in items], np.int64)

    def _recalls(self, pages: Sequence[Sequence[str]]) -> np.ndarray:
        return per_query([self._coded(page) for page in pages], self._targets, _PAGE)["recall"]

    def _similarity(self, page: Sequence[str]) -> float:
        """The mean cosine of two items of a page, by text."""
        vectors = self._vectors[self._coded(page)]
        return float((vectors @ vectors.T)[np.triu_indices(len(vectors), 1)].mean())


def _show(results: Mapping[str, Any]) -> None:
    table = Table(
        "", "recall@20", "minus plain", "similarity", "different items", "unsold slots", "unsold items"
    )
    rows = [(PLAIN, results[PLAIN])]
    rows += [(f"{kind} {at}", figures) for kind in SETTINGS for at, figures in results[kind].items()]
    for name, point in rows:
        difference = point["minus_plain"]
        low, high = difference["ci95"]
        table.add_row(
            name,
            f"{point['recall']:.3f}",
            f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{point['similarity']:.3f}",
            str(point["different_items"]),
            f"{point['never_purchased']:.1%}",
            str(point["never_purchased_items"]),
        )
    Console(width=140).print(table)


def _draw(results: Mapping[str, Any]) -> Figure:
    """Recall over each of three figures, with one line for each kind of setting that starts at plain."""
    panels = (
        ("similarity", "mean cosine of two items of a page"),
        ("different_items", f"different items on {results['queries']} pages"),
        ("never_purchased", "share of slots with unsold items"),
    )
    figure = Figure(figsize=(11, 3.8), layout="constrained", facecolor="white")
    colors = dict(zip(SETTINGS, ("#0072B2", "#D55E00", "#009E73"), strict=True))
    for axes, (name, label) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for kind in SETTINGS:
            points = [results[PLAIN], *results[kind].values()]
            x, y = [figures[name] for figures in points], [figures["recall"] for figures in points]
            axes.plot(x, y, "o-", color=colors[kind], label=kind, markersize=4)
            for value, figures in results[kind].items():
                point = figures[name], figures["recall"]
                axes.annotate(value, point, (4, 3), textcoords="offset points", fontsize=7, color="#333333")
        axes.plot(
            results[PLAIN][name], results[PLAIN]["recall"], "s", color="black", markersize=6, label=PLAIN
        )
        axes.set_xlabel(label)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("recall@20")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
