"""`Recommend`, and what is behind it: pages of one answer, arms of experiments, the log of what was shown."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from vitrine.catalog.v1 import event_pb2, served_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services import wire
from services.catalog import identifier_problem, item_number
from services.errors import InvalidArgument, NotFound
from services.gateway.answers import explain, item_of, items_of, stages_of, versions_of
from services.gateway.asking import both_filters, digest, numbers_of, person_key, seed_of, wish_of
from services.gateway.experiments import Arm, Assigned, interleaved
from services.gateway.masks import keep, tree_of
from services.gateway.pipeline import Pipeline, person_of
from services.gateway.scenarios import HOME, SIMILAR, Known, Scenarios
from services.gateway.sentences import LANGUAGES
from services.gateway.served_log import ServedLog, page_of
from services.gateway.tokens import Tokens
from services.gateway.why_not import Answer
from services.gateway.wish import Ordered, Wish

MAX_PAGE = 500
DEFAULT_PAGE = 20


@dataclass(frozen=True)
class Place:
    """Where a page begins in its answer, when and by whom that was first asked for, and who serves it."""

    start: int
    as_of: datetime
    person: str
    assigned: Assigned
    known: Known
    degraded: Sequence[pb.Degradation] = ()
    explored_upto: int | None = None


class Recommending:
    """Pages over the pipeline of the newest bundle, and over those of bundles that are served beside.

    `wait_for` waits for a catalogue change; `served` takes what was answered.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        tokens: Tokens,
        wait_for: Callable[[int], Awaitable[None]],
        scenarios: Scenarios,
        served: ServedLog | None,
    ) -> None:
        self.pipeline, self._tokens, self._wait_for = pipeline, tokens, wait_for
        self.pipelines: dict[str, Pipeline] = {}
        """Those of bundles that are served beside, by version."""
        self._scenarios, self._served = scenarios, served

    async def recommend(self, request: pb.RecommendRequest, now: datetime) -> pb.RecommendResponse:
        """A page for a person."""
        size = wire.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        request_id = request.request_id or uuid.uuid4().hex
        place = self._page(request, request_id, now)
        as_of, chosen = place.as_of, place.assigned
        page = slice(place.start, place.start + size)
        mask = tree_of(request.read_mask.paths, pb.RecommendResponse.DESCRIPTOR)
        wish = self._wish(request, place, chosen.scenario, page.stop + 1)
        pipeline = self._by(chosen.arm)
        if request.validate_only:
            return pb.RecommendResponse(versions=versions_of(pipeline, as_of, 0), request_id=request_id)
        await self._wait_for(request.min_sequence)
        ordered = await self._run(request, place, wish)
        degraded, left_out = [*place.degraded, *ordered.degraded], set(ordered.left_out)
        items = self.items(ordered, page, pipeline)
        if request.include_reasons:
            language = request.language or LANGUAGES[0]
            await explain(pipeline, wish, ordered, items, language, degraded)
        response = pb.RecommendResponse(
            items=items,
            attribution_token=self.attribution(request_id, request.scenario or HOME, now, chosen),
            versions=versions_of(pipeline, as_of, ordered.state_sequence),
            degraded=degraded,
            request_id=request_id,
            assignment=_assignment(chosen),
            stages=stages_of(ordered) if request.debug else (),
            left_out_item_ids=[i for i in request.item_ids if item_number(i) in left_out],
        )
        if page.stop < len(ordered.numbers):
            content = {
                "o": page.stop,
                "a": as_of.isoformat(),
                "h": digest(request),
                "x": chosen.mark,
                "b": pipeline.bundle,
                "l": ordered.explored_upto,
            }
            if not person_key(request, ""):
                content["u"] = place.person
            response.next_page_token = self._tokens.sign("page", content, now)
        self.log(request, ordered, items, request_id, place, now)
        keep(response, mask)
        return response

    async def explain_item(self, request: pb.ExplainItemRequest, now: datetime) -> pb.ExplainItemResponse:
        """What became of one item in a Recommend."""
        if problem := identifier_problem(request.item_id):
            raise InvalidArgument.of("item_id", problem)
        asked = request.request
        try:
            size = wire.check_limit(asked.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
            place = self._page(asked, asked.request_id or uuid.uuid4().hex, now)
            depth = place.start + size
            wish = self._wish(asked, place, place.assigned.scenario, depth)
        except InvalidArgument as error:
            raise error.under("request") from None
        await self._wait_for(asked.min_sequence)
        number = item_number(request.item_id)
        answer, ordered = await self._why(asked, place, wish, number)
        response = pb.ExplainItemResponse(
            standing=answer.standing,
            message=answer.message,
            place=answer.place,
            ranked_place=answer.ranked,
            candidates=len(ordered.ranked),
            rules=answer.rules,
            degraded=ordered.degraded,
            stages=stages_of(ordered),
        )
        if answer.ranked:
            at = ordered.ranked.index(number)
            response.item.CopyFrom(item_of(ordered, number, request.item_id, ordered.ranked_scores[at]))
        if shown := ordered.scores[:depth]:
            response.last_score = shown[-1]
        return response

    async def similar(self, request: pb.SimilarItemsRequest, now: datetime) -> pb.SimilarItemsResponse:
        """Items like one item."""
        size = wire.check_limit(request.page_size, MAX_PAGE, "page_size", DEFAULT_PAGE)
        if problem := identifier_problem(request.item_id):
            raise InvalidArgument.of("item_id", problem)
        await self._wait_for(request.min_sequence)
        if not self._exists(request.item_id, now):
            raise NotFound("item", request.item_id)
        scenario = self._scenarios.find(SIMILAR)
        sent, condition = both_filters(scenario, request.filter if request.HasField("filter") else None)
        wish = Wish(
            person=person_of("", "", [event_pb2.SessionItem(item_id=request.item_id)]),
            as_of=now,
            excluded=numbers_of(request.exclude_item_ids, "exclude_item_ids"),
            filter=sent,
            condition=condition,
            min_sequence=request.min_sequence,
            sources=scenario.sources,
            by_source=scenario.by_source,
            rules=scenario.rules,
            depth=size,
            loose=scenario.condition,
            scenario=SIMILAR,
            seed=seed_of(pb.RecommendRequest(context_item_ids=[request.item_id]), now),
        )
        ordered = await self.pipeline.run(wish)
        items, request_id = self.items(ordered, slice(0, size), self.pipeline), uuid.uuid4().hex
        asked = pb.RecommendRequest(scenario=SIMILAR)
        place = self.place(SIMILAR, now)
        self.log(asked, ordered, items, request_id, place, now)
        return pb.SimilarItemsResponse(
            items=items,
            attribution_token=self.attribution(request_id, SIMILAR, now, place.assigned),
            versions=versions_of(self.pipeline, now, ordered.state_sequence),
            degraded=ordered.degraded,
        )

    def place(self, scenario: str, now: datetime) -> Place:
        """The beginning of an answer that takes part in no experiment."""
        return Place(0, now, "", Assigned(scenario), self._scenarios.known)

    def _page(self, request: pb.RecommendRequest, request_id: str, now: datetime) -> Place:
        """Where the page begins, with the moment and the arm that all pages of an answer share."""
        known, person = self._scenarios.known, person_key(request, request_id)
        if not request.page_token:
            chosen = _chosen(known, request, person)
            return Place(0, now, person, chosen, known, self._not_served(chosen))
        content = self._tokens.read("page", request.page_token, now, "page_token")
        if content["h"] != digest(request):
            raise InvalidArgument.of("page_token", "belongs to another request; only page_size may change")
        person = content.get("u", person)
        chosen = _chosen(known, request, person)
        if content.get("x", "") != chosen.mark:
            raise InvalidArgument.of("page_token", "is of an experiment that has changed; begin again")
        degraded, bundle = self._not_served(chosen), self._by(chosen.arm).bundle
        if content.get("b", bundle) != bundle:
            degraded.append(_bundle_changed(content["b"]))
        as_of = datetime.fromisoformat(content["a"])
        return Place(content["o"], as_of, person, chosen, known, degraded, content.get("l"))

    def _wish(self, request: pb.RecommendRequest, place: Place, scenario: str, depth: int) -> Wish:
        wish = wish_of(request, place.known.find(scenario), place.as_of, depth)
        return replace(wish, explored_upto=place.explored_upto)

    def _by(self, arm: Arm | None) -> Pipeline:
        """The pipeline of an arm's bundle, or of the newest."""
        return self.pipelines.get(arm.bundle, self.pipeline) if arm else self.pipeline

    def _not_served(self, chosen: Assigned) -> list[pb.Degradation]:
        """A line for each bundle that an arm names and that is not there."""
        there = {"", self.pipeline.bundle, *self.pipelines}
        return [_not_served(bundle) for bundle in sorted({arm.bundle for arm in chosen.arms} - there)]

    async def _run(self, request: pb.RecommendRequest, place: Place, wish: Wish) -> Ordered:
        """What is shown of a request, by the arm or arms that serve it."""
        arm, rival = place.assigned.arm, place.assigned.rival
        if arm is None or rival is None:
            return await self._by(arm).run(wish)
        other = self._wish(request, place, rival.scenario, wish.depth)
        both = await asyncio.gather(self._by(arm).run(wish), self._by(rival).run(other))
        return interleaved(both, (arm.name, rival.name), wish.depth, wish.seed)

    async def _why(
        self, request: pb.RecommendRequest, place: Place, wish: Wish, number: int
    ) -> tuple[Answer, Ordered]:
        """What became of an item; of a page of two arms by the one that has it as a candidate."""
        arm, rival = place.assigned.arm, place.assigned.rival
        answer, ordered = await self._by(arm).why(wish, number)
        if rival is None:
            return answer, ordered
        other = self._wish(request, place, rival.scenario, wish.depth)
        second, of_second = await self._by(rival).why(other, number)
        if second.ranked and not answer.ranked:
            answer, ordered = second, of_second
        shown = (await self._run(request, place, wish)).numbers[: wish.depth]
        if number in shown:
            where = shown.index(number) + 1
            answer = Answer(pb.STANDING_SHOWN, f"is shown in place {where}", where, answer.ranked)
        elif answer.standing == pb.STANDING_SHOWN:
            answer = Answer(pb.STANDING_RANKED_LOWER, "others of both arms come first", 0, answer.ranked)
        return answer, ordered

    def log(
        self,
        request: pb.RecommendRequest,
        ordered: Ordered,
        items: Sequence[pb.Recommendation],
        request_id: str,
        place: Place,
        now: datetime,
    ) -> None:
        """Let a page be kept, and those of shadows be made."""
        if self._served is None:
            return
        chosen = place.assigned
        logged = page_of(request, ordered, items, place.start)
        logged.request_id, logged.scenario = request_id, request.scenario or HOME
        logged.served_at.CopyFrom(wire.time_to(now))
        logged.bundle = self._by(chosen.arm).bundle
        logged.experiment, logged.arm, logged.arm_place = chosen.experiment, chosen.alone, chosen.place
        self._served.add(logged)
        for at, arm in enumerate(chosen.shadows, 1):
            self._served.beside(self._shadow(request, logged, arm, at, place))

    async def _shadow(
        self, request: pb.RecommendRequest, shown: served_pb2.ServedPage, arm: Arm, at: int, place: Place
    ) -> served_pb2.ServedPage:
        """The page that another arm, at a place among all, would have shown."""
        page = slice(shown.start, shown.start + len(shown.item_ids))
        wish = self._wish(request, place, arm.scenario, page.stop + 1)
        pipeline = self._by(arm)
        ordered = await pipeline.run(wish)
        made = page_of(request, ordered, self.items(ordered, page, pipeline), page.start)
        for field in ("request_id", "scenario", "experiment"):
            setattr(made, field, getattr(shown, field))
        made.served_at.CopyFrom(shown.served_at)
        made.shadow, made.arm, made.arm_place, made.bundle = True, arm.name, at, pipeline.bundle
        return made

    def _exists(self, item_id: str, now: datetime) -> bool:
        table = self.pipeline.table
        row = int(table.rows([item_number(item_id)])[0])
        return row >= 0 and bool(table.available(now)[row])

    def attribution(self, request_id: str, scenario: str, now: datetime, chosen: Assigned) -> str:
        """The token that names an answer, for the events that it leads to."""
        content = {"r": request_id, "s": scenario, "b": self._by(chosen.arm).bundle}
        if chosen.experiment:
            content["x"] = chosen.mark
        return self._tokens.sign("shown", content, now)

    def items(self, ordered: Ordered, page: slice, pipeline: Pipeline) -> list[pb.Recommendation]:
        """The items of a page."""
        return items_of(ordered, page, (self.pipeline.table, pipeline.table))


def _chosen(known: Known, request: pb.RecommendRequest, person: str) -> Assigned:
    """Who serves a request; rules of its own that hold for a page keep it out of one that two arms share."""
    chosen, own = known.assigned(request.scenario, person), request.rules
    if chosen.rival and (own.caps or own.quotas or request.exploration):
        return Assigned(request.scenario or HOME)
    return chosen


def _assignment(chosen: Assigned) -> pb.Assignment | None:
    if not chosen.experiment:
        return None
    return pb.Assignment(experiment=chosen.experiment, arm=chosen.alone)


def _bundle_changed(before: str) -> pb.Degradation:
    return pb.Degradation(
        stage="pages",
        code=pb.DEGRADATION_CODE_BUNDLE_CHANGED,
        message=f"the pages before are of bundle {before}: items may come twice, or not at all",
    )


def _not_served(bundle: str) -> pb.Degradation:
    return pb.Degradation(
        stage="bundle",
        code=pb.DEGRADATION_CODE_NOT_READY,
        message=f"bundle {bundle!r} of the experiment's arm is not served; the newest stands in",
    )
