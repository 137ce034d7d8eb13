"""The generated demo shop is reproducible and has the properties that its documentation states."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.behavior import PAGE, TYPES
from demo.catalog import FRESH_DAYS, make_catalog
from demo.drawing import Sketch, draw
from demo.measure import PageEvaluator, QueryUsers
from demo.shop import END, Recipe, is_current, shop_end, write_shop
from demo.tastes import Truth
from demo.world import COLOR_NAMES, KIND_NAMES, PATTERNS, STYLES
from training.data.dataset import ShopData, read_shop

RECIPE = Recipe(seed=3, items=320, users=420, new_users=20, held_out=24)
IMPRESSION, CLICK, CART, PURCHASE = range(4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    write_shop(out, RECIPE)
    return out


@pytest.fixture(scope="module")
def shop(directory: Path) -> ShopData:
    return read_shop(directory / "shop")


@pytest.fixture(scope="module")
def truth(directory: Path) -> Truth:
    return Truth.load(directory / "truth.npz")


@pytest.fixture(scope="module")
def rows(shop: ShopData, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Of each event the rows of its person and item in the truth."""
    users = {user_id: n for n, user_id in enumerate(truth.user_ids)}
    items = {item_id: n for n, item_id in enumerate(truth.item_ids)}
    events = shop.events
    return (
        np.array([users[u] for u in events.user_ids])[events.user],
        np.array([items[i] for i in events.item_ids])[events.item],
    )


def test_a_seed_determines_the_bytes_of_the_shop(directory: Path, tmp_path: Path) -> None:
    def files(root: Path) -> dict[str, bytes]:
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    write_shop(tmp_path / "again", RECIPE)
    assert files(tmp_path / "again") == files(directory)
    assert is_current(directory, RECIPE)
    assert shop_end(directory) == END
    assert not is_current(directory, replace(RECIPE, seed=4))
    assert shop_end(tmp_path) is None
    first, other = (make_catalog(seed, 40, END) for seed in (3, 4))
    assert {p.title for p in first}.isdisjoint(p.title for p in other)


def test_the_shop_reads_without_a_lost_row(directory: Path, shop: ShopData) -> None:
    for report in shop.reports.values():
        assert report.rows_used == report.rows_read
        assert not report.reasons
    assert len(shop.items) == RECIPE.items == len(shop.images)
    assert shop.settings.event_types == {"impression": 0, "click": 0.25, "cart": 0.5, "purchase": 1}
    assert list(shop.settings.event_types) == list(TYPES)
    for item in shop.items[::50]:
        assert len(item.description) > 40
        assert {a.name for a in item.attributes} == {
            "type",
            "colour",
            "pattern",
            "style",
            "material",
            "brand",
        }
        with Image.open(directory / "shop" / "images" / f"{item.id}.jpg") as picture:
            assert picture.size == (128, 128)


def test_held_out_products_are_similar_but_not_in_the_shop(directory: Path, shop: ShopData) -> None:
    lines = (directory / "heldout" / "items.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [json.loads(line) for line in lines]
    assert len(held_out) == RECIPE.held_out
    assert {row["id"] for row in held_out}.isdisjoint(item.id for item in shop.items)
    assert {row["family_id"] for row in held_out}.isdisjoint(item.family_id for item in shop.items)
    assert {row["type"] for row in held_out} <= set(KIND_NAMES)
    assert all((directory / "heldout" / "images" / f"{row['id']}.jpg").is_file() for row in held_out)


def test_few_products_sell_most_and_many_never_sell(shop: ShopData) -> None:
    sold = np.sort(np.bincount(shop.events.item[shop.events.kind == PURCHASE], minlength=RECIPE.items))[::-1]
    assert sold[: RECIPE.items // 10].sum() > 0.35 * sold.sum()
    assert (sold == 0).sum() > 0.15 * RECIPE.items


def test_new_products_and_new_users_have_no_events(
    shop: ShopData, truth: Truth, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    users, items = rows
    available = np.array([item.available_from.timestamp() for item in shop.items if item.available_from])
    fresh = available > (END - timedelta(days=FRESH_DAYS)).timestamp()
    assert 4 <= fresh.sum() < 0.15 * RECIPE.items
    assert not fresh[items].any()
    assert (shop.events.time / 1e6 > available[items]).all()
    assert shop.events.time[-1] / 1e6 < END.timestamp()
    assert truth.new_users.sum() == RECIPE.new_users
    assert set(users) == set(np.flatnonzero(~truth.new_users))


def test_clicked_items_have_a_higher_utility_than_ignored_ones(
    shop: ShopData, truth: Truth, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    users, items = rows
    utility = truth.utility(users)[np.arange(len(users)), items]
    kind = shop.events.kind
    mean = [utility[kind == k].mean() for k in (IMPRESSION, CLICK, CART)]
    assert mean[CLICK] > mean[IMPRESSION] + 0.5
    assert mean[CART] > mean[CLICK] + 0.2
    assert utility[kind == PURCHASE].mean() > mean[CLICK] + 0.2


def test_a_higher_position_gets_more_clicks_for_the_same_utility(
    shop: ShopData, truth: Truth, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    events = shop.events
    clicks, impressions = (
        set(
            zip(
                *(c[events.kind == k].tolist() for c in (events.session, events.item, events.position)),
                strict=True,
            )
        )
        for k in (CLICK, IMPRESSION)
    )
    assert clicks <= impressions
    users, items = rows
    is_impression = events.kind == IMPRESSION
    utility = truth.utility(users)[np.arange(len(users)), items][is_impression]
    position = events.position[is_impression]
    triples = zip(
        events.session[is_impression].tolist(),
        events.item[is_impression].tolist(),
        position.tolist(),
        strict=True,
    )
    is_click = np.array([triple in clicks for triple in triples])
    assert (position.min(), position.max()) == (1, PAGE)
    for low, high in ((-1, 1), (1, 2.5), (2.5, 6)):
        alike = (utility >= low) & (utility < high)
        top, bottom = is_click[alike & (position <= 3)].mean(), is_click[alike & (position > PAGE - 3)].mean()
        assert top > 1.4 * bottom


def test_the_oracle_page_has_the_highest_utility(shop: ShopData, truth: Truth) -> None:
    judge = PageEvaluator(truth, shop)
    users = QueryUsers(np.flatnonzero(~truth.new_users)[:30], [[] for _ in range(30)])
    best = judge.top(truth.utility(users.users), users)
    assert judge.evaluate(best, users)["share"] == pytest.approx(1)
    for scores in (judge.popular(users), judge.bought_together(users)):
        result = judge.evaluate(judge.top(scores, users), users)
        assert 0.05 < result["share_low"] < result["share"] < result["share_high"] < 0.9
    for page, user in zip(best, users.users, strict=True):
        assert not judge.bought[user, page].any()


def draw_images(sketches: list[Sketch]) -> np.ndarray:
    return np.stack([np.asarray(draw(sketch), np.float32) / 255 for sketch in sketches])


def nearest(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    names = np.unique(labels)
    centers = np.stack([train[labels == name].mean(0) for name in names])
    return np.asarray(names[((test[:, None] - centers) ** 2).sum(-1).argmin(1)])


def sketches_of(seed: int, count: int) -> list[Sketch]:
    return [p.sketch for p in make_catalog(seed, count, datetime(2026, 1, 1, tzinfo=UTC))]


def test_a_centroid_classifier_recognizes_colors_and_types() -> None:
    one, two = sketches_of(11, 420), sketches_of(12, 160)
    training, holdout = draw_images(one), draw_images(two)

    def histogram(pictures: np.ndarray) -> np.ndarray:
        middle = (pictures[:, 40:104, 36:92] * 5.999).astype(int)
        codes = middle @ np.array([36, 6, 1])
        counts = [np.bincount(c.ravel(), minlength=216) for c in codes]
        return np.asarray(np.stack(counts) / codes[0].size)

    colours = np.array([COLOR_NAMES.index(s.color) for s in one])
    predictions = nearest(np.sqrt(histogram(training)), colours, np.sqrt(histogram(holdout)))
    assert (predictions == [COLOR_NAMES.index(s.color) for s in two]).mean() > 5 / len(COLOR_NAMES)

    def outline(pictures: np.ndarray) -> np.ndarray:
        apart = np.abs(pictures - pictures[:, :1, :1]).max(-1) > 0.2
        return np.asarray(apart.reshape(len(apart), 16, 8, 16, 8).mean((2, 4)).reshape(len(apart), -1))

    kinds = np.array([KIND_NAMES.index(s.kind) for s in one])
    predictions = nearest(outline(training), kinds, outline(holdout))
    assert (predictions == [KIND_NAMES.index(s.kind) for s in two]).mean() > 10 / len(KIND_NAMES)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_every_type_is_drawn_and_shows_its_pattern(kind: str) -> None:
    plain = Sketch(kind, "blue", PATTERNS[0], STYLES[0], (1, 2), 3)
    pictures = draw_images([plain, *(replace(plain, pattern=name) for name in PATTERNS[1:])])
    assert pictures[0].std() > 0.05
    for a in range(len(PATTERNS)):
        for b in range(a):
            assert np.abs(pictures[a] - pictures[b]).max() > 0.2
