"""Scores of the items of pages, by the ranking service as of each page, and metrics over pages."""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.clicks.logs import Page
from cli.import_events import import_events
from services.catalog.bundle import Bundle
from services.catalog.items import item_hash
from services.ranking.state.query_builder import User
from services.serving.app import App
from services.serving.settings import Settings
from training.data.dataset import read_shop

METRICS = ("auc", "mrr", "ndcg@5", "ndcg@10")
FINAL = "bundle"


def service_scores(bundle_path: Path, shop: Path, pages: Sequence[Page]) -> dict[str, list[np.ndarray]]:
    """Scores float64 (S,) of the items of each page, by component; `FINAL` are those that order a page.

    The events of the directory `shop` are loaded into a new state. Each page is ranked at its own time, so
    only the events before it count.
    """
    bundle = Bundle(bundle_path)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            bundle=bundle.directory,
            state=Path(folder),
            address="127.0.0.1:0",
            device="cpu",
            fixed_time=pages[-1].time,
            impression_log_days=0,
        )
        import_events(settings, bundle, read_shop(shop))
        return asyncio.run(_scores(settings, pages))


async def _scores(settings: Settings, pages: Sequence[Page]) -> dict[str, list[np.ndarray]]:
    app = App(settings)
    await app.start()
    try:
        ranking = app.current.ranking
        scores: dict[str, list[np.ndarray]] = {}
        for page in pages:
            hashes = np.array([item_hash(item) for item in page.shown], np.int64)
            ranked = await ranking.rank(User(page.user), page.time, hashes)
            for name, values in {FINAL: ranked.scores, **ranked.components}.items():
                scores.setdefault(name, []).append(np.nan_to_num(values.astype(np.float64), nan=-1e9))
    finally:
        await app.stop()
    return scores


def per_page(scores: Sequence[np.ndarray], pages: Sequence[Page], seed: int = 0) -> Mapping[str, np.ndarray]:
    """Each metric for each page, float64 (P,). Equal scores are in random order, half in an AUC."""
    generator = np.random.default_rng(seed)
    values = np.array(
        [
            _metrics(score, np.array([item in page.clicked for item in page.shown]), generator)
            for score, page in zip(scores, pages, strict=True)
        ]
    )
    return dict(zip(METRICS, values.T, strict=True))


def _metrics(score: np.ndarray, clicked: np.ndarray, generator: np.random.Generator) -> tuple[float, ...]:
    order = np.lexsort((generator.random(len(score)), -score))
    gains = clicked[order].astype(np.float64)
    rank = np.arange(1, len(gains) + 1)
    positive, negative = score[clicked], score[~clicked]
    difference = positive[:, None] - negative[None, :]
    auc = float((difference > 0).mean() + (difference == 0).mean() / 2) if difference.size else 0.5
    mrr = float((gains / rank).sum() / gains.sum())
    discount = 1 / np.log2(rank + 1)
    ndcg = [float(gains[:k] @ discount[:k] / discount[: min(k, int(gains.sum()))].sum()) for k in (5, 10)]
    return auc, mrr, *ndcg
