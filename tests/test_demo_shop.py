"""The made-up shop is the same every time, reads without a loss, and has in it what it says."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.behaviour import PAGE, TYPES
from demo.catalogue import FRESH_DAYS, make_catalogue
from demo.drawing import Sketch, draw
from demo.measure import Asked, Judge
from demo.shop import END, Recipe, is_made, made_until, write_shop
from demo.tastes import Truth
from demo.world import COLOUR_NAMES, KIND_NAMES, PATTERNS, STYLES
from training.dataset import Shop, read_shop

RECIPE = Recipe(seed=3, items=320, users=420, new_users=20, held_out=24)
IMPRESSION, CLICK, CART, PURCHASE = range(4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    write_shop(out, RECIPE)
    return out


@pytest.fixture(scope="module")
def shop(made: Path) -> Shop:
    return read_shop(made / "shop")


@pytest.fixture(scope="module")
def truth(made: Path) -> Truth:
    return Truth.load(made / "truth.npz")


@pytest.fixture(scope="module")
def rows(shop: Shop, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Of each event the rows of its person and item in the truth."""
    people = {user_id: n for n, user_id in enumerate(truth.user_ids)}
    items = {item_id: n for n, item_id in enumerate(truth.item_ids)}
    events = shop.events
    return (
        np.array([people[u] for u in events.user_ids])[events.user],
        np.array([items[i] for i in events.item_ids])[events.item],
    )


def test_a_recipe_gives_the_same_bytes_and_another_seed_gives_others(made: Path, tmp_path: Path) -> None:
    def files(root: Path) -> dict[str, bytes]:
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    write_shop(tmp_path / "again", RECIPE)
    assert files(tmp_path / "again") == files(made)
    assert is_made(made, RECIPE)
    assert made_until(made) == END
    assert not is_made(made, replace(RECIPE, seed=4))
    assert made_until(tmp_path) is None
    first, other = (make_catalogue(seed, 40, END) for seed in (3, 4))
    assert {p.title for p in first}.isdisjoint(p.title for p in other)


def test_it_reads_without_losing_a_row(made: Path, shop: Shop) -> None:
    for report in shop.reports.values():
        assert report.kept == report.read
        assert not report.reasons
    assert len(shop.items) == RECIPE.items == len(shop.photographs)
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
        with Image.open(made / "shop" / "images" / f"{item.id}.jpg") as picture:
            assert picture.size == (128, 128)


def test_held_out_products_are_of_the_same_world_and_not_in_the_shop(made: Path, shop: Shop) -> None:
    lines = (made / "heldout" / "items.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [json.loads(line) for line in lines]
    assert len(held_out) == RECIPE.held_out
    assert {row["id"] for row in held_out}.isdisjoint(item.id for item in shop.items)
    assert {row["family_id"] for row in held_out}.isdisjoint(item.family_id for item in shop.items)
    assert {row["type"] for row in held_out} <= set(KIND_NAMES)
    assert all((made / "heldout" / "images" / f"{row['id']}.jpg").is_file() for row in held_out)


def test_few_products_sell_most_and_many_sell_never(shop: Shop) -> None:
    sold = np.sort(np.bincount(shop.events.item[shop.events.kind == PURCHASE], minlength=RECIPE.items))[::-1]
    assert sold[: RECIPE.items // 10].sum() > 0.35 * sold.sum()
    assert (sold == 0).sum() > 0.15 * RECIPE.items


def test_new_products_and_new_people_have_done_nothing_yet(
    shop: Shop, truth: Truth, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    users, items = rows
    available = np.array([item.available_from.timestamp() for item in shop.items if item.available_from])
    fresh = available > (END - timedelta(days=FRESH_DAYS)).timestamp()
    assert 4 <= fresh.sum() < 0.15 * RECIPE.items
    assert not fresh[items].any()
    assert (shop.events.time / 1e6 > available[items]).all()
    assert shop.events.time[-1] / 1e6 < END.timestamp()
    assert truth.new_people.sum() == RECIPE.new_users
    assert set(users) == set(np.flatnonzero(~truth.new_people))


def test_what_is_clicked_pleases_more_than_what_is_passed_over(
    shop: Shop, truth: Truth, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    users, items = rows
    utility = truth.utility(users)[np.arange(len(users)), items]
    kind = shop.events.kind
    mean = [utility[kind == k].mean() for k in (IMPRESSION, CLICK, CART)]
    assert mean[CLICK] > mean[IMPRESSION] + 0.5
    assert mean[CART] > mean[CLICK] + 0.2
    assert utility[kind == PURCHASE].mean() > mean[CLICK] + 0.2


def test_a_better_place_gets_more_clicks_for_the_same_utility(
    shop: Shop, truth: Truth, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    events = shop.events
    clicks, shown = (
        set(
            zip(
                *(c[events.kind == k].tolist() for c in (events.session, events.item, events.position)),
                strict=True,
            )
        )
        for k in (CLICK, IMPRESSION)
    )
    assert clicks <= shown
    users, items = rows
    seen = events.kind == IMPRESSION
    utility = truth.utility(users)[np.arange(len(users)), items][seen]
    position = events.position[seen]
    triples = zip(events.session[seen].tolist(), events.item[seen].tolist(), position.tolist(), strict=True)
    clicked = np.array([triple in clicks for triple in triples])
    assert (position.min(), position.max()) == (1, PAGE)
    for low, high in ((-1, 1), (1, 2.5), (2.5, 6)):
        alike = (utility >= low) & (utility < high)
        top, bottom = clicked[alike & (position <= 3)].mean(), clicked[alike & (position > PAGE - 3)].mean()
        assert top > 1.4 * bottom


def test_the_best_page_of_the_truth_is_the_best_page(shop: Shop, truth: Truth) -> None:
    judge = Judge(truth, shop)
    asked = Asked(np.flatnonzero(~truth.new_people)[:30], [[] for _ in range(30)])
    best = judge.top(truth.utility(asked.users), asked)
    assert judge.worth(best, asked)["share"] == pytest.approx(1)
    worths = [
        judge.worth(judge.top(scores, asked), asked)["share"]
        for scores in (judge.popular(asked), judge.bought_together(asked))
    ]
    assert all(0.05 < share < 0.9 for share in worths)
    for page, user in zip(best, asked.users, strict=True):
        assert not judge.bought[user, page].any()


def drawn(sketches: list[Sketch]) -> np.ndarray:
    return np.stack([np.asarray(draw(sketch), np.float32) / 255 for sketch in sketches])


def nearest(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    names = np.unique(labels)
    centres = np.stack([train[labels == name].mean(0) for name in names])
    return np.asarray(names[((test[:, None] - centres) ** 2).sum(-1).argmin(1)])


def sketches_of(seed: int, count: int) -> list[Sketch]:
    return [p.sketch for p in make_catalogue(seed, count, datetime(2026, 1, 1, tzinfo=UTC))]


def test_a_plain_centroid_tells_colours_and_types_from_the_pictures() -> None:
    one, two = sketches_of(11, 420), sketches_of(12, 160)
    seen, unseen = drawn(one), drawn(two)

    def histogram(pictures: np.ndarray) -> np.ndarray:
        middle = (pictures[:, 40:104, 36:92] * 5.999).astype(int)
        codes = middle @ np.array([36, 6, 1])
        counts = [np.bincount(c.ravel(), minlength=216) for c in codes]
        return np.asarray(np.stack(counts) / codes[0].size)

    colours = np.array([COLOUR_NAMES.index(s.colour) for s in one])
    found = nearest(np.sqrt(histogram(seen)), colours, np.sqrt(histogram(unseen)))
    assert (found == [COLOUR_NAMES.index(s.colour) for s in two]).mean() > 5 / len(COLOUR_NAMES)

    def outline(pictures: np.ndarray) -> np.ndarray:
        apart = np.abs(pictures - pictures[:, :1, :1]).max(-1) > 0.2
        return np.asarray(apart.reshape(len(apart), 16, 8, 16, 8).mean((2, 4)).reshape(len(apart), -1))

    kinds = np.array([KIND_NAMES.index(s.kind) for s in one])
    found = nearest(outline(seen), kinds, outline(unseen))
    assert (found == [KIND_NAMES.index(s.kind) for s in two]).mean() > 10 / len(KIND_NAMES)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_every_type_is_drawn_and_shows_its_pattern(kind: str) -> None:
    plain = Sketch(kind, "blue", PATTERNS[0], STYLES[0], (1, 2), 3)
    pictures = drawn([plain, *(replace(plain, pattern=name) for name in PATTERNS[1:])])
    assert pictures[0].std() > 0.05
    for a in range(len(PATTERNS)):
        for b in range(a):
            assert np.abs(pictures[a] - pictures[b]).max() > 0.2
