"""Property 4.1 of the paper: where the squared norm of a weighted trajectory score is the sum of its tokens', and where not.

The token weights are the objectives' own: `coefficients` of a trajectory with advantage 1 is what multiplies each token's score.
"""

import pytest
import torch

from tests.theory.enumerable import Environment, coefficients

HOLDS, FAILS = 1e-10, 1e-5


def moments(env: Environment, scores, weights, probabilities) -> tuple[float, float]:
    """(E |sum_t w_t s_t|^2, sum_t E |w_t s_t|^2); `scores` [n, T, parameters], `weights` [n, T]."""
    weighted = scores * weights[:, :, None]
    whole = weighted.sum(dim=1).square().sum(dim=1)
    tokens = weighted.square().sum(dim=(1, 2))
    return (probabilities @ whole).item(), (probabilities @ tokens).item()


def relative_gap(both: tuple[float, float]) -> float:
    return abs(both[0] - both[1]) / both[1]


@pytest.fixture(params=[0, 1, 2])
def setting(request):
    env = Environment(request.param)
    theta, theta_old = env.parameters(10 + request.param), env.parameters(20 + request.param)
    weights = {}
    for name in ("tic_grpo", "grpo2"):
        for eps in (1e9, 0.28):
            batch = (env.logprobs(theta), env.logprobs(theta_old), env.mask, torch.ones(len(env.responses), dtype=torch.float64))
            scale = len(env.responses)  # undoes the mean over the batch; T = 1 undoes the length
            weights[name, eps] = coefficients(name, *batch, max_response_tokens=1, eps_high=eps) * scale
    return env, env.scores(theta), env.probabilities(theta).detach(), env.probabilities(theta_old).detach(), weights


def test_holds_for_the_score_under_its_own_policy(setting):
    env, scores, current, old, _ = setting
    assert relative_gap(moments(env, scores, env.mask.double(), current)) < HOLDS
    # The cross terms vanish in expectation only: the scores of a trajectory's tokens are not orthogonal.
    assert relative_gap(moments(env, scores, env.mask.double(), old)) > FAILS


def test_holds_for_uncapped_token_weights_under_the_old_policy(setting):
    """E_old[rho_t grad log pi | prefix] = sum_a grad pi = 0: token ratios keep the martingale differences."""
    env, scores, _, old, weights = setting
    assert relative_gap(moments(env, scores, weights["grpo2", 1e9], old)) < HOLDS


def test_fails_for_capped_token_weights(setting):
    env, scores, _, old, weights = setting
    assert relative_gap(moments(env, scores, weights["grpo2", 0.28], old)) > FAILS


def test_fails_once_an_advantage_multiplies(setting):
    env, scores, current, old, weights = setting
    advantages = (env.rewards - env.rewards.mean())[:, None]  # one number per trajectory, and yet
    assert relative_gap(moments(env, scores, env.mask * advantages, current)) > FAILS
    assert relative_gap(moments(env, scores, weights["grpo2", 1e9] * advantages, old)) > FAILS


def test_tic_grpo_inherits_it_as_a_bound_only(setting):
    """The ratio enters squared, and E_old W^2 |.|^2 = E_theta W |.|^2 has a factor W left: no identity, capped or not.

    The paper bounds the capped square by (1 + eps) W; what is left is the identity under the current policy.
    """
    env, scores, current, old, weights = setting
    assert relative_gap(moments(env, scores, weights["tic_grpo", 1e9], old)) > FAILS
    capped, _ = moments(env, scores, weights["tic_grpo", 0.28], old)
    _, bound = moments(env, scores, env.mask.double(), current)
    assert capped <= 1.28 * bound
    once = weights["tic_grpo", 1e9].clamp(min=0).sqrt()  # W to the first power: changes the measure, and the identity holds
    assert relative_gap(moments(env, scores, once, old)) < HOLDS
