"""Positive pairs, their loss and the learned projection equal plain loops."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from training.encoders.contrastive import apply_head, fit_head, pair_loss
from training.examples.positive_pairs import PositivePairs, family_recall, make_pairs, pair_recall

pytestmark = pytest.mark.usefixtures("single_thread")

COUNT = 9
ROWS = st.lists(st.tuples(st.integers(-1, COUNT - 1), st.integers(-5, 5)), max_size=40)


def pairs_of(rows: list[tuple[int, int]]) -> PositivePairs:
    items, baskets = np.array(rows, np.int64).reshape(-1, 2).T
    return make_pairs(items, baskets, COUNT)


def baskets_of(rows: list[tuple[int, int]]) -> list[set[int]]:
    """The different items of each basket that holds two at least."""
    baskets: dict[int, set[int]] = {}
    for item, basket in rows:
        if item >= 0:
            baskets.setdefault(basket, set()).add(item)
    return [items for items in baskets.values() if len(items) > 1]


@given(ROWS, st.integers(0, 5))
@settings(deadline=None)
def test_pairs_are_different_items_of_one_basket(rows: list[tuple[int, int]], seed: int) -> None:
    pairs, baskets = pairs_of(rows), baskets_of(rows)
    assert sorted(pairs.item.tolist()) == sorted(item for basket in baskets for item in basket)
    spans = {(int(s), int(e)) for s, e in zip(pairs.start, pairs.end, strict=True)}
    assert sorted(sorted(pairs.item[s:e].tolist()) for s, e in spans) == sorted(map(sorted, baskets))
    counts = Counter(item for basket in baskets for item in basket)
    total = max(sum(counts.values()), 1)
    np.testing.assert_allclose(pairs.share, [counts[n] / total for n in range(COUNT)], rtol=1e-6)
    if not baskets:
        assert not len(pairs)
        return
    assert pairs.share.sum() == pytest.approx(1)
    left, right = pairs.draw(200, np.random.default_rng(seed))
    together = {(a, b) for basket in baskets for a in basket for b in basket if a != b}
    assert set(zip(left.tolist(), right.tolist(), strict=True)) <= together


def test_every_pair_is_drawn_with_uniform_partners_in_a_basket() -> None:
    pairs = pairs_of([(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
    left, right = pairs.draw(12_000, np.random.default_rng(0))
    counts = Counter(zip(left.tolist(), right.tolist(), strict=True))
    assert len(counts) == 4 * 3 + 2
    for (one, _), count in counts.items():
        assert count == pytest.approx(12_000 / 6 / (3 if one < 4 else 1), rel=0.2)


@given(ROWS, st.sets(st.integers(0, COUNT - 1)))
@settings(deadline=None)
def test_pairs_of_a_subset_equal_those_of_a_shop_with_only_the_subset(
    rows: list[tuple[int, int]], subset: set[int]
) -> None:
    present = np.isin(np.arange(COUNT), sorted(subset))
    pairs = pairs_of(rows).restrict_to(present)
    expected = pairs_of([(item if item in subset else -1, basket) for item, basket in rows])
    for name in ("item", "start", "end", "share"):
        np.testing.assert_array_equal(getattr(pairs, name), getattr(expected, name))


@given(ROWS, st.integers(0, 6))
@settings(deadline=None)
def test_each_basket_gives_one_held_out_pair(rows: list[tuple[int, int]], limit: int) -> None:
    baskets = baskets_of(rows)
    left, right = pairs_of(rows).held_out(limit, seed=3)
    assert len(left) == len(right) == min(limit, len(baskets))
    assert (left != right).all()
    # Every pair has a basket of its own that holds both.
    held_out_pairs = list(zip(left.tolist(), right.tolist(), strict=True))
    holds = np.array([[set(pair) <= basket for basket in baskets] for pair in held_out_pairs], bool)
    if held_out_pairs:
        assert (maximum_bipartite_matching(csr_matrix(holds), perm_type="column") >= 0).all()


def test_a_pair_is_a_hit_if_fewer_than_k_items_are_nearer() -> None:
    choice = np.random.default_rng(0)
    few, many = 25, 1200
    vectors = choice.integers(-2, 3, (many, 4)).astype(np.float32)  # many ties
    for count, k in ((few, 1), (few, 3), (few, 20), (many, 1), (many, 200)):
        left, right = choice.integers(0, count, (2, 700))
        check_recall(vectors[:count], left, right, k)


def check_recall(vectors: np.ndarray, left: np.ndarray, right: np.ndarray, k: int) -> None:
    """The answers equal those of counting who is nearer."""
    left, right = left[left != right], right[left != right]
    recall = pair_recall(vectors, (left, right), k)
    for at in range(0, len(left), 9):
        a, b = int(left[at]), int(right[at])
        similarity = float(vectors[a] @ vectors[b])
        nearer = sum(float(vectors[a] @ v) > similarity for n, v in enumerate(vectors) if n != a)
        assert recall[at] == (nearer < k)


def test_a_variant_is_found_if_fewer_than_k_other_items_are_nearer() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(300, 5)).astype(np.float32)
    families = [f"f{n}" if n else "" for n in generator.integers(0, 100, 300).tolist()]
    present = generator.random(300) < 0.8
    files = [str(n // 2) for n in range(300)]  # two items have one photograph
    for k in (1, 10, 1000):
        hits = family_recall(vectors, present, families, files, k, 1000)
        expected = []
        for row in np.flatnonzero(present).tolist():
            others = [n for n in np.flatnonzero(present).tolist() if n != row]
            if families[row] and families[row] in {families[n] for n in others}:
                others = [n for n in others if files[n] != files[row]]
                nearest = sorted(others, key=lambda n: -float(vectors[row] @ vectors[n]))[:k]
                expected.append(families[row] in {families[n] for n in nearest})
        assert (len(hits), int(hits.sum())) == (len(expected), sum(expected))
    assert not len(family_recall(vectors, present, [""] * 300, files, 10, 1000))
    assert not len(family_recall(vectors, np.zeros(300, bool), families, files, 10, 1000))
    assert len(family_recall(vectors, present, families, files, 10, 7)) == 7


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_loss_is_a_softmax_with_frequency_correction(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.nn.functional.normalize(torch.randn(7, 5, generator=generator), dim=1) for _ in range(2)
    )
    items = torch.tensor([3, 1, 3, 2, 1, 3, 0])
    share = torch.tensor([0.1, 0.2, 0.5, 0.4])
    loss = float(pair_loss(left, right, items, share[items].log(), temperature))
    losses = []
    for row in range(7):
        others = [n for n in range(7) if n == row or items[n] != items[row]]
        value = {
            n: float(left[row] @ right[n]) / temperature - float(np.log(share[items[n]].item()))
            for n in others
        }
        losses.append(-value[row] + float(np.log(sum(np.exp(v) for v in value.values()))))
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)


def planted_groups(count: int = 200, groups: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors whose weak first dimensions tell the group of an item, and the group: int (M,)."""
    choice = np.random.default_rng(seed)
    centers, group = choice.standard_normal((groups, 6)), np.arange(count) % groups
    text = 0.8 * centers[group] + 0.1 * choice.standard_normal((count, 6))
    vectors = np.concatenate([text, choice.standard_normal((count, 18))], axis=1)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), group


def baskets_within(group: np.ndarray, baskets: int, seed: int) -> PositivePairs:
    """Baskets of three items of one group."""
    choice = np.random.default_rng(seed)
    rows = [choice.permutation(np.flatnonzero(group == n % (group.max() + 1)))[:3] for n in range(baskets)]
    return make_pairs(np.concatenate(rows), np.repeat(np.arange(baskets), 3), len(group))


def test_a_projection_finds_the_subspace_of_the_baskets() -> None:
    vectors, group = planted_groups()
    learning, judging = baskets_within(group, 200, seed=1), baskets_within(group, 100, seed=2).held_out(100)
    weight = fit_head(vectors, learning, steps=400, batch=64)
    assert weight.shape == (24, 24)
    assert weight.dtype == np.float32
    before = pair_recall(vectors, judging, 20).mean()
    after = pair_recall(apply_head(vectors, weight), judging, 20).mean()
    assert before < 0.6
    assert after > before + 0.25
    again = fit_head(vectors, learning, steps=400, batch=64)
    np.testing.assert_array_equal(weight, again)


def test_a_projection_keeps_the_other_modality_near() -> None:
    vectors, group = planted_groups()
    choice = np.random.default_rng(9)
    partners = vectors + 0.5 * choice.standard_normal(vectors.shape).astype(np.float32)
    partners /= np.linalg.norm(partners, axis=1, keepdims=True)
    learning = baskets_within(group, 200, seed=1)

    def recall_of(weight: np.ndarray) -> float:
        """How much nearer an item's other view is than those of all items."""
        near = apply_head(vectors, weight) @ apply_head(partners, weight).T
        return float((near.diagonal() - near.mean(1)).mean())

    alone = fit_head(vectors, learning, steps=200, batch=64)
    with_partners = fit_head(vectors, learning, steps=200, batch=64, partners=partners)
    assert recall_of(with_partners) > recall_of(alone) + 0.01


def test_without_pairs_or_steps_the_projection_is_the_identity() -> None:
    vectors, group = planted_groups(60, groups=10)
    none = make_pairs(np.empty(0, np.int64), np.empty(0, np.int64), 60)
    np.testing.assert_array_equal(fit_head(vectors, none, steps=5), np.eye(24, dtype=np.float32))
    np.testing.assert_array_equal(
        fit_head(vectors, baskets_within(group, 30, seed=1), steps=0), np.eye(24, dtype=np.float32)
    )


def test_projected_vectors_have_unit_length_and_zeros_stay_zero() -> None:
    vectors, _ = planted_groups(30)
    vectors[4] = 0
    weight = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)
    for given_as in (vectors, vectors.astype(np.float16)):
        projected = apply_head(given_as, weight)
        length = np.linalg.norm(projected, axis=1)
        np.testing.assert_allclose(np.delete(length, 4), 1, rtol=1e-5)
        assert not projected[4].any()
        assert projected.dtype == np.float32
    expected = weight.astype(np.float64) @ vectors[0]
    np.testing.assert_allclose(apply_head(vectors, weight)[0], expected / np.linalg.norm(expected), atol=1e-5)
