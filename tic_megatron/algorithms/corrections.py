"""Importance weights for the gap between the generator, which sampled, and pi_old, which the ratio is taken to.

The engines' kernels differ from the trainer's, so samples come from a slightly other policy. The weight pi_old / pi_generator
is detached and multiplies a unit's term; both forms bound its variance at the price of a bias.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tic_megatron.algorithms.ratios import Ratio, Segments

Level = Literal["token", "trajectory"]
Form = Literal["truncate", "mask"]


def generator_correction(
    ratio: Ratio,
    old_logprobs: Tensor,
    inference_logprobs: Tensor,
    segments: Segments,
    *,
    level: Level,
    form: Form,
    bound: float,
) -> Tensor:
    """Weights for `objective_terms`.

    Args:
        ratio: the objective's; says what a unit is.
        old_logprobs, inference_logprobs: [n_tokens] of pi_old and of the generator, without gradient.
        segments: which trajectory each token belongs to.
        level: weight every token by its own ratio, or all of a trajectory by the product over it.
        form: `truncate` to at most `bound`, or `mask` to 0 what lies outside [1 / bound, bound].
        bound: > 1.

    Returns:
        [n_units], detached, fp64.

    Raises:
        ValueError: token weights asked for with a trajectory-level ratio, which has one weight per trajectory.
    """
    if level == "token" and not ratio.per_token:
        raise ValueError("a trajectory-level ratio has one weight per trajectory: correct it at the trajectory level")
    gap = (old_logprobs - inference_logprobs).detach().double()
    if level == "trajectory":
        gap = segments.sum(gap)
        if ratio.per_token:
            gap = gap[segments.ids]
    limit = math.log(bound)
    weight = torch.exp(gap.clamp(max=limit))
    return weight if form == "truncate" else torch.where(gap.abs() <= limit, weight, torch.zeros_like(weight))
