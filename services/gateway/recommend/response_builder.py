"""Pages of the pipeline as messages of the contract."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog.item_table import ItemTable
from services.catalog.items import item_hash
from services.gateway.query import Degradation, RankedPage, RecommendQuery
from services.gateway.recommend.explanation_text import sentence
from services.gateway.recommend.pipeline import Pipeline
from services.rpc import proto_conversions


def build_items(page: RankedPage, window: slice, tables: Sequence[ItemTable]) -> list[pb.Recommendation]:
    """The items within a window of a page. The first table that has an item gives its id.

    The tables of two bundles follow the catalog one after the other, so one of them may lack an item for a
    moment.
    """
    item_hashes, ids = page.item_hashes[window], dict[int, str]()
    for table in tables:
        missing = [item for item in item_hashes if item not in ids]
        rows = table.rows(missing)
        present = [item for item, row in zip(missing, rows, strict=True) if row >= 0]
        ids.update(zip(present, table.ids(rows[rows >= 0]), strict=True))
    scores, leading = page.scores[window], page.candidates.leading_sources(ids)
    return [
        build_item(page, item, ids[item], score, leading[item])
        for item, score in zip(item_hashes, scores, strict=True)
        if item in ids
    ]


def build_item(
    page: RankedPage, item: int, item_id: str, score: float, sources: Sequence[str] | None = None
) -> pb.Recommendation:
    """An item, by its hash and id, with the evidence for its position; names `sources`, None for all."""
    of_item = page.candidates.sources_of(item)
    message = pb.Recommendation(item_id=item_id, score=score, sources=build_sources(of_item, sources))
    for name, scores in page.components.items():
        if item in scores:
            message.components.add(component=name, score=scores[item])
    for name, probabilities in page.probabilities.items():
        if not math.isnan(probabilities.get(item, math.nan)):
            message.probabilities.add(type=name, probability=probabilities[item])
    message.rules.extend(page.applied_rules.get(item, ()))
    message.propensity = page.propensities.get(item, 1.0)
    return message


async def add_reasons(
    pipeline: Pipeline,
    query: RecommendQuery,
    page: RankedPage,
    items: Sequence[pb.Recommendation],
    language: str,
    degraded: list[Degradation],
) -> None:
    """Add the reasons of items to their messages, and the strongest one as a sentence."""
    item_hashes = [item_hash(item.item_id) for item in items]
    reasons, titles = await pipeline.reasons(query, page, item_hashes, degraded)
    has_history = any(reason.item_id for of_item in reasons.values() for reason in of_item)
    for item, hash_of_item in zip(items, item_hashes, strict=True):
        of_item = reasons.get(hash_of_item, ())
        for reason in of_item:
            item.reasons.add(
                kind=reason.kind,
                share=reason.share,
                history_item_id=reason.item_id,
                history_purchased=reason.purchased,
            )
        if of_item:
            strongest = of_item[0]
            title = titles.get(strongest.item_id, "")
            kind = strongest.kind if has_history or strongest.kind == "popularity" else "anonymous"
            item.explanation = sentence(kind, language, title, purchased=strongest.purchased)


def build_degraded(degraded: Iterable[Degradation]) -> list[pb.Degradation]:
    """The stages that were skipped and the rules that were relaxed."""
    return [
        pb.Degradation(
            stage=line.stage,
            code=pb.DegradationCode.Value(f"DEGRADATION_CODE_{line.code.name}"),
            message=line.message,
        )
        for line in degraded
    ]


def build_versions(pipeline: Pipeline, as_of: datetime, event_sequence: int) -> pb.Versions:
    """The versions of the bundle, the catalog and the events behind an answer."""
    return pb.Versions(
        bundle=pipeline.bundle,
        catalog_sequence=pipeline.table.sequence,
        event_sequence=event_sequence,
        as_of=proto_conversions.time_to(as_of),
    )


def build_stages(page: RankedPage) -> list[pb.Stage]:
    """The stages of a run."""
    return [
        pb.Stage(name=stage.name, items=stage.items, milliseconds=1000 * stage.seconds)
        for stage in page.stages
    ]


def build_sources(scores: Mapping[str, float], names: Sequence[str] | None = None) -> list[pb.SourceScore]:
    """Sources with their scores: `names` in their order, None for all by name."""
    return [pb.SourceScore(source=name, score=scores[name]) for name in names or sorted(scores)]
