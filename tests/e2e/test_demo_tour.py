"""The tour of a real server has every section, runnable calls and escaped content."""

import asyncio
import io
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import pytest_asyncio
from rich.console import Console

from demo import tour
from demo.client import Card, Section, Strip
from demo.measure import text_to_image_recall
from demo.page import render
from demo.shop import Recipe, write_shop
from services.serving.app import App
from services.serving.settings import Settings
from tests.support.shops import items

HOSTILE = "<script>alert(1)</script> \"quoted\" 'single' & [bold]{x} $body </pre><img src=x onerror=alert(2)>"
HOSTILE_USER = '<b>"ann"&\'$name'


class Page(HTMLParser):
    """The tags and texts of a page, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"h2": [], "h4": [], "code": []}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.texts:
            self.texts[tag].append("")
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop of tests.support.shops as a directory; every title is hostile, and so is a buyer's id."""
    directory = tmp_path_factory.mktemp("shop")
    with (directory / "items.jsonl").open("w") as lines:
        for item in items():
            lines.write(
                json.dumps({"id": item.id, "title": f"{item.title} {HOSTILE}", "type": item.id.split("-")[0]})
                + "\n"
            )
    with (directory / "events.csv").open("w") as lines:
        lines.write("user_id,item_id,time,type\n")
        quoted = HOSTILE_USER.replace('"', '""')
        for world, user in (("kitchen", f'"{quoted}"'), ("garden", "bob")):
            lines.writelines(f"{user},{world}-{i:02},2026-02-{i + 10},purchase\n" for i in range(4))
    (directory / "shop.toml").write_text('[items]\ntext_attributes = ["type"]\n')
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tour_output(bundle: Path, shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page, after a second tour of the same server, and what the terminal showed."""
    root = tmp_path_factory.mktemp("tour")
    output = io.StringIO()
    app = App(Settings(bundle=bundle, state=root / "state", address="127.0.0.1:0"))
    await app.start()
    try:
        address = f"127.0.0.1:{app.port}"
        console = Console(file=output, width=200)
        await asyncio.to_thread(tour.run, address, shop, root / "out", console)
        page = await asyncio.to_thread(tour.run, address, shop, root / "out", console)
    finally:
        await app.stop()
    return page.read_text(encoding="utf-8"), output.getvalue()


def test_every_section_exists_and_the_new_item_is_found(tour_output: tuple[str, str]) -> None:
    text, output = tour_output
    page = Page(text)
    titles = page.texts["h2"]
    assert titles == [
        f"Recommended for {HOSTILE_USER}",
        "Recommended for bob",
        "An anonymous user after two clicks",
        *(f"Search: {words}" for words in tour.SEARCHES),
        "Search by photograph",
        "A brand-new item",
        "The new item, found by a text",
        "The new item, found by a photograph",
        "The new item, recommended",
    ]
    assert all(title in output for title in titles)
    assert sum(tag == "section" for tag, _ in page.tags) == len(titles)
    # An image search has one item to return; a text search and an anonymous page choose among 41.
    assert text.count("the new item is at place 1<") >= 1
    assert "the new item is not among" not in text
    assert "acknowledged in" in text
    assert "degraded stage" not in text
    new = [
        attributes for tag, attributes in page.tags if tag == "article" and attributes["class"] == "card new"
    ]
    assert len(new) >= 3


def test_external_content_on_the_page_is_escaped(tour_output: tuple[str, str]) -> None:
    text, output = tour_output
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "b", "iframe", "object"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/")
        assert not (attributes.get("href") or "#").startswith("http")
    hostile = [title for title in page.texts["h4"] if "<script>" in title]
    assert len(hostile) > 20
    assert all(title.endswith(HOSTILE) for title in hostile)
    assert "[bold]{x}" in output


def test_a_hostile_section_is_escaped_and_keeps_its_text() -> None:
    card = Card(HOSTILE, HOSTILE, 1.5, b"", (HOSTILE,))
    section = Section(HOSTILE, HOSTILE, HOSTILE, (Strip(HOSTILE, (card,)),), (HOSTILE,))
    page = Page(render([section], HOSTILE))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert page.texts["h2"] == page.texts["h4"] == [HOSTILE]
    assert page.texts["code"] == [HOSTILE, HOSTILE]


def test_every_call_is_one_shell_command(tour_output: tuple[str, str]) -> None:
    calls = [code for code in Page(tour_output[0]).texts["code"] if code.startswith("grpcurl")]
    assert len(calls) == 11
    for call in calls:
        words = shlex.split(call)
        assert words[:3] == ["grpcurl", "-plaintext", "-d"]
        request = json.loads(words[3])
        assert request
        assert words[5].startswith("vitrine.gateway.v1.RecommendationService/")
        if "image" in request:
            path = request["image"].removeprefix("$(base64 -w0 ").removesuffix(")")
            assert Path(path).is_file()


def test_an_untrained_image_encoder_matches_images_at_random(bundle: Path, tmp_path: Path) -> None:
    write_shop(tmp_path, Recipe(items=20, users=30, new_users=4, held_out=40))
    recall = text_to_image_recall(bundle, tmp_path / "heldout")
    assert recall is not None
    assert recall["products"] == 40
    assert recall["chance"] == 0.25
    assert all(0 < recall[name] < 0.6 for name in ("title", "title and description"))
