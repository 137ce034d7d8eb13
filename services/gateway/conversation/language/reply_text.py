"""The text of a reply: what was understood, how many items match, and which constraints were relaxed."""

from collections.abc import Mapping, Sequence

from services.gateway.conversation.language.dialogue_state import (
    PRICE,
    AttributeConstraint,
    Change,
    Forget,
    ItemPreference,
    PriceConstraint,
    Reset,
    SearchWords,
)

_PHRASES: Mapping[str, Mapping[str, str]] = {
    "en": {
        "positive": "{attribute} {texts}",
        "negative": "{attribute} not {texts}",
        "or": " or ",
        "range": "price from {low} to {high}",
        "high": "price at most {high}",
        "low": "price at least {low}",
        "liked": "like “{item}”",
        "disliked": "not “{item}”",
        "words": "“{words}”",
        "dropped words": "no longer “{words}”",
        "forget": "any {attribute}",
        "price": "price",
        "reset": "start again",
        "understood": "Understood: {list}. ",
        "nothing": "I understood nothing of this. ",
        "unrecognized": "I did not understand {list}. ",
        "relaxed": "Nothing meets all of that, so I set aside: {list}. ",
        "dropped": "That is a lot: I no longer keep to {list}. ",
        "items": "Here are {count} items.",
        "one item": "Here is 1 item.",
        "no items": "I found nothing.",
        "separator": "; ",
    },
    "zh": {
        "positive": "{attribute}：{texts}",
        "negative": "{attribute}不要{texts}",
        "or": "或",
        "range": "价格{low}到{high}",
        "high": "价格不超过{high}",
        "low": "价格不低于{low}",
        "liked": "像“{item}”",
        "disliked": "不要“{item}”",
        "words": "“{words}”",
        "dropped words": "不再要“{words}”",
        "forget": "{attribute}不限",
        "price": "价格",
        "reset": "重新开始",
        "understood": "已理解：{list}。",
        "nothing": "没有理解这句话。",
        "unrecognized": "没有理解：{list}。",
        "relaxed": "没有商品符合全部条件，已放宽：{list}。",
        "dropped": "条件太多，不再保留：{list}。",
        "items": "为您找到{count}件商品。",
        "one item": "为您找到1件商品。",
        "no items": "没有找到商品。",
        "separator": "；",
    },
}
_MAX_LISTED = 12


def phrase(change: Change, language: str, titles: Mapping[str, str]) -> str:
    """A change in words. `titles` has item titles by id; an item without one is shown by its id."""
    phrases = _PHRASES[language]
    match change:
        case AttributeConstraint(attribute, texts, positive):
            template = phrases["positive" if positive else "negative"]
            return template.format(attribute=_label(attribute), texts=phrases["or"].join(texts))
        case PriceConstraint(low, high, _):
            kind = "high" if low is None else "low" if high is None else "range"
            return phrases[kind].format(low=_amount(low), high=_amount(high))
        case ItemPreference(item_id, positive):
            return phrases["liked" if positive else "disliked"].format(item=titles.get(item_id, item_id))
        case SearchWords(words, positive):
            return phrases["words" if positive else "dropped words"].format(words=" ".join(words))
        case Forget(attribute):
            label = phrases["price"] if attribute == PRICE else _label(attribute)
            return phrases["forget"].format(attribute=label)
        case Reset():
            return phrases["reset"]


def reply(
    language: str,
    understood: Sequence[str],
    unrecognized: Sequence[str],
    relaxed: Sequence[str],
    dropped: Sequence[str],
    count: int,
    *,
    has_message: bool,
) -> str:
    """The reply to a message, if there is one, and to a page of `count` items."""
    phrases = _PHRASES[language]
    parts = []
    if has_message and not understood:
        parts.append(phrases["nothing"])
    lists = {
        "understood": understood,
        "unrecognized": [f"“{word}”" for word in unrecognized] if understood else [],
        "dropped": dropped,
        "relaxed": relaxed,
    }
    for kind, entries in lists.items():
        if entries:
            parts.append(phrases[kind].format(list=phrases["separator"].join(entries[:_MAX_LISTED])))
    kind = "no items" if not count else "one item" if count == 1 else "items"
    return "".join(parts) + phrases[kind].format(count=count)


def _label(attribute: str) -> str:
    return attribute.replace("_", " ")


def _amount(price: float | None) -> str:
    return "" if price is None else f"{price:.2f}".rstrip("0").rstrip(".") if price >= 1 else f"{price:.4g}"
