"""Reasons as sentences, for people who look at a page."""

from collections.abc import Mapping

LANGUAGES = ("en", "zh")
# By kind of evidence: about an item that was bought, about one that was looked at, and about none.
_SENTENCES: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "en": {
        "behaviour": (
            "People who bought “{title}”, as you did, often choose this too",
            "People who looked at “{title}”, as you did, often choose this too",
            "Often chosen by people who shop like you",
        ),
        "text": (
            "Described much like “{title}”, which you bought",
            "Described much like “{title}”, which you looked at",
            "Described much like what you like",
        ),
        "image": (
            "Looks like “{title}”, which you bought",
            "Looks like “{title}”, which you looked at",
            "Looks like what you like",
        ),
        "attributes": (
            "Has much in common with “{title}”, which you bought",
            "Has much in common with “{title}”, which you looked at",
            "Fits what you usually choose",
        ),
        "popularity": ("Popular at the moment",) * 3,
        "nobody": ("A good choice to begin with",) * 3,
    },
    "zh": {
        "behaviour": (
            "购买过“{title}”的顾客也常选择这件商品",
            "浏览过“{title}”的顾客也常选择这件商品",
            "与您喜好相近的顾客常选择这件商品",
        ),
        "text": (
            "描述与您购买过的“{title}”相近",
            "描述与您浏览过的“{title}”相近",
            "描述与您喜欢的商品相近",
        ),
        "image": (
            "外观与您购买过的“{title}”相似",
            "外观与您浏览过的“{title}”相似",
            "外观与您喜欢的商品相似",
        ),
        "attributes": (
            "与您购买过的“{title}”有许多共同点",
            "与您浏览过的“{title}”有许多共同点",
            "符合您平时的选择",
        ),
        "popularity": ("近期热门",) * 3,
        "nobody": ("本店为新顾客推荐",) * 3,
    },
}


def sentence(kind: str, language: str, title: str, *, bought: bool) -> str:
    """The sentence of a kind of evidence; `title` is of the person's own item, empty for none.

    The kind "nobody" is of somebody of whom nothing is known: they have no likings yet.
    """
    of_bought, of_seen, of_none = _SENTENCES[language][kind]
    if not title:
        return of_none
    return (of_bought if bought else of_seen).format(title=title)
