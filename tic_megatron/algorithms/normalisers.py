"""Normalisers: the weight of one trajectory (of each of its tokens, for token-level ratios) in a mini-batch's mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """What a mini-batch is divided by: its totals over all ranks, fixed before the first micro-batch.

    `n_trajectories` (N) and `n_tokens` (sum of T_i) count the trajectories left out for zero advantage too;
    `max_response_tokens` is the constant T.
    """

    n_trajectories: int
    n_tokens: int
    max_response_tokens: int


Normaliser = Callable[[Tensor, Totals], Tensor]
"""(T_i of each trajectory [n_trajectories], totals) -> weights [n_trajectories]."""


def response_length(lengths: Tensor, totals: Totals) -> Tensor:
    """1 / (N T_i): GRPO's mean over a response, then over responses."""
    return 1.0 / (totals.n_trajectories * lengths.clamp(min=1).double())


def constant_length(lengths: Tensor, totals: Totals) -> Tensor:
    """1 / (N T): the constant length normalisation of GRPO_2 and TIC-GRPO (Eq. 8)."""
    return torch.full_like(lengths, 1.0 / (totals.n_trajectories * totals.max_response_tokens), dtype=torch.float64)


def token_mean(lengths: Tensor, totals: Totals) -> Tensor:
    """1 / (sum of all T_i): DAPO's mean over tokens."""
    return torch.full_like(lengths, 1.0 / max(totals.n_tokens, 1), dtype=torch.float64)


def trajectory_mean(lengths: Tensor, totals: Totals) -> Tensor:
    """1 / N: GSPO's mean over responses."""
    return torch.full_like(lengths, 1.0 / totals.n_trajectories, dtype=torch.float64)


NORMALISERS: dict[str, Normaliser] = {
    "response_length": response_length,
    "constant_length": constant_length,
    "token_mean": token_mean,
    "trajectory_mean": trajectory_mean,
}
"""By the names that `algorithm.normaliser` takes."""
