"""How good a direction each objective gives as the policy leaves pi_old: bias and noise of one mini-batch's gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.convergence.ascent import Advantages, Run, draw_batches, objective_gradient, to_parameters
from benchmarks.convergence.environment import Task, logprob_table, return_and_gradient
from tic_megatron.algorithms import OBJECTIVES

WARM_UP, STEP = 48, 8.0
"""On-policy updates before pi_old is frozen, and the size of all updates in units of the policy gradient."""
INNER = (0, 1, 3, 7, 15)
"""Updates since pi_old at which the estimators are looked at."""


@dataclass(frozen=True)
class Moments:
    """Of a mini-batch's gradient, by Monte Carlo: `mean` [S, F, V] and `second` [S], the mean of its squared norm."""

    mean: Tensor
    second: Tensor
    draws: int

    @property
    def squared_mean(self) -> Tensor:
        """||E g||^2 [S], without the part that the noise of the mean adds."""
        raw = self.mean.square().sum(dim=(1, 2))
        return (self.draws * raw - self.second) / (self.draws - 1)


def drift(task: Task, generator: torch.Generator) -> dict[int, Tensor]:
    """theta of k on-policy updates after the warm-up, for k in INNER: a path that favours no objective."""
    run = Run(OBJECTIVES["tic_grpo"], STEP * task.positions, updates_per_refresh=1)
    theta, advantages, visited = task.start(), Advantages(run.baseline, task), {}
    for update in range(WARM_UP + max(INNER) + 1):
        if update - WARM_UP in INNER:
            visited[update - WARM_UP] = theta
        table = logprob_table(task, theta)
        batch = draw_batches(run, task, table, advantages, generator)[0]
        theta = theta + run.step_size * to_parameters(task, table, objective_gradient(run, table, table, batch).table)
    return visited


def moments(run: Run, task: Task, theta: Tensor, theta_old: Tensor, draws: int, generator: torch.Generator) -> Moments:
    """Over `draws` fresh mini-batches from pi_old."""
    old, advantages = logprob_table(task, theta_old), Advantages(run.baseline, task)
    at = old if run.objective.at_old_policy else logprob_table(task, theta)
    mean, second = torch.zeros_like(theta), torch.zeros(task.seeds, dtype=torch.float64)
    for _ in range(draws):
        batch = draw_batches(run, task, old, advantages, generator)[0]
        gradient = to_parameters(task, at, objective_gradient(run, at, old, batch).table)
        mean, second = mean + gradient / draws, second + gradient.square().sum(dim=(1, 2)) / draws
    return Moments(mean, second, draws)


def exact_gradient(task: Task, theta: Tensor) -> Tensor:
    table = logprob_table(task, theta)
    return to_parameters(task, table, return_and_gradient(task, table)[1])


def compare(found: Moments, exact: Tensor) -> dict[str, Tensor]:
    """Per seed [S], NaN where every gradient was 0. `cosine` of the expected gradient with the exact one (bias in direction).
    `efficiency`, the squared cosine with the noise counted, <E g, grad J>^2 / (E ||g||^2 ||grad J||^2): by the descent lemma the
    gain of the best step is proportional to it, whatever the scale of g."""
    inner = (found.mean * exact).sum(dim=(1, 2))
    length = exact.square().sum(dim=(1, 2))
    return {
        "cosine": inner / (found.squared_mean.clamp(min=1e-300) * length).sqrt(),
        "efficiency": inner.square() / (found.second * length),
    }


def estimators() -> dict[str, Run]:
    """The presets, and the two up-only ones without their cap."""
    runs = {name: Run(objective, 0.0, updates_per_refresh=1) for name, objective in OBJECTIVES.items()}
    return runs | {f"{name}, no cap": replace(runs[name], eps_high=math.inf) for name in ("grpo2", "tic_grpo")}


def estimator_quality(task: Task, mini_batches: int) -> dict[str, object]:
    """Median over the seeds of `compare`, for each preset and each number of updates since pi_old."""
    visited = drift(task, torch.Generator().manual_seed(2))
    theta_old = visited[0]
    at_old = exact_gradient(task, theta_old)
    rows = []
    for k, theta in visited.items():
        here = exact_gradient(task, theta)
        for name, run in estimators().items():
            found = moments(run, task, theta, theta_old, mini_batches, torch.Generator().manual_seed(3))
            current, old = compare(found, here), compare(found, at_old)
            rows.append(
                {
                    "objective": name,
                    "updates_since_old": k,
                    "cosine": round(current["cosine"].nanmedian().item(), 4),
                    "cosine_with_old": round(old["cosine"].nanmedian().item(), 4),
                    "efficiency": round(current["efficiency"].nanmedian().item(), 4),
                }
            )
        print("estimators", k, flush=True)
    return {"rows": rows}
