"""Fits the taste model: appeal by penalized likelihood, variances of tastes by how well they predict.

Appeal and users' parts are fitted in turn. The variances of the effects that make the appeal are estimated by
maximum likelihood (expectation-maximization). The variances of the users' effects are those under which the
past of users predicts their later impressions best: the marginal likelihood of Laplace's method shrinks them
too much for users with few events (Breslow and Clayton, 1993), and the model serves to predict.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.special import expit, log_expit

from services.catalog.item_table import ItemTable
from services.ranking.models.taste import (
    MAX_OBSERVATIONS,
    Observations,
    PriceScale,
    TasteModel,
    TasteSettings,
    content_appeal,
    posterior_weights,
    user_part,
)
from services.ranking.state.event_columns import EventState
from services.ranking.state.query_builder import shown_items
from training.core import metrics
from training.core.progress import track
from training.ranking.logistic import fit_logistic

_MAX_EVENTS = 2000  # of a user, the latest impressions and interactions
_MIN_SHOWN, _MIN_ENGAGED = 2000, 200
_MAX_VALUES = 2000  # in the appeal, of all attributes
_LATER_SHARE = 0.2
_LATER_USERS, _LATER_IMPRESSIONS, _MIN_USERS = 2400, 50, 60
_ROUNDS, _STEPS = 4, 4
_MAX_STEP = 1.0
_VALUE, _PRICE, _USER = 0.1, 0.1, 0.2  # the first variances
_LEAST = 0.004  # of a variance; less counts as none
_FACTORS = (4.0, 4.0, 2.0)
_TINY = 1e-9
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TasteFit:
    """What a model is fitted on: `users` are ids, `attributes` names, `targets` int16 kinds of purchases."""

    state: EventState
    table: ItemTable
    users: Sequence[str]
    attributes: Sequence[str]
    targets: np.ndarray

    def impressions(self, users: Sequence[str], since: int, until: int) -> "ImpressionBlocks":
        """What users were shown from a time to another, with what they did within a day and by its end."""
        number, flag = np.empty(0, np.int64), np.empty(0, bool)
        sizes = [0]
        parts: list[tuple[np.ndarray, ...]] = [(number, number, flag, flag)]
        for user in users:
            events = self.state.impressions(user, "", until, _MAX_EVENTS)
            if not len(events.user):
                continue
            past = self.state.history(user, "", until, _MAX_EVENTS)
            shown = shown_items(self.state, self.table, events, past, self.targets)
            end = int(np.count_nonzero(shown.occurred >= since))  # newest first
            for start in range(0, end, MAX_OBSERVATIONS):
                block = slice(start, min(start + MAX_OBSERVATIONS, end))
                columns = (shown.rows, shown.occurred, shown.engaged, shown.strong)
                parts.append(tuple(column[block] for column in columns))
                sizes.append(len(parts[-1][0]))
        rows, time, engaged, strong = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ImpressionBlocks(rows, time, engaged, strong, np.cumsum(sizes))


@dataclass(frozen=True)
class ImpressionBlocks:
    """N items shown to users, in B blocks of at most `MAX_OBSERVATIONS` of one user, newest first.

    `rows` int64 of a table, `time` int64, `engaged` and `strong` bool; `start` int64 (B + 1,) are the blocks.
    """

    rows: np.ndarray
    time: np.ndarray
    engaged: np.ndarray
    strong: np.ndarray
    start: np.ndarray

    def first(self, count: int) -> "ImpressionBlocks":
        """The newest items of one user, as one block."""
        first = slice(count)
        columns = (self.rows[first], self.time[first], self.engaged[first], self.strong[first])
        return ImpressionBlocks(*columns, np.array([0, len(columns[0])]))

    def blocks(self) -> Iterator[slice]:
        """The blocks."""
        for start, end in zip(self.start[:-1].tolist(), self.start[1:].tolist(), strict=True):
            yield slice(start, end)


class Catalog:
    """The values and prices of N items: `codes` int32 (N, A) of `attributes`, `price` float64 (N,)."""

    def __init__(self, table: ItemTable, attributes: Sequence[str]) -> None:
        self.table, self.rows = table, np.arange(table.length)
        columns = {name: table.texts_of_rows(name, self.rows) for name in attributes}
        self.columns = {name: column for name, column in columns.items() if column is not None}
        self.attributes = tuple(self.columns)
        first = [codes[:, 0] for codes, _ in self.columns.values()]
        self.codes = np.ascontiguousarray(np.stack(first, axis=1), np.int32) if first else _no_codes(table)
        self.price_scale = _price_scale(table, self)
        self.price = self.price_scale.of(table, self.rows)

    def observations(self, shown: ImpressionBlocks, block: slice, appeal: np.ndarray) -> Observations:
        """A block of what was shown; `appeal` float64 (N,) is of all items."""
        rows = shown.rows[block]
        return Observations(
            self.codes[rows],
            self.price[rows],
            appeal[rows],
            shown.engaged[block],
            shown.strong[block],
            np.zeros(len(rows), bool),
        )


def _no_codes(table: ItemTable) -> np.ndarray:
    return np.empty((table.length, 0), np.int32)


def _price_scale(table: ItemTable, catalog: Catalog) -> PriceScale:
    """The price within the values of the attribute that explains prices best."""
    column = table.numbers("price")
    price = np.full(table.length, np.nan) if column is None else column[: table.length, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_price = np.log(price)
    known = np.isfinite(log_price)
    if not known.any():
        return PriceScale("", {}, 0.0, 1.0)
    mean = float(log_price[known].mean())
    best = PriceScale("", {}, mean, _deviation(log_price[known] - mean))
    for at, (name, (_, vocabulary)) in enumerate(catalog.columns.items()):
        codes = catalog.codes[:, at]
        used = known & (codes >= 0)
        size = np.bincount(codes[used], minlength=len(vocabulary))
        if np.count_nonzero(size) > used.sum() / 10:  # a type has several items
            continue
        means = np.bincount(codes[used], log_price[used], len(vocabulary)) / np.maximum(size, 1)
        rest = np.where(used, log_price - means[np.maximum(codes, 0)], log_price - mean)[known]
        if _deviation(rest) < best.deviation:
            names = {value: float(means[code]) for value, code in vocabulary.items() if size[code]}
            best = PriceScale(name, names, mean, _deviation(rest))
    return best


def _deviation(values: np.ndarray) -> float:
    return max(float(values.std()), 1e-3)


class Appeal:
    """The appeal of items, fitted to what was shown: effects of values and prices, and of each item.

    `total` float64 (N,) is the appeal of each item that was shown, and no figure for others; `of_items`
    float64 (N,) is the part of the item itself, 0 for others.
    """

    def __init__(self, catalog: Catalog, shown: ImpressionBlocks) -> None:
        self._rows = np.unique(shown.rows)
        count, price = len(self._rows), catalog.price[self._rows]
        parts = [sparse.csr_array(np.stack([price, price**2], axis=1))]
        self._names = list[tuple[str, str]]()
        for name, values, one_hot in _values_by_frequency(catalog, self._rows):
            if len(self._names) + len(values) > _MAX_VALUES:
                _log.info("%s has too many values for the appeal of items", name)
                continue
            self._names += [(name, value) for value in values]
            parts.append(one_hot)
        parts.append(sparse.csr_array(np.ones((count, 1))))
        self._design = sparse.csr_array(sparse.hstack(parts))
        self._penalty = np.ones(self._design.shape[1])
        self._penalty[[0, 1, -1]] = 1e-3  # prices and the intercept are free
        self._item_variance = self._value_variance = 0.3
        rate = float(np.clip(shown.engaged.mean(), 0.001, 0.999))
        intercept = float(np.log(rate / (1 - rate)))
        self.effects = np.zeros(self._design.shape[1])
        self.effects[-1] = intercept
        items = len(catalog.rows)
        self.total, self.of_items = np.full(items, intercept), np.zeros(items)

    def step(self, gradient: np.ndarray, curvature: np.ndarray) -> None:
        """One step by the gradient and the curvature of the log-likelihood of each item, float64 (N,)."""
        total, weight = self.total[self._rows], np.maximum(curvature[self._rows], _TINY)
        working = total + gradient[self._rows] / weight
        precision = 1 / (1 / weight + self._item_variance)
        scaled = self._design.multiply(precision[:, None]).tocsr()
        normal = (self._design.T @ scaled).toarray() + np.diag(self._penalty / self._value_variance)
        inverse = np.linalg.inv(normal)
        self.effects = inverse @ (self._design.T @ (precision * working))
        content = self._design @ self.effects
        own = (working - content) * self._item_variance / (self._item_variance + 1 / weight)
        self.of_items[self._rows] = own
        self.total[self._rows] = total + np.clip(content + own - total, -_MAX_STEP, _MAX_STEP)
        self._item_variance = float((own**2 + 1 / (weight + 1 / self._item_variance)).mean())
        values = self.effects[2:-1] ** 2 + np.diag(inverse)[2:-1]
        self._value_variance = float(values.mean()) if len(values) else 1.0

    def by_value(self) -> dict[str, dict[str, float]]:
        """The effects by attribute and value."""
        effects: dict[str, dict[str, float]] = {}
        for (name, text), effect in zip(self._names, self.effects[2:-1].tolist(), strict=True):
            effects.setdefault(name, {})[text] = effect
        return effects


def _values_by_frequency(
    catalog: Catalog, rows: np.ndarray
) -> Iterator[tuple[str, list[str], sparse.csr_array]]:
    """Each attribute, its values among rows (R,) and a column for each (R, V); few values first."""
    parts = []
    for at, name in enumerate(catalog.attributes):
        codes, (_, vocabulary) = catalog.codes[rows, at], catalog.columns[name]
        values, used = np.unique(codes[codes >= 0]), np.flatnonzero(codes >= 0)
        text_of = {code: text for text, code in vocabulary.items()}
        place = np.searchsorted(values, codes[used])
        one_hot = sparse.csr_array((np.ones(len(used)), (used, place)), (len(rows), len(values)))
        parts.append((name, [text_of[code] for code in values.tolist()], one_hot))
    yield from sorted(parts, key=lambda part: len(part[1]))


def fit_taste(fit: TasteFit, until: int, like: TasteModel | None = None) -> TasteModel | None:
    """Fit a model on the events before `until`, microseconds since 1970; with the variances of another one.

    None if too little was shown, or if tastes do not predict what users did later better than the appeal of
    items alone.
    """
    shown = fit.impressions(fit.users, 0, until)
    engaged = np.count_nonzero(shown.engaged)
    if len(shown.rows) < _MIN_SHOWN or engaged < _MIN_ENGAGED:
        if len(shown.rows):
            message = "no taste model: %d items shown, %d of them engaged with; %d and %d are needed"
            _log.info(message, len(shown.rows), engaged, _MIN_SHOWN, _MIN_ENGAGED)
        return None
    table, catalog = fit.table, Catalog(fit.table, fit.attributes)
    variances = (
        _best_variances(fit, catalog, int(np.quantile(shown.time, 1 - _LATER_SHARE)), until)
        if like is None
        else _variances_of(like.settings, catalog)
    )
    if variances is None:
        return None
    appeal, slope, intercept = _fit_appeal(catalog, shown, variances)
    settings = _settings(catalog, appeal, variances, slope, intercept)
    rows = np.unique(shown.rows)
    order = np.argsort(table.item_hashes[rows])
    hashes = table.item_hashes[rows][order]
    return TasteModel(settings, hashes, appeal.of_items[rows][order].astype(np.float32))


def _settings(
    catalog: Catalog, appeal: "Appeal", variances: np.ndarray, slope: float, intercept: float
) -> TasteSettings:
    """The settings of a model; attributes whose variance is 0 are no part of users' tastes."""
    width = len(catalog.attributes)
    used = np.flatnonzero(variances[:width])
    linear, squared = appeal.effects[:2].tolist()
    return TasteSettings(
        attributes=tuple(catalog.attributes[index] for index in used),
        variances=(*variances[used].tolist(), *variances[width:].tolist()),
        value_effects=appeal.by_value(),
        price_effects=(linear, squared),
        intercept=float(appeal.effects[-1]),
        strong_slope=slope,
        strong_intercept=intercept,
        price=catalog.price_scale,
    )


def _variances_of(settings: TasteSettings, catalog: Catalog) -> np.ndarray:
    """The variances of a model for all attributes of a catalog."""
    of_name = dict(zip(settings.attributes, settings.variances, strict=False))
    others = settings.variances[len(settings.attributes) :]
    return np.array([*(of_name.get(name, 0.0) for name in catalog.attributes), *others])


def _fit_appeal(
    catalog: Catalog, shown: ImpressionBlocks, variances: np.ndarray, rounds: int = _ROUNDS
) -> tuple[Appeal, float, float]:
    """The appeal next to users' parts of these variances, and slope and intercept of strong interactions."""
    appeal, part = Appeal(catalog, shown), np.zeros(len(shown.rows))
    slope = intercept = 0.0
    count = len(catalog.rows)
    for number in range(rounds):
        for _ in range(2 * _STEPS if number == 0 else _STEPS):
            probability = expit(appeal.total[shown.rows] + part)
            gradient = np.bincount(shown.rows, shown.engaged - probability, count)
            curvature = np.bincount(shown.rows, probability * (1 - probability), count)
            appeal.step(gradient, curvature)
        if number:
            slope, intercept = _strong_logit(
                appeal.total[shown.rows[shown.engaged]], shown.strong[shown.engaged]
            )
        for block in shown.blocks():
            observations = catalog.observations(shown, block, appeal.total)
            weights = posterior_weights(observations, variances, slope, intercept)
            codes, price = observations.codes, observations.price
            part[block] = user_part(codes, price, observations, weights, variances)
    return appeal, slope, intercept


def _strong_logit(appeal: np.ndarray, strong: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the logit of a strong interaction by the appeal; (0, 0) without a slope."""
    if not strong.any() or strong.all():
        return 0.0, 0.0
    slope, intercept = fit_logistic(np.stack([appeal, np.ones(len(appeal))], axis=1), strong).tolist()
    return (slope, intercept) if slope > 0 else (0.0, 0.0)


class _LaterImpressions:
    """What users were shown later than their past: how well tastes of some variances predict it."""

    def __init__(
        self,
        catalog: Catalog,
        pairs: Sequence[tuple[ImpressionBlocks, ImpressionBlocks]],
        appeal: np.ndarray,
    ) -> None:
        self._catalog, self._pairs, self._appeal = catalog, pairs, appeal
        rows = np.concatenate([later.rows for _, later in pairs])
        self._engaged = np.concatenate([later.engaged for _, later in pairs])
        self._of_items = appeal[rows]
        self._user = np.repeat(np.arange(len(pairs)), [len(later.rows) for _, later in pairs])

    def design(self, variances: np.ndarray | None, slope: float, intercept: float) -> np.ndarray:
        """The appeal of each item, a constant, and the user's part unless there are no variances."""
        columns = [self._of_items, np.ones(len(self._of_items))]
        if variances is not None:
            columns.append(self._parts(variances, slope, intercept))
        return np.stack(columns, axis=1)

    def scales(self, design: np.ndarray) -> np.ndarray:
        """The coefficients of a design that predict best: what counts is the order of items."""
        return fit_logistic(design, self._engaged)

    def likelihoods(self, design: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The mean log-likelihood of the items of each user, float64 (U,)."""
        logit = design @ scales
        values = log_expit(np.where(self._engaged, logit, -logit))
        return np.asarray(np.bincount(self._user, values) / np.bincount(self._user))

    def _parts(self, variances: np.ndarray, slope: float, intercept: float) -> np.ndarray:
        parts = []
        for past, later in self._pairs:
            observations = self._catalog.observations(past, slice(None), self._appeal)
            weights = posterior_weights(observations, variances, slope, intercept)
            codes, price = self._catalog.codes[later.rows], self._catalog.price[later.rows]
            parts.append(user_part(codes, price, observations, weights, variances))
        return np.concatenate(parts)


def _best_variances(fit: TasteFit, catalog: Catalog, edge: int, until: int) -> np.ndarray | None:
    """The variances under which events before `edge` predict those after it best.

    They are found on one half of the users. None if tastes do not help on the other half.
    """
    early = fit.impressions(fit.users, 0, edge)
    variances = np.array([*[_VALUE] * len(catalog.attributes), _PRICE, _USER])
    pairs = _pairs(fit, edge, until)
    if len(pairs) < _MIN_USERS or not early.engaged.any():
        message = "no taste model: %d users were shown items on early and on late days, %d are needed"
        _log.info(message, len(pairs), _MIN_USERS)
        return None
    early_appeal, *strong = _fit_appeal(catalog, early, variances, rounds=2)
    settings = _settings(catalog, early_appeal, variances, *strong)
    # Some items are shown later only: as when served, their appeal is that of what they are.
    appeal = content_appeal(settings, catalog.table, catalog.rows, catalog.price) + early_appeal.of_items
    half, other_half = (_LaterImpressions(catalog, pairs[start::2], appeal) for start in (0, 1))
    design = half.design(variances, *strong)
    best = half.likelihoods(design, half.scales(design)).mean()
    for factor in track(_FACTORS, "tastes"):
        for index in np.flatnonzero(variances).tolist():
            for value in (variances[index] * factor, variances[index] / factor):
                other = variances.copy()
                other[index] = value if value >= _LEAST else 0.0
                design = half.design(other, *strong)
                likelihood = half.likelihoods(design, half.scales(design)).mean()
                if likelihood > best:
                    best, variances = likelihood, other
                    break
    with_tastes, alone = (
        other_half.likelihoods(other_half.design(of, *strong), half.scales(half.design(of, *strong)))
        for of in (variances, None)
    )
    gain = metrics.paired_interval(with_tastes, alone)
    names = (*catalog.attributes, "price", "user")
    description = ", ".join(f"{n} {v:.3g}" for n, v in zip(names, variances, strict=True) if v)
    message = "tastes gain %.4f [%.4f, %.4f] of log-likelihood for each of %d other users; variances: %s"
    _log.info(message, gain.mean, gain.low, gain.high, gain.count, description)
    return variances if gain.low > 0 else None


def _pairs(fit: TasteFit, edge: int, until: int) -> list[tuple[ImpressionBlocks, ImpressionBlocks]]:
    """The last impressions before `edge`, and some after it, of a sample of users who have both."""
    pairs = []
    for number in np.random.default_rng(1).permutation(len(fit.users)).tolist():
        user = [fit.users[number]]
        past, later = fit.impressions(user, 0, edge), fit.impressions(user, edge, until)
        if len(past.rows) and len(later.rows):
            pairs.append((past.first(MAX_OBSERVATIONS), later.first(_LATER_IMPRESSIONS)))
        if len(pairs) == _LATER_USERS:
            break
    return pairs
