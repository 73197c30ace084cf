"""The objectives once more, in plain Python floats: loops, `math.exp` and the formulas of the paper; batches to compare on."""

from __future__ import annotations

import math

import numpy as np
import torch

from tic_megatron.algorithms import policy_objective

PRESETS = {
    # ratio, clip, weight of a unit, eps_low, eps_high
    "grpo": ("token", "two-sided", "1/T_i", 0.2, 0.2),
    "dapo": ("token", "two-sided", "1/sum T_i", 0.2, 0.28),
    "grpo2": ("token", "up-only", "1/T", 0.2, 0.28),
    "traj_is": ("trajectory", "two-sided", "1/T_i", 0.2, 0.28),
    "tic_grpo": ("trajectory", "up-only", "1/T", 0.2, 0.28),
    "gspo": ("sequence", "two-sided", "1", 3e-4, 4e-4),
    "no_is": ("none", "none", "1/T_i", 0.2, 0.2),
}
BOUND = 30.0


def clipped(x: float, a: float, clip: str, low: float, high: float, dual: float | None) -> tuple[float, float]:
    """(value, slope in x) of the clipped ratio exp(x) times the advantage."""
    ratio = math.exp(min(x, BOUND))
    slope = ratio * a if x <= BOUND else 0.0
    if clip == "none":
        return ratio * a, slope
    if clip == "up-only":
        return (ratio * a, slope) if ratio <= 1 + high else ((1 + high) * a, 0.0)
    inside = min(max(ratio, 1 - low), 1 + high)
    if dual is not None and a < 0 and ratio > dual:
        return dual * a, 0.0
    return (ratio * a, slope) if ratio * a <= inside * a else (inside * a, 0.0)


def log_ratios(deltas: list[float], ratio: str) -> list[float]:
    if ratio == "token":
        return deltas
    if ratio == "none":
        return [0.0] * len(deltas)
    return [math.fsum(deltas) / (max(len(deltas), 1) if ratio == "sequence" else 1)]


def reference(
    name: str, deltas: list[list[float]], advantages: list[float], T: int, low: float, high: float, dual: float | None
) -> tuple[float, list[list[float]]]:
    """(value to maximise, its gradient in every token's log-prob) of a mini-batch; `deltas`: log pi_theta - log pi_old."""
    ratio, clip, weight, _, _ = PRESETS[name]
    n, tokens = len(deltas), max(sum(map(len, deltas)), 1)
    values, gradient = [], []
    for row, a in zip(deltas, advantages, strict=True):
        length = max(len(row), 1)
        w = {"1/T_i": 1 / (n * length), "1/T": 1 / (n * T), "1/sum T_i": 1 / tokens, "1": 1 / n}[weight]
        units = [clipped(x, a, clip, low, high, dual) for x in log_ratios(row, ratio)]
        values += [w * value for value, _ in units]
        share = w / length if ratio == "sequence" else w
        slopes = [share * slope for _, slope in units]
        gradient.append(slopes if ratio in ("token", "none") else slopes * len(row))
    return math.fsum(values), gradient


def near_a_kink(deltas: list[list[float]], name: str, low: float, high: float, dual: float | None) -> bool:
    """Whether a log-ratio lies so near to a bound of its clip that rounding decides on which side."""
    kinks = [BOUND, math.log1p(high), math.log1p(-low), *([math.log(dual)] if dual else [])]
    return any(abs(x - kink) < 1e-7 for row in deltas for x in log_ratios(row, PRESETS[name][0]) for kink in kinks)


class Batch:
    """Padded inputs of `policy_objective` and the same as lists; garbage outside the mask."""

    def __init__(self, log_ratios, lengths, advantages, noise, garbage, seed, dtype=torch.float64):
        generator = np.random.default_rng(seed)
        width = max([*lengths, 1]) + 2
        shape = (len(lengths), width)
        self.mask = torch.zeros(shape, dtype=torch.bool)
        self.new, self.old = torch.full(shape, garbage, dtype=dtype), torch.full(shape, garbage, dtype=dtype)
        for i, (length, total) in enumerate(zip(lengths, log_ratios, strict=True)):
            start = i % 3  # responses need not begin in the first column
            deltas = generator.normal(size=length) * noise
            deltas += (total - deltas.sum()) / max(length, 1)
            old = -generator.exponential(size=length)
            at = slice(start, start + length)
            self.mask[i, at] = True
            self.old[i, at] = torch.from_numpy(old).to(dtype)
            self.new[i, at] = torch.from_numpy(old + deltas).to(dtype)
        self.advantages = torch.tensor(advantages, dtype=torch.float64)
        gaps = self.new.double() - self.old.double()
        self.deltas = [gaps[i][self.mask[i]].tolist() for i in range(len(lengths))]

    def run(self, name, **options):
        """(value, gradient [n, width], metrics)"""
        leaf = self.new.clone().requires_grad_()
        value, metrics = policy_objective(name, leaf, self.old, self.mask, self.advantages, **options)
        value.backward()
        return value.detach(), leaf.grad, metrics

    def check(self, name, T, low, high, dual, *, rtol, atol=0.0):
        value, gradient, metrics = self.run(name, max_response_tokens=T, eps_low=low, eps_high=high, dual_clip=dual)
        assert math.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert all(math.isfinite(metric) for metric in metrics.values())
        assert (gradient[~self.mask] == 0).all()
        assert gradient.dtype == self.new.dtype
        expected_value, expected = reference(name, self.deltas, self.advantages.tolist(), T, low, high, dual)
        magnitude = sum(abs(x) for row in expected for x in row) + abs(expected_value)
        assert math.isclose(value, expected_value, rel_tol=rtol, abs_tol=max(rtol * magnitude, atol))
        flat = torch.tensor([x for row in expected for x in row], dtype=torch.float64)
        torch.testing.assert_close(gradient[self.mask].double(), flat, rtol=rtol, atol=atol)
