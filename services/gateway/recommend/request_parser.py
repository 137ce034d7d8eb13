"""Checks a request of `Recommend` and makes it a query of the pipeline."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Literal

from vitrine.catalog.v1 import event_pb2, filter_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog import filters
from services.catalog.items import identifier_problem, item_hash
from services.core.errors import InvalidArgument, quoted
from services.gateway.experiments.scenarios import HOME, Scenario, rules_from
from services.gateway.query import MAX_DEPTH, RecommendQuery, SessionItem, User
from services.gateway.recommend.explanation_text import LANGUAGES
from services.gateway.rules.page_builder import Rules
from services.rpc import proto_conversions

MAX_SESSION = 200
MAX_EXCLUDED = 10_000
MAX_CONTEXT = 50
MAX_ITEMS = 2000
# What a request may override if its scenario allows it.
_OVERRIDES: tuple[Literal["rules", "diversity", "rotation", "exploration"], ...]
_OVERRIDES = ("rules", "diversity", "rotation", "exploration")


def parse_query(
    request: pb.RecommendRequest, scenario: Scenario, as_of: datetime, depth: int
) -> RecommendQuery:
    """The query for a page of `depth` items; InvalidArgument names the first wrong field."""
    check_request(request)
    condition = combine_filters(scenario, request.filter if request.HasField("filter") else None)
    context = [event_pb2.SessionItem(item_id=item_id) for item_id in request.context_item_ids]
    purchased, viewed = request.purchased_items_policy, request.viewed_items_policy
    has_items = bool(request.item_ids)
    session = [*request.session, *context][-MAX_SESSION:]
    return RecommendQuery(
        user=parse_user(request.user_id, request.visitor_id, session),
        as_of=as_of,
        excluded=parse_excluded(request.exclude_item_ids, "exclude_item_ids"),
        exclude_purchased=purchased == pb.PURCHASED_ITEMS_POLICY_EXCLUDE
        if purchased or has_items
        else scenario.exclude_purchased,
        exclude_viewed=viewed == pb.VIEWED_ITEMS_POLICY_EXCLUDE
        if viewed or has_items
        else scenario.exclude_viewed,
        condition=condition,
        min_sequence=request.min_sequence,
        sources=scenario.sources,
        by_source=scenario.by_source,
        items=tuple(dict.fromkeys(map(item_hash, request.item_ids))) if has_items else None,
        rules=_rules(request, scenario),
        depth=min(depth, MAX_DEPTH),
        fill=not has_items,
        loose_condition=scenario.condition,
        scenario=request.scenario or HOME,
        seed=seed_of(request, as_of),
        jitter_key=f"{user_key(request, str(as_of))} {as_of:%Y-%m-%d}",
    )


def parse_user(user_id: str, visitor_id: str, session: Iterable[event_pb2.SessionItem]) -> User:
    """The user of a public request."""
    return User(user_id, visitor_id, tuple(SessionItem(item.item_id, item.type) for item in session))


def user_key(request: pb.RecommendRequest, default: str) -> str:
    """The id by which experiments tell users apart; `default` for a request without any id."""
    return request.user_id or request.visitor_id or request.session_id or default


def seed_of(request: pb.RecommendRequest, as_of: datetime) -> int:
    """The seed of all random choices: the same on every page of one answer, another for the next answer."""
    text = f"{digest(request)} {as_of.isoformat()}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def check_request(request: pb.RecommendRequest) -> None:
    """InvalidArgument names the first field that is wrong by itself."""
    check_user(request, "session_id", "request_id")
    for name, limit in (("context_item_ids", MAX_CONTEXT), ("item_ids", MAX_ITEMS)):
        if len(ids := getattr(request, name)) > limit:
            raise InvalidArgument.of(name, f"has {len(ids)}, at most {limit} are allowed")
        for index, item_id in enumerate(ids):
            if problem := identifier_problem(item_id):
                raise InvalidArgument.of(f"{name}[{index}]", problem)
    if not 0 <= request.diversity <= 1:
        raise InvalidArgument.of("diversity", "must be between 0 and 1")
    if request.language and request.language not in LANGUAGES:
        raise InvalidArgument.of("language", f"is none of {', '.join(LANGUAGES)}")
    if not 0 <= request.exploration <= 1:
        raise InvalidArgument.of("exploration", "must be between 0 and 1")


def check_user(request: pb.RecommendRequest | pb.RecommendOffersRequest, *id_fields: str) -> None:
    """InvalidArgument names the first wrong field that describes the user, or of the other `id_fields`."""
    for name in ("user_id", "visitor_id", *id_fields):
        value = getattr(request, name)
        if value and (problem := identifier_problem(value)):
            raise InvalidArgument.of(name, problem)
    if len(request.session) > MAX_SESSION:
        raise InvalidArgument.of("session", f"has {len(request.session)}, at most {MAX_SESSION} are allowed")
    for index, item in enumerate(request.session):
        if problem := identifier_problem(item.item_id):
            raise InvalidArgument.of(f"session[{index}].item_id", problem)


def _rules(request: pb.RecommendRequest, scenario: Scenario) -> Rules:
    """The scenario's rules with the request's overrides; InvalidArgument if it allows none."""
    for field in _OVERRIDES:
        if not scenario.allow_overrides and request.HasField(field):
            raise InvalidArgument.of(
                field, f"is not for a request: scenario {quoted(request.scenario)} allows no overrides"
            )
    rules = rules_from(request.rules, scenario.rules)
    if request.HasField("diversity"):
        rules = replace(rules, diversity=request.diversity)
    if request.HasField("rotation"):
        rules = replace(rules, rotation=request.rotation)
    if request.HasField("exploration"):
        rules = replace(rules, exploration=replace(rules.exploration, share=request.exploration))
    return rules


def parse_excluded(item_ids: Sequence[str], field: str) -> frozenset[int]:
    """The hashes of items to exclude; InvalidArgument names `field` if there are too many."""
    if len(item_ids) > MAX_EXCLUDED:
        raise InvalidArgument.of(field, f"has {len(item_ids)}, at most {MAX_EXCLUDED} are allowed")
    return frozenset(item_hash(item_id) for item_id in item_ids)


def combine_filters(scenario: Scenario, message: filter_pb2.Filter | None) -> filters.Filter | None:
    """The condition that a scenario and a request's filter make together."""
    if message is None:
        return scenario.condition
    condition = proto_conversions.filter_from(message)
    if scenario.filter is None:
        return condition
    both = filter_pb2.Filter(all_of=filter_pb2.AllOf(filters=[scenario.filter, message]))
    try:
        return proto_conversions.filter_from(both)
    except InvalidArgument as error:
        raise InvalidArgument.of("filter", f"with the scenario's own filter: {error}") from None


def digest(request: pb.RecommendRequest) -> str:
    """A digest of the fields that are the same on every page of one answer."""
    constant = pb.RecommendRequest()
    constant.CopyFrom(request)
    for name in ("page_token", "page_size", "request_id", "min_sequence", "read_mask", "validate_only"):
        constant.ClearField(name)
    return hashlib.blake2b(constant.SerializeToString(deterministic=True), digest_size=8).hexdigest()
