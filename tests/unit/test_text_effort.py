"""How much tuning of texts is worth its time follows from the baskets, unless the settings say."""

import pytest
import torch

from training.data.encoder_settings import TextTraining
from training.encoders.text_effort import MIN_PAIRS, with_effort


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"])
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return bool(request.param)


def test_few_pairs_leave_the_encoder_as_it_is(on_gpu: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert with_effort(TextTraining(), MIN_PAIRS - 1).mode == "frozen"
    assert "1999 items" in caplog.text
    assert with_effort(TextTraining(), MIN_PAIRS).mode == "auto"


def test_more_pairs_get_more_steps_up_to_a_limit(on_gpu: bool) -> None:
    steps = [with_effort(TextTraining(batch=100), pairs).steps for pairs in (2000, 2010, 10_000_000)]
    assert steps == [150, 150, 150] if not on_gpu else [200, 201, 300]


def test_settings_that_are_given_stay(on_gpu: bool) -> None:
    settings = TextTraining(steps=7, trainable_layers=1, learning_rate=2e-4)
    assert with_effort(settings, 3) == settings
    full = with_effort(TextTraining(mode="full"), 3)
    assert (full.mode, full.steps) == ("full", 1)
    assert full.trainable_layers == (0 if on_gpu else 2)
    assert full.learning_rate == (3e-5 if on_gpu else 1e-4)
