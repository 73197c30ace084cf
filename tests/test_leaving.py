"""A step whose evaluation was given up, because the run was told to leave, is evaluated and recorded where the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray

from tic_megatron.checkpoints import RunState
from tic_megatron.commands import driver
from tic_megatron.commands import train as train_command
from tic_megatron.config import Settings
from tic_megatron.data.quality import SkippedInARow, SkippedUpdate
from tic_megatron.preemption import Preempted, Preemption, mark, taking_signals
from tic_megatron.remote import WorkerError
from tic_megatron.rollout.source import _UnderWay
from tic_megatron.run import Run


class Recorder(Run):
    """A run of which only the records are real: its rows, and the steps that it has saved."""

    def __init__(self, folder, state, saved):
        self.settings, self.dir, self.state = Settings(), folder, state
        self.settings.trainer.steps, self.settings.rollout.save_every = 4, 0
        self.saving = Mock(step=saved, failed=0, has_pending=False)
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
    events: list[Any] = []
    run = Recorder(tmp_path, RunState(step=3), saved=3 if made == 0 else 2)
    run.settings.rollout.steps_ahead, run.saving.has_pending = 1, made == 0
    run.actors = SimpleNamespace(restore=lambda: events.append("restore"))
    run.progress.phase = lambda name: None
    run.saving.has = lambda step: run.saving.step == step
    run.saving.check = lambda: events.append("check")

    def save():
        run.saving.has_pending = run.rollouts.pending(3) is not None
        events.append(("save", run.saving.has_pending))

    def wait(actors, version):
        assert (tmp_path / "requeue").exists() and version == 3
        events.append("wait")
        if failing:
            raise WorkerError("no engine is left")

    run._save = save
    pending = SimpleNamespace(write="write")
    run.rollouts = SimpleNamespace(wait=wait, pending=lambda trained: pending if "wait" in events or made == 1 else None)
    run.saving.add_pending = lambda pending: events.append(("add", pending.write))
    run.leave("SIGTERM")
    assert (tmp_path / "requeue").read_text() == "left at SIGTERM after step 3\n"
    saves = {0: [], 1: [("save", True)], 2: [("save", False)]}[made]
    again = ["wait", *([] if failing else [("add", "write")])] if made == 2 else []
    assert [event for event in events if event not in ("restore", "check")] == [*saves, *again]
    if again:
        assert "check" in events[: events.index("wait")]  # the first save is on the disk by then


@pytest.mark.parametrize("wait", [lambda call: ray.wait([call], timeout=20), lambda call: ray.get(call, timeout=20)])
def test_a_signal_breaks_waits_for_ray_too(ray_cluster, wait):
    """Ray lets no exceptions of handlers through but Ctrl-C's: others become errors, or are dropped."""

    @ray.remote(num_cpus=0)
    def long():
        time.sleep(30)

    call, preemption, before = long.remote(), Preemption(), signal.getsignal(signal.SIGTERM)
    preemption.listen()
    begun = time.monotonic()
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Preempted, match="SIGTERM"), preemption.breakable():
            wait(call)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        ray.cancel(call, force=True)
    assert time.monotonic() - begun < 10


def test_the_actors_stay_the_rollouts_until_it_lets_go_of_them():
    """The thread of a rollout uses the actors, to revive engines, when the driver that waits for it is told to leave."""
    at_work, let_go, events = threading.Event(), threading.Event(), []

    def sample(grader):
        with under_way.lent_actors():
            at_work.set()
            let_go.wait(20)
            events.append("the thread has used them")
        with under_way.lent_actors():
            events.append("it uses them again")

    def interrupt(number, frame):
        threading.Timer(0.5, let_go.set).start()
        raise KeyboardInterrupt

    grader: Any = SimpleNamespace(abandon=lambda: None)
    under_way = _UnderWay(sample, grader)
    under_way.start()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            under_way.responses()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert at_work.is_set() and under_way.at_work and events == ["the thread has used them"]  # now they are the driver's
    under_way.responses()
    assert events[1:] == ["it uses them again"] and not under_way.at_work


def test_no_marker_can_be_left(tmp_path, capfd):
    """What the checks are at must not take the error for its own."""

    def leave_in_vain(number):
        raise OSError("no room")

    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError), taking_signals(leave_in_vain):
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(77)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    (tmp_path / "file").touch()
    settings = Settings()
    settings.run.dir = str(tmp_path / "file" / "run")
    assert train_command._leave(settings, signal.SIGTERM) == 1
    assert "without a marker: Not a directory" in capfd.readouterr().err


def test_whoever_read_the_output_is_gone(monkeypatch, tmp_path):
    """`| tee log`, say, which the same signal has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    broken = os.fdopen(writer, "w")
    monkeypatch.setattr("sys.stderr", broken)

    def fail():
        raise ConnectionError("gone")

    assert driver.drive(fail, tmp_path, what="run", interrupted=str) == 1
    with contextlib.suppress(OSError):
        broken.close()


@pytest.mark.parametrize(
    ("resume", "trained", "left", "without"),
    [
        ("auto", True, False, False),
        ("never", True, False, True),
        ("never", True, True, False),
        ("never", False, False, False),  # the folder is as new: the settings of such a run are put away
        ("/elsewhere/step_4", True, False, True),
        ("/elsewhere/step_4", True, True, False),
        ("/elsewhere/step_4", False, False, False),
    ],
)
def test_what_continues(tmp_path, resume, trained, left, without):
    """The same command would go back, or refuse, unless the run has left with a marker."""
    settings = Settings()
    settings.run.dir, settings.run.resume = str(tmp_path), resume
    settings.save(tmp_path / "config.yaml")
    if trained:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    if left:
        mark(tmp_path, "SIGTERM", 1)
    assert ("without --run.resume" in train_command._what_continues(settings)) == without
