"""From the ranks' statistics to the metrics of a step. One reduction, on the driver."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tic_megatron.actors.stats import MismatchStats, UpdateStats
from tic_megatron.algorithms.objectives import ratio_metrics

_RATIO_NAMES = {
    "log_ratio_mean": "policy/log_ratio_mean",
    "log_ratio_std": "policy/log_ratio_std",
    "capped_fraction": "policy/ratio_capped_fraction",
    "underflow_fraction": "policy/ratio_underflow_fraction",
    "ess": "policy/ess",
}


def update_metrics(updates: Sequence[Sequence[UpdateStats | None]], mismatch: Sequence[MismatchStats | None]) -> dict[str, float]:
    """Metrics of the K updates of a step.

    Args:
        updates: [K][ranks], None for ranks that report nothing.
        mismatch: [ranks].

    Returns:
        `policy/loss`, `policy/grad_norm`, `policy/entropy`: means over the updates; `policy/log_ratio_*`, `ratio_*` and `ess`:
        of the *last* update, where the policy has moved furthest from pi_old, over the trajectories that were trained on;
        `policy/log_ratio_abs_max_first` where it was measured; `mismatch/*`.
    """
    reported = [[stats for stats in ranks if stats is not None] for ranks in updates]
    first, last = reported[0], reported[-1]
    results = [ranks[0].result for ranks in reported]
    n_tokens = sum(s.n_tokens for ranks in reported for s in ranks)
    metrics = {
        "policy/loss": -sum(s.value for ranks in reported for s in ranks) / len(reported),
        "policy/grad_norm": sum(r.grad_norm for r in results) / len(results),
        "policy/learning_rate": results[-1].learning_rate,
        "policy/skipped_updates": float(sum(not r.applied for r in results)),
        "policy/trained_trajectories": float(sum(len(s.log_ratio) for ranks in reported for s in ranks)),
    }
    if n_tokens:
        metrics["policy/entropy"] = sum(s.entropy_sum for ranks in reported for s in ranks) / n_tokens
    noise = [s.noise for s in first if s.noise is not None]
    if noise:
        metrics["policy/log_ratio_abs_max_first"] = max(noise)
    log_ratio = torch.tensor([x for s in last for x in s.log_ratio], dtype=torch.float64)
    capped = torch.tensor([c for s in last for c in s.capped], dtype=torch.bool)
    metrics |= {_RATIO_NAMES[name]: value for name, value in ratio_metrics(log_ratio, capped).items()}
    return metrics | _mismatch_metrics([m for m in mismatch if m is not None])


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
