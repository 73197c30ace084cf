"""The overlong punishment of DAPO: its formula, where it is added, and where it is not."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from tests.rollouts import group_of, rollout_of
from tests.workspace import settings_of
from tic_megatron.config import RewardSettings, Settings, SettingsError
from tic_megatron.config_checks import check_settings
from tic_megatron.evaluation.accuracy import evaluate
from tic_megatron.observability.rollouts import read_rollout, write_rollout
from tic_megatron.rewards import RewardWorkers
from tic_megatron.rewards.background import BackgroundGrader
from tic_megatron.rewards.overlong import overlong_punishment
from tic_megatron.rollout.source import ReplayedRollouts, SampledRollouts
from tic_megatron.run import Run
from tic_megatron.trainer import set_advantages
from tic_megatron.trajectory import Group


@pytest.mark.parametrize(("longest", "buffer"), [(20480, 4096), (64, 64), (10, 1), (7, 3)])
def test_equation_13(longest: int, buffer: int) -> None:
    """Its three cases, in exact arithmetic; continuous at both seams, and -1 at the longest."""
    for length in range(longest + 3):
        if length <= longest - buffer:
            expected = Fraction(0)
        elif length <= longest:
            expected = Fraction((longest - buffer) - length, buffer)
        else:
            expected = Fraction(-1)
        assert overlong_punishment(length, longest, buffer) == pytest.approx(float(expected), abs=1e-15)
    assert overlong_punishment(longest, longest, buffer) == -1.0
    assert overlong_punishment(longest - buffer, longest, buffer) == 0.0


def of_lengths(index: int, lengths: list[int], responses: list[str]) -> Group:
    """Responses with so many tokens, the last of each not sampled by the policy."""
    group = group_of(index, "46", responses)
    for trajectory, n in zip(group.trajectories, lengths, strict=True):
        trajectory.response_ids, trajectory.inference_logprobs = [5] * (n + 1), [-0.5] * (n + 1)
        trajectory.response_mask = [1] * n + [0]
    return group


LENGTHS, RESPONSES = [3, 6, 8, 10], ["46", "46", "45", "46"]
PUNISHMENTS = [0.0, 0.0, -0.25, -0.5]  # 0.5 times the share of the last 4 of 10 tokens


def settings(buffer: int = 4) -> Settings:
    reward = RewardSettings(function="exact", overlong_buffer_tokens=buffer, overlong_penalty=0.5)
    made = Settings(reward=reward)
    made.rollout.max_response_tokens = 10
    return made


def graded(options: Settings) -> tuple[list[Group], dict[str, float]]:
    groups = [of_lengths(n, LENGTHS, RESPONSES) for n in range(2)]
    with RewardWorkers(options.reward) as rewards:
        engines: Any = SimpleNamespace()
        source = SampledRollouts(options, engines, rewards)
        source._grader = BackgroundGrader(rewards)
        for group in groups:
            source._grader.add([group])
        report = source.grade(groups)
    return groups, report.metrics() | punished(options, groups)


def punished(options: Settings, groups: list[Group]) -> dict[str, float]:
    """What a run makes of graded groups."""
    run: Any = SimpleNamespace(settings=options)
    return Run.punish_overlong(run, groups)


def test_it_is_added_before_the_advantages() -> None:
    groups, metrics = graded(settings())
    set_advantages(groups, settings().algorithm)
    rewards = [1.0, 1.0, -0.25, 0.5]
    mean = sum(rewards) / 4
    for group in groups:
        assert [t.reward for t in group.trajectories] == rewards
        assert [t.overlong for t in group.trajectories] == PUNISHMENTS
        assert [t.advantage for t in group.trajectories] == pytest.approx([r - mean for r in rewards])
    assert metrics["reward/overlong_mean"] == -0.75 / 4 and metrics["reward/overlong_fraction"] == 0.5


def test_it_is_off_by_default() -> None:
    groups, metrics = graded(settings(buffer=0))
    assert [t.reward for t in groups[0].trajectories] == [1.0, 1.0, 0.0, 1.0]
    assert not [name for name in metrics if "overlong" in name]
    assert Settings().reward.overlong_buffer_tokens == 0


def test_a_replay_trains_on_the_same_rewards(tmp_path) -> None:
    """They are saved with the punishment, which is not added a second time."""
    groups, metrics = graded(settings())
    write_rollout(tmp_path / "step_000003.jsonl", 3, groups)
    again = settings()
    again.rollout.replay = str(tmp_path)
    source = ReplayedRollouts(again)
    source.begin([], 3)
    replayed = source.collect()
    replayed_metrics = source.grade(replayed).metrics() | punished(again, replayed)
    assert replayed == groups == read_rollout(tmp_path / "step_000003.jsonl")
    assert replayed_metrics == {name: value for name, value in metrics.items() if "overlong" in name}
    assert '"overlong": -0.25' in (tmp_path / "step_000003.jsonl").read_text()


def test_evaluation_knows_nothing_of_it() -> None:
    options = settings()
    group = of_lengths(0, [10], ["46"])
    engines = SimpleNamespace(generate=lambda prompts, **_: rollout_of([group]))
    with RewardWorkers(options.reward) as rewards:
        result = evaluate(engines, [group.prompt], rewards, options.eval, name="x", max_tokens=10)
    assert result.accuracy == 1.0 and group.trajectories[0].reward == 1.0


def test_a_buffer_longer_than_a_response_is_refused(tmp_path) -> None:
    given = settings_of("--model.path=x", "--data.train=y", "--reward.overlong_buffer_tokens=1025")
    with pytest.raises(SettingsError, match=r"reward.overlong_buffer_tokens is 1025: .*rollout.max_response_tokens, 1024"):
        check_settings(given)
