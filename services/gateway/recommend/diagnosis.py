"""Why an item is on a page, or the first reason why it is not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from services.catalog import filters
from services.catalog.item_table import ItemTable
from services.gateway.query import RankedPage, RequestContext
from services.gateway.recommend.slate_builder import SlateBuilder
from services.gateway.rules.page_builder import Exploration, Rules


class ItemStatus(Enum):
    """The outcome for an item; the names are those of the contract's enum."""

    SHOWN = "SHOWN"
    UNKNOWN_ITEM = "UNKNOWN_ITEM"
    UNAVAILABLE = "UNAVAILABLE"
    EXCLUDED = "EXCLUDED"
    IN_SESSION = "IN_SESSION"
    PURCHASED = "PURCHASED"
    VIEWED = "VIEWED"
    FILTERED = "FILTERED"
    NO_SOURCE = "NO_SOURCE"
    RULE = "RULE"
    RANKED_LOWER = "RANKED_LOWER"


@dataclass(frozen=True)
class Diagnosis:
    """`position` on the page and `ranked_position` before the rules count from 1, 0 for none."""

    item_status: ItemStatus
    message: str
    position: int = 0
    ranked_position: int = 0
    rules: Sequence[str] = ()


def diagnose(
    item: int,
    context: RequestContext,
    ranked: RankedPage,
    page: RankedPage,
    builder: SlateBuilder,
    table: ItemTable,
) -> Diagnosis:
    """The outcome for an item hash in a run: `ranked` is before the rules, `page` after them."""
    shown = list(page.item_hashes[: context.query.depth])
    ranked_position = ranked.item_hashes.index(item) + 1 if item in set(ranked.item_hashes) else 0
    if item in shown:
        position = shown.index(item) + 1
        return Diagnosis(ItemStatus.SHOWN, f"is shown in place {position}", position, ranked_position)
    ineligible = _ineligible(item, context, table)
    if ineligible is not None:
        return ineligible
    if not ranked_position:
        return Diagnosis(ItemStatus.NO_SOURCE, "no source proposed it as a candidate")
    rules = [
        name
        for name, fewer in _without_each(context.query.rules)
        if item in _shown(replace(context, query=replace(context.query, rules=fewer)), ranked, builder)
    ]
    if rules:
        message = f"would be shown without {' or '.join(rules)}"
        return Diagnosis(ItemStatus.RULE, message, 0, ranked_position, rules)
    message = f"is candidate {ranked_position} of {len(ranked.item_hashes)}, and {len(shown)} are shown"
    return Diagnosis(ItemStatus.RANKED_LOWER, message, 0, ranked_position)


def _ineligible(item: int, context: RequestContext, table: ItemTable) -> Diagnosis | None:
    query, state = context.query, context.user_state
    row = int(table.rows([item])[0])
    available = table.available(query.as_of)
    if not 0 <= row < len(available):
        return Diagnosis(ItemStatus.UNKNOWN_ITEM, "is not in the catalog")
    if not available[row]:
        return Diagnosis(ItemStatus.UNAVAILABLE, "is deleted, or outside its availability window")
    if item in query.excluded:
        return Diagnosis(ItemStatus.EXCLUDED, "is among exclude_item_ids")
    if query.items is None and item in query.user.session_hashes():
        return Diagnosis(ItemStatus.IN_SESSION, "is in the session or context")
    if query.exclude_purchased and state is not None and item in state.purchased:
        return Diagnosis(ItemStatus.PURCHASED, "was bought before")
    if query.exclude_viewed and state is not None and item in state.history:
        return Diagnosis(ItemStatus.VIEWED, "was looked at before")
    if query.items is not None and item not in query.items:
        return Diagnosis(ItemStatus.NO_SOURCE, "is not among item_ids")
    if query.condition is not None and not filters.evaluate(query.condition, table)[row]:
        meets_loose = query.loose_condition is None or filters.evaluate(query.loose_condition, table)[row]
        owner = "the request's" if meets_loose else "the scenario's"
        return Diagnosis(ItemStatus.FILTERED, f"does not qualify for {owner} filter")
    return None


def _without_each(rules: Rules) -> list[tuple[str, Rules]]:
    """The rules without each kind of rule that they have, by its name."""
    without = {
        "caps": replace(rules, caps=()),
        "boosts": replace(rules, boosts=()),
        "quotas": replace(rules, quotas=()),
        "min_relevance": replace(rules, min_relevance=0.0),
        "diversity": replace(rules, diversity=0.0),
        "rotation": replace(rules, rotation=False),
        "exploration": replace(rules, exploration=Exploration()),
    }
    return [(name, fewer) for name, fewer in without.items() if fewer != rules]


def _shown(context: RequestContext, ranked: RankedPage, builder: SlateBuilder) -> Sequence[int]:
    return builder.arrange(context, ranked).item_hashes[: context.query.depth]
