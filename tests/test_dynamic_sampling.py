"""DAPO's dynamic sampling: a step's groups of equal rewards are replaced by those of further prompts."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.runs import untimed
from tic_megatron.config import Settings
from tic_megatron.observability.rollouts import read_rollout, rollout_path
from tic_megatron.rewards import GradeReport
from tic_megatron.rollout.engines import Rollout
from tic_megatron.rollout.generation import Outcome
from tic_megatron.rollout.source import SampledRollouts
from tic_megatron.run import Run
from tic_megatron.trajectory import Group, Prompt, Trajectory

WANTED = 8


class Source:
    """Groups with unequal rewards at a given rate; what it was asked for."""

    def __init__(self, useful: float, seed: int = 0) -> None:
        self.useful, self.draw = useful, random.Random(seed)
        self.asked: list[tuple[int, int, int]] = []

    def begin(self, prompts, step, refill=0):
        self.asked.append((len(prompts), step, refill))
        self.prompts = prompts

    def collect(self):
        return [self.group(prompt) for prompt in self.prompts]

    def grade(self, groups):
        return GradeReport(graded=2 * len(groups), timed_out=1)

    def group(self, prompt: Prompt) -> Group:
        rewards = [0.0, 1.0] if self.draw.random() < self.useful else [1.0, 1.0]
        return Group(prompt, [Trajectory(prompt, [1], [0.0], [1], "", False, 0, reward=r) for r in rewards])


class Cursor:
    """Prompts without end."""

    def __init__(self) -> None:
        self.numbers = itertools.count()

    def next(self, n):
        return [Prompt(id=str(next(self.numbers)), text="", answer="", token_ids=(1,)) for _ in range(n)]

    def state_dict(self):
        return {"dealt": next(self.numbers)}


def refill(source: Source, **rollout) -> tuple[list[Group], list[Group], dict, SimpleNamespace]:
    settings = Settings()
    settings.trainer.prompts_per_step = WANTED
    for name, value in rollout.items():
        setattr(settings.rollout, name, value)
    notes: list[str] = []
    run: Any = SimpleNamespace(
        settings=settings, rollouts=source, cursor=Cursor(), progress=SimpleNamespace(note=notes.append), notes=notes
    )
    groups = [source.group(prompt) for prompt in run.cursor.next(WANTED)]
    report = GradeReport(graded=2 * WANTED)
    kept, left_out, metrics = Run.refill(run, 3, groups, report)
    assert (report.graded, report.timed_out) == (2 * len([*kept, *left_out]), len(source.asked))
    ids = [group.prompt.id for group in [*kept, *left_out]]
    assert len(set(ids)) == len(ids) == WANTED + sum(n for n, _, _ in source.asked)
    return kept, left_out, metrics, run


def unequal(group: Group) -> bool:
    return len({t.reward for t in group.trajectories}) > 1


@pytest.mark.parametrize("seed", range(20))
def test_a_step_is_filled_with_groups_of_unequal_rewards(seed):
    source = Source(useful=0.3, seed=seed)
    kept, left_out, metrics, run = refill(source, dynamic_sampling=True)
    assert len(kept) == WANTED and all(map(unequal, kept))
    assert [int(group.prompt.id) for group in kept] == sorted(int(group.prompt.id) for group in kept)  # no order by reward
    surplus = [group for group in left_out if unequal(group)]
    assert all(int(group.prompt.id) > int(kept[-1].prompt.id) for group in surplus)
    assert [(step, number) for _, step, number in source.asked] == [(3, k + 1) for k in range(len(source.asked))]
    assert all(1 <= n <= WANTED for n, _, _ in source.asked)
    assert metrics == {"rollout/refills": float(len(source.asked))}
    assert run._cursor_state["dealt"] == len(kept) + len(left_out)  # a resumed run goes on behind them
    assert not run.notes


def test_it_ends_with_what_there_is():
    kept, left_out, metrics, run = refill(Source(useful=0.0), dynamic_sampling=True, max_refills=3)
    assert len(kept) == WANTED and len(left_out) == 3 * WANTED and metrics["rollout/refills"] == 3
    assert "only 0 of 8 groups of step 3 have unequal rewards" in run.notes[0]
    kept, _, _, run = refill(Source(useful=0.05, seed=1), dynamic_sampling=True, max_refills=2)
    assert 1 <= len(kept) < WANTED and all(map(unequal, kept)) and run.notes


@pytest.mark.parametrize("rollout", [{}, {"dynamic_sampling": True, "replay": "runs/old"}])
def test_without_it_and_on_saved_rollouts_nothing_is_asked_for(rollout):
    source = Source(useful=0.3)
    kept, left_out, metrics, _ = refill(source, **rollout)
    assert len(kept) == WANTED and not left_out and not source.asked and not metrics


@pytest.mark.parametrize("seed", range(10))
def test_engines_idle_share_is_that_of_all_rollouts_of_the_step(seed):
    draw = random.Random(seed)
    pool, rewards = SimpleNamespace(failures=0, restarts=0), SimpleNamespace(grade_groups=lambda groups: GradeReport())
    engines: Any = SimpleNamespace(pool=pool)
    source = SampledRollouts(Settings(), engines, cast(Any, rewards))
    for step in (1, 2):
        outcomes = []
        for refill in range(draw.randint(1, 4)):
            busy = {engine: draw.random() for engine in range(3)}
            outcomes.append(outcome := Outcome(seconds=draw.uniform(1.0, 60.0), busy=busy))
            engines.sample = lambda prompts, outcome=outcome, **_: Rollout([], [], outcome)
            source.begin([], step, refill or 1)  # one that may come to nothing
            source.collect()
        seconds = sum(outcome.seconds for outcome in outcomes)
        idle = [1 - sum(outcome.busy[engine] * outcome.seconds for outcome in outcomes) / seconds for engine in range(3)]
        metrics = source.metrics()
        assert metrics["rollout/engine_idle_fraction"] == pytest.approx(sum(idle) / 3)
        assert metrics["rollout/engine_idle_fraction_max"] == pytest.approx(max(idle))
        assert "rollout/engine_idle_fraction" not in source.metrics()  # nothing was made since


@pytest.mark.slow  # two short runs
def test_a_run_refills_its_steps(task, tmp_path):
    from tests.test_trainer import train

    problems = [f"--model.path={task / 'model'}", f"--data.train={task / 'train.jsonl'}", "--reward.function=exact"]
    steps = ["--trainer.steps=2", "--trainer.prompts_per_step=8", "--trainer.updates_per_step=2", "--cluster.device=cpu"]
    sizes = ["--rollout.group_size=4", "--rollout.max_prompt_tokens=64", "--rollout.max_response_tokens=8"]
    actor = ["--actor.max_tokens_per_microbatch=1024", "--actor.learning_rate=3e-4", "--rollout.dynamic_sampling=true"]
    arguments = [*problems, *steps, *sizes, *actor]
    run, replayed = tmp_path / "run", tmp_path / "replayed"
    train(*arguments, f"--run.dir={run}")
    rows = untimed(run)
    assert sum(row["rollout/refills"] for row in rows) > 0
    for row in rows:
        groups = read_rollout(rollout_path(run, row["step"]))
        assert len(groups) == 8 and all(map(unequal, groups))
        assert 0.0 < row["reward/zero_advantage_fraction"] < 1.0  # of all that was sampled
        assert row["policy/trained_trajectories"] == 32
    train(*arguments, f"--run.dir={replayed}", f"--rollout.replay={run}")
    for row, again in zip(rows, untimed(replayed), strict=True):
        assert again["policy/loss"] == row["policy/loss"] and again["policy/grad_norm"] == row["policy/grad_norm"]
