"""From the ranks' statistics to the metrics of a step. One reduction, on the driver."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tic_megatron.actors.stats import MismatchStats, UpdateStats
from tic_megatron.algorithms.clips import LOG_RATIO_BOUND
from tic_megatron.algorithms.objectives import ratio_metrics
from tic_megatron.data.quality import SkippedUpdate

_RATIO_NAMES = {
    "log_ratio_mean": "policy/log_ratio_mean",
    "log_ratio_std": "policy/log_ratio_std",
    "capped_fraction": "policy/ratio_capped_fraction",
    "underflow_fraction": "policy/ratio_underflow_fraction",
    "ess": "policy/ess",
}

_QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


def update_metrics(updates: Sequence[Sequence[UpdateStats | None]], mismatch: Sequence[MismatchStats | None]) -> dict[str, float]:
    """Metrics of the K updates of a step.

    Args:
        updates: [K][ranks], None for ranks that report nothing.
        mismatch: [ranks].

    Returns:
        `policy/loss`, `entropy`, `kl`: means over the updates (the loss over those without a bad trajectory),
        `policy/grad_norm` over those that were applied, `policy/grad_norm_update_<k>` of each;
        `policy/log_ratio_*`, `ratio_*` and `ess`: of the
        *last* update, where the policy has moved furthest from pi_old, over the trajectories that were trained on;
        `policy/drift_update_<k>`: mean |L| at the start of update k; `policy/log_ratio_abs_max_first` where it was measured;
        `mismatch/*`.
    """
    reported = [[stats for stats in ranks if stats is not None] for ranks in updates]
    results = [ranks[0].result for ranks in reported]
    n_tokens = sum(s.n_tokens for ranks in reported for s in ranks)
    losses = [-sum(s.value for s in ranks) for ranks in reported if not any(s.bad_prompts for s in ranks)]
    norms = [r.grad_norm for r in results if r.applied]
    metrics = {
        "policy/learning_rate": results[-1].learning_rate,
        "policy/skipped_updates": float(sum(not r.applied for r in results)),
        "policy/bad_trajectories": float(sum(len(s.bad_prompts) for ranks in reported for s in ranks)),
        "policy/trained_trajectories": float(sum(len(s.log_ratio) for ranks in reported for s in ranks)),
    }
    if losses:
        metrics["policy/loss"] = sum(losses) / len(losses)
    if norms:
        metrics["policy/grad_norm"] = sum(norms) / len(norms)
    if n_tokens:
        metrics["policy/entropy"] = sum(s.entropy_sum for ranks in reported for s in ranks) / n_tokens
        if any(s.kl_sum is not None for ranks in reported for s in ranks):
            metrics["policy/kl"] = sum(s.kl_sum or 0.0 for ranks in reported for s in ranks) / n_tokens
    for k, result in enumerate(results):
        if result.applied:
            metrics[f"policy/grad_norm_update_{k}"] = result.grad_norm
    noise = [s.noise for s in reported[0] if s.noise is not None]
    if noise:
        metrics["policy/log_ratio_abs_max_first"] = max(noise)
    for k, ranks in enumerate(reported):
        drift = [abs(x) for s in ranks for x in s.log_ratio]
        if drift:
            metrics[f"policy/drift_update_{k}"] = sum(drift) / len(drift)
    return metrics | _ratio_metrics(reported[-1]) | _mismatch_metrics([m for m in mismatch if m is not None])


def skipped_updates(updates: Sequence[Sequence[UpdateStats | None]]) -> list[SkippedUpdate]:
    """The updates, of `update_metrics`' [K][ranks], that a bad log-prob or gradient cost; not those of fp16's loss scale."""
    skipped = []
    for k, ranks in enumerate(updates):
        reported = [stats for stats in ranks if stats is not None]
        if not reported[0].result.applied and not reported[0].result.overflow:
            skipped.append(SkippedUpdate(k, [prompt for stats in reported for prompt in stats.bad_prompts]))
    return skipped


def _ratio_metrics(ranks: list[UpdateStats]) -> dict[str, float]:
    """The trajectory ratios of one update: moments, quantiles, and what clip and underflow took, by sign of the advantage."""
    log_ratio = torch.tensor([x for s in ranks for x in s.log_ratio], dtype=torch.float64)
    capped = torch.tensor([c for s in ranks for c in s.capped], dtype=torch.float64)
    advantages = torch.tensor([a for s in ranks for a in s.advantages], dtype=torch.float64)
    metrics = {_RATIO_NAMES[name]: value for name, value in ratio_metrics(log_ratio, capped).items()}
    if log_ratio.numel() == 0:
        return metrics
    points = torch.tensor(list(_QUANTILES.values()), dtype=torch.float64)
    for name, value in zip(_QUANTILES, torch.quantile(log_ratio, points).tolist(), strict=True):
        metrics[f"policy/log_ratio_{name}"] = value
        metrics[f"policy/ratio_{name}"] = math.exp(min(value, LOG_RATIO_BOUND))
    underflow = torch.exp(log_ratio.float()) == 0
    for sign, chosen in (("positive", advantages > 0), ("negative", advantages < 0)):
        if chosen.any():
            metrics[f"policy/ratio_capped_fraction_{sign}"] = capped[chosen].mean().item()
            metrics[f"policy/ratio_underflow_fraction_{sign}"] = underflow[chosen].double().mean().item()
    return metrics


def _mismatch_metrics(ranks: list[MismatchStats]) -> dict[str, float]:
    n_tokens = sum(m.n_tokens for m in ranks)
    if n_tokens == 0:
        return {}
    gaps = [x for m in ranks for x in m.trajectory_log_ratio]
    mean = sum(gaps) / len(gaps)
    return {
        "mismatch/logprob_abs_mean": sum(m.abs_sum for m in ranks) / n_tokens,
        "mismatch/logprob_abs_max": max(m.abs_max for m in ranks),
        "mismatch/trajectory_log_ratio_mean": mean,
        "mismatch/trajectory_log_ratio_std": math.sqrt(sum((x - mean) ** 2 for x in gaps) / len(gaps)),
    }
