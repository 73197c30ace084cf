"""A step whose evaluation was given up, because the run was told to leave, is evaluated and recorded where the run goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from tic_megatron.checkpoints import RunState
from tic_megatron.config import Settings
from tic_megatron.preemption import Preempted, Preemption
from tic_megatron.run import Run


class Recorder(Run):
    """A run of which only the records are real: its rows, and the steps that it has saved."""

    def __init__(self, folder, state, saved):
        self.settings, self.dir, self.state, self._saved = Settings(), folder, state, saved
        self.settings.trainer.steps, self.settings.rollout.save_every = 4, 0
        self.checkpoints = SimpleNamespace(failed=0, problems=list)
        self.preemption, self.memory, self._cursor_state = Preemption(), None, {"place": state.step}
        self.rows, self.saves = [], []
        self.logger = SimpleNamespace(log=lambda step, metrics: self.rows.append((step, metrics)))
        self.health = SimpleNamespace(check=lambda step, metrics: [])
        self.progress = SimpleNamespace(update=lambda step, metrics: None, note=print)

    def evaluate(self, step):
        with self.preemption.breakable():
            return {"eval/heldout/accuracy": step / 8}

    def to_training(self):
        pass

    def log_memory(self, step, phase):
        pass

    def _save(self):
        self.saves.append(self.state.step)


@pytest.mark.parametrize("step", [3, 4])
def test_a_step_is_recorded_once_whenever_the_run_leaves(tmp_path, step):
    whole = Recorder(tmp_path, RunState(step=step - 1), saved=None)
    whole.trained(step, [], {"reward/mean": 0.1 + 0.2, "reward/x": float("nan")})
    whole.record()
    cut = Recorder(tmp_path, RunState(step=step - 1), saved=None)
    cut.preemption.signal = "SIGTERM"  # came in the training step
    cut.trained(step, [], {"reward/mean": 0.1 + 0.2, "reward/x": float("nan")})
    with pytest.raises(Preempted):
        cut.record()
    assert cut.rows == [] and cut.saves == [] and cut.state.step == step
    on = Recorder(tmp_path, RunState(**json.loads(json.dumps(asdict(cut.state)))), saved=step)
    assert on.state.cursor == {"place": step - 1}
    on.record()
    assert repr(on.rows) == repr(whole.rows) and len(on.rows) == 1 and on.rows[0][0] == step
    assert on.state.unrecorded is None and whole.state.unrecorded is None
    assert whole.saves == ([4] if step == 4 else []) and on.saves == []  # it continues from that checkpoint
