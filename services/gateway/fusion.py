"""Several orders as one: reciprocal rank fusion (Cormack et al., 2009)."""

from collections.abc import Iterable, Sequence

RANKS = 60
CROSS_MODAL_WEIGHT = 0.3
"""What a text's order in the image space counts beside its order in the text space."""


def fused(orders: Iterable[tuple[float, Sequence[int]]]) -> dict[int, float]:
    """Item numbers to their fused scores, from orders of numbers, best first, each with its weight."""
    scores: dict[int, float] = {}
    for weight, numbers in orders:
        for place, number in enumerate(numbers, 1):
            scores[number] = scores.get(number, 0.0) + weight / (RANKS + place)
    return scores
