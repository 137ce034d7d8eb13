"""Simulate sixty days of the demo shop: impressions, clicks, carts and purchases.

The simulated shop ranks by sales, novelty, category and similarity to the last click. Users view the top
positions first and click items of high utility. Independent of files; times are seconds since 1970.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from demo.catalog import FRESH_DAYS, Product
from demo.tastes import Truth
from demo.world import KIND_NAMES

TYPES = ("impression", "click", "cart", "purchase")
DAYS = 60
PAGE = 10
_DAY = 86_400
_PAGES_PER_USER = 4.0
_PAGES = ((1, 0.42), (2, 0.28), (3, 0.18), (5, 0.12))
_HOURS = np.array([1, 1, 1, 1, 1, 1, 2, 4, 6, 7, 8, 8, 9, 8, 7, 7, 8, 9, 11, 13, 14, 12, 7, 3], float)
_POSITION_BIAS = 0.45
_BEST, _NEW, _CATEGORY, _SIMILAR = range(4)
_PAGE_TYPE_SHARES = (0.28, 0.12, 0.6)
_SIMILAR_AFTER_CLICK = 0.45


@dataclass(frozen=True)
class Rows:
    """Events in columns of one length: rows of users and products, and indices into TYPES."""

    user: np.ndarray
    session: np.ndarray
    kind: np.ndarray
    item: np.ndarray
    time: np.ndarray
    position: np.ndarray

    @staticmethod
    def of(parts: Sequence["Rows"]) -> "Rows":
        """All rows, ordered by time; a click follows its impression."""
        columns = [np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Rows)]
        rows = Rows(*columns)
        order = np.lexsort((rows.position, rows.kind, rows.session, rows.time))
        return Rows(*(column[order] for column in columns))


@dataclass(frozen=True)
class _Visits:
    """The sessions of a day: `user`, `session`, `start` int64 (V,), `pages` int64 (V,), `mood` (V, K)."""

    user: np.ndarray
    session: np.ndarray
    start: np.ndarray
    pages: np.ndarray
    mood: np.ndarray


class _Shop:
    """The state of the shop's listing: sales, purchases of each user, and item similarity."""

    def __init__(self, truth: Truth, products: Sequence[Product], end: int) -> None:
        self.truth = truth
        self.listed = np.array([p.available_from.timestamp() for p in products]) + FRESH_DAYS * _DAY
        self.kind = np.array([KIND_NAMES.index(p.kind) for p in products])
        self.start = end - DAYS * _DAY
        # Sales before the first day, which give the first day bestsellers.
        self.sales = np.exp(1.1 * truth.appeal / truth.appeal.std())
        self.owned = np.zeros((len(truth.user_ids), len(products)), bool)
        features = truth.products[:, :-3]
        self.similarity = features @ features.T


def simulate(rng: np.random.Generator, truth: Truth, products: Sequence[Product], end: int) -> Rows:
    """Simulate the DAYS before `end`; new users and products that are too new have no events."""
    shop = _Shop(truth, products, end)
    users = np.flatnonzero(~truth.new_users)
    activity = rng.lognormal(0, 1.1, len(users))
    mean_pages = float(sum(n * share for n, share in _PAGES))
    rate = activity / activity.mean() * (_PAGES_PER_USER / mean_pages - 1) / DAYS
    first = rng.integers(0, DAYS, len(users))  # every user has a session
    parts: list[Rows] = []
    sessions = 0
    for day in range(DAYS):
        weekend = 1.25 if day % 7 in (5, 6) else 0.9
        user = np.repeat(users, rng.poisson(rate * weekend) + (first == day))
        visits = _visits(rng, truth, user, shop.start + day * _DAY, sessions)
        sessions += len(user)
        parts += _day(rng, shop, visits)
        shop.sales *= 0.985
    return Rows.of(parts)


def _visits(rng: np.random.Generator, truth: Truth, user: np.ndarray, day: int, sessions: int) -> _Visits:
    count = len(user)
    hour = rng.choice(24, count, p=_HOURS / _HOURS.sum())
    start = day + hour * 3600 + rng.integers(0, 2400, count)
    sizes, shares = zip(*_PAGES, strict=True)
    mood = 0.45 * rng.standard_normal((count, truth.users.shape[1])).astype(np.float32)
    mood[:, -3:] = 0
    order = np.argsort(start, kind="stable")
    pages = rng.choice(sizes, count, p=shares)
    return _Visits(user[order], sessions + np.arange(count), start[order], pages, mood)


def _day(rng: np.random.Generator, shop: _Shop, visits: _Visits) -> list[Rows]:
    """Simulate the sessions of a day page by page; a click influences the next page."""
    parts = []
    last = np.full(len(visits.user), -1)
    for page in range(int(visits.pages.max(initial=0))):
        on = np.flatnonzero(visits.pages > page)
        utility = shop.truth.utility(visits.user[on]) + visits.mood[on] @ shop.truth.products.T
        time = visits.start[on] + page * 150
        page_items = _listing(rng, shop, visits, on, last[on], time, utility)
        appeal = (
            np.take_along_axis(utility, page_items, 1)
            - 8.0 * shop.owned[visits.user[on][:, None], page_items]
        )
        parts += _simulate_page(rng, shop, visits, on, last, time, page_items, appeal)
    return parts


def _listing(
    rng: np.random.Generator,
    shop: _Shop,
    visits: _Visits,
    on: np.ndarray,
    last: np.ndarray,
    time: np.ndarray,
    utility: np.ndarray,
) -> np.ndarray:
    """The products of a page for each session, best place first: int64 (B, PAGE)."""
    sort = rng.choice(3, len(on), p=_PAGE_TYPE_SHARES)
    sort[(last >= 0) & (rng.random(len(on)) < _SIMILAR_AFTER_CLICK)] = _SIMILAR
    bestseller = np.log1p(shop.sales)
    bestseller = (bestseller - bestseller.mean()) / bestseller.std()
    age = (time[:, None] - shop.listed) / _DAY
    weights = np.array([1.6, 0.4, 0.9, 0.4])[sort][:, None]
    score = rng.gumbel(size=utility.shape) * 0.9 + weights * bestseller
    score += np.array([0.3, 2.5, 0.5, 0.2])[sort][:, None] * np.exp(-np.maximum(age, 0) / 12)
    score += 0.25 * utility  # the shop's weak personalization
    score += 6.0 * (shop.kind == _sample_kind(rng, shop, visits, on)[:, None]) * (sort == _CATEGORY)[:, None]
    score += 2.2 * shop.similarity[last] * (sort == _SIMILAR)[:, None]
    score[age < 0] = -np.inf
    top = np.argpartition(-score, PAGE, axis=1)[:, :PAGE]
    return np.take_along_axis(top, np.argsort(-np.take_along_axis(score, top, 1), axis=1), 1)


def _sample_kind(rng: np.random.Generator, shop: _Shop, visits: _Visits, on: np.ndarray) -> np.ndarray:
    count = len(KIND_NAMES)
    taste = shop.truth.users[visits.user[on], :count] + visits.mood[on, :count]
    return np.asarray((1.3 * taste + rng.gumbel(size=taste.shape)).argmax(1))


def _simulate_page(
    rng: np.random.Generator,
    shop: _Shop,
    visits: _Visits,
    on: np.ndarray,
    last: np.ndarray,
    time: np.ndarray,
    page_items: np.ndarray,
    appeal: np.ndarray,
) -> list[Rows]:
    """Simulate the events of a page; updates `shop` and `last`."""
    positions = np.arange(1, PAGE + 1)
    is_view = rng.random(page_items.shape) < positions**-_POSITION_BIAS
    is_click = is_view & (rng.random(page_items.shape) < _sigmoid(1.15 * appeal - 2.55))
    is_cart = is_click & (rng.random(page_items.shape) < _sigmoid(0.9 * appeal - 4.3))
    is_purchase = (is_cart & (rng.random(page_items.shape) < 0.72)) | (  # noqa: PLR2004 - most carts are paid for
        is_click & ~is_cart & (rng.random(page_items.shape) < _sigmoid(0.9 * appeal - 4.6))
    )
    click_times = time[:, None] + np.cumsum(rng.integers(2, 14, page_items.shape), 1)
    payment_times = visits.start[on] + visits.pages[on] * 150 + rng.integers(20, 240, len(on))
    times = (
        np.broadcast_to(time[:, None], page_items.shape),
        click_times,
        click_times + 8,
        np.broadcast_to(payment_times[:, None], page_items.shape),
    )
    parts = []
    for kind, (happened, event_times) in enumerate(
        zip((np.ones_like(is_click), is_click, is_cart, is_purchase), times, strict=True)
    ):
        row, column = np.nonzero(happened)
        session = on[row]
        parts.append(
            Rows(
                visits.user[session],
                visits.session[session],
                np.full(len(row), kind),
                page_items[row, column],
                event_times[row, column],
                positions[column],
            )
        )
    row, column = np.nonzero(is_purchase)
    shop.owned[visits.user[on[row]], page_items[row, column]] = True
    np.add.at(shop.sales, page_items[row, column], 1.0)
    row, column = np.nonzero(is_click)
    last[on[row]] = page_items[row, column]
    return parts


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))
