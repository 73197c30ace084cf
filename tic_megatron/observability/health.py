"""Health checks: signs of trouble in the metrics, as one-line warnings with advice.

The signs are those that the notes on the paper name (stale gradients, underflow of the ratio, collapse of the advantages,
explosion of the KL term), and those of the field (truncation, entropy collapse, generator-trainer mismatch, noise of L).
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

WINDOW = 10
"""Steps over which a sign must hold."""
REPEAT_AFTER = 50
"""Steps before the same warning is given again."""

Metrics = dict[str, float]


@dataclass(frozen=True)
class Check:
    """A sign, looked for in the means of the last `WINDOW` steps.

    `trouble(recent, first)` gets those means and the means of the run's first window; `advice` is formatted with `recent`.
    """

    name: str
    trouble: Callable[[Metrics, Metrics], bool]
    advice: str


def _above(metric: str, limit: float) -> Callable[[Metrics, Metrics], bool]:
    return lambda recent, first: recent.get(metric, -math.inf) > limit


def _stale(recent: Metrics, first: Metrics) -> bool:
    """Far from the policy that sampled, and gradients that have grown instead of shrunk."""
    grown = recent.get("policy/grad_norm", 0.0) > 2 * first.get("policy/grad_norm", math.inf)
    return recent.get("policy/ess", 1.0) < 0.5 and grown


def _entropy_collapse(recent: Metrics, first: Metrics) -> bool:
    if "policy/entropy" not in recent or "policy/entropy" not in first:
        return False
    # A policy that is right nearly always has every right to be sure of itself.
    return recent["policy/entropy"] < 0.1 * first["policy/entropy"] and recent["reward/mean"] < 0.9


def _mismatch(recent: Metrics, first: Metrics) -> bool:
    """Between samples and trainer of the same weights; with those of a step ahead, the policy has moved between the two."""
    return recent.get("rollout/staleness_max", 0.0) == 0 and recent.get("mismatch/trajectory_log_ratio_std", 0.0) > 0.1


CHECKS = (
    Check(
        "stale gradients",
        _stale,
        "the effective sample size is down to {policy/ess:.0%} while gradients grow (norm {policy/grad_norm:.3g}): pi_old is "
        "too old; lower actor.learning_rate or trainer.updates_per_step",
    ),
    Check(
        "skipped updates",
        _above("policy/skipped_updates", 0.5),
        "{policy/skipped_updates:.2g} updates per step are skipped, since the gradients are not finite: lower "
        "actor.learning_rate, or use another actor.precision",
    ),
    Check(
        "ratio capped",
        _above("policy/ratio_capped_fraction", 0.5),
        "the clip takes {policy/ratio_capped_fraction:.0%} of the last update's trajectories (of their tokens, for a ratio per "
        "token), which teach nothing: lower "
        "actor.learning_rate or trainer.updates_per_step, or raise algorithm.eps_high",
    ),
    Check(
        "ratio underflow",
        _above("policy/ratio_underflow_fraction", 0.01),
        "{policy/ratio_underflow_fraction:.1%} of the trajectory ratios are 0 in fp32: the policy moves too far for responses "
        "of {response/length_mean:.0f} tokens; lower actor.learning_rate or trainer.updates_per_step",
    ),
    Check(
        "advantage collapse",
        _above("reward/zero_advantage_fraction", 0.9),
        "{reward/zero_advantage_fraction:.0%} of the groups have equal rewards (mean reward {reward/mean:.3g}), which teach "
        "nothing: choose problems of other difficulty, or a larger rollout.group_size",
    ),
    Check(
        "KL explosion",
        _above("policy/kl", 1.0),
        "the KL to the reference is {policy/kl:.3g} per token: lower actor.learning_rate, or raise algorithm.kl_coefficient",
    ),
    Check(
        "truncation",
        _above("response/truncated_fraction", 0.2),
        "{response/truncated_fraction:.0%} of the responses are cut at rollout.max_response_tokens, and graded so: raise it",
    ),
    Check(
        "entropy collapse",
        _entropy_collapse,
        "the entropy is down to {policy/entropy:.3g} per token at a mean reward of {reward/mean:.3g}: raise "
        "algorithm.eps_high, set algorithm.entropy_coefficient, or lower actor.learning_rate",
    ),
    Check(
        "generator-trainer mismatch",
        _mismatch,
        "generator and trainer disagree by {mismatch/trajectory_log_ratio_std:.2g} (std of a trajectory's log-ratio): use the "
        "same rollout.precision and actor.precision, or algorithm.correction",
    ),
    Check(
        "noise of L",
        _above("policy/log_ratio_abs_max_first", 0.0),
        "the log-ratio at theta_old is {policy/log_ratio_abs_max_first:.2g} and not 0: kernels differ between the two passes; "
        "every trajectory ratio has at least this error",
    ),
)


SPIKE_WINDOW, SPIKE_WARM_UP = 50, 20
"""Updates that say what is usual, and how many there must be."""
SPIKE_DEVIATIONS, SPIKE_FACTOR = 6.0, 3.0
"""A spike is so many robust standard deviations, and at least by this factor, above the median."""
MAD_TO_STD = 1.4826
"""Of a normal distribution: its standard deviation over the median absolute deviation from the median (MAD)."""


_NORM = re.compile(r"policy/grad_norm_update_(\d+)")


class SpikeDetector:
    """Finds gradient norms far above those of the recent updates.

    In logarithms, since the noise of a norm is by factors: it is positive, and its spread grows with it. Median and MAD, since
    up to half of the window may be spikes without hiding the next one, whereas a single spike of the size that matters doubles a
    mean and a standard deviation. The smallest factor is for series so quiet that six deviations are nothing to worry about.
    """

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def add(self, norm: float) -> float | None:
        """Take the norm of the next update; what is usual (the median norm before it) if it is a spike."""
        if not (math.isfinite(norm) and norm > 0):  # no gradient at all is no norm to compare with
            return None
        log, before = math.log(norm), list(self._logs)
        self._logs.append(log)  # a spike too, so that a new level becomes the usual one
        if len(before) < SPIKE_WARM_UP:
            return None
        usual = statistics.median(before)
        spread = MAD_TO_STD * statistics.median(abs(x - usual) for x in before)
        return math.exp(usual) if log - usual > max(SPIKE_DEVIATIONS * spread, math.log(SPIKE_FACTOR)) else None


class HealthMonitor:
    """Feed it every step's metrics; it returns warnings, each kind at most once in `REPEAT_AFTER` steps.

    A run that continues feeds it the rows of `metrics.jsonl` first, of which the warnings were given.
    """

    def __init__(self, checks: Iterable[Check] = CHECKS):
        self._checks = tuple(checks)
        self._recent: deque[Metrics] = deque(maxlen=WINDOW)
        self._first: Metrics | None = None
        self._warned_at: dict[str, int] = {}
        self._spike_detector = SpikeDetector()
        self._last_spike = (-WINDOW, 0.0)  # step, norm

    def check(self, step: int, metrics: Metrics) -> list[str]:
        """Warnings due at this step, such as `ratio underflow: 3.1% of ...`; none before the first window is full."""
        return [*self._spikes(step, metrics), *self._signs(step, metrics)]

    def _spikes(self, step: int, metrics: Metrics) -> list[str]:
        """The largest spike of the gradient in this step, unless as large a one was told less than `WINDOW` steps ago."""
        spikes = []
        for k, norm in sorted((int(match[1]), value) for name, value in metrics.items() if (match := _NORM.fullmatch(name))):
            usual = self._spike_detector.add(norm)
            spikes += [] if usual is None else [(norm, k, usual)]
        if not spikes:
            return []
        norm, k, usual = max(spikes)
        last_step, last_norm = self._last_spike
        if step - last_step < WINDOW and norm <= last_norm:
            return []
        self._last_spike = (step, norm)
        return [
            f"gradient spike: the gradient norm of update {k + 1} of step {step} is {norm:.3g}, {norm / usual:.0f} times the "
            f"usual {usual:.3g}: look at the rollout of this step; lower actor.grad_clip or actor.learning_rate if it comes again"
        ]

    def _signs(self, step: int, metrics: Metrics) -> list[str]:
        self._recent.append(metrics)
        if len(self._recent) < WINDOW:
            return []
        means = _means(self._recent)
        self._first = self._first or means
        warnings = []
        for check in self._checks:
            due = step - self._warned_at.get(check.name, -REPEAT_AFTER) >= REPEAT_AFTER
            if due and check.trouble(means, self._first):
                self._warned_at[check.name] = step
                warnings.append(f"{check.name}: {check.advice.format_map(_Known(means))}")
        return warnings


class _Known(dict):
    """Metrics for the advice's format; one that was not measured reads `nan`."""

    def __missing__(self, key: str) -> float:
        return math.nan


def _means(window: Iterable[Metrics]) -> Metrics:
    """Mean of each metric over the steps that measured it."""
    values: dict[str, list[float]] = {}
    for metrics in window:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    return {name: sum(v) / len(v) for name, v in values.items()}
