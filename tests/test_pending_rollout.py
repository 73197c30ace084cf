"""A rollout that was made ahead of its step, when a run goes on from a checkpoint; without engines."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.rollouts import random_rollout
from tic_megatron.checkpoints import SETTINGS_FILE
from tic_megatron.config import RunSettings, Settings
from tic_megatron.rewards import GradeReport
from tic_megatron.rollout.engines import Rollout
from tic_megatron.rollout.generation import Outcome
from tic_megatron.rollout.pending import PendingRollout
from tic_megatron.rollout.source import SampledRollouts
from tic_megatron.run import Run

MADE, MADE_AGAIN = (random_rollout(seed=seed, n_prompts=4, group_size=2, vocab=100) for seed in (1, 2))
OUTCOME = Outcome(seconds=2.0, busy={0: 0.5}, reissued=3)


def continued(tmp_path, *, steps_ahead):
    """Rollouts of a run that continues: prompt p3 of step 5 was set aside, and the others' groups are in the checkpoint."""
    aside = [(MADE[3].prompt, "engines failed on it")]
    PendingRollout.of(5, Rollout(MADE[:3], aside, OUTCOME), GradeReport(graded=6)).write(tmp_path)
    settings = Settings()
    settings.rollout.steps_ahead = steps_ahead
    pool = SimpleNamespace(failures=0, restarts=0)
    engines: Any = SimpleNamespace(pool=pool, sample=lambda prompts, **_: Rollout(MADE_AGAIN, [], OUTCOME))
    rewards: Any = SimpleNamespace(grade_groups=lambda groups: GradeReport(len(groups)))
    source = SampledRollouts(settings, engines, rewards, note=lambda line: None)
    source.restore(PendingRollout.read(tmp_path))
    return source


@pytest.mark.parametrize(
    ("allowed", "temperature", "used"),
    [([], 1.0, True), (["trainer.prompts_per_step"], 1.0, True), (["reward.function"], 1.0, False), ([], 0.7, False)],
)
def test_it_is_made_again_where_what_it_was_made_with_may_have_changed(tmp_path, allowed, temperature, used):
    """Allowed to this command, or to one before it, which has changed the folder's settings."""
    PendingRollout.of(5, Rollout(MADE, [], OUTCOME), GradeReport(graded=8)).write(tmp_path)
    restored, notes = [], []
    run = Run.__new__(Run)
    run.settings = Settings(run=RunSettings(allow_change=allowed))
    changed = Settings(run=RunSettings(dir="elsewhere"))
    changed.rollout.temperature = temperature
    changed.save(tmp_path / SETTINGS_FILE)
    run.rollouts = SimpleNamespace(restore=restored.append)
    run.progress = SimpleNamespace(note=notes.append)
    run.saving = SimpleNamespace(has_pending=False)
    run._restore_pending(tmp_path)
    assert (len(restored), run.saving.has_pending, len(notes)) == ((1, True, 0) if used else (0, False, 1))


def test_it_is_trained_on(tmp_path):
    source = continued(tmp_path, steps_ahead=1)
    source.begin([group.prompt for group in MADE], 5)
    groups = source.collect()
    assert groups == MADE[:3] and source.grade(groups).graded == 6
    counts = source.metrics()
    assert counts["rollout/prompts_set_aside"] == 1 and counts["rollout/reissued_prompts"] == 3
    assert counts["rollout/engine_idle_fraction"] == 0.5
    source.begin([group.prompt for group in MADE], 6)
    assert source.collect() == MADE_AGAIN


@pytest.mark.parametrize(
    ("steps_ahead", "prompts", "step"),
    [
        (0, MADE, 5),  # on-policy now: nobody would correct for the older weights
        (1, MADE[:3], 5),  # fewer prompts per step: the fourth is due in the next one, and would be trained on twice
        (1, [*MADE[:3], random_rollout(seed=3, n_prompts=5, group_size=2, vocab=100)[4]], 5),  # another problem
        (1, MADE, 6),
    ],
)
def test_it_is_made_again_when_something_else_is_due(tmp_path, steps_ahead, prompts, step):
    source = continued(tmp_path, steps_ahead=steps_ahead)
    source.begin([group.prompt for group in prompts], step)
    assert source.collect() == MADE_AGAIN


def test_it_is_in_the_checkpoint_until_its_step_is_trained(tmp_path):
    """Also when the run is told to leave just after it was collected: the weights that made it are gone by then."""
    source = continued(tmp_path, steps_ahead=1)
    # Not begun: the checkpoint that the run continues from has it, but may lie elsewhere.
    source.pending(4).write(tmp_path)
    again = PendingRollout.read(tmp_path)
    assert again == source.pending(4) and again.step == 5 and again.groups == MADE[:3] and source.pending(5) is None
    source.begin([group.prompt for group in MADE], 5)
    between = source.pending(4)
    groups = source.collect()
    for kept in (between, source.pending(4)):
        assert kept.step == 5 and kept.groups == groups == MADE[:3] and kept.report.graded == 6
        assert kept.set_aside == [(MADE[3].prompt.id, "engines failed on it")]
    assert source.pending(5) is None
    source.begin([group.prompt for group in MADE], 6)
    source.wait(None, 5)
    assert source.pending(5).groups == MADE_AGAIN and source.pending(6) is None
    source.collect()
    source.begin([group.prompt for group in MADE], 6, refill=1)
    source.wait(None, 5)
    assert source.pending(5) is None


def test_without_working_ahead_nothing_is_kept(tmp_path):
    source = continued(tmp_path, steps_ahead=0)
    source.begin([group.prompt for group in MADE], 5)
    source.collect()
    assert source.pending(4) is None


def test_leaving_does_not_wait_for_graders(tmp_path):
    """The step that was trained is saved first; then the rewards are waited for, or what they raise is told."""
    let_go = threading.Event()

    def grade(groups):
        let_go.wait(20)
        return GradeReport(len(groups))

    source = continued(tmp_path, steps_ahead=1)
    source.rewards = SimpleNamespace(grade_groups=grade)
    source.engines.sample = lambda prompts, finished, **_: finished(MADE_AGAIN) or Rollout(MADE_AGAIN, [], OUTCOME)
    source.begin([group.prompt for group in MADE], 6)
    while source._under_way.at_work:
        time.sleep(0.01)
    assert source.pending(5) is None
    groups = source.collect()
    assert groups == MADE_AGAIN and source.pending(5) is None  # nor when it has just been collected
    let_go.set()
    source.wait(None, 5)
    assert source.pending(5).groups == MADE_AGAIN and source.pending(5).report.graded == len(MADE_AGAIN)
