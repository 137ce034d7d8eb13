"""What of the catalogue may be shown to somebody, and the order that the shop's rules give it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from vitrine.gateway.v1 import recommendation_service_pb2 as pb
from vitrine.ranking.v1 import ranking_service_pb2 as ranking_pb

from services import filters
from services.catalog import item_number
from services.gateway.experiments import unit
from services.gateway.rules import FILTER, Slate, arrange, relevance
from services.gateway.trial import Trial, expectation, trial
from services.gateway.wish import DEEPEST, Candidates, Ordered, Wish
from services.item_table import ItemTable

_FILLING = 20_000


class Assortment:
    """The items of a table; `popular` int64 (P,) item numbers, best first."""

    def __init__(self, table: ItemTable, popular: np.ndarray) -> None:
        self._table, self._popular = table, popular
        self._places = 0, np.empty(0, np.int64)

    def arranged(self, wish: Wish, retrieved: ranking_pb.RetrieveResponse | None, ranked: Ordered) -> Ordered:
        """What was ranked as the rules want it, and others of the catalogue where that is too little."""
        depth = min(wish.depth, DEEPEST)
        if not wish.rules.reorder and (len(ranked.numbers) >= depth or not wish.fill):
            return ranked
        more: list[int] = []
        slate = self._slate(wish, retrieved, ranked, [])
        arranged = arrange(slate, wish.rules, depth, more=wish.fill)
        if arranged is None:
            more = self._filling(wish, retrieved, ranked.numbers)
            slate = self._slate(wish, retrieved, ranked, more)
            arranged = arrange(slate, wish.rules, depth, last=True)
        assert arranged is not None  # noqa: S101 - there is no more
        numbers = [*ranked.numbers, *more]
        scores = [*ranked.scores, *[0.0] * len(more)]
        shown = [numbers[place] for place in arranged.places]
        pool = [numbers[place] for place in slate.trial.places.tolist()] if slate.trial else []
        candidates = Candidates(dict(ranked.candidates.sources))
        filled = [numbers[place] for place in arranged.places if place >= len(ranked.numbers)]
        candidates.add("catalogue", filled, [0.0] * len(filled))
        relaxed = [
            pb.Degradation(
                stage=name,
                code=pb.DEGRADATION_CODE_RULE_RELAXED,
                message=f"{name} was given up so that the page has {len(shown)} items",
            )
            for name in arranged.relaxed
        ]
        return replace(
            ranked,
            numbers=shown,
            scores=[scores[place] for place in arranged.places],
            candidates=candidates,
            degraded=[*ranked.degraded, *relaxed],
            moved={numbers[place]: why for place, why in arranged.moved.items()},
            draws=arranged.draws,
            pool=pool,
            propensities={pool[draw.drawn]: draw.propensity for draw in arranged.draws},
            relevances=slate.relevance()[slate.trial.places].tolist() if slate.trial else (),
            explored_upto=retrieved.explorable.upto if retrieved else 0,
        )

    def of_quota(
        self, wish: Wish, retrieved: ranking_pb.RetrieveResponse | None, condition: filters.Filter, limit: int
    ) -> list[int]:
        """The most popular items that may be shown and for which a condition holds."""
        mask = self._mask(wish, wish.condition, retrieved)
        mask &= filters.evaluate(condition, self._table)[: len(mask)]
        return self._most_popular(np.flatnonzero(mask), limit)

    def _mask(
        self, wish: Wish, condition: filters.Filter | None, retrieved: ranking_pb.RetrieveResponse | None
    ) -> np.ndarray:
        """Which rows of the table may be shown under a condition, bool (N,)."""
        mask = self._table.available(wish.as_of)
        if condition is not None:
            mask = mask & filters.evaluate(condition, self._table)[: len(mask)]
        out = self._table.rows(self.excluded(wish, retrieved))
        mask[out[(out >= 0) & (out < len(mask))]] = False
        return mask

    def allowed(
        self, wish: Wish, retrieved: ranking_pb.RetrieveResponse | None, numbers: Sequence[int]
    ) -> list[int]:
        """The hard rules, on every path: live, available, under the filter, not excluded."""
        mask = self._table.available(wish.as_of)
        if wish.condition is not None:
            condition = filters.evaluate(wish.condition, self._table)
            mask = mask[: len(condition)] & condition[: len(mask)]
        rows = self._table.rows(numbers)
        held = (rows >= 0) & (rows < len(mask)) & np.append(mask, False)[np.minimum(rows, len(mask))]
        out = self.excluded(wish, retrieved)
        return [n for n, ok in zip(numbers, held.tolist(), strict=True) if ok and n not in out]

    def any_allowed(self, wish: Wish) -> bool:
        """Whether any item may be shown, for all that is known of no purchases."""
        return bool(self._mask(wish, wish.condition, None).any())

    @staticmethod
    def excluded(wish: Wish, retrieved: ranking_pb.RetrieveResponse | None) -> set[int]:
        """What is not to be shown: by the request, by the visit so far, for having been bought or seen."""
        out = set(wish.excluded)
        if wish.items is None:
            out.update(item_number(item.item_id) for item in wish.person.session)
        if retrieved is not None and wish.exclude_bought:
            out.update(retrieved.bought_item_numbers)
        if retrieved is not None and wish.exclude_seen:
            out.update(retrieved.history.item_numbers)
        return out

    def _most_popular(self, rows: np.ndarray, limit: int) -> list[int]:
        """The numbers of at most `limit` rows, int64, the bundle's popular ones first."""
        first = rows[np.argsort(self._popularity(rows), kind="stable")[:limit]]
        numbers: list[int] = self._table.item_numbers[first].tolist()
        return numbers

    def _popularity(self, rows: np.ndarray) -> np.ndarray:
        """The place of each row among the bundle's popular items, from 0; of others the number of those."""
        length, places = self._places
        if length < self._table.length:  # rows never move
            length = self._table.length
            places = np.full(length, len(self._popular))
            known = self._table.rows(self._popular)
            inside = np.flatnonzero((known >= 0) & (known < length))
            places[known[inside]] = inside
            self._places = length, places
        found: np.ndarray = places[rows]
        return found

    def _filling(
        self, wish: Wish, retrieved: ranking_pb.RetrieveResponse | None, known: Sequence[int]
    ) -> list[int]:
        """What else may be shown, at most 20,000: under the filter first, and of those the popular first."""
        mask = self._mask(wish, wish.condition, retrieved)
        mine = self._table.rows(known)
        mine = mine[(mine >= 0) & (mine < len(mask))]
        loose = np.zeros(len(mask), bool)
        if FILTER in wish.rules.relax:
            loose[:] = self._mask(wish, wish.loose, retrieved)[: len(mask)] & ~mask
        mask[mine] = loose[mine] = False
        return [
            *self._most_popular(np.flatnonzero(mask), _FILLING),
            *self._most_popular(np.flatnonzero(loose), _FILLING),
        ]

    def _outside(self, wish: Wish, numbers: Sequence[int]) -> np.ndarray:
        """Which items do not qualify for the filter, bool (N,)."""
        if wish.condition is None:
            return np.zeros(len(numbers), bool)
        qualify: np.ndarray = filters.evaluate(wish.condition, self._table)[self._table.rows(numbers)]
        return ~qualify

    def _slate(
        self,
        wish: Wish,
        retrieved: ranking_pb.RetrieveResponse | None,
        ranked: Ordered,
        more: Sequence[int],
    ) -> Slate:
        numbers = [*ranked.numbers, *more]
        rows, count = self._table.rows(numbers), len(ranked.numbers)
        values = []
        for cap in wish.rules.caps:
            texts = self._table.texts(cap.attribute)
            values.append(np.full((len(rows), 1), -1) if texts is None else texts[0][rows])
        boosts = np.zeros(len(rows), np.float32)
        for boost in wish.rules.boosts:
            boosts += boost.amount * filters.evaluate(boost.condition, self._table)[rows]
        quotas = np.zeros((len(wish.rules.quotas), len(rows)), bool)
        for mine, quota in zip(quotas, wish.rules.quotas, strict=True):
            if quota.condition is not None:
                mine[:] = filters.evaluate(quota.condition, self._table)[rows]
            else:
                mine[:count] = [quota.source in ranked.candidates.sources[n] for n in ranked.numbers]
        shown = (
            dict(zip(retrieved.shown_item_numbers, retrieved.shown_counts, strict=True)) if retrieved else {}
        )
        column = self._table.vectors("text") or self._table.vectors("image")
        return Slate(
            scores=np.array(ranked.scores, np.float32),
            outside=self._outside(wish, numbers),
            values=values,
            boosts=boosts,
            quotas=quotas,
            shown=np.array([shown.get(n, 0.0) for n in ranked.numbers], np.float32),
            vectors=column[0][rows[:count]].astype(np.float32) if column and wish.rules.diversity else None,
            trial=_trial(wish, retrieved, ranked) if wish.rules.exploration.share else None,
            lots=_lots(wish, ranked.numbers) if wish.rules.variety and _stranger(wish, retrieved) else None,
        )


def _stranger(wish: Wish, retrieved: ranking_pb.RetrieveResponse | None) -> bool:
    """Whether nothing is known of who asks."""
    person = wish.person
    named = bool(person.user_id or person.visitor_id)
    past = named if retrieved is None else bool(retrieved.history.item_numbers)
    return not person.session and not past


def _lots(wish: Wish, numbers: Sequence[int]) -> np.ndarray:
    """A lot for each item that a person keeps all day long, float32 (N,), 0 to 1."""
    return np.array([unit(wish.visit, str(number)) for number in numbers], np.float32)


def _trial(wish: Wish, retrieved: ranking_pb.RetrieveResponse | None, ranked: Ordered) -> Trial | None:
    """What may be tried, of what was ranked; None for nothing."""
    if retrieved is None:
        return None
    place_of = {number: place for place, number in enumerate(ranked.numbers)}
    found, sources = retrieved.explorable, ranked.candidates.sources
    held = [at for at, number in enumerate(found.item_numbers) if number in place_of]
    if not held:
        return None
    numbers = [found.item_numbers[at] for at in held]
    places = np.array([place_of[number] for number in numbers], np.int64)
    only = np.array([set(sources[number]) == {"explore"} for number in numbers], bool)
    apart = np.zeros(len(ranked.numbers), bool)
    apart[places[only]] = True
    expected = expectation(relevance(np.array(ranked.scores, np.float32), apart)[places])
    if ranked.probabilities:  # of the first type of event that they are known of
        known = next(iter(ranked.probabilities.values()))
        expected = np.array([known.get(number, np.nan) for number in numbers])
    return trial(
        places,
        only,
        np.array(found.showings, np.float64)[held],
        np.array(found.engagements, np.float64)[held],
        np.nan_to_num(expected),
        seed=wish.seed,
        depth=wish.depth,
    )
