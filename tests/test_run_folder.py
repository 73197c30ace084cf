"""Which run a folder holds, and what of it may change when it goes on. (What is refused is in tests/bad_input.)"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.bad_input.folder_cases import MOVED_REWARD, STEP_1, STEP_2, flip, make_run, moved_reward
from tests.models import make_tiny_qwen3
from tests.workspace import make_workspace, settings_of
from tic_megatron.commands.preflight import TrainInputs, _set_steps
from tic_megatron.commands.run_folder import began_by, check_run_folder, find_checkpoint, goes_on, record_changes
from tic_megatron.commands.train import _continue, _leave, _prepare, _what_continues
from tic_megatron.config import Settings, SettingsError
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


@pytest.mark.parametrize("name", ["logs", "checkpoints", "hf", "metrics.jsonl"])
def test_what_belongs_to_somebody_else_is_refused(workspace, monkeypatch, name):
    """As when a container has run as root: no save would succeed, or the export at the very end would not."""
    make_run(workspace)
    (workspace.root / "run" / "hf").mkdir()
    settings, ask = settings_of(*workspace.base[1:]).resolve(), os.access
    check_run_folder(settings)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != name and ask(path, mode))
    with pytest.raises(SettingsError, match=rf"run\.dir: .*run/{name} is not yours to use"):
        check_run_folder(settings)


def test_changes_are_recorded_in_another_folder_too(workspace):
    make_run(workspace)
    flags = ["--run.dir=other", f"--run.resume={STEP_2}", "--actor.learning_rate=0.1"]
    settings = settings_of(*workspace.base[1:], *flags).resolve()
    Path(settings.run.dir).mkdir()
    assert "actor.learning_rate 0.1" in record_changes(settings, workspace.root / STEP_2)
    (line,) = (workspace.root / "other" / "changes.jsonl").read_text().splitlines()
    assert set(json.loads(line)["changes"]) == {"actor.learning_rate"}


def test_a_restart_goes_on_from_the_runs_own_checkpoint_once_there_is_one(workspace):
    """And not from the one that `run.resume` names, which may be gone by then."""
    moved_reward(workspace)
    there = (workspace.root / "run").rename(workspace.root / "there")
    inputs = TrainInputs(workspace.model, None, None, [], [], [], [], checkpoint=there / "checkpoints/step_1", step=1, damaged=[])
    settings = settings_of(*workspace.base[1:], *MOVED_REWARD, f"--run.resume={inputs.checkpoint}").resolve()
    assert _continue(inputs, settings) == inputs
    reward = workspace.root / "b" / "r.py"
    before = reward.read_text()
    reward.write_text("def f(response): return 2.0\n")
    with pytest.raises(SettingsError, match=r"reward\.function: .*r\.py:f has changed since .*there/checkpoints/step_1"):
        _continue(inputs, settings)
    reward.write_text(before)
    moved_reward(workspace)
    shutil.rmtree(there)
    goes_on = _continue(inputs, settings)
    assert (goes_on.checkpoint, goes_on.step) == (workspace.root / STEP_2, 2)


def began(workspace, resume):
    """The folder's run has last started with this `run.resume`."""
    settings = settings_of(*workspace.base[1:], f"--run.resume={resume}").resolve()
    settings.save(workspace.root / "run" / "config.yaml")
    return settings


@pytest.mark.parametrize("resume", ["never", STEP_1])
def test_a_requeue_of_a_command_that_goes_back_goes_on(workspace, resume):
    """Where the same command without the marker goes back once more, or is refused."""
    make_run(workspace)
    run = workspace.root / "run"
    settings = settings_of(*workspace.base[1:], f"--run.resume={resume}").resolve()

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
    began(workspace, resume)
    auto = settings_of(*workspace.base[1:]).resolve()  # somebody has continued it without
    inputs = TrainInputs(workspace.model, None, None, [], [], [], [], checkpoint=workspace.root / STEP_2, step=2, damaged=[])
    _prepare(run, auto, inputs)
    assert step_of_the_next() == 2 and "without" not in _what_continues(settings)
    flip(f"{STEP_2}/state.json")(workspace)
    assert step_of_the_next() == 1 and "step_2 is damaged: state.json" in find_checkpoint(settings)[2][0]
    flip(f"{STEP_2}/state.json")(workspace)
    mark(run, "SIGTERM", 2, begun=False)
    assert begins_again()  # it was told to leave before it had gone back
    unmark(run)
    assert begins_again()


def test_a_run_that_began_elsewhere_begins_there_again_until_it_has_a_checkpoint_of_its_own(workspace):
    """Also without `run.resume`; the next time too. (It has died hard, after a step.)"""
    make_run(workspace)
    kept = workspace.root / "kept"
    shutil.move(workspace.root / STEP_2, kept)
    shutil.rmtree(workspace.root / "run" / "checkpoints")
    given = began(workspace, kept).run.resume
    settings = settings_of(*workspace.base[1:]).resolve()
    for _ in range(2):
        check_run_folder(settings)
        checkpoint, state, problems = find_checkpoint(settings)
        assert (checkpoint, state.step, problems) == (kept, 2, [])
        inputs = TrainInputs(workspace.model, None, None, [], [], [], [], checkpoint=kept, step=2, damaged=[])
        _prepare(workspace.root / "run", settings, inputs)
        assert began_by(settings) == given and settings.run.resume == "auto"
    shutil.rmtree(kept)
    with pytest.raises(
        SettingsError, match=r"^run\.dir: the run in .*/run began elsewhere, but .*/kept is not a complete checkpoint"
    ):
        find_checkpoint(settings)


def test_a_command_that_is_told_to_leave_before_it_begins_leaves_the_marker_of_the_folders_run(workspace):
    make_run(workspace)
    given = began(workspace, STEP_1)
    mark(workspace.root / "run", "SIGTERM", 2)
    other = settings_of(*workspace.base[1:], f"--run.resume={workspace.root}/kept").resolve()
    assert not goes_on(other)
    assert _leave(other, signal.SIGUSR1, begun=False) == 0
    assert goes_on(given) and find_checkpoint(given)[1].step == 2


@pytest.mark.parametrize("resume", [None, 5, ["never"], {"a": 1}], ids=repr)
def test_a_run_that_began_by_nonsense_began_as_usual(workspace, resume):
    settings = settings_of(*workspace.base[1:]).resolve()
    (workspace.root / "run").mkdir()
    (workspace.root / "run" / "config.yaml").write_text(json.dumps({"run": {"resume": resume}}))
    assert began_by(settings) == "auto" and find_checkpoint(settings)[0] is None


def test_a_named_checkpoint_that_is_damaged_is_refused(workspace):
    make_run(workspace)
    settings = settings_of(*workspace.base[1:], f"--run.resume={STEP_2}").resolve()
    assert find_checkpoint(settings)[1].step == 2
    flip(f"{STEP_2}/actors/__0_0.distcp")(workspace)
    with pytest.raises(SettingsError, match=r"^run\.resume: .*step_2 is damaged"):
        find_checkpoint(settings)


@pytest.mark.parametrize(
    ("prompts_per_step", "done", "used", "steps"),
    [(10, 0, 0, 200), (10, 50, 500, 200), (20, 50, 500, 125), (10, 25, 500, 175), (7, 50, 500, 50 + 214), (10, 200, 2000, 200)],
)
def test_epochs_with_another_size_of_a_step(prompts_per_step, done, used, steps):
    """1000 problems, 2 epochs: what has been used is, in steps of whatever size; 2 of 1500 are left over by sevens."""
    settings = Settings()
    settings.trainer.epochs, settings.trainer.prompts_per_step = 2, prompts_per_step
    _set_steps(settings, 1000, done=done, used=used)
    assert settings.trainer.steps == steps


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
