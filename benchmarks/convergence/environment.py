"""A family of small random tasks whose return and policy gradient are sums, for many seeds at once.

A response is written token by token: letter `a` (+1), letter `b` (+2) or `stop`. The policy sees the prompt, the position and
the sum of the letters so far modulo `RESIDUES`, and a random 0/1 table says whether stopping there is right. So a response has
1 to `positions` tokens (one that never stops is cut and earns 0), the reward comes at the end, and, although there are
hundreds of thousands of responses, the expected reward is a sum over a few hundred nodes (prompt, position, residue).

The policy is log-linear, softmax(base + features @ theta): it satisfies the Lipschitz-score assumption of the theorems. The
features are random and far fewer than the nodes, so prompts share parameters: an update on one prompt moves the policy at all
others. (With one table entry per prompt, mini-batches of other prompts would never see an importance ratio other than 1.)

Every seed is a task of its own: other features, other rewards, other samples. First dimension of every tensor: seed, S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RESIDUES = 4
STEPS = (1, 2)
STOP = len(STEPS)
VOCABULARY = STOP + 1
BASE_LENGTH = 0.64
"""Mean length of the base policy's geometric distribution, before the cut, as a share of the longest response."""
RIGHT_SHARE = 0.3
"""Share of the places to stop at that are right."""


@dataclass(frozen=True)
class Task:
    """S random tasks.

    `features` [S, nodes, F], of unit norm; `rewards` [S, prompts, positions, residues], for stopping there.
    Nodes are numbered prompt x position x residue. The base policy stops with equal probability at every position.
    """

    features: Tensor
    rewards: Tensor

    @property
    def seeds(self) -> int:
        return self.rewards.shape[0]

    @property
    def prompts(self) -> int:
        return self.rewards.shape[1]

    @property
    def positions(self) -> int:
        return self.rewards.shape[2]

    def start(self) -> Tensor:
        """theta_0 = 0 [S, F, VOCABULARY]: the base policy."""
        return self.features.new_zeros(self.seeds, self.features.shape[2], VOCABULARY)


def make_task(seeds: int, *, prompts: int = 8, positions: int = 12, features: int = 6, generator: torch.Generator) -> Task:
    """Draw S tasks; float64."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(seeds, *shape, features, generator=generator, dtype=torch.float64)

    of_nodes = normal(prompts, 1, 1) + normal(1, positions, 1) + normal(1, 1, RESIDUES) + normal(prompts, positions, RESIDUES)
    of_nodes = of_nodes / of_nodes.norm(dim=-1, keepdim=True)
    right = torch.rand(seeds, prompts, positions, RESIDUES, generator=generator, dtype=torch.float64) < RIGHT_SHARE
    return Task(of_nodes.flatten(1, 3), right.double())


def logprob_table(task: Task, theta: Tensor) -> Tensor:
    """log pi(token | node) for theta [S, F, VOCABULARY] -> [S, VOCABULARY, nodes]."""
    logits = torch.bmm(theta.transpose(1, 2), task.features.transpose(1, 2))
    stop_probability = 1 / (BASE_LENGTH * task.positions)
    base = logits.new_zeros(VOCABULARY, 1)
    base[STOP] = math.log(stop_probability / (1 - stop_probability) * len(STEPS))
    return torch.log_softmax(logits + base, dim=1)


def prompt_values(task: Task, table: Tensor, rewards: Tensor | None = None, cut: Tensor | None = None) -> Tensor:
    """Expected reward of each prompt [S, prompts], summed exactly by recursion from the last position back.

    `rewards` in place of the task's; `cut` [S, prompts]: what a response that never stops earns, 0 by default.
    """
    rewards = task.rewards if rewards is None else rewards
    probabilities = table.exp().view(task.seeds, VOCABULARY, task.prompts, task.positions, RESIDUES)
    after = torch.zeros_like(rewards[:, :, 0]) if cut is None else cut[..., None].expand_as(rewards[:, :, 0])
    for position in reversed(range(task.positions)):
        here = probabilities[:, :, :, position]
        after = here[:, STOP] * rewards[:, :, position] + sum(
            here[:, letter] * after.roll(-step, dims=-1) for letter, step in enumerate(STEPS)
        )
    return after[:, :, 0]


def return_and_gradient(task: Task, table: Tensor) -> tuple[Tensor, Tensor]:
    """(J [S]: the mean over the prompts, its exact gradient with respect to the log-prob table, of the table's shape)."""
    table = table.detach().requires_grad_()
    value = prompt_values(task, table).mean(dim=1)
    (gradient,) = torch.autograd.grad(value.sum(), table)
    return value.detach(), gradient


@dataclass(frozen=True)
class Samples:
    """Responses, R of them per seed.

    `tokens` [S, R, positions]: index of each token into a seed's flattened log-prob table; `mask` the same shape, true up to
    the last token; `rewards` [S, R]; `prompts` [S, R].
    """

    tokens: Tensor
    mask: Tensor
    rewards: Tensor
    prompts: Tensor

    @property
    def lengths(self) -> Tensor:
        """[S, R] tokens of each response, the stop token included."""
        return self.mask.sum(dim=2)


def sample(task: Task, table: Tensor, prompts: Tensor, uniforms: Tensor) -> Samples:
    """Sample responses to `prompts` [S, R] by the inverse distribution function of `uniforms` [S, R, positions].

    Equal uniforms give two runs common random numbers, for as long as their policies agree.
    """
    nodes = task.features.shape[1]
    probabilities = table.exp().flatten(1)
    residue = torch.zeros_like(prompts)
    alive = torch.ones_like(prompts, dtype=torch.bool)
    rewards = torch.zeros_like(uniforms[..., 0])
    tokens, mask = [], []
    for position in range(task.positions):
        node = (prompts * task.positions + position) * RESIDUES + residue
        first, second = probabilities.gather(1, node), probabilities.gather(1, node + nodes)
        u = uniforms[..., position]
        token = (u >= first).long() + (u >= first + second).long()
        tokens.append(token * nodes + node)
        mask.append(alive)
        stopped = alive & (token == STOP)
        rewards = torch.where(stopped, task.rewards.flatten(1).gather(1, node), rewards)
        alive = alive & ~stopped
        residue = (residue + token + 1) % RESIDUES
    return Samples(torch.stack(tokens, dim=2), torch.stack(mask, dim=2), rewards, prompts)
