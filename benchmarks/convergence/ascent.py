"""Vanilla stochastic gradient ascent with the project's own objectives, for all seeds of a task at once.

One outer iteration samples K mini-batches of groups from pi_old = pi_theta, takes one step on each, and refreshes pi_old, as in
the paper's Eq. 6. The exact return and the exact gradient are computed at every third iterate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.convergence.environment import (
    Samples,
    Task,
    logprob_table,
    prompt_values,
    return_and_gradient,
    sample,
)
from tic_megatron.algorithms import group_advantages, normalisers
from tic_megatron.algorithms.clips import ClipRange
from tic_megatron.algorithms.normalisers import Totals
from tic_megatron.algorithms.objectives import Objective, objective_terms, token_weights
from tic_megatron.algorithms.ratios import Segments

BASELINES = ("group", "leave_one_out", "running", "value")
MEASURE_EVERY = 3
"""Updates between exact measurements. Not a divisor of K, so that every age of pi_old is measured."""
RUNNING_RATE = 0.1
"""Of the running mean of each prompt's rewards, per group seen."""


@dataclass(frozen=True)
class Lengths:
    """Filler that makes responses longer without changing the decisions: tokens of probability 1, such as boilerplate.

    The filler has no score and a ratio of 1, so J, its gradient, W and all rho of the decisions stay as they are; T_i alone
    changes. With a `centre` C, a response has C + spread x u tokens, u in [-1, 1]: `long_answers`: u grows with the number of its
    decisions; `independent`: u is a coin flip. Without a centre (0) T_i is the number of decisions.
    `longest`: the constant T; 0 for the number of positions.
    """

    centre: int = 0
    spread: int = 0
    kind: str = "long_answers"
    longest: int = 0

    def of(self, samples: Samples, coins: Tensor) -> Tensor:
        """T_i [S, R]; `coins` [S, R] uniforms."""
        if not self.centre:
            return samples.lengths
        positions = samples.tokens.shape[2]
        u = torch.where(coins < 0.5, -1.0, 1.0) if self.kind == "independent" else 2 * (samples.lengths - 1) / (positions - 1) - 1
        return self.centre + (self.spread * u).round().long()


@dataclass(frozen=True)
class Run:
    """One configuration. `updates` in all; pi_old is refreshed after every `updates_per_refresh` (the paper's K) of them."""

    objective: Objective
    step_size: float
    updates: int = 192
    updates_per_refresh: int = 4
    groups: int = 4
    group_size: int = 8
    eps_high: float | None = None
    eps_low: float | None = None
    dual_clip: float | None = None
    baseline: str = "group"
    lengths: Lengths = Lengths()

    @property
    def clip_range(self) -> ClipRange:
        return self.objective.clip_range(self.eps_low, self.eps_high, self.dual_clip)


@dataclass(frozen=True)
class Batch:
    """One mini-batch: groups x group_size responses per seed, with their advantages [S, R] and T_i [S, R]."""

    samples: Samples
    advantages: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Trace:
    """What a run did, per seed.

    `returns`, `gradient_squared` [S, 1 + updates / MEASURE_EVERY]: exact J and ||grad J||^2, from theta_0 on.
    `ratios`: means over the updates of what `ratio_statistics` gives, [S] each, and `peak`, the maximum of `largest`.
    `length_std` [S]: of the sampled T_i within a mini-batch, mean over the updates.
    """

    returns: Tensor
    gradient_squared: Tensor
    ratios: dict[str, Tensor]
    length_std: Tensor


class Advantages:
    """Rewards to advantages, by one of `BASELINES`."""

    def __init__(self, kind: str, task: Task):
        self.kind, self.task = kind, task
        self.running = torch.full((task.seeds, task.prompts), float("nan"), dtype=torch.float64)

    def __call__(self, rewards: Tensor, prompts: Tensor, old_table: Tensor) -> Tensor:
        """rewards, prompts [S, groups, group_size] -> [S, groups, group_size]."""
        prompt = prompts[..., 0]
        if self.kind == "value":
            return rewards - prompt_values(self.task, old_table).gather(1, prompt)[..., None]
        if self.kind == "running":
            return self._from_running_mean(rewards, prompt)
        flat = group_advantages(rewards.flatten(0, 1), leave_one_out=self.kind == "leave_one_out")
        return flat.view_as(rewards)

    def _from_running_mean(self, rewards: Tensor, prompt: Tensor) -> Tensor:
        """The mean over *earlier* groups is the baseline; before the first, the groups's own, leaving one out."""
        first = group_advantages(rewards.flatten(0, 1), leave_one_out=True).view_as(rewards)
        advantages = []
        for g in range(prompt.shape[1]):
            at = prompt[:, g : g + 1]
            known = self.running.gather(1, at)
            advantages.append(torch.where(known.isnan(), first[:, g], rewards[:, g] - known))
            mean = rewards[:, g].mean(dim=1, keepdim=True)
            updated = torch.where(known.isnan(), mean, known + RUNNING_RATE * (mean - known))
            self.running = self.running.scatter(1, at, updated)
        return torch.stack(advantages, dim=1)


@dataclass(frozen=True)
class Gradient:
    """`table` [S, VOCABULARY, nodes]: gradient of the objective with respect to the log-probs. `log_ratio`, `advantage`, `seed`
    [units]: of each unit of the objective, a token or a response."""

    table: Tensor
    log_ratio: Tensor
    advantage: Tensor
    seed: Tensor


def objective_gradient(run: Run, table: Tensor, old_table: Tensor, batch: Batch) -> Gradient:
    """The project's objective on one mini-batch of every seed.

    Each seed has its own parameters, so one packed batch of all seeds gives every seed's gradient at once: the value is the sum
    of the seeds' objectives. Only the token mean divides by something that differs between seeds; that is done afterwards.
    """
    seeds, responses = batch.advantages.shape
    table = table.detach().requires_grad_()
    mask, tokens = batch.samples.mask, batch.samples.tokens
    trainer = table.flatten(1).gather(1, tokens.flatten(1)).view(mask.shape)[mask]
    old = old_table.flatten(1).gather(1, tokens.flatten(1)).view(mask.shape)[mask]
    segments = Segments(ids=mask.flatten(0, 1).nonzero()[:, 0], lengths=batch.lengths.flatten())
    token_mean = run.objective.normaliser is normalisers.token_mean
    totals = Totals(responses, 1, run.lengths.longest or mask.shape[2])
    advantages = batch.advantages.flatten()
    terms = objective_terms(run.objective, trainer, old, segments, advantages, totals, run.clip_range)
    (gradient,) = torch.autograd.grad(terms.value, table)
    if token_mean:
        gradient = gradient / batch.lengths.sum(dim=1)[:, None, None]
    response = segments.ids if run.objective.ratio.per_token else torch.arange(seeds * responses)
    log_ratio = run.objective.ratio.log_ratio(trainer.detach(), old, segments)
    return Gradient(gradient, log_ratio, advantages[response], response // responses)


def mean_token_weight(run: Run, task: Task, generator: torch.Generator) -> float:
    """Mean, over responses of the base policy, of N x the weight that a token's score has in the objective.

    Objectives differ in scale (1/T against 1/T_i); a step size divided by this number is the same step for all of them.
    """
    table = logprob_table(task, task.start())
    batch = draw_batches(run, task, table, Advantages("group", task), generator)[0]
    responses = batch.lengths.numel()
    segments = Segments(ids=torch.arange(responses), lengths=batch.lengths.flatten())  # one token of each response
    totals = Totals(responses, int(batch.lengths.sum()), run.lengths.longest or task.positions)
    return (token_weights(run.objective, segments, totals).mean() * responses).item()


def ratio_statistics(run: Run, gradient: Gradient, seeds: int) -> dict[str, Tensor]:
    """Per seed [S]: `largest` ratio where A < 0 (the paper's M: what a two-sided clip does not control), the `uncontrolled`
    share of units (A < 0 and a ratio above 1 + eps_high), and the `capped` share (A > 0 and above)."""
    ratio, negative = gradient.log_ratio.exp(), gradient.advantage < 0
    above = ratio > 1 + run.clip_range.eps_high
    zeros = torch.zeros(seeds, dtype=torch.float64)
    units = zeros.index_add(0, gradient.seed, torch.ones_like(ratio))
    return {
        "largest": zeros.scatter_reduce(0, gradient.seed, torch.where(negative, ratio, 0.0), "amax"),
        "uncontrolled": zeros.index_add(0, gradient.seed, (above & negative).double()) / units,
        "capped": zeros.index_add(0, gradient.seed, (above & ~negative).double()) / units,
    }


def to_parameters(task: Task, table: Tensor, gradient: Tensor) -> Tensor:
    """Chain rule from the log-probs to theta: [S, VOCABULARY, nodes] -> [S, F, VOCABULARY]."""
    logits = gradient - table.exp() * gradient.sum(dim=1, keepdim=True)
    return torch.bmm(logits, task.features).transpose(1, 2)


def draw_batches(run: Run, task: Task, table: Tensor, advantages: Advantages, generator: torch.Generator) -> list[Batch]:
    """K mini-batches from pi_old, prompts drawn at random. The random numbers do not depend on the objective or on K."""
    shape = (task.seeds, run.groups, run.group_size)
    batches = []
    for _ in range(run.updates_per_refresh):
        prompts = torch.randint(task.prompts, shape[:2], generator=generator)[..., None].expand(shape)
        uniforms = torch.rand(*shape, task.positions + 1, generator=generator, dtype=torch.float64).flatten(1, 2)
        samples = sample(task, table, prompts.flatten(1), uniforms[..., :-1])
        a = advantages(samples.rewards.view(shape), prompts, table).flatten(1)
        batches.append(Batch(samples, a, run.lengths.of(samples, uniforms[..., -1])))
    return batches


def ascend(run: Run, task: Task, generator: torch.Generator) -> Trace:
    """Run it from theta_0 for all seeds of `task`."""
    theta, advantages = task.start(), Advantages(run.baseline, task)
    returns, squares, statistics, length_std = [], [], [], []
    batches: list[Batch] = []
    old_table = logprob_table(task, theta)
    for update in range(run.updates + 1):
        table = logprob_table(task, theta)
        if update % MEASURE_EVERY == 0:
            value, exact = return_and_gradient(task, table)
            returns.append(value)
            squares.append(to_parameters(task, table, exact).square().sum(dim=(1, 2)))
        if update == run.updates:
            break
        inner = update % run.updates_per_refresh
        if inner == 0:
            old_table = table
            batches = draw_batches(run, task, old_table, advantages, generator)
        at = old_table if run.objective.at_old_policy else table
        gradient = objective_gradient(run, at, old_table, batches[inner])
        theta = theta + run.step_size * to_parameters(task, at, gradient.table)
        statistics.append(ratio_statistics(run, gradient, task.seeds))
        length_std.append(batches[inner].lengths.double().std(dim=1))
    ratios = {name: torch.stack([row[name] for row in statistics]).mean(dim=0) for name in statistics[0]}
    ratios["peak"] = torch.stack([row["largest"] for row in statistics]).amax(dim=0)
    return Trace(torch.stack(returns, dim=1), torch.stack(squares, dim=1), ratios, torch.stack(length_std).mean(dim=0))
