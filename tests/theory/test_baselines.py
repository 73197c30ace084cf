"""The group mean as a baseline: a pure factor 1 - 1/G, for one batch and in expectation over groups."""

from itertools import product

import pytest
import torch

from tests.theory.enumerable import Environment, coefficients, policy_gradient, surrogate_gradient
from tic_megatron.algorithms import OBJECTIVES, group_advantages, policy_objective


def sampled_groups(seed: int, prompts: int, size: int):
    """Log-probs, old log-probs, mask of groups sampled from the old policy, and rewards [prompts, size]."""
    env = Environment(seed, prompts=prompts)
    theta, theta_old = env.parameters(10 + seed), env.parameters(20 + seed)
    generator = torch.Generator().manual_seed(seed)
    probabilities = env.probabilities(theta_old).detach().view(prompts, -1)
    rows = torch.multinomial(probabilities, size, True, generator=generator)
    rows = (rows + torch.arange(prompts)[:, None] * probabilities.shape[1]).flatten()
    old, new = env.logprobs(theta_old)[rows].detach(), env.logprobs(theta)[rows].detach()
    return new, old, env.mask[rows], env.rewards[rows].view(prompts, size)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_group_mean_is_leave_one_out_scaled(name, size):
    """Pointwise, for every preset, clips active: value and gradient."""
    for seed in range(3):
        logprobs, old, mask, rewards = sampled_groups(seed, 3, size)
        mean, others = (group_advantages(rewards, leave_one_out=flag).flatten() for flag in (False, True))
        expected = rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (size - 1)
        torch.testing.assert_close(others, expected.flatten(), rtol=1e-12, atol=1e-14)
        factor = 1 - 1 / size
        first, second = (policy_objective(name, logprobs, old, mask, a, max_response_tokens=4)[0] for a in (mean, others))
        torch.testing.assert_close(first, factor * second, rtol=1e-12, atol=1e-15)
        first, second = (coefficients(name, logprobs, old, mask, a, max_response_tokens=4) for a in (mean, others))
        torch.testing.assert_close(first, factor * second, rtol=1e-12, atol=1e-15)


def group_expectation(env: Environment, name: str, theta, theta_old, size: int, *, leave_one_out: bool):
    """E over groups of `size` i.i.d. trajectories of the objective's gradient, by enumerating every group of every prompt."""
    per_prompt = len(env.responses) // env.prompts
    groups = torch.tensor(list(product(range(per_prompt), repeat=size)))
    rows = torch.cat([groups + prompt * per_prompt for prompt in range(env.prompts)])  # [n_groups, size]
    probability = (env.probabilities(theta_old).detach() * env.prompts)[rows].prod(dim=1) / env.prompts
    advantages = group_advantages(env.rewards[rows], leave_one_out=leave_one_out).flatten()
    flat = rows.flatten()
    new, old = env.logprobs(theta), env.logprobs(theta_old).detach()
    each = coefficients(
        name,
        new[flat],
        old[flat],
        env.mask[flat],
        advantages,
        max_response_tokens=env.max_tokens,
        eps_low=1 - 1e-9,
        eps_high=1e9,
    )
    each = each * rows.shape[0]  # the mean over all groups, undone: each group's own mini-batch
    weighted = each * probability.repeat_interleave(size)[:, None]
    total = torch.zeros_like(new).index_add(0, flat, weighted)
    return torch.autograd.grad((total.detach() * new).sum(), theta)[0]


@pytest.mark.parametrize(("size", "max_tokens"), [(2, 4), (3, 3), (4, 2)])
@pytest.mark.parametrize("name", ["tic_grpo", "grpo2"])
def test_the_group_mean_scales_the_expected_gradient(name, size, max_tokens):
    for seed in range(2):
        env = Environment(seed, prompts=2, max_tokens=max_tokens)
        theta, theta_old = env.parameters(10 + seed), env.parameters(20 + seed)
        truth = policy_gradient(env, theta) if name == "tic_grpo" else surrogate_gradient(env, theta, theta_old)
        truth = truth / max_tokens
        others = group_expectation(env, name, theta, theta_old, size, leave_one_out=True)
        torch.testing.assert_close(others, truth, rtol=0, atol=1e-10)
        mean = group_expectation(env, name, theta, theta_old, size, leave_one_out=False)
        torch.testing.assert_close(mean, truth * (1 - 1 / size), rtol=0, atol=1e-10)
