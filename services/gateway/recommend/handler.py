"""`Recommend`, `ExplainItem` and `SimilarItems`: pages, arms of experiments, the impression log."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from vitrine.catalog.v1 import event_pb2, served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog.items import identifier_problem, item_hash
from services.core.errors import InvalidArgument, NotFound
from services.gateway.experiments.assignment import Arm, Assignment, interleave
from services.gateway.experiments.scenarios import HOME, SIMILAR, Scenarios, ScenarioSet
from services.gateway.query import Degradation, DegradationCode, RankedPage, RecommendQuery
from services.gateway.recommend.diagnosis import Diagnosis, ItemStatus
from services.gateway.recommend.explanation_text import LANGUAGES
from services.gateway.recommend.field_mask import apply_mask, parse_mask
from services.gateway.recommend.impression_log import ImpressionLog, build_page
from services.gateway.recommend.pipeline import Pipeline
from services.gateway.recommend.request_parser import (
    combine_filters,
    digest,
    parse_excluded,
    parse_query,
    parse_user,
    seed_of,
    user_key,
)
from services.gateway.recommend.response_builder import (
    add_reasons,
    build_degraded,
    build_item,
    build_items,
    build_stages,
    build_versions,
)
from services.gateway.recommend.signed_tokens import SignedTokens
from services.rpc import proto_conversions

MAX_PAGE = 500
DEFAULT_PAGE = 20


@dataclass(frozen=True)
class PagePosition:
    """The start of a page in its answer, the time and user of the answer's first page, and its assignment.

    `scenarios` are those in force, and `degraded` says what the assignment or the bundle already cost.
    """

    start: int
    as_of: datetime
    user: str
    assignment: Assignment
    scenarios: ScenarioSet
    degraded: Sequence[Degradation] = ()
    exploration_log_position: int | None = None


@dataclass(frozen=True)
class PublishedPage:
    """The parts that every response with items has."""

    items: Sequence[pb.Recommendation]
    attribution_token: str
    versions: pb.Versions
    request_id: str


class RecommendHandler:
    """Pages of the newest bundle's pipeline, and of the pipelines of candidate bundles.

    `wait_for` waits for a catalog change; `impression_log` takes the pages that were shown.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        tokens: SignedTokens,
        wait_for: Callable[[int], Awaitable[None]],
        scenarios: Scenarios,
        impression_log: ImpressionLog | None,
    ) -> None:
        self._pipeline, self._tokens, self._wait_for = pipeline, tokens, wait_for
        self._candidates: dict[str, Pipeline] = {}
        self._scenarios, self._impression_log = scenarios, impression_log

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline of the newest bundle."""
        return self._pipeline

    def add_pipeline(self, pipeline: Pipeline) -> None:
        """Serve a candidate bundle's pipeline to the arms that name its bundle."""
        self._candidates[pipeline.bundle] = pipeline

    async def recommend(self, request: pb.RecommendRequest, now: datetime) -> pb.RecommendResponse:
        """A page for a user."""
        size = proto_conversions.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        request_id = request.request_id or uuid.uuid4().hex
        position = self._position(request, request_id, now)
        as_of, assignment = position.as_of, position.assignment
        window = slice(position.start, position.start + size)
        mask = parse_mask(request.read_mask.paths, pb.RecommendResponse.DESCRIPTOR)
        query = self._query(request, position, assignment.scenario, window.stop + 1)
        pipeline = self._pipeline_of(assignment.arm)
        if request.validate_only:
            return pb.RecommendResponse(versions=build_versions(pipeline, as_of, 0), request_id=request_id)
        await self._wait_for(request.min_sequence)
        page = await self._run(request, position, query)
        degraded, ineligible = [*position.degraded, *page.degraded], set(page.ineligible)
        items = self.items(page, window, pipeline)
        if request.include_reasons:
            language = request.language or LANGUAGES[0]
            await add_reasons(pipeline, query, page, items, language, degraded)
        response = pb.RecommendResponse(
            items=items,
            attribution_token=self.attribution(request_id, request.scenario or HOME, now, assignment),
            versions=build_versions(pipeline, as_of, page.state_sequence),
            degraded=build_degraded(degraded),
            request_id=request_id,
            assignment=_build_assignment(assignment),
            stages=build_stages(page) if request.debug else (),
            excluded_item_ids=[i for i in request.item_ids if item_hash(i) in ineligible],
        )
        if window.stop < len(page.item_hashes):
            content = {
                "o": window.stop,
                "a": as_of.isoformat(),
                "h": digest(request),
                "x": assignment.label,
                "b": pipeline.bundle,
                "l": page.exploration_log_position,
            }
            if not user_key(request, ""):
                content["u"] = position.user
            response.next_page_token = self._tokens.sign("page", content, now)
        self.log(request, page, items, request_id, position, now)
        apply_mask(response, mask)
        return response

    async def explain_item(self, request: pb.ExplainItemRequest, now: datetime) -> pb.ExplainItemResponse:
        """The outcome for one item in a Recommend."""
        if problem := identifier_problem(request.item_id):
            raise InvalidArgument.of("item_id", problem)
        recommend = request.request
        try:
            size = proto_conversions.check_limit(recommend.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
            position = self._position(recommend, recommend.request_id or uuid.uuid4().hex, now)
            depth = position.start + size
            query = self._query(recommend, position, position.assignment.scenario, depth)
        except InvalidArgument as error:
            raise error.under("request") from None
        await self._wait_for(recommend.min_sequence)
        item = item_hash(request.item_id)
        diagnosis, page = await self._diagnose(recommend, position, query, item)
        response = pb.ExplainItemResponse(
            item_status=pb.ItemStatus.Value(f"ITEM_STATUS_{diagnosis.item_status.name}"),
            message=diagnosis.message,
            position=diagnosis.position,
            ranked_position=diagnosis.ranked_position,
            candidates=len(page.ranked),
            rules=diagnosis.rules,
            degraded=build_degraded(page.degraded),
            stages=build_stages(page),
        )
        if diagnosis.ranked_position:
            score = page.ranked_scores[page.ranked.index(item)]
            response.item.CopyFrom(build_item(page, item, request.item_id, score))
        if scores := page.scores[:depth]:
            response.last_score = scores[-1]
        return response

    async def similar(self, request: pb.SimilarItemsRequest, now: datetime) -> pb.SimilarItemsResponse:
        """Items similar to one item."""
        size = proto_conversions.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        if problem := identifier_problem(request.item_id):
            raise InvalidArgument.of("item_id", problem)
        await self._wait_for(request.min_sequence)
        if not self._is_available(request.item_id, now):
            raise NotFound("item", request.item_id)
        scenario = self._scenarios.find(SIMILAR)
        condition = combine_filters(scenario, request.filter if request.HasField("filter") else None)
        query = RecommendQuery(
            user=parse_user("", "", [event_pb2.SessionItem(item_id=request.item_id)]),
            as_of=now,
            excluded=parse_excluded(request.exclude_item_ids, "exclude_item_ids"),
            condition=condition,
            min_sequence=request.min_sequence,
            sources=scenario.sources,
            by_source=scenario.by_source,
            rules=scenario.rules,
            depth=size,
            loose_condition=scenario.condition,
            scenario=SIMILAR,
            seed=seed_of(pb.RecommendRequest(context_item_ids=[request.item_id]), now),
        )
        page = await self._pipeline.run(query)
        items, request_id = self.items(page, slice(0, size), self._pipeline), uuid.uuid4().hex
        position = self.first_position(SIMILAR, now)
        self.log(pb.RecommendRequest(scenario=SIMILAR), page, items, request_id, position, now)
        return pb.SimilarItemsResponse(
            items=items,
            attribution_token=self.attribution(request_id, SIMILAR, now, position.assignment),
            versions=build_versions(self._pipeline, now, page.state_sequence),
            degraded=build_degraded(page.degraded),
        )

    async def publish(
        self,
        request: pb.RecommendRequest,
        query: RecommendQuery,
        page: RankedPage,
        window: slice,
        now: datetime,
        degraded: list[Degradation],
        *,
        include_reasons: bool,
    ) -> PublishedPage:
        """Build and log a page that takes part in no experiment; failed stages are added to `degraded`."""
        request_id, scenario = request.request_id or uuid.uuid4().hex, request.scenario or HOME
        items = self.items(page, window, self._pipeline)
        if include_reasons:
            language = request.language or LANGUAGES[0]
            await add_reasons(self._pipeline, query, page, items, language, degraded)
        position = self.first_position(scenario, now)
        self.log(request, page, items, request_id, position, now)
        token = self.attribution(request_id, scenario, now, position.assignment)
        versions = build_versions(self._pipeline, now, page.state_sequence)
        return PublishedPage(items, token, versions, request_id)

    def first_position(self, scenario: str, now: datetime) -> PagePosition:
        """The start of an answer that takes part in no experiment."""
        return PagePosition(0, now, "", Assignment(scenario), self._scenarios.current)

    def items(self, page: RankedPage, window: slice, pipeline: Pipeline) -> list[pb.Recommendation]:
        """The items within a window of a page."""
        return build_items(page, window, (self._pipeline.table, pipeline.table))

    def attribution(self, request_id: str, scenario: str, now: datetime, assignment: Assignment) -> str:
        """The token by which events name the answer that led to them."""
        content = {"r": request_id, "s": scenario, "b": self._pipeline_of(assignment.arm).bundle}
        if assignment.experiment:
            content["x"] = assignment.label
        return self._tokens.sign("shown", content, now)

    def log(
        self,
        request: pb.RecommendRequest,
        page: RankedPage,
        items: Sequence[pb.Recommendation],
        request_id: str,
        position: PagePosition,
        now: datetime,
    ) -> None:
        """Log a page, and start the pages of shadow arms."""
        if self._impression_log is None:
            return
        assignment = position.assignment
        logged = build_page(request, page, items, position.start)
        logged.request_id, logged.scenario = request_id, request.scenario or HOME
        logged.served_at.CopyFrom(proto_conversions.time_to(now))
        logged.bundle = self._pipeline_of(assignment.arm).bundle
        logged.experiment, logged.arm = assignment.experiment, assignment.single_arm
        logged.arm_index = assignment.arm_index
        self._impression_log.add(logged)
        for arm_index, arm in enumerate(assignment.shadows, 1):
            self._impression_log.add_shadow(self._shadow_page(request, logged, arm, arm_index, position))

    def _position(self, request: pb.RecommendRequest, request_id: str, now: datetime) -> PagePosition:
        """The page's position, with the time and the arm that all pages of an answer share."""
        scenarios, user = self._scenarios.current, user_key(request, request_id)
        if not request.page_token:
            assignment = _assign(scenarios, request, user)
            return PagePosition(0, now, user, assignment, scenarios, self._missing_bundles(assignment))
        content = self._tokens.read("page", request.page_token, now, "page_token")
        if content["h"] != digest(request):
            raise InvalidArgument.of("page_token", "belongs to another request; only page_size may change")
        user = content.get("u", user)
        assignment = _assign(scenarios, request, user)
        if content.get("x", "") != assignment.label:
            raise InvalidArgument.of("page_token", "is of an experiment that has changed; begin again")
        degraded, bundle = self._missing_bundles(assignment), self._pipeline_of(assignment.arm).bundle
        if content.get("b", bundle) != bundle:
            degraded.append(_bundle_changed(content["b"]))
        as_of = datetime.fromisoformat(content["a"])
        return PagePosition(content["o"], as_of, user, assignment, scenarios, degraded, content.get("l"))

    def _query(
        self, request: pb.RecommendRequest, position: PagePosition, scenario: str, depth: int
    ) -> RecommendQuery:
        query = parse_query(request, position.scenarios.find(scenario), position.as_of, depth)
        return replace(query, exploration_log_position=position.exploration_log_position)

    def _pipeline_of(self, arm: Arm | None) -> Pipeline:
        """The pipeline of an arm's bundle, or of the newest."""
        return self._candidates.get(arm.bundle, self._pipeline) if arm else self._pipeline

    def _missing_bundles(self, assignment: Assignment) -> list[Degradation]:
        """A line for each bundle that an arm names and that is not served."""
        served = {"", self._pipeline.bundle, *self._candidates}
        return [
            _bundle_missing(bundle) for bundle in sorted({arm.bundle for arm in assignment.arms} - served)
        ]

    async def _run(
        self, request: pb.RecommendRequest, position: PagePosition, query: RecommendQuery
    ) -> RankedPage:
        """The page of the arm, or of the two arms, that serve a request."""
        arm, rival = position.assignment.arm, position.assignment.rival
        if arm is None or rival is None:
            return await self._pipeline_of(arm).run(query)
        other = self._query(request, position, rival.scenario, query.depth)
        both = await asyncio.gather(self._pipeline_of(arm).run(query), self._pipeline_of(rival).run(other))
        return interleave(both, (arm.name, rival.name), query.depth, query.seed)

    async def _diagnose(
        self, request: pb.RecommendRequest, position: PagePosition, query: RecommendQuery, item: int
    ) -> tuple[Diagnosis, RankedPage]:
        """The outcome for an item; on a page of two arms by the arm that has it as a candidate."""
        arm, rival = position.assignment.arm, position.assignment.rival
        diagnosis, page = await self._pipeline_of(arm).explain_item(query, item)
        if rival is None:
            return diagnosis, page
        other = self._query(request, position, rival.scenario, query.depth)
        by_rival, page_of_rival = await self._pipeline_of(rival).explain_item(other, item)
        if by_rival.ranked_position and not diagnosis.ranked_position:
            diagnosis, page = by_rival, page_of_rival
        ranked_position = diagnosis.ranked_position
        shown = (await self._run(request, position, query)).item_hashes[: query.depth]
        if item in shown:
            place = shown.index(item) + 1
            message = f"is shown in place {place}"
            diagnosis = Diagnosis(ItemStatus.SHOWN, message, place, ranked_position)
        elif diagnosis.item_status is ItemStatus.SHOWN:
            message = "others of both arms come first"
            diagnosis = Diagnosis(ItemStatus.RANKED_LOWER, message, 0, ranked_position)
        return diagnosis, page

    async def _shadow_page(
        self,
        request: pb.RecommendRequest,
        shown: served_pb2.ServedPage,
        arm: Arm,
        arm_index: int,
        position: PagePosition,
    ) -> served_pb2.ServedPage:
        """The page that another arm of the experiment would have shown."""
        window = slice(shown.start, shown.start + len(shown.item_ids))
        query = self._query(request, position, arm.scenario, window.stop + 1)
        pipeline = self._pipeline_of(arm)
        page = await pipeline.run(query)
        shadow = build_page(request, page, self.items(page, window, pipeline), window.start)
        for field in ("request_id", "scenario", "experiment"):
            setattr(shadow, field, getattr(shown, field))
        shadow.served_at.CopyFrom(shown.served_at)
        shadow.shadow, shadow.arm, shadow.arm_index = True, arm.name, arm_index
        shadow.bundle = pipeline.bundle
        return shadow

    def _is_available(self, item_id: str, now: datetime) -> bool:
        table = self._pipeline.table
        row = int(table.rows([item_hash(item_id)])[0])
        return row >= 0 and bool(table.available(now)[row])


def _assign(scenarios: ScenarioSet, request: pb.RecommendRequest, user: str) -> Assignment:
    """The assignment of a request. Its own caps, quotas or exploration keep it off an interleaved page."""
    assignment, rules = scenarios.assign(request.scenario, user), request.rules
    if assignment.rival and (rules.caps or rules.quotas or request.exploration):
        return Assignment(request.scenario or HOME)
    return assignment


def _build_assignment(assignment: Assignment) -> pb.Assignment | None:
    if not assignment.experiment:
        return None
    return pb.Assignment(experiment=assignment.experiment, arm=assignment.single_arm)


def _bundle_changed(bundle: str) -> Degradation:
    message = f"the pages before are of bundle {bundle}: items may come twice, or not at all"
    return Degradation("pages", DegradationCode.BUNDLE_CHANGED, message)


def _bundle_missing(bundle: str) -> Degradation:
    message = f"bundle {bundle!r} of the experiment's arm is not served; the newest bundle answers"
    return Degradation("bundle", DegradationCode.NOT_READY, message)
