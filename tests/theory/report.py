"""Figures of docs/theory.md: gradients that GRPO_2 lies between, and how far Property 4.1 is from holding.

    python -m tests.theory.report [--environments 100]

Prints two Markdown tables.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product
from statistics import median

import torch

from tests.theory.enumerable import (
    Environment,
    policy_gradient,
    relative_distance,
    score_weights,
    squared_norms,
    surrogate_gradient,
)


@dataclass(frozen=True)
class Distances:
    """|surrogate - gradient| / |gradient| for the gradients at theta and at theta_old; the mean length under theta_old."""

    to_current: float
    to_old: float
    mean_length: float

    @property
    def nearer_to_current(self) -> float:
        return float(self.to_current < self.to_old)


def measure(seed: int, max_tokens: int, *, direction: str, spread: float, stop_logit: float = -3.0) -> Distances:
    """|The gradient GRPO_2 follows - the policy gradient| in one random environment of one prompt, exactly.

    The stop token is made rare, so that T is about the mean length. The policy moves from theta_old in a random direction or
    along its gradient (`direction`: random or ascent); `spread`: standard deviation of log W after the move, to first order.
    """
    env = Environment(seed, prompts=1, max_tokens=max_tokens, stop_logit=stop_logit)
    theta_old = env.parameters(1000 + seed)
    old_gradient = policy_gradient(env, theta_old)
    step = old_gradient if direction == "ascent" else env.parameters(2000 + seed).detach()
    probabilities = env.probabilities(theta_old).detach()
    slope = torch.autograd.functional.jvp(lambda theta: env.logprobs(theta).sum(dim=1), theta_old.detach(), step)[1]
    size = spread / (probabilities @ slope.square()).sqrt()  # the mean of slope under the old policy is 0
    theta = (theta_old.detach() + size * step).requires_grad_()
    surrogate = surrogate_gradient(env, theta, theta_old)
    return Distances(
        relative_distance(surrogate, policy_gradient(env, theta)),
        relative_distance(surrogate, old_gradient),
        (probabilities @ env.lengths.double()).item(),
    )


MOMENTS = {
    # name: (weight of a token's score, expectation under the current policy or the old one)
    "1": ("none", "theta"),
    "rho, uncapped": ("grpo2", "theta_old"),
    "rho, capped at 1.28": ("grpo2 capped", "theta_old"),
    "A": ("none", "theta"),
    "rho A, uncapped": ("grpo2", "theta_old"),
    "W, uncapped": ("tic_grpo", "theta_old"),
    "W, capped at 1.28": ("tic_grpo capped", "theta_old"),
    "sqrt(W), uncapped": ("root", "theta_old"),
}


def moment_gaps(seed: int) -> dict[str, float]:
    """For each entry of `MOMENTS`: relative difference of the two sides of Property 4.1."""
    env = Environment(seed)
    theta, theta_old = env.parameters(10 + seed), env.parameters(20 + seed)
    scores, weights = env.scores(theta), score_weights(env, theta, theta_old)
    probabilities = {"theta": env.probabilities(theta).detach(), "theta_old": env.probabilities(theta_old).detach()}
    advantages = (env.rewards - env.mean_rewards(theta_old))[:, None]
    gaps = {}
    for name, (weight, policy) in MOMENTS.items():
        factor = weights[weight] * (advantages if "A" in name else 1)
        whole, tokens = squared_norms(scores, factor, probabilities[policy])
        gaps[name] = abs(whole / tokens - 1)
    return gaps


def print_distances(count: int) -> None:
    print("| move | std of log W | T | mean length | distance to the gradient at theta | at theta_old | nearer to theta |")
    print("|---|---|---|---|---|---|---|")
    for direction, spread, max_tokens in product(("random", "ascent"), (0.1, 0.5), (1, 2, 4, 6, 8)):
        found = [measure(seed, max_tokens, direction=direction, spread=spread) for seed in range(count)]
        medians = [median(getattr(d, field) for d in found) for field in ("mean_length", "to_current", "to_old")]
        share = sum(d.nearer_to_current for d in found) / count
        print(
            f"| {direction} | {spread:g} | {max_tokens} | {' | '.join(f'{m:.3g}' for m in medians)} | {share:.0%} |", flush=True
        )


def print_moment_gaps(count: int) -> None:
    found = [moment_gaps(seed) for seed in range(count)]
    print("| weight of the score | sampled from | relative gap, median | largest |")
    print("|---|---|---|---|")
    for name, (_, policy) in MOMENTS.items():
        gaps = [gap[name] for gap in found]
        print(f"| {name} | {policy} | {median(gaps):.1e} | {max(gaps):.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, default=100)
    count = parser.parse_args().environments
    print_moment_gaps(count)
    print()
    print_distances(count)


if __name__ == "__main__":
    main()
