"""Which run a folder holds, and what of it may change when it goes on. (What is refused is in tests/bad_input.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bad_input.folder_cases import MOVED_REWARD, STEP_1, STEP_2, flip, make_run, moved_reward, rewrite
from tests.models import make_tiny_qwen3
from tests.workspace import make_workspace, settings_of
from tic_megatron.commands.preflight import TrainInputs
from tic_megatron.commands.run_folder import begin_state, check_run_folder, find_checkpoint, record_changes
from tic_megatron.commands.train import _continue, _what_continues
from tic_megatron.config import SettingsError
from tic_megatron.preemption import mark, unmark


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_tiny_qwen3(tmp_path / "made", seed=0, tie_word_embeddings=True)
    return make_workspace(tmp_path, model)


def test_files_of_the_users_may_move(workspace):
    """Of programs the checkpoints have the hashes; what another one of that name would say is in tests/bad_input."""
    moved_reward(workspace)
    settings = settings_of(*workspace.base[1:], *MOVED_REWARD).resolve()
    check_run_folder(settings)
    assert find_checkpoint(settings)[1].step == 2
    registered = settings_of(*workspace.base[1:], "--reward.function=f").resolve()
    with pytest.raises(SettingsError, match=r"reward\.function \(.*a/r\.py:f there, f here\)"):  # another one of that name
        check_run_folder(registered)
    settings.reward.function = settings.reward.function.replace(":f", ":g")
    with pytest.raises(SettingsError, match=r"reward\.function \(.*a/r\.py:f there, .*b/r\.py:g here\)"):
        check_run_folder(settings)


def test_changes_are_recorded_in_another_folder_too(workspace):
    make_run(workspace)
    flags = ["--run.dir=other", f"--run.resume={STEP_2}", "--actor.learning_rate=0.1"]
    settings = settings_of(*workspace.base[1:], *flags).resolve()
    Path(settings.run.dir).mkdir()
    assert "actor.learning_rate 0.1" in record_changes(settings, workspace.root / STEP_2)
    (line,) = (workspace.root / "other" / "changes.jsonl").read_text().splitlines()
    assert set(json.loads(line)["changes"]) == {"actor.learning_rate"}


def test_a_restart_goes_on_from_the_runs_own_checkpoint_once_there_is_a_later_one(workspace):
    """Though the one that `run.resume` names, an older one of the same folder or one from elsewhere, may be gone by then."""
    make_run(workspace)
    own, gone = workspace.root / STEP_2, workspace.root / "gone" / "step_1"
    for step, expected in ((1, own), (2, gone), (5, gone)):
        inputs = TrainInputs(workspace.model, None, None, [], [], [], [], checkpoint=gone, step=step, damaged=[])
        settings = settings_of(*workspace.base[1:], f"--run.resume={STEP_1}").resolve()
        goes_on = _continue(inputs, settings)
        assert goes_on.checkpoint == expected and goes_on.step == (2 if expected == own else step)


@pytest.mark.parametrize("resume", ["never", STEP_1])
def test_a_requeue_of_a_command_that_goes_back_goes_on(workspace, resume):
    """Where the same command without the marker goes back once more, or is refused; from checkpoints of its own only."""
    make_run(workspace)
    run = workspace.root / "run"
    settings = settings_of(*workspace.base[1:], f"--run.resume={resume}").resolve()
    given = settings.run.resume

    def began_so(*steps):
        for step in (STEP_1, STEP_2):
            state = json.loads((workspace.root / step / "state.json").read_text())
            rewrite(f"{step}/state.json", json.dumps(state | {"resume": given if step in steps else "auto"}))(workspace)

    def step_of_the_next():
        check_run_folder(settings)
        return find_checkpoint(settings)[1].step

    def begins_again():
        if resume != "never":
            return step_of_the_next() == 1 and "without --run.resume" in _what_continues(settings)
        with pytest.raises(SettingsError, match="holds a run already"):
            check_run_folder(settings)
        return True

    mark(run, "SIGTERM", 2)
    assert begins_again()  # the folder's run has begun in another way: somebody wants to go back
    began_so(STEP_1, STEP_2)
    assert step_of_the_next() == 2 and "without" not in _what_continues(settings)
    assert begin_state(workspace.root / STEP_2, settings).resume == given  # and when it leaves again
    began_so(STEP_2)
    flip(f"{STEP_2}/state.json".replace("state.json", "actors/__0_0.distcp"))(workspace)
    with pytest.raises(SettingsError, match="step_2 is damaged"):
        step_of_the_next()  # the first step's is another run's
    flip(f"{STEP_2}/actors/__0_0.distcp")(workspace)
    began_so(STEP_1, STEP_2)
    mark(run, "SIGTERM", 2, begun=False)
    assert begins_again()  # it was told to leave before it had gone back
    unmark(run)
    assert begins_again()


def test_a_run_that_never_goes_on_may_be_told_to_leave_before_its_first_step(workspace):
    settings = settings_of(*workspace.base[1:], "--run.resume=never").resolve()
    run = workspace.root / "run"
    run.mkdir()
    settings.save(run / "config.yaml")
    with pytest.raises(SettingsError, match="holds a run already"):
        check_run_folder(settings)
    mark(run, "SIGTERM", 0)
    check_run_folder(settings)
    assert find_checkpoint(settings)[0] is None and "without" not in _what_continues(settings)
