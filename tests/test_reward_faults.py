"""Rewards that misbehave cost the response that they grade, which is named; never the run."""

from __future__ import annotations

import os
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.rollouts import group_of
from tic_megatron.config import RewardSettings, Settings
from tic_megatron.rewards import REWARDS, Reward, RewardWorkers
from tic_megatron.rewards.background import BackgroundGrader
from tic_megatron.rewards.registry import InvalidRewardError, finite_number
from tic_megatron.rewards.workers import MOST_FAULTS_NAMED
from tic_megatron.rollout.source import SampledRollouts

HOSTILE = """
import os, signal, subprocess, sys, time
from tic_megatron.rewards.registry import register_reward

class Mute(Exception):
    def __str__(self):
        raise RuntimeError

def mute():
    raise Mute

def child_that_answers():
    if os.fork() == 0:
        return 0.25
    time.sleep(0.3)
    return 0.5

DEEDS = {
    "raise": lambda: 1 / 0,
    "raise without a text": mute,
    "sys.exit": lambda: sys.exit(3),
    "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
    "os._exit": lambda: os._exit(7),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory": lambda: len(bytearray(8 << 30)),
    "recursion": lambda: DEEDS["recursion"](),
    "sleep": lambda: time.sleep(60),
    "sleep in a child": lambda: subprocess.run(["sleep", "60.625"]),
    "print": lambda: [print("rubbish"), os.write(1, b"more {rubbish}\\n"), 0.5][-1],
    "read": lambda: 0.5 if sys.stdin.read() == "" else 1.0,
    "str": lambda: "1.0",
    "None": lambda: None,
    "list": lambda: [1.0],
    "complex": lambda: 1 + 2j,
    "nan": lambda: float("nan"),
    "inf": lambda: -float("inf"),
    "huge": lambda: 10**400,
    "True": lambda: True,
    "slow": lambda: (time.sleep(0.05), 1.0)[1],
}

@register_reward("hostile", isolated=True)
def hostile(response, answer):
    return DEEDS[response]() if response in DEEDS else float(response == answer)
"""
FAILED = {
    "raise": "grading failed: ZeroDivisionError: division by zero",
    "raise without a text": "grading failed: Mute: unprintable",
    "sys.exit": "grading failed: SystemExit: 3",
    "interrupt": "grading failed: KeyboardInterrupt",
    "os._exit": "the grader died, twice (exit status 7)",
    "killed": "the grader died, twice (signal 9)",
    "memory": "grading failed: MemoryError",
    "recursion": "grading failed: RecursionError",
}
INVALID = {
    "str": "the reward is '1.0' (str), not a finite number",
    "None": "the reward is None (NoneType), not a finite number",
    "list": "the reward is [1.0] (list), not a finite number",
    "complex": "the reward is (1+2j) (complex), not a finite number",
    "nan": "the reward is nan (float), not a finite number",
    "inf": "the reward is -inf (float), not a finite number",
    "huge": "(int), not a finite number",
}
TIMED_OUT = ["sleep", "sleep in a child"]
GOOD = {"print": 0.5, "read": 0.5, "True": 1.0, "46": 1.0, "45": 0.0}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RewardSettings:
    """Graders know the reward `hostile`, since every interpreter with this path registers it when it starts."""
    (tmp_path / "sitecustomize.py").write_text(HOSTILE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setitem(REWARDS, "hostile", Reward("hostile", lambda response, answer: 0.0, isolated=True))
    return RewardSettings(function="hostile", timeout_s=6.0, workers=2)


def test_a_reward_of_no_size_that_fp32_can_add_up() -> None:
    assert finite_number(-1e9) == -1e9
    with pytest.raises(InvalidRewardError, match=r"the reward is 1e\+300 \(float\), more than 1e\+09 in size"):
        finite_number(1e300)


def test_whatever_an_isolated_reward_does_costs_its_response_only(hostile: RewardSettings, tmp_path: Path) -> None:
    responses = [*FAILED, *INVALID, *TIMED_OUT, *GOOD]
    groups = [group_of(n, "46", ["46", response]) for n, response in enumerate(responses)]
    log = tmp_path / "logs" / "rewards.log"
    with RewardWorkers(hostile, log) as workers:
        grader = BackgroundGrader(workers)
        for group in groups:
            grader.add([group])
        report = grader.finish()
    assert [group.trajectories[0].reward for group in groups] == [1.0] * len(groups)  # their neighbours
    assert [group.trajectories[1].reward for group in groups] == [GOOD.get(response, 0.0) for response in responses]
    assert (report.failed, report.invalid, report.timed_out) == (len(FAILED), len(INVALID), len(TIMED_OUT))
    assert report.metrics() == {"reward/failed": 8.0, "reward/invalid": 7.0, "reward/timed_out": 2.0}
    expected = FAILED | INVALID | dict.fromkeys(TIMED_OUT, "grading took longer than reward.timeout_s 6")
    lines = {line.partition(": ")[0]: line for line in report.faults}
    assert len(lines) == len(report.faults) == len(expected)
    for n, response in enumerate(responses):
        if response in expected:
            line = lines[f"prompt p:{n}, response 1"]
            assert expected[response] in line and line.endswith("; it counts 0") and "\n" not in line and len(line) < 300
    written = log.read_text()
    assert all(line in written for line in report.faults) and "more {rubbish}" in written
    deadline = time.monotonic() + 20
    while children_of_graders() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children_of_graders()  # killed with it


def children_of_graders() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            found += [entry.name] if entry.name.isdigit() and b"60.625" in (entry / "cmdline").read_bytes() else []
        except OSError:
            continue
    return found


def test_answers_that_nobody_asked_for_grade_nothing(hostile: RewardSettings, tmp_path: Path) -> None:
    """A grader's forked child answers too: the worker is replaced, and no other response gets the stray answer."""
    source = HOSTILE.replace('    "raise": ', '    "fork": child_that_answers,\n    "raise": ')
    (tmp_path / "sitecustomize.py").write_text(source)
    with RewardWorkers(hostile, tmp_path / "rewards.log") as workers:
        rewards, report = workers.grade([("46", "46"), ("fork", "46"), *[("45", "46"), ("slow", "46")] * 20])
        assert rewards[0] == 1.0 and rewards[1] in (0.0, 0.25, 0.5) and rewards[2:] == [0.0, 1.0] * 20
        assert report.graded == 42 and report.timed_out == 0
        assert workers.grade([("46", "46")] * 4)[0] == [1.0] * 4


@pytest.mark.parametrize(
    "value",
    [
        1,
        0.5,
        True,
        np.float32(0.5),
        np.float64(0.5),
        np.int64(3),
        np.bool_(True),
        np.array(0.5),
        torch.tensor(0.5),
        Fraction(1, 2),
    ],
    ids=repr,
)
def test_numbers_of_all_kinds_are_rewards(value) -> None:
    number = finite_number(value)
    assert type(number) is float and number == float(value)


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1", b"1", [], [1.0], {}, 1j, np.complex64(1), np.array([0.5, 1]), np.array([0.5]).tolist(), torch.ones(2)),
        *(float("nan"), float("inf"), np.float32("nan"), np.float64("-inf"), torch.tensor(float("nan")), 10**400, Decimal(1)),
        object(),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_anything_else_is_not(value) -> None:
    with pytest.raises(InvalidRewardError, match=r"the reward is .*, not a finite number") as error:
        finite_number(value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 150


def rewards_of(monkeypatch: pytest.MonkeyPatch, function) -> RewardWorkers:
    monkeypatch.setitem(REWARDS, "inline", Reward("inline", function))
    return RewardWorkers(RewardSettings(function="inline"), token_text={5: "a", 6: ""}.__getitem__)


def test_inline_rewards_are_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": float("nan"), "b": None, "c": "1.0", "d": np.float32(0.5), "e": True}

    def grade(response: str, answer: str):
        if response == "exit":
            sys.exit("enough")
        return values[response]

    group = group_of(3, "46", [*values, "f", "exit"])
    report = rewards_of(monkeypatch, grade).grade_groups([group])
    assert [t.reward for t in group.trajectories] == [0.0, 0.0, 0.0, 0.5, 1.0, 0.0, 0.0]
    assert (report.invalid, report.failed, report.timed_out) == (3, 2, 0)
    assert report.faults == [
        "prompt p:3, response 0: the reward is nan (float), not a finite number; it counts 0",
        "prompt p:3, response 1: the reward is None (NoneType), not a finite number; it counts 0",
        "prompt p:3, response 2: the reward is '1.0' (str), not a finite number; it counts 0",
        "prompt p:3, response 5: grading failed: KeyError: 'f'; it counts 0",
        "prompt p:3, response 6: grading failed: SystemExit: enough; it counts 0",
    ]


OF_NO_ORDER = [{0: 0.5, 1: 0.5}, {3.0, 4.0}, b"ab"]
"""Their members are numbers, and no rewards."""


@pytest.mark.parametrize("value", [[1.0], [1.0, float("nan")], [1.0, None], 1.0, None, ["0", "1"], "01", *OF_NO_ORDER], ids=repr)
def test_dense_rewards_too(monkeypatch: pytest.MonkeyPatch, value) -> None:
    group = group_of(0, "46", ["a", "a"])
    replies = iter([[0.5, np.float32(0.25)], value])
    report = rewards_of(monkeypatch, lambda tokens, answer: next(replies)).grade_groups([group])
    assert [t.token_rewards for t in group.trajectories] == [[0.5, 0.25], [0.0, 0.0]]
    assert (report.invalid, report.failed) == (1, 0) and report.faults[0].startswith("prompt p:0, response 1: the reward ")


def test_the_user_is_told_of_the_first_few(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    rewards = rewards_of(monkeypatch, lambda response, answer: None)
    engines: Any = SimpleNamespace()
    source = SampledRollouts(Settings(), engines, rewards, note=notes.append)
    groups = [group_of(n, "46", ["a", "b"]) for n in range(4)]
    source._grader = BackgroundGrader(rewards)
    for group in groups:
        source._grader.add([group])
    assert source.grade(groups).metrics() == {"reward/timed_out": 0.0, "reward/failed": 0.0, "reward/invalid": 8.0}
    assert len(notes) == MOST_FAULTS_NAMED + 1
    assert notes[0] == "warning: prompt p:0, response 0: the reward is None (NoneType), not a finite number; it counts 0"
    assert notes[-1] == f"warning: {8 - MOST_FAULTS_NAMED} more responses could not be graded; all are in logs/rewards.log"
