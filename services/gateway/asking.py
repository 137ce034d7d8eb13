"""What a request of `Recommend` asks for, checked, as the wish that the pipeline fulfils."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Literal

from vitrine.catalog.v1 import event_pb2, filter_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services import filters, wire
from services.catalog import identifier_problem, item_number
from services.errors import InvalidArgument
from services.gateway.pipeline import person_of
from services.gateway.rules import Rules
from services.gateway.scenarios import HOME, Scenario, rules_from
from services.gateway.sentences import LANGUAGES
from services.gateway.wish import DEEPEST, Wish

MAX_SESSION = 200
MAX_EXCLUDED = 10_000
MAX_CONTEXT = 50
MAX_ITEMS = 2000
_OWN: tuple[Literal["rules", "diversity", "rotation", "exploration"], ...]
_OWN = ("rules", "diversity", "rotation", "exploration")


def wish_of(request: pb.RecommendRequest, scenario: Scenario, as_of: datetime, depth: int) -> Wish:
    """The wish, `depth` items long; InvalidArgument names the first field that is wrong."""
    check(request)
    sent, condition = both_filters(scenario, request.filter if request.HasField("filter") else None)
    context = [event_pb2.SessionItem(item_id=item_id) for item_id in request.context_item_ids]
    policy, seen, named = request.bought_policy, request.seen_policy, bool(request.item_ids)
    session = [*request.session, *context][-MAX_SESSION:]
    return Wish(
        person=person_of(request.user_id, request.visitor_id, session),
        as_of=as_of,
        excluded=numbers_of(request.exclude_item_ids, "exclude_item_ids"),
        exclude_bought=policy == pb.BOUGHT_POLICY_EXCLUDE if policy or named else scenario.exclude_bought,
        exclude_seen=seen == pb.SEEN_POLICY_EXCLUDE if seen or named else scenario.exclude_seen,
        filter=sent,
        condition=condition,
        min_sequence=request.min_sequence,
        sources=scenario.sources,
        by_source=scenario.by_source,
        items=tuple(dict.fromkeys(map(item_number, request.item_ids))) if named else None,
        rules=_rules(request, scenario),
        depth=min(depth, DEEPEST),
        fill=not named,
        loose=scenario.condition,
        scenario=request.scenario or HOME,
        seed=seed_of(request, as_of),
        visit=f"{request.user_id or request.visitor_id or request.session_id or as_of} {as_of:%Y-%m-%d}",
    )


def person_key(request: pb.RecommendRequest, request_id: str) -> str:
    """What tells the people of an experiment apart."""
    return request.user_id or request.visitor_id or request.session_id or request_id


def seed_of(request: pb.RecommendRequest, as_of: datetime) -> int:
    """What decides the draws of an answer: the same on all its pages, another each time it is asked for."""
    text = f"{digest(request)} {as_of.isoformat()}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def check(request: pb.RecommendRequest) -> None:
    """InvalidArgument names the first field that is wrong by itself."""
    check_person(request, "session_id", "request_id")
    for name, most in (("context_item_ids", MAX_CONTEXT), ("item_ids", MAX_ITEMS)):
        for at, item_id in enumerate(ids := getattr(request, name)):
            if problem := identifier_problem(item_id):
                raise InvalidArgument.of(f"{name}[{at}]", problem)
        if len(ids) > most:
            raise InvalidArgument.of(name, f"has {len(ids)}, at most {most} are allowed")
    if not 0 <= request.diversity <= 1:
        raise InvalidArgument.of("diversity", "must be between 0 and 1")
    if request.language and request.language not in LANGUAGES:
        raise InvalidArgument.of("language", f"is none of {', '.join(LANGUAGES)}")
    if not 0 <= request.exploration <= 1:
        raise InvalidArgument.of("exploration", "must be between 0 and 1")


def check_person(request: pb.RecommendRequest | pb.RecommendOffersRequest, *others: str) -> None:
    """InvalidArgument names the first wrong field of those that say who asks, or of `others` that are ids."""
    for name in ("user_id", "visitor_id", *others):
        value = getattr(request, name)
        if value and (problem := identifier_problem(value)):
            raise InvalidArgument.of(name, problem)
    if len(request.session) > MAX_SESSION:
        raise InvalidArgument.of("session", f"has {len(request.session)}, at most {MAX_SESSION} are allowed")
    for at, item in enumerate(request.session):
        if problem := identifier_problem(item.item_id):
            raise InvalidArgument.of(f"session[{at}].item_id", problem)


def _rules(request: pb.RecommendRequest, scenario: Scenario) -> Rules:
    """The rules of a scenario with those of a request in their place; InvalidArgument where it is locked."""
    for part in _OWN:
        if scenario.locked and request.HasField(part):
            raise InvalidArgument.of(part, f"is not for a request: scenario {request.scenario!r} is locked")
    rules = rules_from(request.rules, scenario.rules)
    if request.HasField("diversity"):
        rules = replace(rules, diversity=request.diversity)
    if request.HasField("rotation"):
        rules = replace(rules, rotation=request.rotation)
    if request.HasField("exploration"):
        rules = replace(rules, exploration=replace(rules.exploration, share=request.exploration))
    return rules


def numbers_of(ids: Sequence[str], field: str) -> frozenset[int]:
    """The numbers of items; InvalidArgument names `field` where there are too many."""
    if len(ids) > MAX_EXCLUDED:
        raise InvalidArgument.of(field, f"has {len(ids)}, at most {MAX_EXCLUDED} are allowed")
    return frozenset(item_number(item_id) for item_id in ids)


def both_filters(
    scenario: Scenario, sent: filter_pb2.Filter | None
) -> tuple[filter_pb2.Filter | None, filters.Filter | None]:
    """What both a scenario and a request ask of items, as a message and decoded."""
    if sent is None:
        return scenario.filter, scenario.condition
    mine = wire.filter_from(sent)
    if scenario.filter is None or scenario.condition is None:
        return sent, mine
    both = filter_pb2.Filter(all_of=filter_pb2.AllOf(filters=[scenario.filter, sent]))
    try:
        return both, wire.filter_from(both)
    except InvalidArgument as error:
        raise InvalidArgument.of("filter", f"with the scenario's own filter: {error}") from None


def digest(request: pb.RecommendRequest) -> str:
    """What is the same on every page of an answer."""
    same = pb.RecommendRequest()
    same.CopyFrom(request)
    for name in ("page_token", "page_size", "request_id", "min_sequence", "read_mask", "validate_only"):
        same.ClearField(name)
    return hashlib.blake2b(same.SerializeToString(deterministic=True), digest_size=8).hexdigest()
