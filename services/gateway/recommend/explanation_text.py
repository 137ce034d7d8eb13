"""Reasons as sentences for the shop's customers."""

from collections.abc import Mapping

LANGUAGES = ("en", "zh")
# By kind of evidence: with a purchased item, with a viewed item, and without an item.
_SENTENCES: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "en": {
        "behavior": (
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
        "anonymous": ("A good choice to begin with",) * 3,
    },
    "zh": {
        "behavior": (
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
        "anonymous": ("本店为新顾客推荐",) * 3,
    },
}


def sentence(kind: str, language: str, title: str, *, purchased: bool) -> str:
    """The sentence for a kind of evidence; `title` is that of the user's own item, empty for none.

    The kind "anonymous" is for a user without any history.
    """
    with_purchased, with_viewed, without_item = _SENTENCES[language][kind]
    if not title:
        return without_item
    return (with_purchased if purchased else with_viewed).format(title=title)
