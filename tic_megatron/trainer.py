"""The training loop."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch

from tic_megatron.algorithms import dense_advantages, group_advantages
from tic_megatron.commands.preflight import TrainInputs
from tic_megatron.config import AlgorithmSettings, Settings
from tic_megatron.data.packing import Packing, has_equal_rewards, pack_rollout
from tic_megatron.preemption import Interruption, Preempted
from tic_megatron.run import Run
from tic_megatron.trajectory import Group, MiniBatch


def train(settings: Settings, inputs: TrainInputs) -> dict[str, Any] | None:
    """Train from start (or checkpoint) to end; returns the summary that is also written to `summary.json`, or None when the
    run was told to leave (`tic_megatron.preemption`) and has saved what it has."""
    with Run(settings, inputs) as run:
        try:
            if run.state.step == 0:
                run.evaluate(0)
            if run.state.unrecorded is not None:  # the run was told to leave while it evaluated
                run.record()
            for step in range(run.state.step + 1, settings.trainer.steps + 1):
                run.trained(step, *train_step(run, step))
                run.record()
                run.preemption.check()
            return run.finish()
        except (Preempted, Interruption):
            run.leave(run.preemption.signal)
            return None


def train_step(run: Run, step: int) -> tuple[list[Group], dict[str, float]]:
    """One rollout and K optimizer updates on it; then pi_old <- pi."""
    settings, timed = run.settings, run.timers
    timed.reset()
    with timed("step"):
        with timed("generate"):
            run.progress.phase("generate")
            with run.preemption.breakable():
                groups = run.rollout(step)
        run.log_memory(step, "generate")
        with timed("reward"):
            report = run.rollouts.grade(groups)  # most of it is done: it went on beside the generation
        with timed("generate"), run.preemption.breakable():
            groups, left_out, refilled = run.refill(step, groups, report)
        with timed("reward"):
            sampled = [*groups, *left_out]
            punished = run.punish_overlong(sampled)
            run.look_ahead(step)
            dropped = run.drop_bad(groups)
            set_advantages(groups, settings.algorithm)
            made = rollout_metrics(sampled, step) | refilled
        with timed("old_logprob"):
            run.progress.phase("train")
            run.to_training()
            # Packed once: old log-probs and updates see the same micro-batches, so their rounding cancels.
            shards = pack(groups, settings)
            run.actors.load_rollout(shards, step)
            if settings.algorithm.kl_in_reward:
                penalize_rewards(run, groups, shards)
            run.actors.old_logprobs(check_noise=noise_check_due(settings, step))
        with timed("update"):
            metrics, skipped = run.actors.update()
            run.finish_profile()
            run.report_skipped(skipped, groups)
        with suppress(Preempted, Interruption):  # the step is trained; the run leaves once it is recorded
            with timed("generate"), run.preemption.breakable():
                run.rollouts.wait(run.actors, version=step)  # for the next step's, one step ahead
            run.log_memory(step, "train")
            with timed("weight_sync"):
                run.rollouts.use_weights(run.actors, version=step)
            run.log_memory(step, "weight_sync")
    n_tokens = sum(len(t.tokens) for group in sampled for t in group.trajectories)
    speed = {"throughput/tokens_per_s": n_tokens / timed.seconds("step")}
    made |= run.rollouts.metrics()
    grading = report.metrics() | punished
    return groups, made | grading | dropped | metrics | timed.metrics() | speed | run.actors.usage(timed)


def set_advantages(groups: list[Group], options: AlgorithmSettings) -> None:
    """Group-relative advantages from the rewards, in place. A group of one that is left of a group teaches nothing."""
    for group in groups:
        if any(t.token_rewards is not None for t in group.trajectories):
            set_dense_advantages(group, options)
            continue
        rewards = torch.tensor([[t.reward for t in group.trajectories]], dtype=torch.float64)
        advantages = torch.zeros_like(rewards)
        if rewards.shape[1] >= 2:
            advantages = group_advantages(rewards, normalize_std=options.normalize_std, leave_one_out=options.leave_one_out)
        for trajectory, advantage in zip(group.trajectories, advantages[0].tolist(), strict=True):
            trajectory.advantage = advantage


def set_dense_advantages(group: Group, options: AlgorithmSettings) -> None:
    """One advantage per token, for a reward that is given at tokens; `advantage` is their sum."""
    rewards = [torch.tensor(t.sampled(t.token_rewards), dtype=torch.float64) for t in group.trajectories]
    advantages = [torch.zeros_like(r) for r in rewards]
    if len(rewards) >= 2:
        advantages = dense_advantages(rewards, normalize_std=options.normalize_std, leave_one_out=options.leave_one_out)
    for trajectory, values in zip(group.trajectories, advantages, strict=True):
        trajectory.token_advantages = trajectory.spread(values.tolist())
        trajectory.advantage = sum(trajectory.token_advantages)


def pack(groups: list[Group], settings: Settings) -> list[list[MiniBatch]]:
    """The rollout as mini-batches, [data-parallel rank][update]; groups that teach nothing are left out where that is exact."""
    return pack_rollout(groups, settings.trainer.updates_per_step, Packing.of(settings))


def penalize_rewards(run: Run, groups: list[Group], shards: list[list[MiniBatch]]) -> None:
    """Renew the advantages: those of the rewards less the KL to the reference policy (k1). The rewards themselves stay what was
    given, which is logged, saved and replayed.

    k1 of a token depends on the tokens up to it: with a dense reward it is subtracted at its token. Otherwise its sum is
    subtracted from the response's reward; the expected gradient is the same.
    """
    options = run.settings.algorithm
    given = [(t, t.reward, t.token_rewards) for group in groups for t in group.trajectories]
    order = [
        [t for mini_batch in shard for micro_batch in mini_batch.micro_batches for t in micro_batch.trajectories]
        for shard in shards
    ]
    for trajectories, kl in zip(order, run.actors.kl_to_reference(), strict=True):
        for trajectory, value in zip(trajectories, kl, strict=True):
            if not all(map(math.isfinite, value)):
                continue  # so are its log-probs, and the update that meets it is skipped
            trajectory.reward -= options.kl_coefficient * sum(value)
            if trajectory.token_rewards is not None:
                penalties = trajectory.spread(value)
                trajectory.token_rewards = [
                    r - options.kl_coefficient * p for r, p in zip(trajectory.token_rewards, penalties, strict=True)
                ]
    set_advantages(groups, options)
    for trajectory, reward, token_rewards in given:
        trajectory.reward, trajectory.token_rewards = reward, token_rewards
    run.actors.set_advantages([[a for t in trajectories for a in t.unit_advantages] for trajectories in order])


def noise_check_due(settings: Settings, step: int) -> bool:
    """Whether `policy/log_ratio_abs_max_first` is measured: in step 1 and every `trainer.noise_check_every` steps."""
    every = settings.trainer.noise_check_every
    return every > 0 and (step - 1) % every == 0


def rollout_metrics(groups: list[Group], step: int) -> dict[str, float]:
    """`reward/*`, `response/*` and `rollout/*` of the graded rollout of a step."""
    trajectories = [t for group in groups for t in group.trajectories]
    n = len(trajectories)
    oldest = min(t.weight_version for t in trajectories)
    return {
        "reward/mean": sum(t.reward for t in trajectories) / n,
        "reward/zero_advantage_fraction": sum(has_equal_rewards(group) for group in groups) / len(groups),
        "response/length_mean": sum(t.response_length for t in trajectories) / n,
        "response/truncated_fraction": sum(t.truncated for t in trajectories) / n,
        "rollout/weight_version_min": float(oldest),
        "rollout/staleness_max": float(step - 1 - oldest),
    }
