"""Group-relative advantages."""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-6
"""Added to a group's standard deviation before dividing by it."""


def group_advantages(rewards: Tensor, *, normalize_std: bool = False, leave_one_out: bool = False) -> Tensor:
    """A[b, g] = r[b, g] - mean of r[b, :] (the paper's group mean; no division by the standard deviation).

    A group whose rewards are all equal gets exactly 0, whatever the rounding of its mean.

    Args:
        rewards: [B, G], G >= 2, any floating dtype.
        normalize_std: divide by the group's (biased) standard deviation + 1e-6.
        leave_one_out: the baseline is the mean of the *others*, which is unbiased. It is a pure scale: the group mean's
            advantages times 1 / (1 - 1/G).

    Returns:
        [B, G]

    Raises:
        ValueError: a group of fewer than two, or a reward that is not finite.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, group] with groups of at least 2, got shape {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    centred = torch.where(equal, torch.zeros_like(centred), centred)
    if leave_one_out:
        centred = centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    if normalize_std:
        centred = centred / (rewards.std(dim=1, keepdim=True, correction=0) + STD_FLOOR)
    return centred
