"""`python -m demo.measure`: how good are a running gateway's pages, judged by the made-up truth.

A page's worth is the mean true utility of its items, stated as a share of the way from a
random page (0) to the best page there is (1). Beside it stand two plain rules that see the
same events: bestsellers, and items bought by those who bought the same. Photographs of
held-out products are looked for by their texts with the bundle's own image encoder.
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
from services.bundle import Bundle
from services.server import CHANNEL_OPTIONS
from training.dataset import Shop, read_shop

PAGE = 20
SESSION = 2
_CUT = 10
_DAMPING = 5.0
_AWARE = 50
"""Of a new person's best so many items are the two of the session."""


@dataclass(frozen=True)
class Asked:
    """People to ask for: their rows in the truth, and the rows of items of their running session."""

    users: np.ndarray
    sessions: list[list[int]]


class Judge:
    """Worth of pages over the items of a shop; item and user rows are those of the truth."""

    def __init__(self, truth: Truth, shop: Shop) -> None:
        self.truth = truth
        events = shop.events
        row = {item_id: n for n, item_id in enumerate(truth.item_ids)}
        user = {user_id: n for n, user_id in enumerate(truth.user_ids)}
        users = np.array([user[u] for u in events.user_ids])[events.user]
        items = np.array([row.get(i, -1) for i in events.item_ids])[events.item]
        bought = (events.kind == list(shop.settings.event_types).index("purchase")) & (items >= 0)
        self.bought = np.zeros((len(user), len(row)), np.float32)
        self.bought[users[bought], items[bought]] = 1

    def popular(self, asked: Asked) -> np.ndarray:
        """Scores (B, N) of bestsellers, the same for everybody."""
        return np.broadcast_to(self.bought.sum(0), (len(asked.users), self.bought.shape[1]))

    def bought_together(self, asked: Asked) -> np.ndarray:
        """Scores (B, N): of those who bought what a person bought or looks at, how many bought an item.

        Shares of few buyers are damped, and what nobody decides is left to bestsellers.
        """
        count = self.bought.sum(0)
        together = self.bought.T @ self.bought
        np.fill_diagonal(together, 0)
        share = together / (count[:, None] + _DAMPING)
        seeds = self.bought[asked.users].copy()
        for place, session in enumerate(asked.sessions):
            seeds[place, session] = 1
        return np.asarray(seeds @ share + 1e-6 * count)

    def top(self, scores: np.ndarray, asked: Asked) -> list[list[int]]:
        """Pages by score, without what a person bought or has in the session."""
        left = np.where(self.bought[asked.users] > 0, -np.inf, scores)
        for place, session in enumerate(asked.sessions):
            left[place, session] = -np.inf
        return [row[:PAGE].tolist() for row in np.argsort(-left, axis=1, kind="stable")]

    def worth(self, pages: Sequence[Sequence[int]], asked: Asked) -> dict[str, float]:
        """Mean utility of the pages, of random and of best ones, and the share of the way between."""
        utility = self.truth.utility(asked.users)
        mean = float(np.mean([utility[n, page].mean() for n, page in enumerate(pages) if page]))
        best = self.top(utility, asked)
        oracle = float(np.mean([utility[n, page].mean() for n, page in enumerate(best)]))
        random = float(utility.mean())
        fresh = self.bought.sum(0) == 0
        return {
            "utility": mean,
            "random": random,
            "oracle": oracle,
            "share": (mean - random) / (oracle - random),
            "never_bought": float(np.mean([fresh[page].mean() for page in pages if page])),
        }


def sample(truth: Truth, judge: Judge, count: int, rng: np.random.Generator) -> dict[str, Asked]:
    """Known people who bought something, and brand-new ones with two items to their taste."""
    known = np.flatnonzero(judge.bought.sum(1) > 0)
    known = rng.permutation(known)[:count]
    new = np.flatnonzero(truth.new_people)[:count]
    best = np.argsort(-truth.utility(new), axis=1)[:, :_AWARE]
    sessions = [rng.permutation(row)[:SESSION].tolist() for row in best]
    return {"known people": Asked(known, [[] for _ in known]), "brand-new people": Asked(new, sessions)}


def pages_of(stub: pb_grpc.RecommendationServiceStub, truth: Truth, asked: Asked) -> list[list[int]]:
    """The gateway's pages as rows of the truth; an item that the truth does not know is left out."""
    row = {item_id: n for n, item_id in enumerate(truth.item_ids)}
    pages = []
    for user, session in zip(asked.users, asked.sessions, strict=True):
        request = pb.RecommendRequest(
            user_id=truth.user_ids[user],
            session=session_of([truth.item_ids[item] for item in session]),
            page_size=PAGE,
        )
        response = stub.Recommend(request, timeout=30)
        pages.append([row[item.item_id] for item in response.items if item.item_id in row])
    return pages


def compare(address: str, data: Path, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """For each group of people, what the pages of each way are worth."""
    truth, shop = Truth.load(data / "truth.npz"), read_shop(data / "shop")
    judge = Judge(truth, shop)
    found: dict[str, dict[str, dict[str, float]]] = {}
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = pb_grpc.RecommendationServiceStub(channel)
        for group, asked in sample(truth, judge, count, np.random.default_rng(0)).items():
            ways = {
                "Vitrine": pages_of(stub, truth, asked),
                "bought together": judge.top(judge.bought_together(asked), asked),
                "bestsellers": judge.top(judge.popular(asked), asked),
            }
            found[group] = {way: judge.worth(pages, asked) for way, pages in ways.items()}
    return found


def text_to_photograph(bundle: Path, held_out: Path) -> dict[str, float] | None:
    """Recall at 10 of a held-out product's photograph by its text; None without an image encoder."""
    directory = Bundle(bundle).component("image")
    if directory is None:
        return None
    # Loads torch, which the rest of a measurement does without.
    from services.embedding.encoders import ImageEncoder  # noqa: PLC0415

    rows = [json.loads(line) for line in (held_out / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = []
    for row in rows:
        with Image.open(held_out / "images" / f"{row['id']}.jpg") as picture:
            pictures.append(picture.convert("RGB"))
    encoder = ImageEncoder(directory)
    images = encoder.encode(pictures)
    found = {"products": float(len(rows)), "chance": min(1.0, _CUT / len(rows))}
    for name, texts in (
        ("title", [row["title"] for row in rows]),
        ("title and description", [f"{row['title']}. {row['description']}" for row in rows]),
    ):
        likeness = encoder.encode_texts(texts) @ images.T
        above = (likeness > np.diag(likeness)[:, None]).sum(1)
        found[name] = float((above < _CUT).mean())
    return found


def show(
    worths: dict[str, dict[str, dict[str, float]]], recall: dict[str, float] | None, console: Console
) -> None:
    """Print what was measured."""
    for group, ways in worths.items():
        table = Table(title=f"Pages of {PAGE} for {group}", title_justify="left")
        table.add_column("by")
        for name in ("mean true utility", "share of the best", "never bought before"):
            table.add_column(name, justify="right")
        for way, worth in ways.items():
            numbers = (f"{worth['utility']:.3f}", f"{worth['share']:.1%}", f"{worth['never_bought']:.1%}")
            table.add_row(way, *numbers)
        any_worth = next(iter(ways.values()))
        table.add_row("random", f"{any_worth['random']:.3f}", "0.0%", "")
        table.add_row("oracle", f"{any_worth['oracle']:.3f}", "100.0%", "")
        console.print(table)
    if recall is None:
        console.print("text to photograph: skipped, this bundle has no image/ encoder")
        return
    console.print(
        f"text to photograph, recall@{_CUT} among {recall['products']:.0f} held-out products: "
        f"{recall['title']:.1%} by title, {recall['title and description']:.1%} by title and description, "
        f"{recall['chance']:.1%} by chance"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line says; the last line is everything as JSON."""
    parser = argparse.ArgumentParser(prog="python -m demo.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="127.0.0.1:50051", help="the gateway's host:port")
    parser.add_argument("--data", type=Path, required=True, help="what demo.shop wrote: shop/ and truth.npz")
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle that is served")
    parser.add_argument("--people", type=int, default=300, help="at most so many of each group")
    options = parser.parse_args(arguments)
    worths = compare(options.address, options.data, options.people)
    recall = text_to_photograph(options.bundle, options.data / "heldout")
    console = Console()
    show(worths, recall, console)
    print(json.dumps({"pages": worths, "text_to_photograph": recall}))  # noqa: T201 - for programs


if __name__ == "__main__":
    main()
