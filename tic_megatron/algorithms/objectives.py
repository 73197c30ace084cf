"""Policy objectives as ratio x clip x normaliser.

An objective is one entry of `OBJECTIVES`; nothing else knows which one runs. Add your own with

    register_objective("mine", Objective(ratios.TRAJECTORY, clips.two_sided, normalisers.constant_length, 0.2, 0.3))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tic_megatron.algorithms import clips, normalisers, ratios
from tic_megatron.algorithms.normalisers import Totals
from tic_megatron.algorithms.ratios import Segments


@dataclass(frozen=True)
class Objective:
    """One objective to maximise: sum over units of normaliser x clip(ratio, advantage), with default clip ranges."""

    ratio: ratios.Ratio
    clip: clips.Clip
    normaliser: normalisers.Normaliser
    eps_low: float
    eps_high: float


OBJECTIVES: dict[str, Objective] = {
    # GRPO, Eq. 4-5 of arXiv 2508.02833.
    "grpo": Objective(ratios.TOKEN, clips.two_sided, normalisers.response_length, 0.2, 0.2),
    # TIC-GRPO, Eq. 8: (1/N) sum_i min(W_i, 1 + eps_high) A_i / T.
    "tic_grpo": Objective(ratios.TRAJECTORY, clips.up_only, normalisers.constant_length, 0.2, 0.28),
}


def register_objective(name: str, objective: Objective) -> None:
    """Add an objective under a new name. Raises ValueError when the name is taken."""
    if name in OBJECTIVES:
        raise ValueError(f"an objective named {name!r} exists already")
    OBJECTIVES[name] = objective


@dataclass(frozen=True)
class ObjectiveTerms:
    """Result of `objective_terms`.

    `value`: this rank's part of the objective, a scalar to maximise (for token-level ratios a partial sum over the ranks
    that share a sequence; for trajectory-level ones the same on each). `log_ratio`, `capped`: [n_trajectories], detached:
    L_i, and whether the cap removed the gradient (of any of its tokens held here, for token-level ratios).
    """

    value: Tensor
    log_ratio: Tensor
    capped: Tensor


def objective_terms(
    objective: Objective,
    trainer_logprobs: Tensor,
    old_logprobs: Tensor,
    segments: Segments,
    advantages: Tensor,
    totals: Totals,
    *,
    eps_low: float | None = None,
    eps_high: float | None = None,
) -> ObjectiveTerms:
    """The objective over packed response tokens: what the actors differentiate.

    Args:
        objective: the composition.
        trainer_logprobs: [n_tokens] log pi_theta, with gradient.
        old_logprobs: [n_tokens] log pi_old, without.
        segments: which trajectory each token belongs to.
        advantages: [n_trajectories].
        totals: what the mini-batch is divided by.
        eps_low, eps_high: clip range, the objective's default when None.
    """
    eps_low = objective.eps_low if eps_low is None else eps_low
    eps_high = objective.eps_high if eps_high is None else eps_high
    log_ratio = objective.ratio.log_ratio(trainer_logprobs, old_logprobs, segments)
    weights = objective.normaliser(segments.lengths, totals)
    if objective.ratio.per_token:
        advantages, weights = advantages[segments.ids], weights[segments.ids]
    clipped, capped = objective.clip(log_ratio, advantages.to(log_ratio.dtype), eps_low, eps_high)
    with torch.no_grad():
        trajectory_log_ratio = segments.sum(trainer_logprobs.detach() - old_logprobs)
        if objective.ratio.per_token:
            capped = torch.zeros_like(segments.lengths).index_add(0, segments.ids, capped.to(segments.lengths.dtype)) > 0
    return ObjectiveTerms((clipped.double() * weights).sum(), trajectory_log_ratio, capped)


def policy_objective(
    name: str,
    trainer_logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    max_response_tokens: int,
    eps_low: float | None = None,
    eps_high: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A registered objective on padded tensors, for use without the trainer.

    Args:
        name: key of `OBJECTIVES`.
        trainer_logprobs, old_logprobs: [N, T_max] log pi_theta (with gradient) and log pi_old.
        mask: [N, T_max], true at response tokens.
        advantages: [N].
        max_response_tokens: the constant T.
        eps_low, eps_high: clip range, the objective's default when None.

    Returns:
        (value, metrics): the scalar to MAXIMISE, a mean over the N trajectories, and `log_ratio_mean`, `log_ratio_std`,
        `capped_fraction`, `ess`.

    Raises:
        KeyError: unknown name.
    """
    mask = mask.bool()
    lengths = mask.sum(dim=1)
    segments = Segments(ids=mask.nonzero()[:, 0], lengths=lengths)
    totals = Totals(mask.shape[0], int(lengths.sum()), max_response_tokens)
    # masked_select keeps what lies outside the mask (NaN, infinities) out of value and gradient.
    terms = objective_terms(
        OBJECTIVES[name],
        trainer_logprobs.masked_select(mask),
        old_logprobs.masked_select(mask),
        segments,
        advantages,
        totals,
        eps_low=eps_low,
        eps_high=eps_high,
    )
    return terms.value, ratio_metrics(terms.log_ratio, terms.capped)


def ratio_metrics(log_ratio: Tensor, capped: Tensor) -> dict[str, float]:
    """What the trajectory ratios of a batch look like.

    Args:
        log_ratio: [n] L_i.
        capped: [n] whether the cap removed the gradient.

    Returns:
        `log_ratio_mean`, `log_ratio_std`, `capped_fraction`, `underflow_fraction` (W_i is 0 in fp32) and `ess`, the
        effective sample size of W over n: (sum W)^2 / (n sum W^2).
    """
    if log_ratio.numel() == 0:
        return {}
    relative = torch.exp(log_ratio.double() - log_ratio.double().max())  # ESS does not change with a common factor
    return {
        "log_ratio_mean": log_ratio.mean().item(),
        "log_ratio_std": log_ratio.std(correction=0).item(),
        "capped_fraction": capped.double().mean().item(),
        "underflow_fraction": (torch.exp(log_ratio.float()) == 0).double().mean().item(),
        "ess": (relative.sum().square() / (relative.square().sum() * relative.numel())).item(),
    }
