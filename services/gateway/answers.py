"""What the pipeline found, as the contract's messages."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services import wire
from services.catalog import item_number
from services.gateway.pipeline import Pipeline
from services.gateway.sentences import sentence
from services.gateway.wish import Ordered, Wish
from services.item_table import ItemTable


def items_of(ordered: Ordered, page: slice, tables: Sequence[ItemTable]) -> list[pb.Recommendation]:
    """The items of a page, by the ids of whichever table knows them.

    Tables of two bundles follow one after the other: an item may be known to one alone for a moment.
    """
    numbers, ids = ordered.numbers[page], dict[int, str]()
    for table in tables:
        missing = [number for number in numbers if number not in ids]
        rows = table.rows(missing)
        known = [number for number, row in zip(missing, rows, strict=True) if row >= 0]
        ids.update(zip(known, table.ids(rows[rows >= 0]), strict=True))
    told = zip(numbers, ordered.scores[page], strict=True)
    return [item_of(ordered, number, ids[number], score) for number, score in told if number in ids]


def item_of(ordered: Ordered, number: int, item_id: str, score: float) -> pb.Recommendation:
    """An item with what its place rests on."""
    item = pb.Recommendation(
        item_id=item_id, score=score, sources=sources_of(ordered.candidates.sources[number])
    )
    for name, scores in ordered.components.items():
        if number in scores:
            item.components.add(component=name, score=scores[number])
    for name, probabilities in ordered.probabilities.items():
        if not math.isnan(probabilities.get(number, math.nan)):
            item.probabilities.add(type=name, probability=probabilities[number])
    item.rules.extend(ordered.moved.get(number, ()))
    item.propensity = ordered.propensities.get(number, 1.0)
    return item


async def explain(
    pipeline: Pipeline,
    wish: Wish,
    ordered: Ordered,
    items: Sequence[pb.Recommendation],
    language: str,
    degraded: list[pb.Degradation],
) -> None:
    """Give the items of a page their reasons, and the strongest as a sentence."""
    numbers = [item_number(item.item_id) for item in items]
    reasons, titles = await pipeline.reasons(wish, ordered, numbers, degraded)
    known = any(reason.item_id for mine in reasons.values() for reason in mine)
    for item, number in zip(items, numbers, strict=True):
        mine = reasons.get(number, ())
        for reason in mine:
            item.reasons.add(
                kind=reason.kind,
                share=reason.share,
                history_item_id=reason.item_id,
                history_bought=reason.bought,
            )
        if mine:
            first = mine[0]
            title = titles.get(first.item_id, "")
            kind = first.kind if known or first.kind == "popularity" else "nobody"
            item.explanation = sentence(kind, language, title, bought=first.bought)


def versions_of(pipeline: Pipeline, as_of: datetime, event_sequence: int) -> pb.Versions:
    """What made an answer."""
    return pb.Versions(
        bundle=pipeline.bundle,
        catalog_sequence=pipeline.table.sequence,
        event_sequence=event_sequence,
        as_of=wire.time_to(as_of),
    )


def stages_of(ordered: Ordered) -> list[pb.Stage]:
    """The steps of a run."""
    return [pb.Stage(name=s.name, items=s.items, milliseconds=1000 * s.seconds) for s in ordered.stages]


def sources_of(scores: Mapping[str, float]) -> list[pb.SourceScore]:
    """Sources with their scores, by name."""
    return [pb.SourceScore(source=name, score=score) for name, score in sorted(scores.items())]
