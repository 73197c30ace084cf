"""KL estimators against a reference policy, and the entropy bonus: per-token terms beside the policy objective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tic_megatron.algorithms.clips import LOG_RATIO_BOUND
from tic_megatron.algorithms.ratios import token_log_ratio

KLEstimator = Callable[[Tensor, Tensor], Tensor]
"""(trainer_logprobs, ref_logprobs) -> estimate of KL(pi_theta || pi_ref) at each token [n_tokens]."""


def k1(trainer_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi_theta - log pi_ref: unbiased. For rewards only: as a loss its expected gradient is zero."""
    return token_log_ratio(trainer_logprobs, ref_logprobs)


def k2(trainer_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi_theta - log pi_ref)^2 / 2: biased, but its gradient, on-policy, is that of KL(pi_theta || pi_ref) of the next
    token at the visited prefixes."""
    return token_log_ratio(trainer_logprobs, ref_logprobs).square() / 2


def k3(trainer_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = log pi_ref - log pi_theta: unbiased and never negative; d stops at 30.

    As a loss its gradient, on-policy, is that of the other direction: KL(pi_ref || pi_theta) at the visited prefixes.
    """
    d = token_log_ratio(ref_logprobs, trainer_logprobs).clamp(max=LOG_RATIO_BOUND)
    return torch.exp(d) - 1 - d


KL_LOSSES: dict[str, KLEstimator] = {"k2": k2, "k3": k3}
"""Estimators that may be a loss, by the names that `algorithm.kl_estimator` takes (`k1` goes into the reward)."""


def weighted_sum(per_token: Tensor, weights: Tensor) -> Tensor:
    """Sum of per-token terms [n_tokens] with the objective's own token weights (`token_weights`), a scalar in fp64."""
    return (per_token.double() * weights).sum()
