"""What the weight 1/T_i does without any noise: ascent along GRPO's expected gradient, on-policy, beside the true gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.convergence.ascent import to_parameters
from benchmarks.convergence.environment import Task, logprob_table, prompt_values, return_and_gradient

STEP = 16.0
"""Size of the updates, in units of the policy gradient: both directions are scaled to a mean weight of 1 at theta_0."""
CENTRE, SPREADS = 30, (0, 6, 12, 18)


def expected_gradient(task: Task, table: Tensor, lengths: Tensor) -> Tensor:
    """E[(r - V) / T_i x score] at theta = theta_old, exactly, with respect to the log-prob table.

    It is the gradient of E[(r - V) / T_i] at a fixed baseline V, the prompt's expected reward. `lengths` [positions]: T_i of a
    response with 1, 2, ... decisions; one that is cut has the last.
    """
    table = table.detach().requires_grad_()
    with torch.no_grad():
        values = prompt_values(task, table)
    rewards = (task.rewards - values[..., None, None]) / lengths[:, None]
    objective = prompt_values(task, table, rewards, cut=-values / lengths[-1]).mean(dim=1)
    (gradient,) = torch.autograd.grad(objective.sum(), table)
    return gradient


def mean_weight(task: Task, lengths: Tensor) -> float:
    """E[1 / T_i] of the base policy."""
    table = logprob_table(task, task.start())
    weights = (1 / lengths).expand(task.seeds, task.prompts, -1)[..., None].expand_as(task.rewards)
    return prompt_values(task, table, weights, cut=weights[..., -1, 0]).mean().item()


def ascend_expected(task: Task, lengths: Tensor, updates: int) -> tuple[Tensor, Tensor, Tensor]:
    """(J [S, updates], ||grad J||^2 [S, updates], cosine of the two directions [S, updates])."""
    theta, scale = task.start(), STEP / mean_weight(task, lengths)
    returns, squares, cosines = [], [], []
    for _ in range(updates):
        table = logprob_table(task, theta)
        value, gradient = return_and_gradient(task, table)
        exact = to_parameters(task, table, gradient)
        followed = to_parameters(task, table, expected_gradient(task, table, lengths))
        inner, square = (exact * followed).sum(dim=(1, 2)), exact.square().sum(dim=(1, 2))
        returns.append(value)
        squares.append(square)
        cosines.append(inner / (square.sqrt() * followed.norm(dim=(1, 2))).clamp(min=1e-300))
        theta = theta + scale * followed
    return torch.stack(returns, dim=1), torch.stack(squares, dim=1), torch.stack(cosines, dim=1)


def length_bias(task: Task, reachable: Tensor, updates: int) -> dict[str, object]:
    """For the natural lengths (1 .. positions) and those of `Lengths(kind="long_answers")`."""
    decisions = torch.arange(1, task.positions + 1, dtype=torch.float64)
    cases = {"natural": decisions}
    for spread in SPREADS:
        u = 2 * (decisions - 1) / (task.positions - 1) - 1
        cases[f"30 +-{spread}"] = CENTRE + (spread * u).round()
    rows = {}
    for label, lengths in cases.items():
        returns, squares, cosines = ascend_expected(task, lengths, updates)
        gain = (returns - returns[:, :1]) / (reachable[:, None] - returns[:, :1])
        last = updates - updates // 4
        rows[label] = {
            "cosine": {f"{i}": round(cosines[:, i].median().item(), 4) for i in (0, updates // 8, updates - 1)},
            "speed": round(gain[:, :192].mean().item(), 4),
            "gain": round(gain[:, -1].mean().item(), 4),
            "late_stationarity": float(f"{squares[:, last:].mean().item():.3g}"),
        }
    return {"updates": updates, "rows": rows}
