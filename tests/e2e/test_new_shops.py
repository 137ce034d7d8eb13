"""Small and new shops train with defaults, serve and answer sensibly."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vitrine.catalog.v1 import event_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from cli.import_events import import_events
from cli.main import main
from services.catalog.bundle import Bundle
from services.serving.app import App
from services.serving.settings import Settings
from tests.support.models import make_image_encoder, make_text_encoder
from training.data.dataset import read_shop

pytestmark = pytest.mark.usefixtures("single_thread")
WORLDS = ("garden", "kitchen")
Rows = list[dict[str, Any]]


@dataclass
class Kind:
    """Items, events, and settings; `pictured` items have an image file."""

    items: Rows
    events: Rows
    settings: str = ""
    pictured: list[str] = field(default_factory=list)


def items(count: int, **more: str) -> Rows:
    return [{"id": f"{w}{n}", "title": f"{w} thing {n}", **more} for w in WORLDS for n in range(count // 2)]


def events(users: int, days: int, count: int, **more: str) -> Rows:
    """Each user stays in one world, and takes three of its items on some of the days."""
    generator, rows = np.random.default_rng(0), []
    for user in range(users):
        for day in generator.permutation(days)[: max(1, days // 2)]:
            for n in generator.permutation(count // 2)[:3]:
                item, time = f"{WORLDS[user % 2]}{n}", f"2026-01-{1 + day:02}T10:00"
                rows.append({"user_id": f"u{user}", "item_id": item, "time": time, **more})
    return rows


def ten_items() -> Kind:
    return Kind(items(10), events(20, 10, 10))


def one_user() -> Kind:
    return Kind(items(30), events(1, 20, 30))


def one_day() -> Kind:
    return Kind(items(30), events(15, 1, 30))


def views_alone() -> Kind:
    return Kind(items(30), events(15, 10, 30, type="view"), "[event_types]\nview = 1.0\n")


def ratings_alone() -> Kind:
    """No texts worth reading, and a type that is neither a view nor a purchase."""
    shop = Kind(items(30), events(15, 10, 30, type="rating"), "[event_types]\nrating = 1.0\n")
    for index, item in enumerate(shop.items):
        item["title"] = f"No. {index}"
    return shop


def guests_alone() -> Kind:
    """Every basket is of another user."""
    shop = ten_items()
    for row in shop.events:
        row["user_id"] = f"{row['user_id']} on {row['time']}"
    return shop


def images_alone() -> Kind:
    """No item has a text."""
    shop = Kind(items(12), events(15, 10, 12))
    shop.pictured = [item["id"] for item in shop.items]
    shop.items = [{"id": item["id"], "price": 3} for item in shop.items]
    return shop


KINDS = (ten_items, one_user, one_day, views_alone, ratings_alone, guests_alone, images_alone)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bases")
    make_text_encoder(directory / "text")
    make_image_encoder(directory / "image")
    return directory


def write(directory: Path, kind: Kind) -> None:
    (directory / "images").mkdir(parents=True)
    for name, rows in (("items", kind.items), ("events", kind.events)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "shop.toml").write_text(kind.settings)
    for n, item_id in enumerate(kind.pictured):
        color = (20 * n, 255 - 20 * n, 90)
        Image.new("RGB", (40, 40), color).save(directory / "images" / f"{item_id}.png")


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
async def test_a_small_shop_trains_and_answers(
    make: Callable[[], Kind], bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, shop = make(), tmp_path / "shop"
    write(shop, kind)
    arguments = [f"--data={shop}", f"--out={tmp_path / 'out'}", f"--text-base={bases / 'text'}"]
    assert main(["train", *arguments, f"--image-base={bases / 'image'}"]) == 0
    lines = capsys.readouterr().err.splitlines()[-5:]
    words = [line.split(maxsplit=1)[0] for line in lines]
    assert words == ["Data:", "Texts", "Ranking:", "Quality:", "Next:"]
    bundle = Bundle(tmp_path / "out")
    settings = Settings(bundle=bundle.directory, state=tmp_path / "state", address="127.0.0.1:0")
    import_events(settings, bundle, read_shop(shop))
    app = App(settings)
    await app.start()
    assert app.gateway is not None
    size, first = len(kind.items), kind.events[0]
    requests = {
        "known": pb.RecommendRequest(
            page_size=20, user_id=first["user_id"], purchased_items_policy=pb.PURCHASED_ITEMS_POLICY_KEEP
        ),
        "anonymous": pb.RecommendRequest(page_size=20),
        "session": pb.RecommendRequest(
            page_size=20, session=[event_pb2.SessionItem(item_id=first["item_id"])]
        ),
    }
    pages = {name: await app.gateway.Recommend(request, None) for name, request in requests.items()}
    similar = await app.gateway.SimilarItems(
        pb.SimilarItemsRequest(item_id=first["item_id"], page_size=5), None
    )
    await app.stop()
    for name, page in pages.items():
        ids = [item.item_id for item in page.items]
        assert not page.degraded, (name, page.degraded)
        assert len(set(ids)) == len(ids) == min(20, size - (name == "session")), name
    assert first["item_id"] not in [item.item_id for item in similar.items]
    assert len(similar.items) == 5
    if make is not images_alone and make is not one_user:
        own = first["item_id"].rstrip("0123456789")
        session = [item.item_id for item in pages["session"].items][:4]
        assert sum(item.startswith(own) for item in session) >= 3
