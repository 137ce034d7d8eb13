"""Links and anchors in the Markdown pages resolve."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("README*.md"),
        *(ROOT / name for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
_FENCE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1[ \t]*$", re.MULTILINE | re.DOTALL)
_INDENTED_BLOCK = re.compile(r"(?<=\n\n)(?:(?: {4}|\t).*(?:\n|\Z)|\n)+")
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^ {0,3}\[[^\]^]+\]:\s*<?(\S+?)>?\s*$", re.MULTILINE)
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$", re.MULTILINE)
_HTML_ANCHOR = re.compile(r"<a\s+(?:id|name)=\"([^\"]+)\"")


def without_blocks(text: str) -> str:
    """The text without its code blocks."""
    return _INDENTED_BLOCK.sub("\n", _FENCE.sub("", text))


def links(page: Path) -> list[str]:
    """The targets of a page's links, external ones left out."""
    prose = _CODE.sub("", without_blocks(page.read_text()))
    targets = [*_LINK.findall(prose), *_REFERENCE.findall(prose)]
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def anchors(text: str) -> set[str]:
    """The anchors of a page: GitHub's names of its headings, and anchors written in HTML."""
    return {*_heading_anchors(text), *_HTML_ANCHOR.findall(text)}


def _heading_anchors(text: str) -> Iterator[str]:
    counts = Counter[str]()
    for _, title in _HEADING.findall(without_blocks(text)):
        visible = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        letters = (c for c in visible.lower() if c in " -_" or unicodedata.category(c)[0] in "LNM")
        name = "".join(letters).replace(" ", "-")
        yield f"{name}-{counts[name]}" if counts[name] else name
        counts[name] += 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_resolve_to_files_and_headings(page: Path) -> None:
    problems = []
    for link in links(page):
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            problems.append(f"{link}: no such file")
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target.read_text())):
            problems.append(f"{link}: no such heading")
    assert not problems


def test_index_links_to_every_page_outside_decisions_and_experiments() -> None:
    index = ROOT / "docs" / "index.md"
    targets = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    pages = {page for page in (ROOT / "docs").glob("*.md") if page != index}
    assert pages <= targets


@pytest.mark.parametrize("folder", ["decisions", "experiments"])
def test_the_index_of_a_folder_of_records_is_complete(folder: str) -> None:
    listing = ROOT / "docs" / folder / "README.md"
    entries = {(listing.parent / link.partition("#")[0]).resolve() for link in links(listing)}
    assert set(listing.parent.glob("2*.md")) | set(listing.parent.glob("0*.md")) <= entries


def test_anchors_equal_those_of_github() -> None:
    page = '# A `tail -5` title\n\n## Twice\n\n## Twice\n\n    # no heading\n\n<a id="own"></a>\n'
    assert anchors(page) == {"a-tail--5-title", "twice", "twice-1", "own"}


def test_links_in_code_are_ignored(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[one](a.md) and `[two](b.md)`\n\n    [three](c.md)\n\n```\n[four](d.md)\n```\n\n[five](https://e)\n"
    )
    assert links(page) == ["a.md"]


_PATH = re.compile(r"`((?:services|training|analytics|cli|tests|protos/vitrine)/[\w/.]+)`")


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(name: str) -> None:
    paths = set(_PATH.findall((ROOT / name).read_text()))
    assert paths
    assert not {path for path in paths if not (ROOT / path).exists()}
