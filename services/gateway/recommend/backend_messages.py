"""The pipeline's values as messages of the embedding and ranking services, and their answers as values."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from vitrine.catalog.v1 import event_pb2, filter_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services.catalog import query_vectors
from services.catalog.candidate_sources import EMBEDDING_SOURCES, RANKING_SOURCES
from services.catalog.items import item_hash
from services.gateway.candidates import CandidateSet
from services.gateway.query import Evidence, ExplorationCandidates, RecommendQuery, User, UserState
from services.rpc import packed_fields, proto_conversions

_SOURCES: Mapping[str, ranking_pb.Source.ValueType] = {
    name: ranking_pb.Source.Value(f"SOURCE_{name.upper()}") for name in RANKING_SOURCES
}
_SOURCE_NAMES = {source: name for name, source in _SOURCES.items()}
_SPACE_NAMES = {item_pb2.Space.Value(f"SPACE_{name.upper()}"): name for name in EMBEDDING_SOURCES}
_EXPLORATION_CANDIDATES = 100
_MAX_EXCLUDED = 100_000

SourceCandidates = tuple[str, Sequence[int], Sequence[float]]
"""A source, its item hashes and their scores."""


def user_to(user: User) -> ranking_pb.User:
    """The message of a user."""
    session = [event_pb2.SessionItem(item_id=item.item_id, type=item.type) for item in user.session]
    return ranking_pb.User(user_id=user.user_id, visitor_id=user.visitor_id, session=session)


def filter_to(query: RecommendQuery) -> filter_pb2.Filter | None:
    """The message of a query's filter, None for none."""
    return None if query.condition is None else proto_conversions.filter_to(query.condition)


def retrieve_request(
    query: RecommendQuery, condition: filter_pb2.Filter | None, bundle: str, limit: int
) -> ranking_pb.RetrieveRequest:
    """The request for a user's state and for at most `limit` candidates of each source."""
    request = ranking_pb.RetrieveRequest(
        user=user_to(query.user),
        as_of=proto_conversions.time_to(query.as_of),
        limit=limit,
        filter=condition,
        exclude_item_hashes=sorted(query.excluded),
        exclude_purchased=query.exclude_purchased,
        min_sequence=query.min_sequence,
        bundle=bundle,
        sources=_ranking_sources(query),
        include_shown=query.rules.rotation,
    )
    exploration = query.rules.exploration
    if exploration.share and query.items is None:
        request.exploration_query.CopyFrom(
            ranking_pb.ExplorationQuery(
                scenario=query.scenario,
                limit=_EXPLORATION_CANDIDATES,
                seed=query.seed,
                max_age_days=exploration.max_age_days,
                max_impressions=exploration.max_impressions,
                max_slots_per_day=exploration.max_slots_per_day,
                max_interactions=exploration.max_interactions,
                log_position=query.exploration_log_position,
            )
        )
    return request


def user_state_from(response: ranking_pb.RetrieveResponse) -> UserState:
    """The user's state in an answer of Retrieve."""
    exploration = response.exploration_candidates
    return UserState(
        history=list(response.history.item_hashes),
        history_weights=list(response.history.weights),
        purchased=list(response.purchased_item_hashes),
        impressions=dict(zip(response.shown_item_hashes, response.shown_counts, strict=True)),
        exploration=ExplorationCandidates(
            item_hashes=list(exploration.item_hashes),
            impressions=list(exploration.impressions),
            interactions=list(exploration.interactions),
            log_position=exploration.log_position,
        ),
        sequence=response.state_sequence,
    )


def candidates_from(response: ranking_pb.RetrieveResponse) -> list[SourceCandidates]:
    """The candidates in an answer of Retrieve, by source."""
    return [(_SOURCE_NAMES[part.source], part.item_hashes, part.scores) for part in response.candidates]


def query_groups(user: User, state: UserState | None) -> list[embedding_pb.QueryGroup]:
    """The items to search by: those of the history, or of the session if the history is unknown."""
    if state is not None:
        groups = query_vectors.query_groups(state.history, state.history_weights)
    else:
        session = [item_hash(item.item_id) for item in reversed(user.session)]
        groups = query_vectors.query_groups(session, [1.0] * len(session))
    return [embedding_pb.QueryGroup(item_hashes=group.item_hashes, weights=group.weights) for group in groups]


def search_request(
    query: RecommendQuery,
    groups: Sequence[embedding_pb.QueryGroup],
    condition: filter_pb2.Filter | None,
    excluded: frozenset[int],
    bundle: str,
    limit: int,
) -> embedding_pb.SearchRequest:
    """The request for at most `limit` items near to each group, without those `excluded`, hashes."""
    return embedding_pb.SearchRequest(
        groups=groups,
        limit=limit,
        filter=condition,
        exclude_item_hashes=sorted(excluded)[:_MAX_EXCLUDED],
        min_sequence=query.min_sequence,
        bundle=bundle,
        as_of=proto_conversions.time_to(query.as_of),
        merge_groups=True,
    )


def hits_from(response: embedding_pb.SearchResponse) -> list[SourceCandidates]:
    """The hits of a search, by vector space."""
    return [(_SPACE_NAMES[hits.space], hits.item_hashes, hits.scores) for hits in response.results]


def rank_request(
    query: RecommendQuery, candidates: CandidateSet, state_sequence: int, bundle: str
) -> ranking_pb.RankRequest:
    """The request for the scores of candidates. Those that the caller lists are all scored by the models."""
    request = ranking_pb.RankRequest(
        user=user_to(query.user),
        as_of=proto_conversions.time_to(query.as_of),
        state_sequence=state_sequence,
        bundle=bundle,
    )
    packed_fields.extend(request, "item_hashes", candidates.item_hashes)
    if query.items is None:
        for source, indices, scores in candidates.columns():
            column = request.sources.add(source=source)
            packed_fields.extend(column, "indices", indices)
            packed_fields.extend(column, "scores", scores)
    return request


def explain_request(
    query: RecommendQuery, item_hashes: Sequence[int], state_sequence: int, bundle: str
) -> ranking_pb.ExplainRequest:
    """The request for the evidence behind the scores of items."""
    return ranking_pb.ExplainRequest(
        user=user_to(query.user),
        as_of=proto_conversions.time_to(query.as_of),
        item_hashes=item_hashes,
        state_sequence=state_sequence,
        bundle=bundle,
    )


def evidence_from(
    response: ranking_pb.ExplainResponse,
    item_hashes: Sequence[int],
    user: User,
    ids_of: Mapping[int, str],
) -> dict[int, list[Evidence]]:
    """The evidence for each item hash, the strongest first; `ids_of` has the ids of the user's own items."""
    by_item: dict[int, list[Evidence]] = {}
    # A session item without a type may be one that the user only looked at.
    viewed = {item_hash(item.item_id) for item in user.session if not item.type}
    for evidence in response.evidence:
        columns = evidence.shares, evidence.history_item_hashes, evidence.purchased
        for item, share, own, purchased in zip(item_hashes, *columns, strict=True):
            if share > 0:
                reason = Evidence(evidence.kind, share, ids_of.get(own, ""), purchased and own not in viewed)
                by_item.setdefault(item, []).append(reason)
    for reasons in by_item.values():
        reasons.sort(key=lambda reason: -reason.share)
    return by_item


def profile_request(user: User, as_of: datetime, bundle: str) -> ranking_pb.GetUserProfileRequest:
    """The request for a user's profile."""
    return ranking_pb.GetUserProfileRequest(
        user_id=user.user_id,
        visitor_id=user.visitor_id,
        as_of=proto_conversions.time_to(as_of),
        bundle=bundle,
    )


def _ranking_sources(query: RecommendQuery) -> list[ranking_pb.Source.ValueType]:
    """The sources of Retrieve, empty for all. It always has one: Retrieve also returns the user's state."""
    if not query.sources and query.items is None:
        return []
    names = () if query.items is not None else query.sources
    return [_SOURCES[name] for name in names if name in _SOURCES] or [ranking_pb.SOURCE_POPULAR]
