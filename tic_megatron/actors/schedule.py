"""Learning-rate schedule: a pure function of the update's number, so resuming needs nothing but the count."""

from __future__ import annotations

import math

from tic_megatron.config import Settings


def learning_rate(update: int, settings: Settings) -> float:
    """Learning rate of one optimizer update.

    Linear from 0 (exclusive) to the peak over `lr_warmup_updates`, then constant, or linear or cosine decay to
    `min_learning_rate` at the end of the run.

    Args:
        update: updates done before this one, from 0.
        settings: the run's settings; its length is `trainer.steps` x `trainer.updates_per_step`.
    """
    actor = settings.actor
    total = settings.trainer.steps * settings.trainer.updates_per_step
    if update < actor.lr_warmup_updates:
        return actor.learning_rate * (update + 1) / actor.lr_warmup_updates
    # A run that goes on with fewer updates per step has done more of them than it would have by then.
    progress = min(1.0, (update - actor.lr_warmup_updates) / max(1, total - actor.lr_warmup_updates))
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[actor.lr_decay]
    return actor.min_learning_rate + (actor.learning_rate - actor.min_learning_rate) * factor
