"""The sequence model's fit: what comes next, told from what was drawn instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from services.item_table import ItemTable
from services.ranking.query import LONGEST_WALK
from services.ranking.sequence import Items, SequenceNet, SequenceSettings, read_items
from training.dataset import Events
from training.progress import track
from training.queries import DAY, baskets
from training.shop_settings import SequenceTraining

_POPULARITY = 0.75
_LEAST_VALUES = 5
_CLIP = 5.0
_WARM_UP = 0.10001  # of a tenth of ten steps OneCycleLR would make a division by zero


@dataclass(frozen=True)
class Walks:
    """Engagements of P people, one person's after another's, in time and among equal times at random.

    Columns of one length N: `item` int64 codes; `time` int64; `weight` float32; `again` bool, that its
    basket holds the item already. `end` int64 (P + 1,) where people begin and end.
    """

    item: np.ndarray
    time: np.ndarray
    weight: np.ndarray
    again: np.ndarray
    end: np.ndarray


@dataclass(frozen=True)
class Engagements:
    """What people engaged with, in columns of one length N, and the table rows (K,) of their item codes.

    Codes are in the order of item numbers.
    """

    user: np.ndarray
    basket: np.ndarray
    item: np.ndarray
    time: np.ndarray
    weight: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, events: Events, weights: Mapping[str, float], table: ItemTable, before: int) -> "Engagements":
        """Those with items of the table that were recorded before a moment, microseconds since 1970."""
        weight = np.array(list(weights.values()), np.float32)[events.kind]
        rows = table.rows(events.number)
        kept = (weight > 0) & (rows >= 0) & (events.time < before)
        known, item = np.unique(rows[kept], return_inverse=True)
        order = np.argsort(table.item_numbers[known])
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        basket = baskets(events)[kept]
        return cls(events.user[kept], basket, place[item], events.time[kept], weight[kept], known[order])

    def walks(self, generator: np.random.Generator) -> Walks:
        """The order of this time."""
        order = np.lexsort((generator.random(len(self.user)), self.time, self.user))
        user, item = self.user[order], self.item[order]
        _, basket = np.unique(self.basket[order], return_inverse=True)
        _, first = np.unique(basket * (len(self.rows) + 1) + item, return_index=True)
        again = np.ones(len(item), bool)
        again[first] = False
        end = np.flatnonzero(np.diff(user, prepend=-1, append=-2))
        return Walks(item, self.time[order], self.weight[order], again, end)


def fit_sequence(
    engaged: Engagements, table: ItemTable, training: SequenceTraining, attributes: Sequence[str]
) -> SequenceNet | None:
    """A model of the items engaged with, by their vectors and `attributes`.

    None when nobody did two things, or for no epochs.

    Softmax over what came next and items drawn by a power of their popularity, each corrected by how
    often it is drawn (Yi et al., 2019); what its basket holds already is not asked for. Of a person the
    last 51 engagements teach.
    """
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    if not len(engaged.user) or not training.epochs:
        return None
    walks = engaged.walks(generator)
    # Who did the same thing again in one basket did one thing.
    long = np.flatnonzero(np.add.reduceat(~walks.again, walks.end[:-1]) > 1)
    if not len(long):
        return None
    numbers = table.item_numbers[engaged.rows]
    values = _frequent_values(table, engaged.rows, attributes)
    settings = SequenceSettings(table.spaces, values, training.width, training.dropout)
    net = SequenceNet(settings, numbers)
    catalogue = read_items(table, engaged.rows, settings, numbers)
    share = np.bincount(engaged.item, minlength=len(numbers)) ** _POPULARITY
    share = share / share.sum()
    log_drawn = torch.from_numpy(np.log(share * training.negatives).astype(np.float32))
    optimiser = torch.optim.AdamW(net.parameters(), lr=training.learning_rate)
    batches = -(-len(long) // training.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, training.learning_rate, total_steps=max(1, training.epochs * batches), pct_start=_WARM_UP
    )
    net.train()
    for step in track(range(training.epochs * batches), "sequence model"):
        if step % batches == 0:
            walks, order = engaged.walks(generator), _by_length(engaged, long, generator)
            starts = generator.permutation(batches)
        people = order[starts[step % batches] * training.batch :][: training.batch]
        drawn = generator.choice(len(numbers), training.negatives, p=share)
        loss = _loss(net, catalogue, _batch(walks, people), torch.from_numpy(drawn), log_drawn, training)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), _CLIP)
        optimiser.step()
        schedule.step()
    return net.eval()


@dataclass(frozen=True)
class _Batch:
    """Of B people items int64 (B, L) and what a `Walk` has; `target` int64 (B, L) what came next."""

    items: torch.Tensor
    gaps: torch.Tensor
    weights: torch.Tensor
    target: torch.Tensor
    worth: torch.Tensor


def _batch(walks: Walks, people: np.ndarray) -> _Batch:
    end = walks.end[people + 1]
    begin = np.maximum(walks.end[people], end - LONGEST_WALK - 1)
    length = end - begin - 1
    at = begin[:, None] + np.arange(length.max())
    known = np.arange(length.max()) < length[:, None]
    at = np.where(known, at, begin[:, None])
    gaps = np.where(known, (walks.time[at + 1] - walks.time[at]) / DAY, 0)
    worth = np.where(known & ~walks.again[at + 1], walks.weight[at + 1], 0)
    columns = (walks.item[at], np.float32(gaps), walks.weight[at], walks.item[at + 1], np.float32(worth))
    return _Batch(*(torch.from_numpy(column) for column in columns))


def _loss(
    net: SequenceNet,
    catalogue: Items,
    batch: _Batch,
    drawn: torch.Tensor,
    log_drawn: torch.Tensor,
    training: SequenceTraining,
) -> torch.Tensor:
    asked = batch.worth > 0
    target = batch.target[asked]
    used, place = torch.unique(torch.cat([batch.items.flatten(), target, drawn]), return_inverse=True)
    walked, answer, other = place.split([batch.items.numel(), len(target), len(drawn)])
    mine = Items(
        {s: v[used] for s, v in catalogue.vectors.items()}, catalogue.values[used], catalogue.known[used]
    )
    kept = (torch.rand(len(used), 1) >= training.delta_dropout).to(torch.float32)
    items = net.content(mine) + kept * net.delta(mine.known)
    people = net(items[walked].view(*batch.items.shape, -1), batch.gaps, batch.weights)[asked]
    others = people @ items[other].T - log_drawn[drawn]
    others = others.masked_fill(target[:, None] == drawn[None, :], float("-inf"))
    odds = torch.cat([(people * items[answer]).sum(1, keepdim=True), others], 1)
    surprise = cross_entropy(odds, torch.zeros(len(target), dtype=torch.long), reduction="none")
    worth = batch.worth[asked]
    return (worth * surprise).sum() / worth.sum().clamp(min=1e-9)


def _by_length(engaged: Engagements, long: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """People of about the same length beside each other, since a batch is as long as its longest."""
    size = np.bincount(engaged.user)
    size = np.minimum(size[size > 0][long], LONGEST_WALK + 1)
    return np.asarray(long[np.argsort(size + generator.random(len(long)), kind="stable")])


def _frequent_values(table: ItemTable, rows: np.ndarray, attributes: Sequence[str]) -> list[tuple[str, str]]:
    """The attribute values that five at least of these rows have."""
    found = []
    for attribute in attributes:
        column = table.texts(attribute)
        if column is None:
            continue
        codes, vocabulary = column
        held = codes[rows]
        count = np.bincount(held[held >= 0], minlength=len(vocabulary))
        found += [(attribute, text) for text, code in vocabulary.items() if count[code] >= _LEAST_VALUES]
    return found
