"""When a learned part replaces a simpler one: only where held-out data show that it is better."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from training.core.decisions import decide
from training.encoders.fit_encoders import projection_decision


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
    assert projection_decision("text", _recall(count, body, tuned)).accepted is used


def test_without_held_out_baskets_a_part_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    decision = projection_decision("image", {})
    with caplog.at_level(logging.WARNING):
        decision.log()
    assert not decision.accepted
    assert "the projection of image: too few to tell (0 held-out queries)" in caplog.text


def test_a_decision_names_both_sides_the_gain_and_the_queries() -> None:
    values = np.repeat([0.5, 1.0], 100)
    decision = decide("trees", "the weighted sum", "of nDCG", values, values - 0.25)
    assert decision.accepted
    expected = "+0.250 [+0.250, +0.250] of nDCG against the weighted sum on 200 held-out queries: it is used"
    assert str(decision) == f"trees: {expected}"
    assert decision.to_dict()["text"] == str(decision)


def test_a_rejection_is_a_warning_and_names_what_stays(caplog: pytest.LogCaptureFixture) -> None:
    values = np.random.default_rng(0).random(500)
    with caplog.at_level(logging.INFO):
        decide("trees", "the weighted sum", "of nDCG", values, values[::-1]).log()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("it is left out in favor of the weighted sum")


def test_a_part_that_is_used_without_a_gain_says_why(caplog: pytest.LogCaptureFixture) -> None:
    values = np.random.default_rng(0).random(500)
    decision = decide("the tuned text encoder", "the frozen one", "of partners found", values, values[::-1])
    decision = replace(decision, accepted=True, reason="[text] mode is full")
    with caplog.at_level(logging.INFO):
        decision.log()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("it is used, because [text] mode is full")
