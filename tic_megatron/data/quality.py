"""Trajectories that cannot be trained on: a reward or log-prob that is not a finite number.

Rewards and the generator's log-probs are known before the training: such trajectories are left out. The trainer's own are
known in the update only, where one bad trajectory spoils the whole gradient: such updates are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tic_megatron.data.packing import split_into_mini_batches
from tic_megatron.trajectory import Group, Trajectory


class TooManyBadTrajectoriesError(RuntimeError):
    """More of a step's trajectories are unusable than `algorithm.max_bad_fraction` allows."""


def drop_bad_trajectories(groups: list[Group], *, max_fraction: float) -> list[str]:
    """Take unusable trajectories out of their groups, in place. The others keep their group, baseline included.

    Returns:
        What was dropped, one line each, naming prompt and reason.

    Raises:
        TooManyBadTrajectoriesError: more than `max_fraction` of them are bad, or all; nothing has been dropped then.
    """
    bad: dict[int, str] = {}
    total = 0
    for group in groups:
        for index, trajectory in enumerate(group.trajectories):
            total += 1
            problem = _problem(trajectory)
            if problem:
                bad[id(trajectory)] = f"prompt {group.prompt.id}, response {index}: {problem}"
    lines = list(bad.values())
    if lines and (len(lines) > max_fraction * total or len(lines) == total):
        limit = "which leaves none" if len(lines) == total else f"above algorithm.max_bad_fraction {max_fraction}"
        raise TooManyBadTrajectoriesError(
            f"{len(lines)} of {total} trajectories cannot be trained on, {limit}; the first: {lines[0]}"
        )
    for group in groups:
        group.trajectories = [t for t in group.trajectories if id(t) not in bad]
    return lines


@dataclass(frozen=True)
class SkippedUpdate:
    """An update of a step, by its index, that no rank applied, since a log-prob or gradient was not finite.

    `bad_prompts`: prompt id of each trajectory with such a log-prob; empty where only the gradient was bad.
    """

    index: int
    bad_prompts: list[str]


def report_skipped_updates(
    skipped: Sequence[SkippedUpdate], groups: Sequence[Group], n_updates: int, *, max_fraction: float
) -> list[str]:
    """What was skipped in a step of `n_updates`, one line each, naming the prompts.

    Raises:
        TooManyBadTrajectoriesError: more than `max_fraction` of the step's trajectories have log-probs that are not finite.
    """
    total = sum(len(group.trajectories) for group in groups)
    bad = [prompt for update in skipped for prompt in update.bad_prompts]
    if len(bad) > max_fraction * total:
        raise TooManyBadTrajectoriesError(
            f"the trainer's log-probs of {len(bad)} of {total} trajectories are not finite, above algorithm.max_bad_fraction "
            f"{max_fraction} (prompts {_some(bad)}); their updates were skipped"
        )
    lines = []
    for update in skipped:
        reason = f"the trainer's log-probs are not finite in {len(update.bad_prompts)} of its trajectories"
        prompts = update.bad_prompts
        if not prompts:
            reason = "its loss or gradient is not finite, though all log-probs are"
            prompts = [group.prompt.id for group in split_into_mini_batches(groups, n_updates)[update.index]]
        lines.append(f"update {update.index + 1} of {n_updates} was skipped: {reason} (prompts {_some(prompts)})")
    return lines


class SkippedInARow:
    """Counts the updates that were skipped one after another, over steps too. `count`: so many, up to now."""

    def __init__(self, limit: int, count: int = 0) -> None:
        self._limit = limit
        self.count = count

    def add(self, skipped: Sequence[SkippedUpdate], n_updates: int) -> None:
        """A step of `n_updates` is done. TooManyBadTrajectoriesError when `limit` updates in a row have been skipped."""
        indices = {update.index for update in skipped}
        for index in range(n_updates):
            self.count = self.count + 1 if index in indices else 0
            if self.count >= self._limit:
                raise TooManyBadTrajectoriesError(
                    f"{self.count} updates in a row were skipped for log-probs or gradients that are not finite "
                    "(algorithm.max_skipped_updates); the lines before this one name the prompts. Lower actor.learning_rate, use "
                    "another actor.precision, or continue from an older checkpoint"
                )


def _some(prompts: Sequence[str]) -> str:
    names = list(dict.fromkeys(prompts))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _problem(trajectory: Trajectory) -> str | None:
    if trajectory.token_rewards is not None:
        problem = _dense_problem(trajectory)
        if problem:
            return problem
    if not math.isfinite(trajectory.reward):
        return f"its reward is {trajectory.reward}"
    for position, value in enumerate(trajectory.inference_logprobs):
        if not math.isfinite(value):
            return f"the generator's log-prob of token {position} is {value}"
    return None


def _dense_problem(trajectory: Trajectory) -> str | None:
    rewards, n = trajectory.token_rewards, len(trajectory.response_ids)
    if not trajectory.response_length:
        return "it has token rewards, but no token that the policy sampled"
    if len(rewards) != n:
        return f"it has {len(rewards)} token rewards for {n} response tokens"
    for position, (reward, sampled) in enumerate(zip(rewards, trajectory.response_mask, strict=True)):
        if not math.isfinite(reward):
            return f"the reward of token {position} is {reward}"
        if reward and not sampled:
            return f"token {position} has the reward {reward}, but the policy did not sample it"
    return None
