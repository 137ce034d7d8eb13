"""HTML markup is removed from texts, and plain texts are unchanged."""

import html
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.catalog.items import Attribute, Item, item_text, title_words
from services.catalog.markup import plain_text
from services.embedding.store.schema import content_hashes
from tests.support.cpu_reference import reference_seconds

WORDS = st.lists(st.text("abcdefgh茶é", min_size=1, max_size=8), min_size=1, max_size=6)
TAGS = ("b", "span", "a", "em", "font")


@pytest.mark.parametrize(
    "text",
    ["a < b", "M&S", "black&copper", "R&D; x", "size <M>", "I <3 you", "a <b and", "  two  spaces ", "x > y"],
)
def test_a_text_without_markup_is_unchanged(text: str) -> None:
    assert plain_text(text) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<p>One.</p><p>Two</p>", "One. Two"),
        ("Salt &amp; pepper", "Salt & pepper"),
        ("caf&eacute; &#233; &#xe9;", "café é é"),
        ("<script>var a = '<b>';</script>Hi<style>p{}</style>", "Hi"),
        ("<!-- no -->yes", "yes"),
        ("""<a title="x > y" href='q'>link</a>""", "link"),
        ("one<br/>two<BR>three", "one two three"),
        ("<DIV\nclass=a>x</DIV>", "x"),
        ("<![CDATA[<b>x</b>]]>", "x"),
        ("&lt;p&gt;escaped &amp;amp; all&lt;/p&gt;", "escaped & all"),
        ("bo<b>ld</b>", "bold"),
        ("&nbsp;a&nbsp;b", "a b"),
    ],
)
def test_markup_is_removed(text: str, words: str) -> None:
    assert plain_text(text) == words


@given(words=WORDS, tag=st.sampled_from(TAGS), block=st.sampled_from(["p", "li", "td", "h2"]))
def test_the_same_words_with_and_without_markup_are_the_same_text(
    words: list[str], tag: str, block: str
) -> None:
    plain = " ".join(words)
    marked = "".join(f'<{block} style="color: red"><{tag}>{word}</{tag}></{block}>' for word in words)
    for text in (marked, html.escape(marked), f"<!-- x -->{marked}<script>y</script>"):
        assert plain_text(text) == plain
        assert plain_text(plain_text(text)) == plain_text(text)


@given(st.text("<>&;#/!-ab\"'= p", max_size=60))
def test_any_text_is_read_and_never_becomes_longer(text: str) -> None:
    assert len(plain_text(text)) <= len(text)


@pytest.mark.parametrize(
    "part", ["<", "<!--", "<a ", "<a '", "<a \"'", "<script>", "&amp;", "&amp;amp;", "<![CDATA[", "&#38;#38;"]
)
def test_a_megabyte_of_broken_markup_is_cheap(part: str) -> None:
    start = time.process_time()
    plain_text(part * ((1 << 20) // len(part)))
    assert time.process_time() - start < 60 * reference_seconds()  # quadratic time would be thousands


def test_markup_changes_neither_words_nor_vectors_and_stays_in_the_stored_item() -> None:
    plain = Item("a", "Salt & pepper", "Holds half a litre.", (Attribute("kind", ("mug & jug",)),))
    marked = Item(
        "b",
        "Salt &amp; <b>pepper</b>",
        "<p>Holds half a litre.</p>",
        (Attribute("kind", ("mug &amp; jug",)),),
    )
    assert item_text(plain) == item_text(marked)
    assert title_words(plain.title) == title_words(marked.title)
    assert content_hashes(plain)["text"] == content_hashes(marked)["text"]
    assert marked.title == "Salt &amp; <b>pepper</b>"
