"""Grading while generation goes on."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from tests.rollouts import group_of
from tic_megatron.config import RewardSettings
from tic_megatron.rewards import GradeReport, RewardWorkers
from tic_megatron.rewards.background import BackgroundGrader
from tic_megatron.trajectory import Group


def test_grading_in_the_background_gives_the_same_rewards() -> None:
    """Group by group, while others are still to come: the same as all at once; and again with the same workers."""
    responses = ["7", r"\boxed{7}", "8", "no idea"]
    expected, given = ([group_of(i, "7", responses[i:] + responses[:i]) for i in range(4)] for _ in range(2))
    with RewardWorkers(RewardSettings(timeout_s=60)) as workers:
        total = workers.grade_groups(expected)
        for _ in range(2):
            grader = BackgroundGrader(workers)
            for group in given:
                for trajectory in group.trajectories:
                    trajectory.reward = math.nan
                grader.add([group])
                time.sleep(0.02)
            report = grader.finish()
            assert (report.graded, report.failed, report.timed_out) == (total.graded, total.failed, total.timed_out)
            assert given == expected
    assert {t.reward for group in given for t in group.trajectories} == {0.0, 1.0}


def test_an_error_of_the_background_grading_reaches_the_caller() -> None:
    class Broken:
        def grade_groups(self, groups: list[Group]) -> None:
            raise RuntimeError("the graders do not start")

    workers: Any = Broken()
    grader = BackgroundGrader(workers)
    grader.add([group_of(0, "7", ["7", "8"])])
    with pytest.raises(RuntimeError, match="the graders do not start"):
        grader.finish()


def test_what_is_given_together_is_graded_together() -> None:
    """A whole rollout, in deterministic mode: a reward may depend, in its last digits, on what shares a batch."""
    calls = []

    class Counting:
        def grade_groups(self, groups: list[Group]) -> GradeReport:
            calls.append(len(groups))
            return GradeReport(len(groups))

    workers: Any = Counting()
    for _ in range(50):
        grader = BackgroundGrader(workers)
        assert not grader.finished
        grader.add([group_of(i, "7", ["7", "8"]) for i in range(16)])
        assert grader.finish().graded == 16 and grader.finished
    assert set(calls) <= {16, 0} and sum(calls) == 50 * 16
