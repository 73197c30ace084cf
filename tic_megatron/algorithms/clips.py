"""Clips: from a unit's log-ratio and advantage to its clipped, advantage-weighted ratio.

Nothing overflows: the log-ratio is bounded before `exp`. Selections use `torch.where`, so a masked infinity cannot turn
into NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOG_RATIO_BOUND = 30.0
"""Where a clip leaves a ratio unbounded, its log-ratio stops here, with zero gradient beyond."""

Clip = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
"""(log_ratio, advantage, eps_low, eps_high) -> (value to maximise, whether the cap took the gradient away); all [n_units]."""


def up_only(log_ratio: Tensor, advantage: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """min(ratio, 1 + eps_high) * A, whatever the sign of A (TIC-GRPO's clip); eps_low is not used."""
    bound = math.log1p(eps_high)
    return torch.exp(log_ratio.clamp(max=bound)) * advantage, log_ratio > bound


def two_sided(log_ratio: Tensor, advantage: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """PPO's min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A) (GRPO, Eq. 4-5).

    The minimum lets the ratio grow without bound where A < 0 and shrink where A > 0; the former stops at exp(30).
    """
    ratio = torch.exp(log_ratio.clamp(max=LOG_RATIO_BOUND))
    low, high = 1.0 - eps_low, 1.0 + eps_high
    capped = torch.where(advantage >= 0, ratio > high, ratio < low)
    value = torch.where(capped, ratio.detach().clamp(low, high), ratio) * advantage
    return value, capped | (log_ratio > LOG_RATIO_BOUND)
