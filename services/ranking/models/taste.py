"""The taste model: what users of a shop like, and what each of them likes differently.

The logit of an engagement with an item that was shown is the sum of the item's appeal and of the user's
own part, a mixed-effects model (GLMix, Zhang et al., KDD 2016). The appeal has an effect per value of each
attribute, of the price within the type of the item, and of the item itself, which is 0 for a new one. The
user's part has the same effects without the last one, each with a normal prior of mean 0, and is the mode of
its posterior given the user's own impressions and interactions. That is logistic regression with a
Gaussian-process prior (Rasmussen and Williams, 2006, algorithm 3.1): the variances of the prior make a kernel
over items, so its cost depends on the number of observations and not on the number of attribute values.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from services.catalog.item_table import ItemTable
from services.catalog.row_arrays import RowArrays
from services.core.kernels import array, kernel
from services.core.sorted_arrays import find
from services.ranking.state.item_stats import ItemStats
from services.ranking.state.user_query import SEEDS, UserQuery
from services.ranking.state.value_codes import AttributeValues

SETTINGS_FILE, EFFECTS_FILE = "taste.json", "effects.safetensors"
TASTE_COLUMNS = ("taste_appeal", "taste_as_new", "taste_from_session", "taste_from_history")
"""The appeal of a candidate, the same as if it were new, and what the session and the past add to it."""
MAX_OBSERVATIONS = 100
_STEPS = 8
_CONVERGED = 1e-3
_MAX_STEP = 2.0
# Two prices of one type say nothing about each other if they differ by so many standard deviations.
_PRICE_RANGE = 2.0
_MAX_DEVIATION = 3.0
_CODES, _NUMBERS, _FLAGS = array(np.int32, 2), array(np.float64), array(np.bool_)


@dataclass(frozen=True)
class PriceScale:
    """Turns the price of an item into its deviation from typical prices of its type.

    The deviation is log(price) less the mean of its type, `mean_of` by the value of the attribute
    `attribute`, or `mean` for another value, divided by `deviation`; at most 3 either way.
    """

    attribute: str
    mean_of: Mapping[str, float]
    mean: float
    deviation: float

    def of(self, table: ItemTable, rows: np.ndarray) -> np.ndarray:
        """The deviation of rows (R,), float64; 0 for an unknown price."""
        price = table.numbers("price")
        values = np.full(len(rows), np.nan) if price is None else price[rows, 0]
        expected = effects_of(table, rows, self.attribute, self.mean_of, self.mean)
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = (np.log(values) - expected) / self.deviation
        return np.clip(np.where(np.isfinite(scaled), scaled, 0), -_MAX_DEVIATION, _MAX_DEVIATION)


@dataclass(frozen=True)
class TasteSettings:
    """The parameters of a model but for the effects of single items.

    `variances` are those of a user's effects: per value of each of `attributes`, of a price, and of a
    constant. `value_effects` by attribute and value, `price_effects`, of the deviation of a price and its
    square, and `intercept` make the appeal of an item. A stronger interaction, such as a purchase after a
    click, has the logit `strong_slope` times that of the engagement plus `strong_intercept`.
    """

    attributes: tuple[str, ...]
    variances: tuple[float, ...]
    value_effects: Mapping[str, Mapping[str, float]]
    price_effects: tuple[float, float]
    intercept: float
    strong_slope: float
    strong_intercept: float
    price: PriceScale


@dataclass(frozen=True)
class TasteModel:
    """The settings, and the effects float32 (M,) of the items `item_hashes`, int64 (M,) ascending."""

    settings: TasteSettings
    item_hashes: np.ndarray
    item_effects: np.ndarray


@dataclass(frozen=True)
class Observations:
    """What a user has shown of their taste, O observations of items.

    `codes` int32 (O, A) are the items' values of the model's attributes, -1 for none; `price` float64 (O,)
    the deviations of their prices; `appeal` float64 (O,); `engaged` and `strong` bool (O,): whether there was
    an interaction, and one that is heavier than the lightest type; `is_open` bool (O,): whether a stronger
    one may follow yet, so that its absence says nothing.
    """

    codes: np.ndarray
    price: np.ndarray
    appeal: np.ndarray
    engaged: np.ndarray
    strong: np.ndarray
    is_open: np.ndarray


def posterior_weights(
    observations: Observations, variances: np.ndarray, slope: float, intercept: float
) -> np.ndarray:
    """The weight of each observation, float64 (O,): a user's part for an item is their sum by its kernel."""
    weights = _posterior(
        observations.codes,
        observations.price,
        observations.appeal,
        observations.engaged,
        observations.strong,
        observations.is_open,
        variances,
        slope,
        intercept,
    )
    return np.asarray(weights)


def user_part(
    codes: np.ndarray,
    price: np.ndarray,
    observations: Observations,
    weights: np.ndarray,
    variances: np.ndarray,
) -> np.ndarray:
    """The part of a user for items with `codes` (C, A) and deviations `price` (C,): float64 (C,).

    Of several `weights`, (W, O), a part by each: float64 (W, C).
    """
    each = np.ascontiguousarray(weights.reshape(-1, len(observations.price)))
    by_attribute = np.ascontiguousarray(observations.codes.T)
    parts = _user_parts(codes, price, by_attribute, observations.price, each, variances)
    return np.asarray(parts.reshape(*weights.shape[:-1], len(price)))


def _strongest(rows: np.ndarray, weights: np.ndarray, lightest: float) -> tuple[np.ndarray, np.ndarray]:
    """Interactions with each item as one: its row, int64 (R,), in order, and whether one was a strong one."""
    first = np.sort(np.unique(rows, return_index=True)[1])
    return rows[first], np.isin(rows[first], rows[weights > lightest])


class TasteView:
    """A model over the rows of an item table, which may grow and change."""

    def __init__(self, model: TasteModel, table: ItemTable, values: AttributeValues) -> None:
        self._model, self._table, self._values = model, table, values
        self._variances = np.array(model.settings.variances)
        self._arrays = RowArrays(table, (3,), self._item_arrays)
        self._arrays.current()  # now, not during a request

    def columns(self, query: UserQuery, rows: np.ndarray, stats: ItemStats) -> list[np.ndarray]:
        """The columns `TASTE_COLUMNS` of rows (C,), float32 (C,); the user's are NaN if nothing is known."""
        own, observed = self._arrays.current()[0][rows], self._observed(query, stats)
        parts = np.full((2, len(rows)), np.nan, np.float32)
        if observed is not None:
            observations, weights, in_session = observed
            codes, price = self._codes(rows, stats), np.ascontiguousarray(own[:, 2], np.float64)
            by_time = np.stack([weights * in_session, weights * ~in_session])
            parts[:] = user_part(codes, price, observations, by_time, self._variances)
        return [own[:, 0], own[:, 1], *parts]

    def _observed(
        self, query: UserQuery, stats: ItemStats
    ) -> tuple[Observations, np.ndarray, np.ndarray] | None:
        """What the user has shown, its weights, and which of it is of the session; None without any."""
        if self not in query.derived:
            query.derived[self] = self._observe(query, stats)
        observed: tuple[Observations, np.ndarray, np.ndarray] | None = query.derived[self]
        return observed

    def _observe(
        self, query: UserQuery, stats: ItemStats
    ) -> tuple[Observations, np.ndarray, np.ndarray] | None:
        shown, lightest = query.impressions, query.impressions.lightest
        session, in_session = _strongest(query.session, query.session_weights, lightest)
        others = ~np.isin(shown.rows, session)
        past = ~np.isin(query.history, np.concatenate([shown.rows, session]))
        history, in_history = _strongest(query.history[past], query.weights[past], lightest)
        session, history = session[:SEEDS], history[:SEEDS]
        shown_rows = np.flatnonzero(others)[: MAX_OBSERVATIONS - len(session) - len(history)]
        rows = np.concatenate([session, history, shown.rows[shown_rows]])
        if not len(rows):
            return None
        appeal, _, price = np.ascontiguousarray(self._arrays.current()[0][rows].T, np.float64)
        engaged, of_session = np.ones(len(session) + len(history), bool), np.arange(len(rows)) < len(session)
        observations = Observations(
            self._codes(rows, stats),
            price,
            appeal,
            np.concatenate([engaged, shown.engaged[shown_rows]]),
            np.concatenate(
                [in_session[: len(session)], in_history[: len(history)], shown.strong[shown_rows]]
            ),
            of_session,
        )
        settings = self._model.settings
        weights = posterior_weights(
            observations, self._variances, settings.strong_slope, settings.strong_intercept
        )
        return observations, weights, of_session

    def _codes(self, rows: np.ndarray, stats: ItemStats) -> np.ndarray:
        """The values of rows (R,) by attribute, int32 (R, A), -1 for none."""
        codes = np.full((len(self._model.settings.attributes), len(rows)), -1, np.int32)
        for column, name in zip(codes, self._model.settings.attributes, strict=True):
            values = self._values.get(name, stats)
            if values is not None:
                column[:] = values.codes[rows]
        return np.ascontiguousarray(codes.T)

    def _item_arrays(self, rows: np.ndarray) -> tuple[np.ndarray]:
        """The appeal of rows, as they are and as if they were new, and the deviation of their price."""
        model, price = self._model, self._model.settings.price.of(self._table, rows)
        as_new = content_appeal(model.settings, self._table, rows, price)
        place = find(model.item_hashes, self._table.item_hashes[rows])
        own = np.where(place >= 0, np.append(model.item_effects, np.float32(0))[place], 0)
        return (np.stack([as_new + own, as_new, price], axis=1),)


def content_appeal(
    settings: TasteSettings, table: ItemTable, rows: np.ndarray, price: np.ndarray
) -> np.ndarray:
    """The appeal of rows (R,) by their attributes and the deviations of their prices (R,): float64 (R,)."""
    linear, squared = settings.price_effects
    appeal = settings.intercept + linear * price + squared * price**2
    for attribute, effects in settings.value_effects.items():
        appeal += effects_of(table, rows, attribute, effects, 0.0)
    return np.asarray(appeal)


def effects_of(
    table: ItemTable, rows: np.ndarray, attribute: str, effects: Mapping[str, float], other: float
) -> np.ndarray:
    """The effect of the first value of a text attribute of rows (R,), `other` without one: float64 (R,)."""
    texts, index = table.first_texts(attribute, rows)
    of_text = np.array([*(effects.get(text, other) for text in texts), other])  # the last one is for none
    return np.asarray(of_text[index])


def write_taste(directory: Path, model: TasteModel) -> None:
    """Write a model."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SETTINGS_FILE).write_text(json.dumps(asdict(model.settings), indent=1) + "\n")
    arrays = {"item_hashes": model.item_hashes, "item_effects": model.item_effects}
    save_file(arrays, directory / EFFECTS_FILE)


def read_taste(directory: Path) -> TasteModel:
    """Read what `write_taste` wrote."""
    parameters = json.loads((directory / SETTINGS_FILE).read_text())
    parameters["price"] = PriceScale(**parameters["price"])
    for name in ("attributes", "variances", "price_effects"):
        parameters[name] = tuple(parameters[name])
    return TasteModel(TasteSettings(**parameters), **load_file(directory / EFFECTS_FILE))


@kernel(_CODES, _NUMBERS, _NUMBERS, _FLAGS, _FLAGS, _FLAGS, _NUMBERS, np.float64, np.float64)
def _posterior(
    codes: np.ndarray,
    price: np.ndarray,
    appeal: np.ndarray,
    engaged: np.ndarray,
    strong: np.ndarray,
    is_open: np.ndarray,
    variances: np.ndarray,
    slope: float,
    intercept: float,
) -> np.ndarray:
    """The weights of observations, float64 (O,), by Newton's method."""
    count, width = codes.shape
    covariance = np.empty((count, count))
    for one in range(count):
        for other in range(one + 1):
            near = max(1 - abs(price[one] - price[other]) / _PRICE_RANGE, 0.0)
            total = variances[width + 1] + variances[width] * near
            for column in range(width):
                if codes[one, column] >= 0 and codes[one, column] == codes[other, column]:
                    total += variances[column]
            covariance[one, other] = covariance[other, one] = total
    part, weights = np.zeros(count), np.zeros(count)
    gradient, curvature, root = np.empty(count), np.empty(count), np.empty(count)
    system = np.empty((count, count))
    for _ in range(_STEPS):
        for index in range(count):
            logit = appeal[index] + part[index]
            probability = 1 / (1 + np.exp(-logit))
            gradient[index] = engaged[index] - probability
            curvature[index] = probability * (1 - probability) + 1e-6
            if engaged[index] and slope > 0 and (strong[index] or not is_open[index]):
                probability = 1 / (1 + np.exp(-slope * logit - intercept))
                gradient[index] += slope * (strong[index] - probability)
                curvature[index] += slope * slope * probability * (1 - probability)
            root[index] = np.sqrt(curvature[index])
        for one in range(count):
            for other in range(count):
                system[one, other] = root[one] * covariance[one, other] * root[other]
            system[one, one] += 1
        target = curvature * part + gradient
        weights = target - root * np.linalg.solve(system, root * (covariance @ target))
        change = covariance @ weights - part
        changed = 0.0
        for index in range(count):
            changed = max(changed, abs(change[index]))
            part[index] += min(max(change[index], -_MAX_STEP), _MAX_STEP)
        if changed < _CONVERGED:
            break
    return weights


@kernel(_CODES, _NUMBERS, _CODES, _NUMBERS, array(np.float64, 2), _NUMBERS, reorder=True)
def _user_parts(
    codes: np.ndarray,
    price: np.ndarray,
    observed_codes: np.ndarray,
    observed_price: np.ndarray,
    weights: np.ndarray,
    variances: np.ndarray,
) -> np.ndarray:
    """The sums of each of weights, float64 (W, O), by the kernel of items and observations: (W, C).

    `observed_codes` are by attribute, int32 (A, O).
    """
    count, width = codes.shape
    result = np.empty((len(weights), count))
    for each in range(len(weights)):
        of_each = weights[each]
        base = variances[width + 1] * of_each.sum()
        for index in range(count):
            near = 0.0
            for observation in range(len(of_each)):
                distance = abs(price[index] - observed_price[observation])
                near += of_each[observation] * max(1 - distance / _PRICE_RANGE, 0.0)
            total = base + variances[width] * near
            for column in range(width):
                code, same = codes[index, column], 0.0
                if code >= 0:
                    for observation in range(len(of_each)):
                        same += of_each[observation] * (observed_codes[column, observation] == code)
                    total += variances[column] * same
            result[each, index] = total
    return result
