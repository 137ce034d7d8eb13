"""`python -m demo.measure`: evaluate the pages of a running gateway against the true utilities of the demo.

The score of a page is the mean true utility of its items, scaled from a random page (0) to the best possible
page (1). Two baselines use the same events: bestsellers, and items of users who bought the same items.
Text-to-image retrieval uses held-out products and the bundle's image encoder.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.gateway.v1 import recommendation_service_pb2_grpc as pb_grpc

from demo.client import session_of
from demo.tastes import Truth
from services.catalog.bundle import Bundle
from services.rpc.server import CHANNEL_OPTIONS
from training.data.dataset import ShopData, read_shop

PAGE = 20
SESSION = 2
_CUT = 10
_DAMPING = 5.0
_TOP_ITEMS = 50
"""The session of a new user has two of their best items: this many."""


@dataclass(frozen=True)
class QueryUsers:
    """Users to evaluate: their rows in the truth, and the item rows of their session."""

    users: np.ndarray
    sessions: list[list[int]]


class PageEvaluator:
    """Evaluates pages of a shop; item and user rows are those of the truth."""

    def __init__(self, truth: Truth, shop: ShopData) -> None:
        self.truth = truth
        events = shop.events
        row = {item_id: n for n, item_id in enumerate(truth.item_ids)}
        user = {user_id: n for n, user_id in enumerate(truth.user_ids)}
        users = np.array([user[u] for u in events.user_ids])[events.user]
        items = np.array([row.get(i, -1) for i in events.item_ids])[events.item]
        is_purchase = (events.kind == list(shop.settings.event_types).index("purchase")) & (items >= 0)
        self.bought = np.zeros((len(user), len(row)), np.float32)
        self.bought[users[is_purchase], items[is_purchase]] = 1

    def popular(self, queries: QueryUsers) -> np.ndarray:
        """Scores (B, N) of bestsellers, the same for everybody."""
        return np.broadcast_to(self.bought.sum(0), (len(queries.users), self.bought.shape[1]))

    def bought_together(self, queries: QueryUsers) -> np.ndarray:
        """Scores (B, N): the share of buyers of the user's items who bought each other item.

        Shares of few buyers are damped; ties follow bestsellers.
        """
        count = self.bought.sum(0)
        together = self.bought.T @ self.bought
        np.fill_diagonal(together, 0)
        share = together / (count[:, None] + _DAMPING)
        seeds = self.bought[queries.users].copy()
        for index, session in enumerate(queries.sessions):
            seeds[index, session] = 1
        return np.asarray(seeds @ share + 1e-6 * count)

    def top(self, scores: np.ndarray, queries: QueryUsers) -> list[list[int]]:
        """Pages by score, without the purchases and session items of the user."""
        masked = np.where(self.bought[queries.users] > 0, -np.inf, scores)
        for index, session in enumerate(queries.sessions):
            masked[index, session] = -np.inf
        return [row[:PAGE].tolist() for row in np.argsort(-masked, axis=1, kind="stable")]

    def evaluate(self, pages: Sequence[Sequence[int]], queries: QueryUsers) -> dict[str, float]:
        """Mean utility of the pages, of random and of best pages; the scaled score and its interval.

        The interval is of 95%, by a bootstrap over users.
        """
        utility = self.truth.utility(queries.users)
        shown = [n for n, page in enumerate(pages) if page]
        if not shown:
            raise RuntimeError("every page is empty: has the gateway items of this shop?")
        of_page = np.array([utility[n, pages[n]].mean() for n in shown])
        best_pages = self.top(utility, queries)
        of_best = np.array([utility[n, best_pages[n]].mean() for n in shown])
        random, generator = float(utility.mean()), np.random.default_rng(0)
        rows = generator.integers(0, len(shown), (1000, len(shown)))
        shares = (of_page[rows].mean(1) - random) / (of_best[rows].mean(1) - random)
        low, high = np.percentile(shares, [2.5, 97.5]).tolist()
        fresh = self.bought.sum(0) == 0
        return {
            "utility": float(of_page.mean()),
            "random": random,
            "oracle": float(of_best.mean()),
            "share": float((of_page.mean() - random) / (of_best.mean() - random)),
            "share_low": low,
            "share_high": high,
            "never_bought": float(np.mean([fresh[page].mean() for page in pages if page])),
        }


def sample(
    truth: Truth, evaluator: PageEvaluator, count: int, rng: np.random.Generator
) -> dict[str, QueryUsers]:
    """Users with purchases, and new users with a session of two items of high utility."""
    buyers = np.flatnonzero(evaluator.bought.sum(1) > 0)
    buyers = rng.permutation(buyers)[:count]
    new = np.flatnonzero(truth.new_users)[:count]
    best = np.argsort(-truth.utility(new), axis=1)[:, :_TOP_ITEMS]
    sessions = [rng.permutation(row)[:SESSION].tolist() for row in best]
    return {
        "known users": QueryUsers(buyers, [[] for _ in buyers]),
        "new users": QueryUsers(new, sessions),
    }


def pages_of(stub: pb_grpc.RecommendationServiceStub, truth: Truth, queries: QueryUsers) -> list[list[int]]:
    """The gateway's pages as rows of the truth; an item that the truth does not know is left out."""
    row = {item_id: n for n, item_id in enumerate(truth.item_ids)}
    pages = []
    for user, session in zip(queries.users, queries.sessions, strict=True):
        request = pb.RecommendRequest(
            user_id=truth.user_ids[user],
            session=session_of([truth.item_ids[item] for item in session]),
            page_size=PAGE,
        )
        response = stub.Recommend(request, timeout=30)
        pages.append([row[item.item_id] for item in response.items if item.item_id in row])
    return pages


def compare(address: str, data: Path, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """The scores of each method for each group of users."""
    truth, shop = Truth.load(data / "truth.npz"), read_shop(data / "shop")
    evaluator = PageEvaluator(truth, shop)
    results: dict[str, dict[str, dict[str, float]]] = {}
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.RecommendationServiceStub(channel)
        for group, queries in sample(truth, evaluator, count, np.random.default_rng(0)).items():
            ways = {
                "Vitrine": pages_of(stub, truth, queries),
                "bought together": evaluator.top(evaluator.bought_together(queries), queries),
                "bestsellers": evaluator.top(evaluator.popular(queries), queries),
            }
            results[group] = {way: evaluator.evaluate(pages, queries) for way, pages in ways.items()}
    return results


def text_to_image_recall(bundle: Path, held_out: Path) -> dict[str, float] | None:
    """Recall at 10 of the image of a held-out product by its text; None without an image encoder."""
    directory = Bundle(bundle).component("image")
    if directory is None:
        return None
    # Loads torch, which the rest of a measurement does without.
    from services.embedding.encoders.encoders import ImageEncoder  # noqa: PLC0415

    rows = [json.loads(line) for line in (held_out / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = []
    for row in rows:
        with Image.open(held_out / "images" / f"{row['id']}.jpg") as image:
            pictures.append(image.convert("RGB"))
    encoder = ImageEncoder(directory)
    images = encoder.encode(pictures)
    recall = {"products": float(len(rows)), "chance": min(1.0, _CUT / len(rows))}
    for name, texts in (
        ("title", [row["title"] for row in rows]),
        ("title and description", [f"{row['title']}. {row['description']}" for row in rows]),
    ):
        similarity = encoder.encode_texts(texts) @ images.T
        rank = (similarity > np.diag(similarity)[:, None]).sum(1)
        recall[name] = float((rank < _CUT).mean())
    return recall


def show(
    results: dict[str, dict[str, dict[str, float]]], recall: dict[str, float] | None, console: Console
) -> None:
    """Print the results."""
    for group, ways in results.items():
        table = Table(title=f"Pages of {PAGE} for {group}", title_justify="left")
        table.add_column("by")
        for name in ("mean true utility", "share of the best", "never bought before"):
            table.add_column(name, justify="right", no_wrap=True)
        for way, scores in ways.items():
            share = f"{scores['share']:.1%} [{scores['share_low']:.1%}, {scores['share_high']:.1%}]"
            cells = (f"{scores['utility']:.3f}", share, f"{scores['never_bought']:.1%}")
            table.add_row(way, *cells)
        any_scores = next(iter(ways.values()))
        table.add_row("random", f"{any_scores['random']:.3f}", "0.0%", "")
        table.add_row("oracle", f"{any_scores['oracle']:.3f}", "100.0%", "")
        console.print(table)
    if recall is None:
        console.print("text to image: skipped, this bundle has no image/ encoder")
        return
    console.print(
        f"text to image, recall@{_CUT} among {recall['products']:.0f} held-out products: "
        f"{recall['title']:.1%} by title, {recall['title and description']:.1%} by title and description, "
        f"{recall['chance']:.1%} by chance"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line says; the last line is everything as JSON."""
    parser = argparse.ArgumentParser(prog="python -m demo.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="127.0.0.1:50051", help="the gateway's host:port")
    parser.add_argument("--data", type=Path, required=True, help="what demo.shop wrote: shop/ and truth.npz")
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle that is served")
    parser.add_argument("--users", type=int, default=300, help="maximum number of users in each group")
    options = parser.parse_args(arguments)
    results = compare(options.address, options.data, options.users)
    recall = text_to_image_recall(options.bundle, options.data / "heldout")
    console = Console()
    show(results, recall, console)
    print(json.dumps({"pages": results, "text_to_image": recall}))  # noqa: T201 - for programs


if __name__ == "__main__":
    main()
