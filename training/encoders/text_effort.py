"""How much tuning of the text encoder a shop's baskets are worth on this machine."""

import logging

import torch

from training.data.encoder_settings import TextTraining

MIN_PAIRS = 2000
"""Fewer engagements in baskets of several items are too few to tune a text encoder on."""
_EPOCHS = 10
_STEPS, _STEPS_ON_CPU = 300, 150
_LAYERS_ON_CPU = 2
_RATE, _RATE_OF_LAYERS = 3e-5, 1e-4
_log = logging.getLogger(__name__)


def with_effort(training: TextTraining, pairs: int) -> TextTraining:
    """The settings with every number that was left out; `pairs` counts the engagements to learn from.

    The mode "auto" becomes "frozen" if there are fewer than 2,000 pairs and the settings name no steps.
    """
    on_gpu = torch.cuda.is_available()
    if training.mode == "auto" and training.steps is None and pairs < MIN_PAIRS:
        _log.warning(
            "text: the baskets hold %d items together with others, of the %d that tuning needs: the encoder "
            "stays as it is",
            pairs,
            MIN_PAIRS,
        )
        return training.model_copy(update={"mode": "frozen", "steps": 0, "trainable_layers": 0})
    layers = training.trainable_layers
    if layers is None:
        layers = 0 if on_gpu else _LAYERS_ON_CPU
    steps = training.steps
    if steps is None:
        steps = min(_STEPS if on_gpu else _STEPS_ON_CPU, -(-_EPOCHS * pairs // training.batch))
    rate = training.learning_rate or (_RATE_OF_LAYERS if layers else _RATE)
    return training.model_copy(update={"trainable_layers": layers, "steps": steps, "learning_rate": rate})
