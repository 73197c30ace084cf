"""The loss closure of an update, without a model: numbers that are not finite, and the statistics of dense rewards."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.rollouts import random_rollout
from tic_megatron.actors.context_parallel import ALONE
from tic_megatron.actors.stats import UpdateResult
from tic_megatron.actors.step import PolicyStep
from tic_megatron.config import Settings
from tic_megatron.data.packing import Packing, pack_rollout
from tic_megatron.trainer import penalize_rewards, set_advantages
from tic_megatron.trajectory import MicroBatch


class GivenLogprobs:
    """A backend whose log-probs are given: those of the forward-only passes, of the reference, and of the updates."""

    device = torch.device("cpu")
    layout, uniform_lengths, data_parallel_rank, has_logprobs, reports = ALONE, False, 0, True, True

    def __init__(self):
        self.spoilt: dict[str, float] = {}
        self.losses: list[float] = []

    def _logprobs(self, packed, kind: str) -> torch.Tensor:
        logprobs = torch.linspace(-3.0, -1.0, packed.targets.numel())
        if kind in self.spoilt:
            logprobs[-1] = self.spoilt[kind]  # of the last trajectory
        return logprobs

    def forward(self, inputs, *, reference=False):
        return [self._logprobs(packed, "reference" if reference else "old") for packed in inputs]

    def update(self, inputs, loss):
        values = []
        for index, packed in enumerate(inputs):
            logprobs = self._logprobs(packed, "trainer").requires_grad_()
            value = loss(index, logprobs, torch.ones(packed.targets.numel()))
            value.backward()
            values.append((value.item(), logprobs.grad))
        self.losses = values
        return UpdateResult(0.0, 0.0, all(math.isfinite(value) for value, _ in values))


def make_step(**algorithm) -> tuple[PolicyStep, GivenLogprobs]:
    settings = Settings()
    settings.rollout.max_response_tokens = 40
    for name, value in algorithm.items():
        setattr(settings.algorithm, name, value)
    backend: Any = GivenLogprobs()
    return PolicyStep(backend, settings), backend


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["trainer", "old", "reference"])
def test_a_log_prob_that_is_not_finite_is_named_and_the_loss_says_so(kind, value):
    """-inf too, for which the trajectory ratio is 0 and value and gradient would be finite."""
    step, backend = make_step(kl_coefficient=0.1)
    shards = pack_rollout(random_rollout(seed=0, n_prompts=4, group_size=3, vocab=50), 2, Packing(1, 120, keep_all=True))
    backend.spoilt = {kind: value}
    step.load(shards[0])
    step.old_logprobs(check_noise=False)
    stats = [step.update(k) for k in range(2)]
    packed = step.mini_batches[1].micro_batches
    assert stats[1].bad_prompts == [m.trajectories[-1].prompt.id for m in packed] and len(packed) > 1
    assert all(math.isnan(loss) and torch.isnan(gradient).all() for loss, gradient in backend.losses)
    # The first update's old log-probs are its own.
    assert (stats[0].bad_prompts == []) == (kind == "old")
    assert math.isfinite(stats[1].value) and stats[1].log_ratio == []


def test_good_trajectories_are_not_named():
    step, _ = make_step()
    step.load(pack_rollout(random_rollout(seed=0, n_prompts=4, group_size=3, vocab=50), 2, Packing(1, 120))[0])
    step.old_logprobs(check_noise=False)
    stats = step.update(0)
    assert stats.bad_prompts == [] and stats.result.applied and stats.log_ratio


def test_where_nothing_is_compared_there_is_no_noise():
    """The first mini-batch has lost all its groups: they teach nothing."""
    step, _ = make_step()
    shards = pack_rollout(random_rollout(seed=0, n_prompts=4, group_size=3, vocab=50), 2, Packing(1, 120))
    shards[0][0] = replace(shards[0][0], micro_batches=[MicroBatch()])
    step.load(shards[0])
    step.old_logprobs(check_noise=True)
    assert step.update(0).noise is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_noise_that_is_not_finite_is_not_none(value):
    step, backend = make_step()
    step.load(pack_rollout(random_rollout(seed=0, n_prompts=4, group_size=3, vocab=50), 2, Packing(1, 120))[0])
    backend.spoilt["old"] = value  # in the forward-only pass alone
    step.old_logprobs(check_noise=True)
    assert step.update(0).noise == math.inf


@pytest.mark.parametrize("dense", [False, True])
def test_the_kl_in_the_reward_changes_the_advantages_only(dense):
    """Rewards stay what was given. A KL that is not finite is left out: the update that meets its log-probs is skipped."""
    groups = random_rollout(seed=0, n_prompts=2, group_size=3, vocab=50, dense=dense)
    trajectories = [t for group in groups for t in group.trajectories]
    before = [(t.reward, t.token_rewards) for t in trajectories]
    shards = pack_rollout(groups, 1, Packing(1, 300, keep_all=True))
    order = [t for m in shards[0][0].micro_batches for t in m.trajectories]
    kl = [[0.25] * (t.response_length if dense else 1) for t in order]
    kl[order.index(trajectories[4])][-1] = math.nan
    sent = []
    settings = Settings()
    settings.algorithm.kl_coefficient = 2.0
    actors = SimpleNamespace(kl_to_reference=lambda: [kl], set_advantages=sent.append)
    run: Any = SimpleNamespace(settings=settings, actors=actors)
    penalize_rewards(run, groups, shards)
    assert [(t.reward, t.token_rewards) for t in trajectories] == before
    got = [(t.advantage, t.token_advantages) for t in trajectories]
    for i, t in enumerate(trajectories):
        penalty = 0.0 if i == 4 else 0.5
        t.reward -= penalty
        t.token_rewards = t.token_rewards and [r - penalty for r in t.token_rewards]
    set_advantages(groups, settings.algorithm)
    assert [(t.advantage, t.token_advantages) for t in trajectories] == got
    assert sent == [[[a for t in order for a in t.unit_advantages]]]
