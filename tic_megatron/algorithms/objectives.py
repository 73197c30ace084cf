"""Policy objectives as ratio x clip x normaliser.

An objective is one entry of `OBJECTIVES`; nothing else knows which one runs. Add your own with

    register_objective("mine", Objective(ratios.TRAJECTORY, clips.two_sided, normalisers.constant_length, 0.2, 0.3))
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tic_megatron.algorithms import clips, normalisers, ratios
from tic_megatron.algorithms.clips import ClipRange
from tic_megatron.algorithms.normalisers import Totals
from tic_megatron.algorithms.ratios import Segments


@dataclass(frozen=True)
class Objective:
    """One objective to maximise: sum over units of normaliser x clip(ratio, advantage), with default clip ranges.

    `at_old_policy`: every one of the K gradients is evaluated at theta_old, the steps applied one after another.
    """

    ratio: ratios.Ratio
    clip: clips.Clip
    normaliser: normalisers.Normaliser
    eps_low: float
    eps_high: float
    at_old_policy: bool = False

    def clip_range(
        self, eps_low: float | None = None, eps_high: float | None = None, dual_clip: float | None = None
    ) -> ClipRange:
        """The objective's own range, where nothing else is given."""
        return ClipRange(self.eps_low if eps_low is None else eps_low, self.eps_high if eps_high is None else eps_high, dual_clip)


OBJECTIVES: dict[str, Objective] = {
    # Equations of arXiv 2508.02833. GRPO, Eq. 4-5.
    "grpo": Objective(ratios.TOKEN, clips.two_sided, normalisers.response_length, 0.2, 0.2),
    # The GRPO baseline of the paper's experiments: a mean over all tokens, with a wider upper range.
    "dapo": Objective(ratios.TOKEN, clips.two_sided, normalisers.token_mean, 0.2, 0.28),
    # GRPO_2 (GRPO+UB_Clip), Eq. 14.
    "grpo2": Objective(ratios.TOKEN, clips.up_only, normalisers.constant_length, 0.2, 0.28),
    # GRPO+Traj_IS. (The paper's ablation changes its DAPO baseline: set the normaliser to token_mean for that.)
    "traj_is": Objective(ratios.TRAJECTORY, clips.two_sided, normalisers.response_length, 0.2, 0.28),
    # TIC-GRPO, Eq. 8: (1/N) sum_i min(W_i, 1 + eps_high) A_i / T.
    "tic_grpo": Objective(ratios.TRAJECTORY, clips.up_only, normalisers.constant_length, 0.2, 0.28),
    # GSPO (Zheng et al. 2025).
    "gspo": Objective(ratios.SEQUENCE, clips.two_sided, normalisers.trajectory_mean, 3e-4, 4e-4),
    # No importance sampling (Figure 1).
    "no_is": Objective(ratios.NONE, clips.unclipped, normalisers.response_length, 0.2, 0.2, at_old_policy=True),
}


def register_objective(name: str, objective: Objective) -> None:
    """Add an objective under a new name. Raises ValueError when the name is taken."""
    if name in OBJECTIVES:
        raise ValueError(f"an objective named {name!r} exists already")
    OBJECTIVES[name] = objective


def with_dense_rewards(objective: Objective) -> Objective:
    """The objective for rewards given at tokens instead of at the end: its trajectory ratio becomes the prefix ratio.

    A reward at token t depends on the tokens up to t only, so W over those alone corrects it: the value is
    (1/N) sum_i sum_t min(W[i, 1..t], 1 + eps) A[i, t] / T, with one advantage per token (`dense_advantages`).

    Raises ValueError for an objective without a trajectory ratio: it does not say what weights such a reward.
    """
    if objective.ratio is not ratios.TRAJECTORY:
        raise ValueError("dense rewards are defined for objectives with the trajectory ratio only")
    return replace(objective, ratio=ratios.PREFIX)


@dataclass(frozen=True)
class ObjectiveTerms:
    """Result of `objective_terms`.

    `value`: this rank's part of the objective, a scalar to maximise (for token-level ratios a partial sum over the ranks
    that share a sequence; for trajectory-level ones the same on each). `log_ratio`, `capped`: [n_trajectories], detached:
    L_i, and the share of its gradient that the clip removed: 0 or 1, and for token-level ratios the share of its tokens.
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
    clip_range: ClipRange,
    correction: Tensor | None = None,
) -> ObjectiveTerms:
    """The objective over packed response tokens: what the actors differentiate.

    Args:
        objective: the composition.
        trainer_logprobs: [n_tokens] log pi_theta, with gradient.
        old_logprobs: [n_tokens] log pi_old, without.
        segments: which trajectory each token belongs to.
        advantages: [n_trajectories]; [n_tokens] with the prefix ratio.
        totals: what the mini-batch is divided by.
        clip_range: see `Objective.clip_range`.
        correction: [n_units] detached weights for samples of another policy than pi_old (see `corrections`).
    """
    log_ratio = objective.ratio.log_ratio(trainer_logprobs, old_logprobs, segments)
    weights = objective.normaliser(segments.lengths, totals)
    if objective.ratio.per_token:
        weights = weights[segments.ids]
        if objective.ratio is not ratios.PREFIX:
            advantages = advantages[segments.ids]
    if correction is not None:
        weights = weights * correction
    clipped, capped = objective.clip(log_ratio, advantages.to(log_ratio.dtype), clip_range)
    with torch.no_grad():
        if objective.ratio.per_token:
            delta = ratios.token_log_ratio(trainer_logprobs, old_logprobs)
            trajectory_log_ratio, n_capped = segments.sum(torch.stack([delta, capped.to(delta.dtype)], dim=1)).unbind(1)
            share = n_capped / segments.lengths.clamp(min=1)
        else:
            share = capped.double()
            trajectory_log_ratio = log_ratio.detach()
            if objective.ratio.length_mean:
                trajectory_log_ratio = trajectory_log_ratio * segments.lengths
    return ObjectiveTerms((clipped.double() * weights).sum(), trajectory_log_ratio, share)


def token_weights(objective: Objective, segments: Segments, totals: Totals) -> Tensor:
    """[n_tokens] weight of a token's grad log pi in the objective at theta_old, the advantage left out.

    KL and entropy terms use it, so that their balance with the policy term does not depend on the objective.
    """
    weights = objective.normaliser(segments.lengths, totals)
    if objective.ratio.length_mean:
        weights = weights / segments.lengths.clamp(min=1)
    return weights[segments.ids]


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
    dual_clip: float | None = None,
    normaliser: str | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A registered objective on padded tensors, for use without the trainer.

    Args:
        name: key of `OBJECTIVES`.
        trainer_logprobs, old_logprobs: [N, T_max] log pi_theta (with gradient) and log pi_old.
        mask: [N, T_max], true at response tokens.
        advantages: [N].
        max_response_tokens: the constant T.
        eps_low, eps_high: clip range, the objective's default when None.
        dual_clip: constant c > 1 that bounds the ratio where A < 0, for two-sided clips.
        normaliser: key of `NORMALISERS` in place of the objective's own.

    Returns:
        (value, metrics): the scalar to MAXIMISE, a mean over the N trajectories, and `log_ratio_mean`, `log_ratio_std`,
        `capped_fraction`, `underflow_fraction`, `ess`.

    Raises:
        KeyError: unknown name.
    """
    objective = OBJECTIVES[name]
    if normaliser is not None:
        objective = replace(objective, normaliser=normalisers.NORMALISERS[normaliser])
    mask = mask.bool()
    lengths = mask.sum(dim=1)
    # masked_select keeps what lies outside the mask (NaN, infinities) out of value and gradient.
    terms = objective_terms(
        objective,
        trainer_logprobs.masked_select(mask),
        old_logprobs.masked_select(mask),
        Segments(ids=mask.nonzero()[:, 0], lengths=lengths),
        advantages,
        Totals(mask.shape[0], int(lengths.sum()), max_response_tokens),
        objective.clip_range(eps_low, eps_high, dual_clip),
    )
    return terms.value, ratio_metrics(terms.log_ratio, terms.capped)


def ratio_metrics(log_ratio: Tensor, capped: Tensor) -> dict[str, float]:
    """What the trajectory ratios of a batch look like.

    Args:
        log_ratio: [n] L_i.
        capped: [n] share of its gradient that the clip removed.

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
