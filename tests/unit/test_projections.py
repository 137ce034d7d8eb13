"""When a projection of vectors is used: only where later baskets show that it helps."""

import logging

import numpy as np
import pytest

from training.encoders.fit_encoders import projection_helps


def _recall(count: int, body: float, tuned: float) -> dict[str, np.ndarray]:
    """Hits at these rates, as nearly as `count` allows; a better side finds all that the other finds."""
    rank = np.arange(count)
    return {"body": rank < body * count, "tuned": rank < tuned * count}


@pytest.mark.parametrize(
    ("count", "body", "tuned", "used"),
    [
        (1000, 0.1, 0.2, True),
        (1000, 0.1, 0.1, False),
        (1000, 0.2, 0.1, False),
        (1000, 0.1, 0.103, False),  # three more: of which chance may make none
        (1000, 0.1, 0.106, True),  # six more: hardly chance
        (99, 0.0, 1.0, False),  # too few to tell
    ],
)
def test_a_projection_has_to_find_more_partners(count: int, body: float, tuned: float, used: bool) -> None:
    assert projection_helps("text", _recall(count, body, tuned)) is used


def test_a_shop_without_later_baskets_has_no_projection_and_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not projection_helps("image", {})
    assert "image: 0 later baskets are too few" in caplog.text
