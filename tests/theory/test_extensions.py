"""Dense rewards, KL penalties and generator corrections: their expectations, exactly."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from tests.theory.enumerable import Environment, policy_gradient, relative_distance, values
from tic_megatron.algorithms import OBJECTIVES, Objective, dense_advantages
from tic_megatron.algorithms.corrections import generator_correction
from tic_megatron.algorithms.normalisers import Totals
from tic_megatron.algorithms.objectives import objective_terms, token_weights, with_dense_rewards
from tic_megatron.algorithms.penalties import KL_LOSSES, k1, k2, k3, weighted_sum
from tic_megatron.algorithms.ratios import Segments

EXACT = 1e-10


@pytest.fixture(params=[0, 1, 2])
def setting(request):
    env = Environment(request.param)
    return env, env.parameters(10 + request.param), env.parameters(20 + request.param)


def packed(env: Environment) -> Segments:
    return Segments(env.mask.nonzero()[:, 0], env.lengths)


def expected_packed_gradient(
    env: Environment, objective: Objective, theta, theta_old, advantages, weights, correction=None, eps_high: float = 1e9
):
    """Expected gradient over the packed path; `weights` [n] are the rows' sampling probabilities."""
    leaf = env.logprobs(theta)[env.mask].detach().requires_grad_()
    terms = objective_terms(
        objective,
        leaf,
        env.logprobs(theta_old)[env.mask].detach(),
        packed(env),
        advantages,
        Totals(1, 1, env.max_tokens),
        objective.clip_range(1 - 1e-9, eps_high),
        correction,
    )
    per_token = torch.autograd.grad(terms.value, leaf)[0]  # with N = 1: each row as its own mini-batch
    sampled = per_token * weights.detach()[packed(env).ids]
    return torch.autograd.grad((sampled * env.logprobs(theta)[env.mask]).sum(), theta)[0]


# --- dense rewards


def prefix_rewards(env: Environment) -> torch.Tensor:
    """Rewards of every token [n, T]: each depends on the tokens up to it, and no others."""
    generator = torch.Generator().manual_seed(99)
    reward_of: dict[tuple, float] = {}
    rewards = torch.zeros(env.mask.shape, dtype=torch.float64)
    for i, (prompt, response) in enumerate(zip(env.prompt.tolist(), env.responses, strict=True)):
        for t in range(len(response)):
            key = (prompt, response[: t + 1])
            if key not in reward_of:
                reward_of[key] = torch.randn((), generator=generator, dtype=torch.float64).item()
            rewards[i, t] = reward_of[key]
    return rewards


@pytest.fixture
def dense(setting):
    """(env, theta, theta_old, rewards of every token [n, T])"""
    return *setting, prefix_rewards(setting[0])


def test_dense_rewards_follow_the_policy_gradient(dense):
    env, theta, theta_old, rewards = dense
    truth = policy_gradient(env, theta, rewards.sum(dim=1)) / env.max_tokens
    old = env.probabilities(theta_old)
    objective = with_dense_rewards(OBJECTIVES["tic_grpo"])
    gradient = expected_packed_gradient(env, objective, theta, theta_old, rewards[env.mask], old)
    torch.testing.assert_close(gradient, truth, rtol=0, atol=EXACT)
    # The full ratio on the summed reward has the same expectation; the prefix ratio leaves out factors that average to 1.
    summed = expected_packed_gradient(env, OBJECTIVES["tic_grpo"], theta, theta_old, rewards.sum(dim=1), old)
    torch.testing.assert_close(summed, truth, rtol=0, atol=EXACT)


def test_one_baseline_for_every_token_is_biased(dense):
    """Whether a token is there at all depends on the tokens before it. At the last token only, it is not."""
    env, theta, theta_old, rewards = dense
    truth = policy_gradient(env, theta, rewards.sum(dim=1)) / env.max_tokens
    old = env.probabilities(theta_old)
    objective = with_dense_rewards(OBJECTIVES["tic_grpo"])
    baseline = env.mean_rewards(theta_old, rewards.sum(dim=1))
    at_the_end = rewards.clone()
    at_the_end[torch.arange(len(env.responses)), env.lengths - 1] -= baseline
    gradient = expected_packed_gradient(env, objective, theta, theta_old, at_the_end[env.mask], old)
    torch.testing.assert_close(gradient, truth, rtol=0, atol=EXACT)
    everywhere = (rewards - 1.0)[env.mask]
    gradient = expected_packed_gradient(env, objective, theta, theta_old, everywhere, old)
    assert relative_distance(gradient, truth) > 1e-2


def groups_of(env: Environment, size: int) -> torch.Tensor:
    """Rows of every group of `size` trajectories of every prompt, [n_groups, size]: of all lengths, side by side."""
    per_prompt = len(env.responses) // env.prompts
    groups = torch.tensor(list(product(range(per_prompt), repeat=size)))
    return torch.cat([groups + prompt * per_prompt for prompt in range(env.prompts)])


def dense_group_gradients(env: Environment, theta, theta_old, rewards, size: int, advantages_of, eps_high: float = 1e9):
    """(probability of each group under the old policy [n_groups], each group's d objective / d log pi of its members' tokens
    [n_groups, size, T]); `advantages_of(rewards of the members)` gives their advantages."""
    rows = groups_of(env, size)
    probability = (env.probabilities(theta_old).detach() * env.prompts)[rows].prod(dim=1) / env.prompts
    token_rewards = [rewards[i, : env.lengths[i]] for i in range(len(env.responses))]
    advantages = torch.cat([a for group in rows.tolist() for a in advantages_of([token_rewards[i] for i in group])])
    flat = rows.flatten()
    mask = env.mask[flat]
    leaf = env.logprobs(theta)[flat][mask].detach().requires_grad_()
    objective = with_dense_rewards(OBJECTIVES["tic_grpo"])
    terms = objective_terms(
        objective,
        leaf,
        env.logprobs(theta_old)[flat][mask].detach(),
        Segments(mask.nonzero()[:, 0], env.lengths[flat]),
        advantages,
        Totals(size, size, env.max_tokens),
        objective.clip_range(None, eps_high),
    )
    each = torch.zeros(mask.shape, dtype=torch.float64)
    each[mask] = torch.autograd.grad(terms.value, leaf)[0]
    return probability, each.view(len(rows), size, -1)


def dense_group_expectation(env: Environment, theta, theta_old, rewards, size: int, advantages_of):
    probability, each = dense_group_gradients(env, theta, theta_old, rewards, size, advantages_of)
    new = env.logprobs(theta)[groups_of(env, size)]
    return torch.autograd.grad((probability[:, None, None] * each * new).sum(), theta)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_the_group_baseline_of_dense_rewards_does_not_bias(size):
    """Over every group, members of different lengths included, away from the old policy: the others' mean leaves the expected
    gradient that of the policy, over T; the group's scales it by 1 - 1/G."""
    env = Environment(size, prompts=2, max_tokens=6 - size)
    theta, theta_old = env.parameters(10 + size), env.parameters(20 + size)
    rewards = prefix_rewards(env)
    truth = policy_gradient(env, theta, rewards.sum(dim=1)) / env.max_tokens
    others = dense_group_expectation(env, theta, theta_old, rewards, size, partial(dense_advantages, leave_one_out=True))
    torch.testing.assert_close(others, truth, rtol=0, atol=EXACT)
    mean = dense_group_expectation(env, theta, theta_old, rewards, size, dense_advantages)
    torch.testing.assert_close(mean, truth * (1 - 1 / size), rtol=0, atol=EXACT)

    def not_telescoped(members):
        """b[t] subtracted at t, and not given back at t - 1."""
        credit = [a.flip(0).cumsum(0).flip(0) for a in dense_advantages(members, leave_one_out=True)]
        return [r - (r.flip(0).cumsum(0).flip(0) - c) for r, c in zip(members, credit, strict=True)]

    biased = dense_group_expectation(env, theta, theta_old, rewards, size, not_telescoped)
    assert relative_distance(biased, truth) > 1e-2


def test_the_group_baseline_of_dense_rewards_lowers_the_variance():
    """At the old policy, against no baseline and against the others' mean sum at the last token (which does not bias either)."""
    env = Environment(0, prompts=2)
    theta = env.parameters(10)
    rewards = prefix_rewards(env) + 3.0
    scores = env.scores(theta)[groups_of(env, 2)]

    def at_the_last_token(members):
        advantages = [r.clone() for r in members]
        for i, a in enumerate(advantages):
            a[-1] -= members[1 - i].sum()
        return advantages

    def variance(advantages_of) -> float:
        probability, each = dense_group_gradients(env, theta, theta, rewards, 2, advantages_of)
        gradients = (each[..., None] * scores).sum(dim=(1, 2))
        return (probability @ gradients.square().sum(dim=1) - (probability @ gradients).square().sum()).item()

    own = variance(partial(dense_advantages, leave_one_out=True))
    assert own < 0.7 * variance(at_the_last_token)
    assert own < 0.7 * variance(lambda members: members)


def test_corrected_dense_rewards_follow_the_policy_gradient(dense):
    """Samples of a third policy, weighted by the whole trajectory's ratio: the factors after a token average to 1."""
    env, theta, theta_old, rewards = dense
    third = env.parameters(77)
    objective = with_dense_rewards(OBJECTIVES["tic_grpo"])
    old, generator = (env.logprobs(t)[env.mask].detach() for t in (theta_old, third))
    correction = generator_correction(
        objective.ratio, old, generator, packed(env), level="trajectory", form="truncate", bound=1e9
    )
    gradient = expected_packed_gradient(env, objective, theta, theta_old, rewards[env.mask], env.probabilities(third), correction)
    truth = policy_gradient(env, theta, rewards.sum(dim=1)) / env.max_tokens
    torch.testing.assert_close(gradient, truth, rtol=0, atol=EXACT)


def test_dense_rewards_clip_every_prefix(dense):
    """Bias of the cap: each token's reward is lost where its own prefix ratio is above 1 + eps."""
    env, theta, theta_old, rewards = dense
    objective = with_dense_rewards(OBJECTIVES["tic_grpo"])
    gradient = expected_packed_gradient(
        env, objective, theta, theta_old, rewards[env.mask], env.probabilities(theta_old), eps_high=0.28
    )
    new, old = env.logprobs(theta), env.logprobs(theta_old).detach()
    kept = (new - old).detach().cumsum(dim=1).exp() <= 1.28
    assert 0.05 < kept[env.mask].double().mean() < 0.95
    reach = old.sum(dim=1).exp() / env.prompts
    prefix_ratio = (new - old).cumsum(dim=1).exp()
    expected = torch.autograd.grad((torch.where(kept, prefix_ratio * rewards, 0.0).sum(dim=1) * reach).sum(), theta)[0]
    torch.testing.assert_close(gradient, expected / env.max_tokens, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["grpo", "dapo", "grpo2", "gspo", "no_is"])
def test_dense_rewards_need_the_trajectory_ratio(name):
    with pytest.raises(ValueError, match="trajectory ratio"):
        with_dense_rewards(OBJECTIVES[name])


# --- KL penalties, on-policy


def token_kl(first, second) -> torch.Tensor:
    """KL(first || second) of the next token at every prefix [prompts, prefixes]; arguments are log-policies."""
    return (first.exp() * (first - second)).sum(dim=-1)


def trajectory_kl(env: Environment, theta, theta_ref) -> torch.Tensor:
    gap = (env.logprobs(theta) - env.logprobs(theta_ref).detach()).sum(dim=1)
    return (env.probabilities(theta) * gap).sum()


def expected_penalty(env: Environment, estimator, theta, theta_ref, *, as_loss: bool):
    """E_theta of the sum over a trajectory's tokens; `as_loss`: its gradient as a trainer takes it, the samples held fixed."""
    per_token = estimator(env.logprobs(theta)[env.mask], env.logprobs(theta_ref)[env.mask].detach())
    weights = env.probabilities(theta).detach()[packed(env).ids]
    total = weighted_sum(per_token, weights)
    return torch.autograd.grad(total, theta)[0] if as_loss else total.detach()


def gradient_at_fixed_prefixes(env: Environment, theta, per_prefix) -> torch.Tensor:
    """Gradient of sum over prefixes of P_theta(prefix, held fixed) x a function of the next-token distribution there."""
    visits = torch.zeros(env.prompts, len(env.prefixes), dtype=torch.float64)
    probability = env.probabilities(theta).detach()[:, None].expand(env.mask.shape)
    visits.index_put_(
        (env.prompt[:, None].expand(env.mask.shape)[env.mask], env.prefix_at[env.mask]), probability[env.mask], True
    )
    return torch.autograd.grad((visits * per_prefix).sum(), theta)[0]


def test_kl_values(setting):
    """Of the sequence's KL, by summing each token's."""
    env, theta, theta_ref = setting
    truth = trajectory_kl(env, theta, theta_ref).detach()
    for unbiased in (k1, k3):
        torch.testing.assert_close(expected_penalty(env, unbiased, theta, theta_ref, as_loss=False), truth, rtol=0, atol=EXACT)
    assert (expected_penalty(env, k2, theta, theta_ref, as_loss=False) - truth).abs() > 1e-2  # k2's value is biased


def test_kl_gradients_as_a_loss(setting):
    """k1: zero. k2: that of KL(theta || ref) at the visited prefixes. k3: that of KL(ref || theta) there."""
    env, theta, theta_ref = setting
    k1_gradient = expected_penalty(env, k1, theta, theta_ref, as_loss=True)
    torch.testing.assert_close(k1_gradient, torch.zeros_like(theta), rtol=0, atol=EXACT)
    ref = env.log_policy(theta_ref).detach()
    forward = gradient_at_fixed_prefixes(env, theta, token_kl(env.log_policy(theta), ref))
    backward = gradient_at_fixed_prefixes(env, theta, token_kl(ref, env.log_policy(theta)))
    torch.testing.assert_close(expected_penalty(env, k2, theta, theta_ref, as_loss=True), forward, rtol=0, atol=EXACT)
    torch.testing.assert_close(expected_penalty(env, k3, theta, theta_ref, as_loss=True), backward, rtol=0, atol=EXACT)
    assert relative_distance(backward, forward) > 0.05
    # Neither moves the probability of the prefixes, as the gradient of the trajectories' KL does: that takes k1 in the reward.
    whole = torch.autograd.grad(trajectory_kl(env, theta, theta_ref), theta)[0]
    assert relative_distance(forward, whole) > 0.05
    gap = (env.logprobs(theta) - env.logprobs(theta_ref)).sum(dim=1).detach()
    torch.testing.assert_close(policy_gradient(env, theta, gap), whole, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_penalties_weigh_a_token_as_the_objective_does(name):
    """`token_weights` is what multiplies a token's score at the old policy, for an advantage of 1."""
    env = Environment(0)
    logprobs = env.logprobs(env.parameters(1))[env.mask].detach().requires_grad_()
    totals = Totals(50, 170, 7)
    ones = torch.ones(len(env.responses), dtype=torch.float64)
    objective = OBJECTIVES[name]
    terms = objective_terms(objective, logprobs, logprobs.detach(), packed(env), ones, totals, objective.clip_range())
    gradient = torch.autograd.grad(terms.value, logprobs)[0]
    torch.testing.assert_close(token_weights(objective, packed(env), totals), gradient, rtol=1e-12, atol=0)


def test_the_kl_losses_on_offer():
    assert list(KL_LOSSES.items()) == [("k2", k2), ("k3", k3)]


# --- corrections for samples of a third policy


def expectation_under_generator(env, name, theta, theta_old, theta_generator, *, level: Any, form: Any, bound: float):
    objective = OBJECTIVES[name]
    old, generator = (env.logprobs(t)[env.mask].detach() for t in (theta_old, theta_generator))
    correction = generator_correction(objective.ratio, old, generator, packed(env), level=level, form=form, bound=bound)
    advantages = env.rewards - env.mean_rewards(theta_old)
    sampled = env.probabilities(theta_generator)
    return expected_packed_gradient(env, objective, theta, theta_old, advantages, sampled, correction, eps_high=0.28)


@pytest.mark.parametrize("form", ["truncate", "mask"])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_corrected_samples_of_the_generator_have_the_expectation_of_the_old_policy(setting, name, form):
    """Exactly, at the trajectory level, when nothing is truncated; the objective's own clip is active."""
    env, theta, theta_old = setting
    third = env.parameters(77)
    advantages = env.rewards - env.mean_rewards(theta_old)
    truth = expected_packed_gradient(
        env, OBJECTIVES[name], theta, theta_old, advantages, env.probabilities(theta_old), eps_high=0.28
    )
    exact = expectation_under_generator(env, name, theta, theta_old, third, level="trajectory", form=form, bound=1e9)
    torch.testing.assert_close(exact, truth, rtol=0, atol=EXACT)
    bounded = expectation_under_generator(env, name, theta, theta_old, third, level="trajectory", form=form, bound=1.5)
    assert relative_distance(bounded, truth) > 1e-3
    if OBJECTIVES[name].ratio.per_token:  # a token's own ratio leaves the gap of the prefix before it
        token = expectation_under_generator(env, name, theta, theta_old, third, level="token", form=form, bound=1e9)
        assert relative_distance(token, truth) > 1e-3


def test_corrected_tic_grpo_follows_the_policy_gradient_at_the_current_policy(setting):
    env, theta, theta_old = setting
    third = env.parameters(77)
    objective = OBJECTIVES["tic_grpo"]
    old, generator = (env.logprobs(t)[env.mask].detach() for t in (theta_old, third))
    correction = generator_correction(
        objective.ratio, old, generator, packed(env), level="trajectory", form="truncate", bound=1e9
    )
    gradient = expected_packed_gradient(
        env, objective, theta, theta_old, env.rewards - env.mean_rewards(third), env.probabilities(third), correction
    )
    torch.testing.assert_close(gradient, policy_gradient(env, theta) / env.max_tokens, rtol=0, atol=EXACT)


def test_the_packed_and_the_padded_path_agree(setting):
    """The expectations above run over the packed path: row by row it is `policy_objective`."""
    env, theta, theta_old = setting
    advantages = env.rewards - env.mean_rewards(theta_old)
    new, old = env.logprobs(theta), env.logprobs(theta_old).detach()
    for name in ("grpo", "grpo2", "traj_is", "tic_grpo", "gspo", "no_is"):
        each = torch.stack(values(env, name, new, old, advantages, eps_low=None, eps_high=None))
        objective = OBJECTIVES[name]
        terms = objective_terms(
            objective,
            new[env.mask],
            old[env.mask],
            packed(env),
            advantages,
            Totals(1, 1, env.max_tokens),
            objective.clip_range(),
        )
        torch.testing.assert_close(terms.value, each.sum(), rtol=1e-12, atol=1e-12)
