"""Property 4.1 of the paper: where the squared norm of a weighted trajectory score is the sum of its tokens', and where not.

The token weights are the objectives' own: what multiplies each token's score for an advantage of 1.
"""

import pytest

from tests.theory.enumerable import Environment, score_weights, squared_norms

HOLDS, FAILS = 1e-10, 1e-5


@pytest.fixture(params=[0, 1, 2])
def setting(request):
    """(environment, scores at theta, probabilities under theta and under theta_old, weights)."""
    env = Environment(request.param)
    theta, theta_old = env.parameters(10 + request.param), env.parameters(20 + request.param)
    probabilities = env.probabilities(theta).detach(), env.probabilities(theta_old).detach()
    return env, env.scores(theta), *probabilities, score_weights(env, theta, theta_old)


def relative_gap(scores, weights, probabilities) -> float:
    whole, tokens = squared_norms(scores, weights, probabilities)
    return abs(whole / tokens - 1)


def test_holds_for_the_score_under_its_own_policy(setting):
    _, scores, current, old, weights = setting
    assert relative_gap(scores, weights["none"], current) < HOLDS
    # The cross terms vanish in expectation only: the scores of a trajectory's tokens are not orthogonal.
    assert relative_gap(scores, weights["none"], old) > FAILS


def test_holds_for_uncapped_token_weights_under_the_old_policy(setting):
    """E_old[rho_t grad log pi | prefix] = sum_a grad pi = 0: token ratios keep the martingale differences."""
    _, scores, _, old, weights = setting
    assert relative_gap(scores, weights["grpo2"], old) < HOLDS


def test_fails_for_capped_token_weights(setting):
    _, scores, _, old, weights = setting
    assert relative_gap(scores, weights["grpo2 capped"], old) > FAILS


def test_fails_once_an_advantage_multiplies(setting):
    """One number per trajectory, and yet: it depends on the tokens."""
    env, scores, current, old, weights = setting
    advantages = (env.rewards - env.rewards.mean())[:, None]
    assert relative_gap(scores, weights["none"] * advantages, current) > FAILS
    assert relative_gap(scores, weights["grpo2"] * advantages, old) > FAILS


def test_tic_grpo_inherits_it_as_a_bound_only(setting):
    """The ratio enters squared, and E_old W^2 |.|^2 = E_theta W |.|^2 has a factor W left: no identity, capped or not.

    The paper bounds the capped square by (1 + eps) W; what is left is the identity under the current policy.
    """
    _, scores, current, old, weights = setting
    assert relative_gap(scores, weights["tic_grpo"], old) > FAILS
    assert relative_gap(scores, weights["tic_grpo capped"], old) > FAILS
    capped, _ = squared_norms(scores, weights["tic_grpo capped"], old)
    _, tokens = squared_norms(scores, weights["none"], current)
    assert capped <= 1.28 * tokens
    # W to the first power changes the measure to the current policy's, and nothing else.
    assert relative_gap(scores, weights["root"], old) < HOLDS
