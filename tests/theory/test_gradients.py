"""What the expected gradient of each objective is, away from the old policy and at it."""

from functools import cache
from itertools import combinations

import pytest
import torch

from tests.theory.enumerable import (
    Environment,
    coefficients,
    cosine,
    expected_gradient,
    policy_gradient,
    relative_distance,
    surrogate_gradient,
)
from tests.theory.report import measure
from tic_megatron.algorithms import OBJECTIVES

EXACT = 1e-10
PRESETS = ["grpo", "dapo", "grpo2", "traj_is", "tic_grpo", "gspo", "no_is"]
PAIRS = list(combinations(PRESETS, 2))
EQUAL_AT_OLD = [{"grpo", "traj_is", "gspo", "no_is"}, {"grpo2", "tic_grpo"}]
PARALLEL_AT_OLD = [{"grpo", "traj_is", "gspo", "no_is"}, {"grpo2", "tic_grpo", "dapo"}]


@pytest.fixture(params=[0, 1, 2])
def setting(request):
    """(environment, theta, theta_old, advantages over the true mean reward under the old policy)."""
    env = Environment(request.param)
    theta, theta_old = env.parameters(10 + request.param), env.parameters(20 + request.param)
    return env, theta, theta_old, env.rewards - env.mean_rewards(theta_old)


def test_the_environment_is_a_distribution(setting):
    env, theta, theta_old, _ = setting
    assert len(env.responses) == 3 * 31
    assert sorted(set(env.lengths.tolist())) == [1, 2, 3, 4]
    assert torch.isclose(env.probabilities(theta).sum(), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-14)
    log_ratio = (env.logprobs(theta) - env.logprobs(theta_old)).sum(dim=1)
    assert log_ratio.min() < -0.5
    assert log_ratio.max() > 0.5


def test_tic_grpo_follows_the_policy_gradient_at_the_current_policy(setting):
    env, theta, theta_old, advantages = setting
    truth = policy_gradient(env, theta) / env.max_tokens
    torch.testing.assert_close(expected_gradient(env, "tic_grpo", theta, theta_old, advantages), truth, rtol=0, atol=EXACT)
    # Any baseline that is constant for a prompt does; T is the configured maximum.
    shifted = advantages + env.prompt * 0.7
    assert relative_distance(expected_gradient(env, "tic_grpo", theta, theta_old, shifted), truth) < EXACT
    longer = expected_gradient(env, "tic_grpo", theta, theta_old, advantages, max_response_tokens=20)
    torch.testing.assert_close(longer * 5, truth, rtol=0, atol=EXACT)


def test_grpo2_follows_the_surrogate(setting):
    env, theta, theta_old, advantages = setting
    gradient = expected_gradient(env, "grpo2", theta, theta_old, advantages) * env.max_tokens
    torch.testing.assert_close(gradient, surrogate_gradient(env, theta, theta_old), rtol=0, atol=EXACT)
    # ... which is neither gradient.
    assert relative_distance(gradient, policy_gradient(env, theta)) > 0.1
    assert relative_distance(gradient, policy_gradient(env, theta_old)) > 0.1


def test_division_by_the_length_changes_the_reward_that_is_followed(setting):
    """grpo and traj_is follow the surrogate and the policy gradient of another reward: (r - b) / T_i."""
    env, theta, theta_old, advantages = setting
    other = advantages / env.lengths
    grpo = expected_gradient(env, "grpo", theta, theta_old, advantages)
    torch.testing.assert_close(grpo, surrogate_gradient(env, theta, theta_old, other), rtol=0, atol=EXACT)
    traj_is = expected_gradient(env, "traj_is", theta, theta_old, advantages)
    torch.testing.assert_close(traj_is, policy_gradient(env, theta, other), rtol=0, atol=EXACT)


@pytest.mark.parametrize("eps", [0.0, 0.28, 1.0])
def test_the_clip_costs_exactly_the_capped_part(setting, eps):
    """bias = -(1/T) sum_tau P_theta(tau) 1{W > 1 + eps} (r - b) grad log P_theta(tau)."""
    env, theta, theta_old, advantages = setting
    new, old = env.logprobs(theta), env.logprobs(theta_old).detach()
    capped = (new.detach() - old).sum(dim=1).exp() > 1 + eps
    assert 0.02 < env.probabilities(theta).detach()[capped].sum() < 0.98
    probability = env.probabilities(theta).detach()
    lost = torch.where(capped, probability * advantages, 0.0) @ new.sum(dim=1) / env.max_tokens
    bias = -torch.autograd.grad(lost, theta)[0]
    clipped = expected_gradient(env, "tic_grpo", theta, theta_old, advantages, eps_high=eps)
    truth = policy_gradient(env, theta) / env.max_tokens
    torch.testing.assert_close(clipped - truth, bias, rtol=0, atol=EXACT)
    assert bias.norm() > 1e-3


def test_at_the_old_policy_expected_gradients(setting):
    env, theta, _, _ = setting
    truth = policy_gradient(env, theta)
    advantages = env.rewards - env.mean_rewards(theta)
    for name in ("tic_grpo", "grpo2"):
        gradient = expected_gradient(env, name, theta, theta, advantages)
        torch.testing.assert_close(gradient, truth / env.max_tokens, rtol=0, atol=EXACT)
    for name in ("grpo", "traj_is", "gspo", "no_is"):
        assert cosine(expected_gradient(env, name, theta, theta, advantages), truth) < 0.995, f"{name} is parallel to the truth"


@cache
def sampled_batch(seed: int, *, moved: bool):
    """A mini-batch of 64 trajectories: log-probs, old log-probs, mask, advantages of mean 0."""
    env = Environment(seed)
    theta, theta_old = env.parameters(10 + seed), env.parameters(20 + seed)
    rows = torch.multinomial(env.probabilities(theta_old).detach(), 64, True, generator=torch.Generator().manual_seed(seed))
    old = env.logprobs(theta_old)[rows].detach()
    new = env.logprobs(theta)[rows].detach() if moved else old.clone()
    return new, old, env.mask[rows], env.rewards[rows] - env.rewards[rows].mean()


def relation(first: torch.Tensor, second: torch.Tensor) -> str:
    if relative_distance(first, second) < 1e-12:
        return "equal"
    return "parallel" if 1 - cosine(first.flatten(), second.flatten()) < 1e-12 else "different"


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_coincidences_at_the_old_policy_and_no_others(pair):
    assert set(PRESETS) <= set(OBJECTIVES)
    for seed in range(3):
        batch = sampled_batch(seed, moved=False)
        for clips in ({}, {"eps_low": 0.9, "eps_high": 1e9}):
            first, second = (coefficients(name, *batch, max_response_tokens=4, **clips) for name in pair)
            same = any(set(pair) <= group for group in EQUAL_AT_OLD)
            parallel = any(set(pair) <= group for group in PARALLEL_AT_OLD)
            assert relation(first, second) == ("equal" if same else "parallel" if parallel else "different")


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_no_coincidences_away_from_the_old_policy(pair):
    """... but for dapo and grpo2, both a constant per token, whose only other difference is the clip."""
    for seed in range(3):
        batch = sampled_batch(seed, moved=True)
        clipped, unclipped = (
            relation(*(coefficients(name, *batch, max_response_tokens=4, **clips) for name in pair))
            for clips in ({}, {"eps_low": 1 - 1e-9, "eps_high": 1e9})
        )
        assert clipped == "different"
        assert unclipped == ("parallel" if pair == ("dapo", "grpo2") else "different")


def test_dapo_is_tic_grpo_by_the_mean_length():
    for seed in range(3):
        batch = sampled_batch(seed, moved=False)
        mask = batch[2]
        dapo, tic_grpo = (coefficients(name, *batch, max_response_tokens=4) for name in ("dapo", "tic_grpo"))
        torch.testing.assert_close(dapo, tic_grpo * (mask.shape[0] * 4 / int(mask.sum())), rtol=1e-12, atol=0)


def test_which_gradient_the_surrogate_is_nearer_to_depends_on_length_and_direction():
    """Neither "GRPO estimates the old gradient" nor "the current one": the table of docs/theory.md, in small."""

    def nearer_to_current(max_tokens: int, direction: str) -> float:
        found = [measure(seed, max_tokens, direction=direction, spread=0.1) for seed in range(20)]
        return sum(d.nearer_to_current for d in found) / len(found)

    single = measure(0, 1, direction="random", spread=0.5)
    assert single.to_current < EXACT < single.to_old  # one token: the surrogate is the objective
    assert nearer_to_current(2, "random") > 0.75
    assert nearer_to_current(6, "ascent") < 0.5
