"""Fits the sequence model: predicts the next item against sampled negatives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from services.catalog.item_table import ItemTable
from services.ranking.models.sequence import SequenceItems, SequenceNet, SequenceSettings, read_items
from services.ranking.state.user_query import MAX_SEQUENCE
from training.core.progress import track
from training.data.config import SequenceTraining
from training.data.events import Events
from training.examples.queries import DAY, baskets

_POPULARITY = 0.75
_MIN_ITEMS = 5
_CLIP = 5.0
_WARM_UP = 0.10001  # with exactly 0.1 of ten steps, OneCycleLR divides by zero


@dataclass(frozen=True)
class ItemSequences:
    """The engagements of P users, one user after the other, sorted by time, ties at random.

    Columns of one length N: `item` int64 codes; `time` int64; `weight` float32; `again` bool, whether the
    basket already holds the item. `end` int64 (P + 1,) are the bounds of the users.
    """

    item: np.ndarray
    time: np.ndarray
    weight: np.ndarray
    again: np.ndarray
    end: np.ndarray


@dataclass(frozen=True)
class Engagements:
    """Engagements in columns of one length N, and the table rows (K,) of their item codes.

    Item codes follow the order of the item hashes.
    """

    user: np.ndarray
    basket: np.ndarray
    item: np.ndarray
    time: np.ndarray
    weight: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, events: Events, weights: Mapping[str, float], table: ItemTable, until: int) -> "Engagements":
        """The engagements before `until`, microseconds since 1970, with items of the table."""
        weight = np.array(list(weights.values()), np.float32)[events.kind]
        rows = table.rows(events.number)
        usable = (weight > 0) & (rows >= 0) & (events.time < until)
        engaged_rows, item = np.unique(rows[usable], return_inverse=True)
        order = np.argsort(table.item_hashes[engaged_rows])
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        basket = baskets(events)[usable]
        return cls(
            events.user[usable], basket, place[item], events.time[usable], weight[usable], engaged_rows[order]
        )

    def item_sequences(self, generator: np.random.Generator) -> ItemSequences:
        """The sequences of all users, with a new random order of ties."""
        order = np.lexsort((generator.random(len(self.user)), self.time, self.user))
        user, item = self.user[order], self.item[order]
        _, basket = np.unique(self.basket[order], return_inverse=True)
        _, first = np.unique(basket * (len(self.rows) + 1) + item, return_index=True)
        again = np.ones(len(item), bool)
        again[first] = False
        end = np.flatnonzero(np.diff(user, prepend=-1, append=-2))
        return ItemSequences(item, self.time[order], self.weight[order], again, end)


def fit_sequence(
    engagements: Engagements, table: ItemTable, training: SequenceTraining, attributes: Sequence[str]
) -> SequenceNet | None:
    """A model of the items of `engagements`, from their vectors and `attributes`.

    None without epochs, or if no user has two engagements.

    Softmax over the next item and negatives sampled by a power of their popularity, corrected for the
    sampling probability (Yi et al., 2019). A repeated item of a basket is no target. Of each user the last 51
    engagements are used.
    """
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    if not len(engagements.user) or not training.epochs:
        return None
    sequences = engagements.item_sequences(generator)
    # Repetitions of an item in one basket count once.
    eligible = np.flatnonzero(np.add.reduceat(~sequences.again, sequences.end[:-1]) > 1)
    if not len(eligible):
        return None
    hashes = table.item_hashes[engagements.rows]
    values = _frequent_values(table, engagements.rows, attributes)
    settings = SequenceSettings(table.spaces, values, training.embedding_size, training.dropout)
    net = SequenceNet(settings, hashes)
    catalog = read_items(table, engagements.rows, settings, hashes)
    share = np.bincount(engagements.item, minlength=len(hashes)) ** _POPULARITY
    share = share / share.sum()
    log_sampling = torch.from_numpy(np.log(share * training.negatives).astype(np.float32))
    optimizer = torch.optim.AdamW(net.parameters(), lr=training.learning_rate)
    batches = -(-len(eligible) // training.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=max(1, training.epochs * batches), pct_start=_WARM_UP
    )
    net.train()
    for step in track(range(training.epochs * batches), "sequence model"):
        if step % batches == 0:
            sequences, order = (
                engagements.item_sequences(generator),
                _by_length(engagements, eligible, generator),
            )
            starts = generator.permutation(batches)
        users = order[starts[step % batches] * training.batch :][: training.batch]
        negatives = generator.choice(len(hashes), training.negatives, p=share)
        loss = _loss(
            net, catalog, collate(sequences, users), torch.from_numpy(negatives), log_sampling, training
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
    return net.eval()


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences of B users: `items` int64 (B, L), `gaps`, `weights`; `target` int64 (B, L) the next items."""

    items: torch.Tensor
    gaps: torch.Tensor
    weights: torch.Tensor
    target: torch.Tensor
    target_weight: torch.Tensor


def collate(sequences: ItemSequences, users: np.ndarray) -> SequenceBatch:
    """Pad the sequences of these users to one length and split each into inputs and targets."""
    end = sequences.end[users + 1]
    start = np.maximum(sequences.end[users], end - MAX_SEQUENCE - 1)
    length = end - start - 1
    index = start[:, None] + np.arange(length.max())
    is_step = np.arange(length.max()) < length[:, None]
    index = np.where(is_step, index, start[:, None])
    gaps = np.where(is_step, (sequences.time[index + 1] - sequences.time[index]) / DAY, 0)
    target_weight = np.where(is_step & ~sequences.again[index + 1], sequences.weight[index + 1], 0)
    columns = (
        sequences.item[index],
        np.float32(gaps),
        sequences.weight[index],
        sequences.item[index + 1],
        np.float32(target_weight),
    )
    return SequenceBatch(*(torch.from_numpy(column) for column in columns))


def _loss(
    net: SequenceNet,
    catalog: SequenceItems,
    batch: SequenceBatch,
    negatives: torch.Tensor,
    log_sampling: torch.Tensor,
    training: SequenceTraining,
) -> torch.Tensor:
    has_target = batch.target_weight > 0
    target = batch.target[has_target]
    codes, place = torch.unique(torch.cat([batch.items.flatten(), target, negatives]), return_inverse=True)
    input_place, target_place, negative_place = place.split(
        [batch.items.numel(), len(target), len(negatives)]
    )
    batch_items = SequenceItems(
        {s: v[codes] for s, v in catalog.vectors.items()}, catalog.values[codes], catalog.delta_rows[codes]
    )
    id_mask = (torch.rand(len(codes), 1) >= training.id_embedding_dropout).to(torch.float32)
    items = net.content(batch_items) + id_mask * net.delta(batch_items.delta_rows)
    users = net(items[input_place].view(*batch.items.shape, -1), batch.gaps, batch.weights)[has_target]
    negative_logits = users @ items[negative_place].T - log_sampling[negatives]
    negative_logits = negative_logits.masked_fill(target[:, None] == negatives[None, :], float("-inf"))
    logits = torch.cat([(users * items[target_place]).sum(1, keepdim=True), negative_logits], 1)
    losses = cross_entropy(logits, torch.zeros(len(target), dtype=torch.long), reduction="none")
    weight = batch.target_weight[has_target]
    return (weight * losses).sum() / weight.sum().clamp(min=1e-9)


def _by_length(engagements: Engagements, eligible: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The users sorted by about their length, because a batch is as long as its longest sequence."""
    size = np.bincount(engagements.user)
    size = np.minimum(size[size > 0][eligible], MAX_SEQUENCE + 1)
    return np.asarray(eligible[np.argsort(size + generator.random(len(eligible)), kind="stable")])


def _frequent_values(table: ItemTable, rows: np.ndarray, attributes: Sequence[str]) -> list[tuple[str, str]]:
    """The attribute values of at least five of these rows."""
    values = []
    for attribute in attributes:
        column = table.texts(attribute)
        if column is None:
            continue
        codes, vocabulary = column
        row_codes = codes[rows]
        count = np.bincount(row_codes[row_codes >= 0], minlength=len(vocabulary))
        values += [(attribute, text) for text, code in vocabulary.items() if count[code] >= _MIN_ITEMS]
    return values
