"""A step whose evaluation was given up, because the run was told to leave, is evaluated and recorded where the run goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from tic_megatron.checkpoints import RunState
from tic_megatron.config import Settings
from tic_megatron.data.quality import SkippedInARow, SkippedUpdate
from tic_megatron.preemption import Preempted, Preemption
from tic_megatron.remote import WorkerError
from tic_megatron.run import Run


class Recorder(Run):
    """A run of which only the records are real: its rows, and the steps that it has saved."""

    def __init__(self, folder, state, saved):
        self.settings, self.dir, self.state, self._saved = Settings(), folder, state, saved
        self.settings.trainer.steps, self.settings.rollout.save_every = 4, 0
        self.checkpoints = SimpleNamespace(failed=0, problems=list)
        self.preemption, self.memory, self._cursor_state = Preemption(), None, {"place": state.step}
        self.skipped_in_a_row = SkippedInARow(3, state.skipped_in_a_row)
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
    cut.skipped_in_a_row.add([SkippedUpdate(1, ["p"])], 2)
    cut.trained(step, [], {"reward/mean": 0.1 + 0.2, "reward/x": float("nan")})
    with pytest.raises(Preempted):
        cut.record()
    assert cut.rows == [] and cut.saves == [] and cut.state.step == step
    on = Recorder(tmp_path, RunState(**json.loads(json.dumps(asdict(cut.state)))), saved=step)
    assert on.state.cursor == {"place": step - 1} and on.skipped_in_a_row.count == 1
    on.record()
    assert repr(on.rows) == repr(whole.rows) and len(on.rows) == 1 and on.rows[0][0] == step
    assert on.state.unrecorded is None and whole.state.unrecorded is None
    assert whole.saves == ([4] if step == 4 else []) and on.saves == []  # it continues from that checkpoint


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("made", [0, 1, 2])  # the rollout is there: in the checkpoint, when the run is told to leave, later
def test_the_rollout_that_is_being_made_ahead_is_waited_for_when_the_step_is_safe(tmp_path, made, failing):
    events = []
    run = Recorder(tmp_path, RunState(step=3), saved=3 if made == 0 else 2)
    run.settings.rollout.steps_ahead, run._saved_pending = 1, made == 0
    run.actors = SimpleNamespace(restore=lambda: events.append("restore"))
    run.progress.phase = lambda name: None
    run.checkpoints.finish = lambda: events.append("finish")

    def save():
        run._saved_pending = run.rollouts.pending(3) is not None
        events.append(("save", run._saved_pending))

    def wait(actors, version):
        assert (tmp_path / "requeue").exists() and version == 3
        events.append("wait")
        if failing:
            raise WorkerError("no engine is left")

    run._save = save
    pending = SimpleNamespace(write="write")
    run.rollouts = SimpleNamespace(wait=wait, pending=lambda trained: pending if "wait" in events or made == 1 else None)
    run.checkpoints.add_pending = lambda step, write: events.append(("add", step, write))
    run.leave("SIGTERM")
    assert (tmp_path / "requeue").read_text() == "left at SIGTERM after step 3\n"
    saves = {0: [], 1: [("save", True)], 2: [("save", False)]}[made]
    again = ["wait", *([] if failing else [("add", 3, "write")])] if made == 2 else []
    assert [event for event in events if event not in ("restore", "finish")] == [*saves, *again]
    assert "finish" in events[: events.index("wait")] if again else True
