"""Which run a folder holds, and what of it may change when it goes on. (What is refused is in tests/bad_input.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bad_input.folder_cases import MOVED_REWARD, STEP_1, STEP_2, make_run, moved_reward
from tests.models import make_tiny_qwen3
from tests.workspace import make_workspace, settings_of
from tic_megatron.commands.preflight import TrainInputs
from tic_megatron.commands.run_folder import check_run_folder, find_checkpoint, record_changes
from tic_megatron.commands.train import _continue
from tic_megatron.config import SettingsError


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
