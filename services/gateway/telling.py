"""What came of a turn as messages: what was understood, what the page rests on, and the reply."""

from collections.abc import Mapping, Sequence

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.gateway.conversing import Turn
from services.gateway.dialogue import Change, Dialogue, Forget, Liking, Price, Reset, Values, Words
from services.gateway.replies import phrase, reply


def tell(
    response: pb.ConverseResponse, turn: Turn, language: str, titles: Mapping[str, str], *, said: bool
) -> None:
    """Write into a response what there is to say of its page; `said` is whether there was a message."""

    def phrases(changes: Sequence[Change]) -> list[str]:
        return [phrase(change, language, titles) for change in changes]

    understood, relaxed, dropped = phrases(turn.changes), phrases(turn.relaxed), phrases(turn.dropped)
    response.understood.extend(map(_understanding, turn.changes, understood))
    for condition in _in_force(turn.dialogue):
        told = _understanding(condition, phrase(condition, language, titles))
        told.relaxed = condition in turn.relaxed
        response.in_force.append(told)
    response.degraded.extend(turn.degraded)
    for some, why in ((relaxed, "was set aside: nothing meets all"), (dropped, "is no longer kept")):
        for text in some:
            response.degraded.add(
                stage="conversation", code=pb.DEGRADATION_CODE_RULE_RELAXED, message=f"{text} {why}"
            )
    count = len(response.items)
    response.reply = reply(language, understood, turn.not_understood, relaxed, dropped, count, said=said)


def _in_force(dialogue: Dialogue) -> list[Change]:
    words = [Words(dialogue.words)] if dialogue.words else []
    liked = [Liking(item_id) for item_id in dialogue.liked]
    disliked = [Liking(item_id, liked=False) for item_id in dialogue.disliked]
    return [*dialogue.conditions, *words, *liked, *disliked]


def _understanding(change: Change, text: str) -> pb.Understanding:
    told = pb.Understanding(text=text, wanted=True)
    match change:
        case Values(attribute, texts, wanted):
            told.kind, told.wanted = pb.UNDERSTANDING_KIND_ATTRIBUTE, wanted
            told.attribute = attribute
            told.values.extend(texts)
        case Price(low, high, _):
            told.kind = pb.UNDERSTANDING_KIND_PRICE
            if low is not None:
                told.min_price = low
            if high is not None:
                told.max_price = high
        case Liking(item_id, liked):
            told.kind, told.wanted, told.item_id = pb.UNDERSTANDING_KIND_ITEM, liked, item_id
        case Words(words, wanted):
            told.kind, told.wanted, told.words = pb.UNDERSTANDING_KIND_WORDS, wanted, " ".join(words)
        case Forget(attribute):
            told.kind, told.attribute = pb.UNDERSTANDING_KIND_FORGET, attribute
        case Reset():
            told.kind = pb.UNDERSTANDING_KIND_RESET
    return told
