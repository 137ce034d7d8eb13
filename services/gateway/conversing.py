"""A turn of a dialogue: a message is read, the dialogue moves on, and a page is made of what it has come to.

Knows the pipeline and how a dialogue travels, not how messages are read.
"""

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from vitrine.catalog.v1 import event_pb2, filter_pb2, item_pb2
from vitrine.embedding.v1 import embedding_service_pb2 as embedding_pb
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from services import filters, wire
from services.catalog import item_number
from services.errors import DeadlineExceeded, InvalidArgument
from services.gateway import dialogue as talk
from services.gateway.dialogue import Change, Condition, Dialogue, Liking, Words
from services.gateway.fusion import CROSS_MODAL_WEIGHT, fused
from services.gateway.interpreter import Heard, Reading, Shown
from services.gateway.pipeline import Pipeline, person_of
from services.gateway.readers import Reader
from services.gateway.rules import Boost
from services.gateway.sentences import LANGUAGES
from services.gateway.tokens import Tokens
from services.gateway.vocabulary import Vocabularies, Vocabulary
from services.gateway.wish import Ordered, Wish

_KIND = "talk"
_FOUND = 400
_LATEST_LIKED, _LATEST_DISLIKED = 8, 16
_NEAREST, _SINKS = 10, -0.3


@dataclass(frozen=True)
class Turn:
    """What came of a turn: the page, the wish that it answers, and what there is to say of it.

    `changes` are those of the message; `relaxed` conditions are in `dialogue` and not met, `dropped` ones had
    to go.
    """

    ordered: Ordered
    wish: Wish
    dialogue: Dialogue
    changes: Sequence[Change]
    not_understood: Sequence[str]
    relaxed: Sequence[Condition]
    dropped: Sequence[Change]
    degraded: list[pb.Degradation]


class Conversing:
    """Dialogues over a pipeline, that travel in `tokens` and whose messages a `reader` reads."""

    def __init__(self, pipeline: Pipeline, tokens: Tokens, reader: Reader) -> None:
        self._pipeline, self._tokens, self._reader = pipeline, tokens, reader
        self._vocabularies = Vocabularies(pipeline.table)

    def begun(self, request: pb.ConverseRequest, now: datetime) -> Dialogue:
        """What the dialogue has come to; InvalidArgument names the token when it is another person's."""
        if not request.conversation_token:
            return Dialogue()
        content = self._tokens.read(_KIND, request.conversation_token, now, "conversation_token")
        user, visitor = _digests(request)
        same = content["u"] == user
        if not content["u"]:  # a visitor who signs in goes on
            same = content["v"] == visitor and bool(visitor or not user)
        if not same:
            raise InvalidArgument.of("conversation_token", "is of another person's dialogue")
        return talk.dialogue_from(content["d"])

    def token(self, request: pb.ConverseRequest, dialogue: Dialogue, now: datetime) -> str:
        """What the next turn goes on from."""
        user, visitor = _digests(request)
        content = {"u": user, "v": visitor, "d": talk.content_of(dialogue)}
        return self._tokens.sign(_KIND, content, now)

    async def turn(self, request: pb.ConverseRequest, wish: Wish, before: Dialogue) -> Turn:
        """Read the message, move the dialogue on, make the page; `wish` is what the request itself asks."""
        degraded: list[pb.Degradation] = []
        reading = await self._read(request, before, degraded)
        unsaid = [c for c in reading.changes if isinstance(c, Words) and not c.wanted]
        strange = [w for c in unsaid for w in c.words if w not in before.words]
        changes = [c for c in reading.changes if c not in unsaid or set(c.words) & set(before.words)]
        likes = [Liking(item_id) for item_id in request.liked_item_ids]
        dislikes = [Liking(item_id, liked=False) for item_id in request.disliked_item_ids]
        now, dropped = before.after([*changes, *likes, *dislikes]).bounded()
        wish, ordered, relaxed = await self._page(_of_person(wish, now), now, degraded)
        table = self._pipeline.table
        rows = table.rows(ordered.numbers[: min(talk.MAX_SHOWN, wish.depth)])
        return Turn(
            ordered,
            wish,
            replace(now, shown=tuple(table.ids(rows))),
            changes,
            [*reading.not_understood, *strange],
            relaxed,
            dropped,
            [*degraded, *ordered.degraded],
        )

    async def titles(self, turn: Turn) -> dict[str, str]:
        """The titles of the items that a turn speaks of, by their ids."""
        spoken = {c.item_id for c in turn.changes if isinstance(c, Liking)}
        spoken |= {*turn.dialogue.liked, *turn.dialogue.disliked}
        return await self._pipeline.titles(sorted(spoken), "reply", turn.degraded) if spoken else {}

    async def _read(
        self, request: pb.ConverseRequest, before: Dialogue, degraded: list[pb.Degradation]
    ) -> Reading:
        if not request.message.strip():
            return Reading()
        vocabulary = await self._vocabularies.now()
        named = [*request.liked_item_ids, *request.disliked_item_ids]
        focus = request.focus_item_id or (named[0] if len(named) == 1 else "")
        heard = Heard(
            request.message,
            request.language or LANGUAGES[0],
            vocabulary,
            self._shown(before.shown, vocabulary),
            next(iter(self._shown([focus], vocabulary)), None),
        )
        reading, problem = await self._reader.read(heard)
        if problem is not None:
            late = isinstance(problem, DeadlineExceeded)
            degraded.append(
                pb.Degradation(
                    stage="interpret",
                    code=pb.DEGRADATION_CODE_TIMEOUT if late else pb.DEGRADATION_CODE_FAILED,
                    message="the shop's interpreter was late" if late else "the shop's interpreter failed",
                )
            )
        return reading

    def _shown(self, item_ids: Iterable[str], vocabulary: Vocabulary) -> list[Shown]:
        """The items as a message may refer to them; unknown ones are left out."""
        table = self._pipeline.table
        prices, found = table.numbers("price"), []
        for row in table.rows(map(item_number, item_ids)).tolist():
            if row < 0:
                continue
            price = float(prices[row, 0]) if prices is not None and row < len(prices) else float("nan")
            texts = {name: table.texts_of(name, row) for name in vocabulary.known}
            [item_id] = table.ids([row])
            found.append(Shown(item_id, texts, price if price >= 0 else None))
        return found

    async def _page(
        self, wish: Wish, now: Dialogue, degraded: list[pb.Degradation]
    ) -> tuple[Wish, Ordered, list[Condition]]:
        """The page, the wish that it answers, and the conditions that were set aside for there to be one."""
        kept: Sequence[Condition] = now.conditions
        # Where nothing may be shown whatever is said, nothing of it is in the way.
        some = await asyncio.to_thread(self._pipeline.some_may_be_shown, wish)
        while True:
            kept = await asyncio.to_thread(self._met, wish, kept) if some else kept
            said: list[pb.Degradation] = []
            narrowed = await self._led(_narrowed(wish, kept), now, said)
            ordered = await self._pipeline.run(narrowed)
            if ordered.numbers or not kept or not some:
                degraded += said
                return narrowed, ordered, [c for c in now.conditions if c not in kept]
            kept = kept[:-1]  # all that meets them was bought before

    def _met(self, wish: Wish, conditions: Sequence[Condition]) -> Sequence[Condition]:
        """The conditions without the newest that must go for anything to meet the rest."""
        some = self._pipeline.some_may_be_shown
        while conditions and not some(_narrowed(wish, conditions)):
            without = ((*conditions[:at], *conditions[at + 1 :]) for at in reversed(range(len(conditions))))
            conditions = next((c for c in without if some(_narrowed(wish, c))), conditions[:-1])
        return conditions

    async def _led(self, wish: Wish, now: Dialogue, degraded: list[pb.Degradation]) -> Wish:
        """The wish with what the words find as its candidates, and what is near to disliked items sunk."""
        liked = now.liked[-_LATEST_LIKED:] if now.words else ()
        disliked = now.disliked[-_LATEST_DISLIKED:]
        if not now.words and not disliked:
            return wish
        request = embedding_pb.SearchRequest(
            groups=[embedding_pb.InterestGroup(item_ids=[item_id]) for item_id in (*liked, *disliked)],
            text=" ".join(now.words),
            limit=_FOUND,
            filter=wish.filter,
            exclude_item_numbers=sorted(wish.excluded),
            min_sequence=wish.min_sequence,
            bundle=self._pipeline.bundle,
            as_of=wire.time_to(wish.as_of),
        )
        found = await self._pipeline.search(request, degraded)
        orders, near = [], set[int]()
        for result in found.results if found else ():
            if len(liked) <= result.query < len(liked) + len(disliked):
                near.update(_very_near(result))
            elif result.query < len(liked):
                orders.append((1 / len(liked), result.item_numbers))
            else:
                weight = CROSS_MODAL_WEIGHT if result.space == item_pb2.SPACE_IMAGE else 1.0
                orders.append((weight, result.item_numbers))
        if near:
            ids = frozenset(self._pipeline.table.ids(self._known(near)))
            sunk = Boost(filters.In("id", ids), _SINKS)
            wish = replace(wish, rules=replace(wish.rules, boosts=(*wish.rules.boosts, sunk)))
        scores = fused(orders)
        best = sorted(scores, key=lambda number: (-scores[number], number))[:_FOUND]
        return replace(wish, items=tuple(best), blend=True) if best else wish

    def _known(self, numbers: Iterable[int]) -> list[int]:
        return [row for row in self._pipeline.table.rows(sorted(numbers)).tolist() if row >= 0]


def _very_near(result: embedding_pb.SearchResult) -> list[int]:
    """Of the nearest items those that are no further from the same than from the middle of all found.

    Encoders differ in what a cosine is worth, so that no fixed one would do.
    """
    scores = result.scores
    least = (1 + scores[len(scores) // 2]) / 2 if scores else 1.0
    told = zip(result.item_numbers[:_NEAREST], scores[:_NEAREST], strict=True)
    return [number for number, score in told if score >= least]


def _digests(request: pb.ConverseRequest) -> tuple[str, str]:
    """What stands for the user and for the visitor in a token; empty for none."""
    user, visitor = (
        hashlib.blake2b(value.encode(), digest_size=8).hexdigest() if value else ""
        for value in (request.user_id, request.visitor_id)
    )
    return user, visitor


def _of_person(wish: Wish, now: Dialogue) -> Wish:
    """The wish of somebody who likes and dislikes what the dialogue has come to; neither is shown."""
    liked = [event_pb2.SessionItem(item_id=item_id) for item_id in now.liked]
    told = frozenset(item_number(item_id) for item_id in (*now.liked, *now.disliked))
    person = person_of(wish.person.user_id, wish.person.visitor_id, liked)
    return replace(wish, person=person, excluded=wish.excluded | told)


def _narrowed(wish: Wish, conditions: Sequence[Condition]) -> Wish:
    """The wish under conditions; a shop's rules may give up the request's own filter, not these."""
    if not conditions:
        return wish
    parts = talk.filters_of(conditions)
    own = [] if wish.condition is None else [wish.condition]
    message = filter_pb2.Filter()
    message.all_of.filters.extend([wish.filter] if wish.filter is not None else [])
    message.all_of.filters.extend(wire.filter_to(part) for part in parts)
    loose = [] if wish.loose is None else [wish.loose]
    return replace(
        wish,
        filter=message,
        condition=filters.AllOf((*own, *parts)),
        loose=filters.AllOf((*loose, *parts)),
    )
