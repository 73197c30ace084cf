"""Importance ratios, in log space: which log-ratio does an objective clip and weight by?

A ratio function maps per-token log-ratios to a vector of *units*, one per token or one per trajectory. `exp` is taken by
the clips only, after the log-ratio has been bounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which trajectory each response token of a packed batch belongs to.

    `ids` [n_tokens]: trajectory index of each token held here; `lengths` [n_trajectories]: T_i, response tokens of each
    trajectory over *all* ranks that share its sequence; `group`: those ranks (context parallelism), None for one.
    """

    ids: Tensor
    lengths: Tensor
    group: dist.ProcessGroup | None = None

    def sum(self, per_token: Tensor) -> Tensor:
        """Sum over each trajectory's tokens, in fp64: [n_tokens, ...] -> [n_trajectories, ...]."""
        shape = (self.lengths.shape[0], *per_token.shape[1:])
        sums = torch.zeros(shape, dtype=torch.float64, device=per_token.device)
        sums = sums.index_add(0, self.ids, per_token.double())
        return sum_over_group(sums, self.group)

    def running_sum(self, per_token: Tensor) -> Tensor:
        """Sum over each trajectory's tokens so far, the token itself included, in fp64: [n_tokens] -> [n_tokens].

        Tokens of a trajectory stand together and in order. Raises ValueError under context parallelism, where they do not.
        """
        if self.group is not None and self.group.size() > 1:
            raise ValueError("prefix sums of a sequence that is shared between ranks are not defined")
        total = per_token.double().cumsum(0)
        starts = torch.searchsorted(self.ids, torch.arange(self.lengths.shape[0], device=self.ids.device))
        before = torch.cat([total.new_zeros(1), total])[starts]  # sum of all earlier trajectories
        return total - before[self.ids]


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, group):
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_over_group(partial: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce with an identity backward.

    Every rank of the group computes the same scalar objective J of the total L = sum_r L_r. The full gradient is
    dJ/dL * sum_r dL_r/dtheta; rank r holds only the tokens of L_r, so with dL/dL_r = 1 (identity) its own gradient is
    dJ/dL * dL_r/dtheta, and the *sum* of the ranks' gradients, which the gradient reduction over the group takes, is exact.
    An all-reduce in the backward too would multiply it by the group's size.
    """
    if group is None or group.size() == 1 or partial.numel() == 0:
        return partial
    return _SumOverGroup.apply(partial, group)


@dataclass(frozen=True)
class Ratio:
    """`log_ratio(trainer_logprobs, old_logprobs, segments)` gives the units' log-ratios.

    `per_token`: a unit is a token, else a trajectory. `length_mean`: the log-ratio is a mean over the trajectory's tokens,
    so a token's share of the unit's gradient is 1 / T_i.
    """

    per_token: bool
    log_ratio: Callable[[Tensor, Tensor, Segments], Tensor]
    length_mean: bool = False


def token_log_ratio(trainer: Tensor, old: Tensor) -> Tensor:
    """delta, in fp32 at least: half precision would round every ratio to three digits, and exp(30) overflows fp16."""
    dtype = torch.promote_types(torch.promote_types(trainer.dtype, old.dtype), torch.float32)
    return trainer.to(dtype) - old.to(dtype)


def _token(trainer: Tensor, old: Tensor, segments: Segments) -> Tensor:
    return token_log_ratio(trainer, old)


def _trajectory(trainer: Tensor, old: Tensor, segments: Segments) -> Tensor:
    return segments.sum(token_log_ratio(trainer, old))


def _prefix(trainer: Tensor, old: Tensor, segments: Segments) -> Tensor:
    return segments.running_sum(token_log_ratio(trainer, old))


def _none(trainer: Tensor, old: Tensor, segments: Segments) -> Tensor:
    return token_log_ratio(trainer, trainer.detach())


def _sequence(trainer: Tensor, old: Tensor, segments: Segments) -> Tensor:
    return segments.sum(token_log_ratio(trainer, old)) / segments.lengths.clamp(min=1)


TOKEN = Ratio(per_token=True, log_ratio=_token)
"""rho[i, t] = pi_theta / pi_old of one token."""
TRAJECTORY = Ratio(per_token=False, log_ratio=_trajectory)
"""W[i] = product of rho[i, t] over the trajectory (TIC-GRPO, Eq. 8)."""
SEQUENCE = Ratio(per_token=False, log_ratio=_sequence, length_mean=True)
"""s[i] = W[i] ** (1 / T_i) (GSPO)."""
PREFIX = Ratio(per_token=True, log_ratio=_prefix)
"""W[i, 1..t] = product of rho[i, k] over k <= t: what weights a reward given at token t (dense rewards)."""
NONE = Ratio(per_token=True, log_ratio=_none)
"""1, with the gradient of log pi: no importance sampling (the paper's Figure 1)."""
