"""Trajectories that cannot be trained on: a reward or log-prob that is not a finite number."""

from __future__ import annotations

import math

from tic_megatron.trajectory import Group, Trajectory


class TooManyBadTrajectoriesError(RuntimeError):
    """More of a step's trajectories are unusable than `algorithm.max_bad_fraction` allows."""


def drop_bad_trajectories(groups: list[Group], *, max_fraction: float) -> list[str]:
    """Take unusable trajectories out of their groups, in place. The others keep their group, baseline included.

    Returns:
        What was dropped, one line each, naming prompt and reason.

    Raises:
        TooManyBadTrajectoriesError: more than `max_fraction` of them are bad; nothing has been dropped then.
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
    if len(lines) > max_fraction * total:
        raise TooManyBadTrajectoriesError(
            f"{len(lines)} of {total} trajectories cannot be trained on, above algorithm.max_bad_fraction {max_fraction}; "
            f"the first: {lines[0]}"
        )
    for group in groups:
        group.trajectories = [t for t in group.trajectories if id(t) not in bad]
    return lines


def _problem(trajectory: Trajectory) -> str | None:
    if not math.isfinite(trajectory.reward):
        return f"its reward is {trajectory.reward}"
    for position, value in enumerate(trajectory.inference_logprobs):
        if not math.isfinite(value):
            return f"the generator's log-prob of token {position} is {value}"
    return None
