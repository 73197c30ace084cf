"""Rollouts for tests that need trajectories but no generator: random tokens, or given texts."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tic_megatron.algorithms import dense_advantages, group_advantages
from tic_megatron.trajectory import Group, Prompt, Trajectory

if TYPE_CHECKING:
    from tic_megatron.rollout.engines import Rollout


def random_rollout(
    *, seed: int, n_prompts: int, group_size: int, vocab: int, max_prompt: int = 20, max_response: int = 30, dense: bool = False
) -> list[Group]:
    """Groups with random lengths (single-token responses among them), rewards 0 or 1, and advantages.

    `dense`: rewards at tokens instead, and a few tokens that the policy did not sample.

    Token 0 is left out: it is the padding token of the small models, whose embedding transformers does not train.
    """
    import torch

    rng = random.Random(seed)
    groups = []
    for p in range(n_prompts):
        prompt = Prompt(f"p{p}", "", "", tuple(rng.randrange(1, vocab) for _ in range(rng.randint(3, max_prompt))))
        trajectories = []
        for i in range(group_size):
            n = 1 if i == 0 else rng.randint(1, max_response)
            ids = [rng.randrange(1, vocab) for _ in range(n)]
            reward = float(rng.random() < 0.4)
            trajectories.append(Trajectory(prompt, ids, [-5.0] * n, [1] * n, "", False, 0, reward=reward))
        rewards = torch.tensor([[t.reward for t in trajectories]], dtype=torch.float64)
        for t, a in zip(trajectories, group_advantages(rewards)[0].tolist(), strict=True):
            t.advantage = a
        if dense:
            grade_tokens(trajectories, rng)
        groups.append(Group(prompt, trajectories))
    return groups


def group_of(index: int, answer: str, responses: list[str]) -> Group:
    """Prompt `p:<index>` with these responses, not graded."""
    prompt = Prompt(f"p:{index}", "?", answer, (1,))
    return Group(prompt, [Trajectory(prompt, [5, 6], [-0.5, -0.25], [1, 1], text, False, 0) for text in responses])


def rollout_of(groups: list[Group], set_aside: dict[int, tuple[Prompt, str]] | None = None) -> Rollout:
    """What engines would return of these, `set_aside` by place among the prompts, with the reason."""
    from tic_megatron.rollout.engines import Rollout
    from tic_megatron.rollout.generation import Outcome

    aside = set_aside or {}
    return Rollout(groups, list(aside.values()), Outcome({place: reason for place, (_, reason) in aside.items()}))


def grade_tokens(trajectories: list[Trajectory], rng: random.Random) -> None:
    """Random rewards at tokens, and their advantages."""
    import torch

    for t in trajectories:
        t.response_mask = [int(i == 0 or rng.random() < 0.9) for i in range(len(t.response_ids))]
        t.token_rewards = [rng.choice((0.0, 0.0, 0.5, 1.0, -0.5)) * sampled for sampled in t.response_mask]
        t.reward = sum(t.token_rewards)
    advantages = dense_advantages([torch.tensor(t.sampled(t.token_rewards), dtype=torch.float64) for t in trajectories])
    for t, a in zip(trajectories, advantages, strict=True):
        t.token_advantages = t.spread(a.tolist())
        t.advantage = a.sum().item()
