"""What a dialogue answers in words: what was understood, what was found, what was set aside."""

from collections.abc import Mapping, Sequence

from services.gateway.dialogue import PRICE, Change, Forget, Liking, Price, Reset, Values, Words

_PHRASES: Mapping[str, Mapping[str, str]] = {
    "en": {
        "wanted": "{attribute} {texts}",
        "unwanted": "{attribute} not {texts}",
        "or": " or ",
        "span": "price from {low} to {high}",
        "high": "price at most {high}",
        "low": "price at least {low}",
        "liked": "like “{item}”",
        "disliked": "not “{item}”",
        "words": "“{words}”",
        "no words": "no longer “{words}”",
        "forget": "any {attribute}",
        "price": "price",
        "reset": "start again",
        "understood": "Understood: {told}. ",
        "nothing": "I understood nothing of this. ",
        "strange": "I did not understand {told}. ",
        "relaxed": "Nothing meets all of that, so I set aside: {told}. ",
        "dropped": "That is a lot: I no longer keep to {told}. ",
        "found": "Here are {count} items.",
        "one": "Here is 1 item.",
        "none": "I found nothing.",
        "apart": "; ",
    },
    "zh": {
        "wanted": "{attribute}：{texts}",
        "unwanted": "{attribute}不要{texts}",
        "or": "或",
        "span": "价格{low}到{high}",
        "high": "价格不超过{high}",
        "low": "价格不低于{low}",
        "liked": "像“{item}”",
        "disliked": "不要“{item}”",
        "words": "“{words}”",
        "no words": "不再要“{words}”",
        "forget": "{attribute}不限",
        "price": "价格",
        "reset": "重新开始",
        "understood": "已理解：{told}。",
        "nothing": "没有理解这句话。",
        "strange": "没有理解：{told}。",
        "relaxed": "没有商品符合全部条件，已放宽：{told}。",
        "dropped": "条件太多，不再保留：{told}。",
        "found": "为您找到{count}件商品。",
        "one": "为您找到1件商品。",
        "none": "没有找到商品。",
        "apart": "；",
    },
}
_MOST_TOLD = 12


def phrase(change: Change, language: str, titles: Mapping[str, str]) -> str:
    """A change in words; `titles` of items by their ids, the id where there is none."""
    say = _PHRASES[language]
    match change:
        case Values(attribute, texts, wanted):
            values = say["or"].join(texts)
            return say["wanted" if wanted else "unwanted"].format(attribute=_label(attribute), texts=values)
        case Price(low, high, _):
            kind = "high" if low is None else "low" if high is None else "span"
            return say[kind].format(low=_amount(low), high=_amount(high))
        case Liking(item_id, liked):
            return say["liked" if liked else "disliked"].format(item=titles.get(item_id, item_id))
        case Words(words, wanted):
            return say["words" if wanted else "no words"].format(words=" ".join(words))
        case Forget(attribute):
            named = say["price"] if attribute == PRICE else _label(attribute)
            return say["forget"].format(attribute=named)
        case Reset():
            return say["reset"]


def reply(
    language: str,
    understood: Sequence[str],
    strange: Sequence[str],
    relaxed: Sequence[str],
    dropped: Sequence[str],
    count: int,
    *,
    said: bool,
) -> str:
    """The answer in words to a message, if one was `said`, and to a page of `count` items."""
    say = _PHRASES[language]
    parts = []
    if said and not understood:
        parts.append(say["nothing"])
    listed = {
        "understood": understood,
        "strange": [f"“{word}”" for word in strange] if understood else [],
        "dropped": dropped,
        "relaxed": relaxed,
    }
    for kind, some in listed.items():
        if some:
            parts.append(say[kind].format(told=say["apart"].join(some[:_MOST_TOLD])))
    kind = "none" if not count else "one" if count == 1 else "found"
    return "".join(parts) + say[kind].format(count=count)


def _label(attribute: str) -> str:
    return attribute.replace("_", " ")


def _amount(price: float | None) -> str:
    return "" if price is None else f"{price:.2f}".rstrip("0").rstrip(".") if price >= 1 else f"{price:.4g}"
