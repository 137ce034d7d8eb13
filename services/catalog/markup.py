"""Removes HTML markup from product texts.

This is not a sanitizer: the result is for encoders and explanations, never for a browser. `html.parser` is
not used: it takes "black&copper" for "black©per", drops "<M>", and needs quadratic time on some malformed
input.
"""

import html
import re

_BLOCKS = frozenset(
    """
    address article aside blockquote body br caption center col colgroup dd details dialog div dl dt
    fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hgroup hr html iframe img
    input li link main menu meta nav noscript object ol option p picture pre script section select
    source style summary svg table tbody td template textarea tfoot th thead title tr track ul video
    audio embed button canvas map area param
    """.split()  # noqa: SIM905 - a line for each would hide the rest
)
_INLINE = frozenset(
    """
    a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark q rp rt ruby s
    samp small span strike strong sub sup time tt u var wbr
    """.split()  # noqa: SIM905 - a line for each would hide the rest
)
_TAG = re.compile(
    r"""</?([a-zA-Z][a-zA-Z0-9]*+)(?=[\s/>])
        (?: [^<>"']*+ (?: (?:"[^"<]*+"|'[^'<]*+') [^<>"']*+ )*+ > | [^<>]*+ > )""",
    re.VERBOSE,
)
_DECLARATION = re.compile(r"<[!?][a-zA-Z][^<>]*+>|<!\[CDATA\[|\]\]>")
_REFERENCE = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_HIDDEN = (
    (re.compile("<!--"), re.compile("-->")),
    (re.compile(r"<script(?=[\s/>])[^<>]*+>", re.IGNORECASE), re.compile(r"</script\s*+>", re.IGNORECASE)),
    (re.compile(r"<style(?=[\s/>])[^<>]*+>", re.IGNORECASE), re.compile(r"</style\s*+>", re.IGNORECASE)),
)
_MAX_PASSES = 3


def plain_text(text: str) -> str:
    """The text without HTML tags, comments, scripts and styles, and with character references decoded.

    Tags that end a line or a cell become a space. A tag that HTML does not have stays ("size <M>"), and so
    does a reference without its semicolon ("M&S"). Text that was escaped as a whole ("&lt;p&gt;") is decoded
    once more. A text without markup is returned unchanged; in others white space is collapsed.
    """
    for _ in range(_MAX_PASSES):
        if "<" not in text and "&" not in text:
            break
        previous, text = text, _decode(text)
        if text == previous:
            break
    return text


def _decode(text: str) -> str:
    words = text
    if "<" in text:
        for opening, closing in _HIDDEN:
            words = _remove(words, opening, closing)
        words = _TAG.sub(_replacement, _DECLARATION.sub(" ", words))
    words = _REFERENCE.sub(lambda reference: html.unescape(reference[0]), words)
    return text if words == text else " ".join(words.split())


def _remove(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> str:
    """The text without everything from an opening to its closing; an opening that never closes stays."""
    parts, position = [], 0
    while (start := opening.search(text, position)) and (end := closing.search(text, start.end())):
        parts += [text[position : start.start()], " "]
        position = end.end()
    return "".join([*parts, text[position:]])


def _replacement(tag: re.Match[str]) -> str:
    name = tag[1].lower()
    if name in _BLOCKS:
        return " "
    return "" if name in _INLINE else tag[0]
