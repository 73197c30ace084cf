"""How far the gradient that GRPO_2 follows lies from the policy gradients at the current and at the old policy.

    python -m tests.theory.distances [--environments 100]

Exact gradients in random environments of one prompt, the stop token made rare so that T is about the mean length; the move
from the old policy has a random direction or that of its policy gradient, and a size given as the standard deviation of
log W. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from tests.theory.enumerable import Environment, policy_gradient, relative_distance, surrogate_gradient


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
    """One environment; `direction`: random or ascent; `spread`: standard deviation of log W after the move, to first order."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, default=100)
    count = parser.parse_args().environments
    print("| move | std of log W | T | mean length | to the gradient at theta | at theta_old | nearer to theta |")
    print("|---|---|---|---|---|---|---|")
    for direction in ("random", "ascent"):
        for spread in (0.1, 0.5):
            for max_tokens in (1, 2, 4, 6, 8):
                found = [measure(seed, max_tokens, direction=direction, spread=spread) for seed in range(count)]
                medians = [
                    torch.tensor([getattr(d, field) for d in found]).median().item()
                    for field in ("mean_length", "to_current", "to_old")
                ]
                share = sum(d.nearer_to_current for d in found) / count
                row = [direction, f"{spread:g}", str(max_tokens), *(f"{m:.3g}" for m in medians), f"{share:.0%}"]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
