"""One turn of a dialogue: interpret the message, update the state, and recommend under it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services.catalog.items import item_hash
from services.core import deadline
from services.core.errors import DeadlineExceeded
from services.gateway.conversation import query_builder
from services.gateway.conversation.language.dialogue_state import (
    MAX_SHOWN,
    Change,
    Constraint,
    DialogueState,
    ItemPreference,
    SearchWords,
)
from services.gateway.conversation.language.interpreter import Interpretation, InterpreterInput, ShownItem
from services.gateway.conversation.language.interpreter_runner import InterpreterRunner
from services.gateway.conversation.language.vocabulary import Vocabulary, VocabularyCache
from services.gateway.query import Degradation, DegradationCode, RankedPage, RecommendQuery
from services.gateway.recommend.explanation_text import LANGUAGES
from services.gateway.recommend.pipeline import Pipeline


@dataclass(frozen=True)
class Turn:
    """The result of a turn: the ranked page, the query that it answers, and the new state.

    `changes` are those of the message. `relaxed` constraints stay in `state`, but the page does not meet
    them. `dropped` changes no longer fit into the state.
    """

    page: RankedPage
    query: RecommendQuery
    state: DialogueState
    changes: Sequence[Change]
    unrecognized: Sequence[str]
    relaxed: Sequence[Constraint]
    dropped: Sequence[Change]
    degraded: list[Degradation]


class TurnRunner:
    """Runs turns over a pipeline, with an interpreter for the messages."""

    def __init__(self, pipeline: Pipeline, interpreter: InterpreterRunner) -> None:
        self._pipeline, self._interpreter = pipeline, interpreter
        self._vocabulary = VocabularyCache(pipeline.table, pipeline.pool)

    async def run(self, request: pb.ConverseRequest, query: RecommendQuery, state: DialogueState) -> Turn:
        """One turn from `state`; `query` has the request's own filter and rules."""
        degraded: list[Degradation] = []
        interpretation = await self._interpret(request, state, degraded)
        removals = [c for c in interpretation.changes if isinstance(c, SearchWords) and not c.positive]
        unmatched = [w for c in removals for w in c.words if w not in state.words]
        changes = [c for c in interpretation.changes if c not in removals or set(c.words) & set(state.words)]
        likes = [ItemPreference(item_id) for item_id in request.liked_item_ids]
        dislikes = [ItemPreference(item_id, positive=False) for item_id in request.disliked_item_ids]
        state, dropped = state.apply([*changes, *likes, *dislikes]).truncate()
        query, page, relaxed = await self._page(query_builder.with_preferences(query, state), state, degraded)
        table = self._pipeline.table
        rows = table.rows(page.item_hashes[: min(MAX_SHOWN, query.depth)])
        return Turn(
            page,
            query,
            replace(state, shown_ids=tuple(table.ids(rows))),
            changes,
            [*interpretation.unrecognized, *unmatched],
            relaxed,
            dropped,
            [*degraded, *page.degraded],
        )

    async def titles(self, turn: Turn) -> dict[str, str]:
        """The titles of the items that the reply and the constraints of a turn name, by item id."""
        item_ids = {c.item_id for c in turn.changes if isinstance(c, ItemPreference)}
        item_ids |= {*turn.state.liked_ids, *turn.state.disliked_ids}
        return await self._pipeline.titles(sorted(item_ids), "reply", turn.degraded) if item_ids else {}

    async def _interpret(
        self, request: pb.ConverseRequest, state: DialogueState, degraded: list[Degradation]
    ) -> Interpretation:
        if not request.message.strip():
            return Interpretation()
        vocabulary = await self._vocabulary.current()
        rated = [*request.liked_item_ids, *request.disliked_item_ids]
        focus = request.focus_item_id or (rated[0] if len(rated) == 1 else "")
        interpretation, problem = await self._interpreter.read(
            InterpreterInput(
                request.message,
                request.language or LANGUAGES[0],
                vocabulary,
                self._shown_items(state.shown_ids, vocabulary),
                next(iter(self._shown_items([focus], vocabulary)), None),
            )
        )
        if problem is not None:
            degraded.append(_interpreter_degradation(problem))
        return interpretation

    def _shown_items(self, item_ids: Iterable[str], vocabulary: Vocabulary) -> list[ShownItem]:
        """The items as a message may refer to them; unknown ids are skipped."""
        table = self._pipeline.table
        prices, items = table.numbers("price"), []
        for row in table.rows(map(item_hash, item_ids)).tolist():
            if row < 0:
                continue
            price = float(prices[row, 0]) if prices is not None and row < len(prices) else float("nan")
            texts = {name: table.texts_of(name, row) for name in vocabulary.attribute_texts}
            [item_id] = table.ids([row])
            items.append(ShownItem(item_id, texts, price if price >= 0 else None))
        return items

    async def _page(
        self, query: RecommendQuery, state: DialogueState, degraded: list[Degradation]
    ) -> tuple[RecommendQuery, RankedPage, list[Constraint]]:
        """The page, the query that it answers, and the constraints that were relaxed for it."""
        pipeline, active = self._pipeline, state.constraints
        seconds = deadline.remaining()
        # If nothing matches the request alone, relaxing constraints does not help.
        relaxable = await pipeline.pool.run(partial(pipeline.any_eligible, query))
        while True:
            if relaxable:
                active = await pipeline.pool.run(partial(self._satisfiable, query, active))
            problems: list[Degradation] = []
            narrowed = query_builder.with_constraints(query, active)
            narrowed = await self._with_search(narrowed, state, problems)
            page = await pipeline.run(narrowed)
            late = seconds is not None and (deadline.remaining() or 0.0) < seconds / 2
            if page.item_hashes or not active or not relaxable or late:
                degraded += problems
                return narrowed, page, [c for c in state.constraints if c not in active]
            active = active[:-1]  # the user has purchased every item that meets them

    def _satisfiable(
        self, query: RecommendQuery, constraints: tuple[Constraint, ...]
    ) -> tuple[Constraint, ...]:
        """The constraints without the newest ones that must go so that an item meets the rest."""

        def matches(candidates: Sequence[Constraint]) -> bool:
            return self._pipeline.any_eligible(query_builder.with_constraints(query, candidates))

        while constraints and not matches(constraints):
            newest_first = reversed(range(len(constraints)))
            subsets = ((*constraints[:index], *constraints[index + 1 :]) for index in newest_first)
            constraints = next(filter(matches, subsets), constraints[:-1])
        return constraints

    async def _with_search(
        self, query: RecommendQuery, state: DialogueState, degraded: list[Degradation]
    ) -> RecommendQuery:
        request = query_builder.search_request(query, state, self._pipeline.bundle)
        if request is None:
            return query
        response = await self._pipeline.search(request, degraded)
        results = response.results if response else ()
        return query_builder.with_search_results(query, state, results, self._pipeline.table)


def _interpreter_degradation(problem: Exception) -> Degradation:
    late = isinstance(problem, DeadlineExceeded)
    return Degradation(
        stage="interpret",
        code=DegradationCode.TIMEOUT if late else DegradationCode.FAILED,
        message="the shop's interpreter timed out" if late else "the shop's interpreter failed",
    )
