"""Sixty days in the made-up shop: what people were shown, clicked, put into the cart and bought.

The shop lists as old shops do: by bestsellers, novelty, categories and likeness to the last
click. People look at the top of a page first and click on what pleases them. Knows nothing
of files; times are seconds since 1970.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from demo.catalogue import FRESH_DAYS, Product
from demo.tastes import Truth
from demo.world import KIND_NAMES

TYPES = ("impression", "click", "cart", "purchase")
DAYS = 60
PAGE = 10
_DAY = 86_400
_PAGES_PER_PERSON = 4.0
_PAGES = ((1, 0.42), (2, 0.28), (3, 0.18), (5, 0.12))
_HOURS = np.array([1, 1, 1, 1, 1, 1, 2, 4, 6, 7, 8, 8, 9, 8, 7, 7, 8, 9, 11, 13, 14, 12, 7, 3], float)
_POSITION_BIAS = 0.45
_BEST, _NEW, _CATEGORY, _LIKE = range(4)
_KIND_OF_PAGE = (0.28, 0.12, 0.6)
_LIKE_AFTER_CLICK = 0.45


@dataclass(frozen=True)
class Rows:
    """Events in columns of one length: rows of people and products, codes of TYPES."""

    user: np.ndarray
    session: np.ndarray
    kind: np.ndarray
    item: np.ndarray
    time: np.ndarray
    position: np.ndarray

    @staticmethod
    def of(parts: Sequence["Rows"]) -> "Rows":
        """All rows, in the order of time; a click follows its impression."""
        columns = [np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Rows)]
        whole = Rows(*columns)
        order = np.lexsort((whole.position, whole.kind, whole.session, whole.time))
        return Rows(*(column[order] for column in columns))


@dataclass(frozen=True)
class _Visits:
    """The sessions of a day: `user`, `session`, `begin` int64 (V,), `pages` int64 (V,), `mood` (V, K)."""

    user: np.ndarray
    session: np.ndarray
    begin: np.ndarray
    pages: np.ndarray
    mood: np.ndarray


class _Shop:
    """The listing's view of the products, and what has been bought and clicked so far."""

    def __init__(self, truth: Truth, products: Sequence[Product], end: int) -> None:
        self.truth = truth
        self.listed = np.array([p.available_from.timestamp() for p in products]) + FRESH_DAYS * _DAY
        self.kind = np.array([KIND_NAMES.index(p.kind) for p in products])
        self.begin = end - DAYS * _DAY
        # What sold before the first day, so that it has bestsellers too.
        self.sales = np.exp(1.1 * truth.appeal / truth.appeal.std())
        self.owned = np.zeros((len(truth.user_ids), len(products)), bool)
        features = truth.products[:, :-3]
        self.likeness = features @ features.T


def simulate(rng: np.random.Generator, truth: Truth, products: Sequence[Product], end: int) -> Rows:
    """What happened in the DAYS before `end`; new people and products too new were not there."""
    shop = _Shop(truth, products, end)
    here = np.flatnonzero(~truth.new_people)
    activity = rng.lognormal(0, 1.1, len(here))
    usual_pages = float(sum(n * share for n, share in _PAGES))
    rate = activity / activity.mean() * (_PAGES_PER_PERSON / usual_pages - 1) / DAYS
    first = rng.integers(0, DAYS, len(here))  # everybody comes once at least
    parts: list[Rows] = []
    sessions = 0
    for day in range(DAYS):
        weekend = 1.25 if day % 7 in (5, 6) else 0.9
        user = np.repeat(here, rng.poisson(rate * weekend) + (first == day))
        visits = _visits(rng, truth, user, shop.begin + day * _DAY, sessions)
        sessions += len(user)
        parts += _day(rng, shop, visits)
        shop.sales *= 0.985
    return Rows.of(parts)


def _visits(rng: np.random.Generator, truth: Truth, user: np.ndarray, day: int, sessions: int) -> _Visits:
    count = len(user)
    hour = rng.choice(24, count, p=_HOURS / _HOURS.sum())
    begin = day + hour * 3600 + rng.integers(0, 2400, count)
    sizes, shares = zip(*_PAGES, strict=True)
    mood = 0.45 * rng.standard_normal((count, truth.people.shape[1])).astype(np.float32)
    mood[:, -3:] = 0
    order = np.argsort(begin, kind="stable")
    pages = rng.choice(sizes, count, p=shares)
    return _Visits(user[order], sessions + np.arange(count), begin[order], pages, mood)


def _day(rng: np.random.Generator, shop: _Shop, visits: _Visits) -> list[Rows]:
    """Every session of the day, page by page; what is clicked on one page shapes the next."""
    parts = []
    last = np.full(len(visits.user), -1)
    for page in range(int(visits.pages.max(initial=0))):
        on = np.flatnonzero(visits.pages > page)
        utility = shop.truth.utility(visits.user[on]) + visits.mood[on] @ shop.truth.products.T
        now = visits.begin[on] + page * 150
        shown = _listing(rng, shop, visits, on, last[on], now, utility)
        seen = np.take_along_axis(utility, shown, 1) - 8.0 * shop.owned[visits.user[on][:, None], shown]
        parts += _answers(rng, shop, visits, on, last, now, shown, seen)
    return parts


def _listing(
    rng: np.random.Generator,
    shop: _Shop,
    visits: _Visits,
    on: np.ndarray,
    last: np.ndarray,
    now: np.ndarray,
    utility: np.ndarray,
) -> np.ndarray:
    """The products of a page for each session, best place first: int64 (B, PAGE)."""
    sort = rng.choice(3, len(on), p=_KIND_OF_PAGE)
    sort[(last >= 0) & (rng.random(len(on)) < _LIKE_AFTER_CLICK)] = _LIKE
    bestseller = np.log1p(shop.sales)
    bestseller = (bestseller - bestseller.mean()) / bestseller.std()
    age = (now[:, None] - shop.listed) / _DAY
    weights = np.array([1.6, 0.4, 0.9, 0.4])[sort][:, None]
    score = rng.gumbel(size=utility.shape) * 0.9 + weights * bestseller
    score += np.array([0.3, 2.5, 0.5, 0.2])[sort][:, None] * np.exp(-np.maximum(age, 0) / 12)
    score += 0.25 * utility  # a shop's own, weak, idea of what a person likes
    score += 6.0 * (shop.kind == _wanted_kind(rng, shop, visits, on)[:, None]) * (sort == _CATEGORY)[:, None]
    score += 2.2 * shop.likeness[last] * (sort == _LIKE)[:, None]
    score[age < 0] = -np.inf
    top = np.argpartition(-score, PAGE, axis=1)[:, :PAGE]
    return np.take_along_axis(top, np.argsort(-np.take_along_axis(score, top, 1), axis=1), 1)


def _wanted_kind(rng: np.random.Generator, shop: _Shop, visits: _Visits, on: np.ndarray) -> np.ndarray:
    count = len(KIND_NAMES)
    taste = shop.truth.people[visits.user[on], :count] + visits.mood[on, :count]
    return np.asarray((1.3 * taste + rng.gumbel(size=taste.shape)).argmax(1))


def _answers(
    rng: np.random.Generator,
    shop: _Shop,
    visits: _Visits,
    on: np.ndarray,
    last: np.ndarray,
    now: np.ndarray,
    shown: np.ndarray,
    seen: np.ndarray,
) -> list[Rows]:
    """What people do with a page; remembers it in `shop` and `last`."""
    place = np.arange(1, PAGE + 1)
    looked = rng.random(shown.shape) < place**-_POSITION_BIAS
    clicked = looked & (rng.random(shown.shape) < _sigmoid(1.15 * seen - 2.55))
    cart = clicked & (rng.random(shown.shape) < _sigmoid(0.9 * seen - 4.3))
    bought = (cart & (rng.random(shown.shape) < 0.72)) | (  # noqa: PLR2004 - most carts are paid for
        clicked & ~cart & (rng.random(shown.shape) < _sigmoid(0.9 * seen - 4.6))
    )
    at = now[:, None] + np.cumsum(rng.integers(2, 14, shown.shape), 1)
    pay = visits.begin[on] + visits.pages[on] * 150 + rng.integers(20, 240, len(on))
    times = (
        np.broadcast_to(now[:, None], shown.shape),
        at,
        at + 8,
        np.broadcast_to(pay[:, None], shown.shape),
    )
    parts = []
    for kind, (done, when) in enumerate(
        zip((np.ones_like(clicked), clicked, cart, bought), times, strict=True)
    ):
        row, column = np.nonzero(done)
        session = on[row]
        parts.append(
            Rows(
                visits.user[session],
                visits.session[session],
                np.full(len(row), kind),
                shown[row, column],
                when[row, column],
                place[column],
            )
        )
    row, column = np.nonzero(bought)
    shop.owned[visits.user[on[row]], shown[row, column]] = True
    np.add.at(shop.sales, shown[row, column], 1.0)
    row, column = np.nonzero(clicked)
    last[on[row]] = shown[row, column]
    return parts


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))
