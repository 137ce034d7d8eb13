"""Adds a dialogue state to a `RecommendQuery`: preferences, constraints and search results."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from vitrine.catalog.v1 import item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb

from services.catalog import filters
from services.catalog.item_table import ItemTable
from services.catalog.items import item_hash
from services.gateway.conversation.language.dialogue_state import Constraint, DialogueState, filters_of
from services.gateway.query import RecommendQuery, SessionItem
from services.gateway.recommend import backend_messages
from services.gateway.rules.page_builder import Boost
from services.gateway.rules.rank_fusion import CROSS_MODAL_WEIGHT, fuse
from services.rpc import proto_conversions

_SEARCH_DEPTH = 400
_MAX_LIKED_QUERIES, _MAX_DISLIKED_QUERIES = 8, 16
_MAX_NEAREST, _DISLIKE_BOOST = 10, -0.3


def with_preferences(query: RecommendQuery, state: DialogueState) -> RecommendQuery:
    """The query with liked items as the session; neither liked nor disliked items are shown."""
    liked = tuple(SessionItem(item_id) for item_id in state.liked_ids)
    excluded = frozenset(item_hash(item_id) for item_id in (*state.liked_ids, *state.disliked_ids))
    return replace(query, user=replace(query.user, session=liked), excluded=query.excluded | excluded)


def with_constraints(query: RecommendQuery, constraints: Sequence[Constraint]) -> RecommendQuery:
    """The query under constraints. The shop's rules may relax the request's own filter, not these."""
    if not constraints:
        return query
    parts = filters_of(constraints)
    own = [] if query.condition is None else [query.condition]
    loose = [] if query.loose_condition is None else [query.loose_condition]
    return replace(
        query,
        condition=filters.AllOf((*own, *parts)),
        loose_condition=filters.AllOf((*loose, *parts)),
    )


def search_request(
    query: RecommendQuery, state: DialogueState, bundle: str
) -> embedding_pb.SearchRequest | None:
    """A search by the state's words and latest preferences; None if it has neither words nor dislikes."""
    liked, disliked = _query_items(state)
    if not state.words and not disliked:
        return None
    return embedding_pb.SearchRequest(
        groups=[embedding_pb.QueryGroup(item_ids=[item_id]) for item_id in (*liked, *disliked)],
        text=" ".join(state.words),
        limit=_SEARCH_DEPTH,
        filter=backend_messages.filter_to(query),
        exclude_item_hashes=sorted(query.excluded),
        min_sequence=query.min_sequence,
        bundle=bundle,
        as_of=proto_conversions.time_to(query.as_of),
    )


def with_search_results(
    query: RecommendQuery,
    state: DialogueState,
    results: Iterable[embedding_pb.SearchResult],
    table: ItemTable,
) -> RecommendQuery:
    """The query with the results of `search_request`.

    The hits of words and liked items become its candidates; items similar to disliked ones are demoted.
    """
    liked, disliked = _query_items(state)
    rankings, similar = [], set[int]()
    for result in results:
        if len(liked) <= result.query < len(liked) + len(disliked):
            similar.update(_similar_items(result))
        elif result.query < len(liked):
            rankings.append((1 / len(liked), result.item_hashes))
        else:
            weight = CROSS_MODAL_WEIGHT if result.space == item_pb2.SPACE_IMAGE else 1.0
            rankings.append((weight, result.item_hashes))
    if similar:
        rows = table.rows(sorted(similar))
        demoted = Boost(filters.In("id", frozenset(table.ids(rows[rows >= 0]))), _DISLIKE_BOOST)
        query = replace(query, rules=replace(query.rules, boosts=(*query.rules.boosts, demoted)))
    scores = fuse(rankings)
    best = sorted(scores, key=lambda item: (-scores[item], item))[:_SEARCH_DEPTH]
    return replace(query, items=tuple(best), blend=True) if best else query


def _query_items(state: DialogueState) -> tuple[Sequence[str], Sequence[str]]:
    """The liked and the disliked items to search by; liked items only if there are words too."""
    liked = state.liked_ids[-_MAX_LIKED_QUERIES:] if state.words else ()
    return liked, state.disliked_ids[-_MAX_DISLIKED_QUERIES:]


def _similar_items(result: embedding_pb.SearchResult) -> list[int]:
    """The nearest hits, by hash, whose score is halfway or more from the median score to 1.

    Cosines of different encoders are not comparable, so a fixed threshold does not work.
    """
    scores = result.scores
    threshold = (1 + scores[len(scores) // 2]) / 2 if scores else 1.0
    nearest = zip(result.item_hashes[:_MAX_NEAREST], scores[:_MAX_NEAREST], strict=True)
    return [item for item, score in nearest if score >= threshold]
