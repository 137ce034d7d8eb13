"""Why an item is on a page, or what kept it off: the first thing on the way that did."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import filters
from services.catalog import item_number
from services.gateway.assortment import Assortment
from services.gateway.rules import Exploration
from services.gateway.wish import Ordered, Wish
from services.item_table import ItemTable


@dataclass(frozen=True)
class Answer:
    """`place` on the answer and `ranked` before the rules count from 1, 0 for neither; `rules` by name."""

    standing: pb.Standing.ValueType
    message: str
    place: int = 0
    ranked: int = 0
    rules: Sequence[str] = ()


def why(
    number: int,
    wish: Wish,
    retrieved: ranking_pb.RetrieveResponse | None,
    ranked: Ordered,
    ordered: Ordered,
    assortment: Assortment,
    table: ItemTable,
) -> Answer:
    """What became of an item in a run that `ranked` candidates and `ordered` them by the rules."""
    shown = list(ordered.numbers[: wish.depth])
    before = ranked.numbers.index(number) + 1 if number in set(ranked.numbers) else 0
    if number in shown:
        place = shown.index(number) + 1
        return Answer(pb.STANDING_SHOWN, f"is shown in place {place}", place, before)
    hard = _hard(number, wish, retrieved, table)
    if hard is not None:
        return hard
    if not before:
        return Answer(pb.STANDING_NO_SOURCE, "no source brought it as a candidate")
    held = [name for name, less in _without(wish) if number in _shown(less, retrieved, ranked, assortment)]
    if held:
        return Answer(pb.STANDING_RULE, f"would be shown without {' or '.join(held)}", 0, before, held)
    many = len(ranked.numbers)
    message = f"is candidate {before} of {many}, and {len(shown)} are shown"
    return Answer(pb.STANDING_RANKED_LOWER, message, 0, before)


def _hard(
    number: int, wish: Wish, retrieved: ranking_pb.RetrieveResponse | None, table: ItemTable
) -> Answer | None:
    row = int(table.rows([number])[0])
    available = table.available(wish.as_of)
    if not 0 <= row < len(available):
        return Answer(pb.STANDING_UNKNOWN_ITEM, "is not in the catalogue")
    if not available[row]:
        return Answer(pb.STANDING_UNAVAILABLE, "is deleted, or outside its availability window")
    if number in wish.excluded:
        return Answer(pb.STANDING_EXCLUDED, "is among exclude_item_ids")
    if wish.items is None and number in {item_number(item.item_id) for item in wish.person.session}:
        return Answer(pb.STANDING_IN_SESSION, "is in the session or context")
    if wish.exclude_bought and retrieved is not None and number in retrieved.bought_item_numbers:
        return Answer(pb.STANDING_BOUGHT, "was bought before")
    if wish.exclude_seen and retrieved is not None and number in retrieved.history.item_numbers:
        return Answer(pb.STANDING_SEEN, "was looked at before")
    if wish.items is not None and number not in wish.items:
        return Answer(pb.STANDING_NO_SOURCE, "is not among item_ids")
    if wish.condition is not None and not filters.evaluate(wish.condition, table)[row]:
        loose = wish.loose is None or filters.evaluate(wish.loose, table)[row]
        whose = "the request's" if loose else "the scenario's"
        return Answer(pb.STANDING_FILTERED, f"does not qualify for {whose} filter")
    return None


def _without(wish: Wish) -> list[tuple[str, Wish]]:
    """The wish without each of its rules."""
    rules = wish.rules
    less = {
        "caps": replace(rules, caps=()),
        "boosts": replace(rules, boosts=()),
        "quotas": replace(rules, quotas=()),
        "min_relevance": replace(rules, min_relevance=0.0),
        "diversity": replace(rules, diversity=0.0),
        "rotation": replace(rules, rotation=False),
        "exploration": replace(rules, exploration=Exploration()),
    }
    return [(name, replace(wish, rules=some)) for name, some in less.items() if some != rules]


def _shown(
    wish: Wish, retrieved: ranking_pb.RetrieveResponse | None, ranked: Ordered, assortment: Assortment
) -> Sequence[int]:
    return assortment.arranged(wish, retrieved, ranked).numbers[: wish.depth]
