"""Clips: from a unit's log-ratio and advantage to its clipped, advantage-weighted ratio.

Nothing overflows: the log-ratio is bounded before `exp`. Selections use `torch.where`, so a masked infinity cannot turn
into NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_BOUND = 30.0
"""Where a clip leaves a ratio unbounded, its log-ratio stops here, with zero gradient beyond."""


@dataclass(frozen=True)
class ClipRange:
    """`1 - eps_low .. 1 + eps_high`, and dual clip's constant c > 1 (None: off), which two-sided clips use where A < 0."""

    eps_low: float
    eps_high: float
    dual_clip: float | None = None


Clip = Callable[[Tensor, Tensor, ClipRange], tuple[Tensor, Tensor]]
"""(log_ratio, advantage, range) -> (value to maximise, whether the clip took the gradient away); all [n_units]."""


def up_only(log_ratio: Tensor, advantage: Tensor, clip: ClipRange) -> tuple[Tensor, Tensor]:
    """min(ratio, 1 + eps_high) * A, whatever the sign of A (TIC-GRPO's clip); eps_low is not used."""
    bound = math.log1p(clip.eps_high)
    return torch.exp(log_ratio.clamp(max=bound)) * advantage, log_ratio > bound


def two_sided(log_ratio: Tensor, advantage: Tensor, clip: ClipRange) -> tuple[Tensor, Tensor]:
    """PPO's min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A) (GRPO, Eq. 4-5).

    The minimum lets the ratio grow without bound where A < 0; it stops at exp(30), or at dual clip's constant.
    """
    ratio = torch.exp(log_ratio.clamp(max=LOG_RATIO_BOUND))
    low, high = 1.0 - clip.eps_low, 1.0 + clip.eps_high
    positive = advantage >= 0
    capped = torch.where(positive, ratio > high, ratio < low)
    value = torch.where(capped, ratio.detach().clamp(low, high), ratio)
    bounded = log_ratio > LOG_RATIO_BOUND
    if clip.dual_clip is not None:
        bounded = ~positive & (ratio > clip.dual_clip)
        value = torch.where(bounded, torch.full_like(value, clip.dual_clip), value)
    return value * advantage, capped | bounded


def unclipped(log_ratio: Tensor, advantage: Tensor, clip: ClipRange) -> tuple[Tensor, Tensor]:
    """ratio * A, the ratio stopped at exp(30) only."""
    return torch.exp(log_ratio.clamp(max=LOG_RATIO_BOUND)) * advantage, log_ratio > LOG_RATIO_BOUND
