"""`trainer.epochs`: the number of steps follows from the problems."""

from __future__ import annotations

import json
import sys
import types

import pytest

from tests.bad_input.folder_cases import make_run
from tests.models import make_tiny_qwen3
from tests.workspace import make_workspace, refusal, settings_of, write_rows
from tic_megatron.cli import main
from tic_megatron.commands.preflight import preflight
from tic_megatron.config_checks import check_settings


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0, tie_word_embeddings=True)


@pytest.fixture
def workspace(tmp_path, tiny_qwen3, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_workspace(tmp_path, tiny_qwen3)


def steps_of(workspace, *flags: str) -> int:
    settings = settings_of(*workspace.base[1:], *flags)
    check_settings(settings)
    settings = settings.resolve()
    preflight(settings)
    return settings.trainer.steps


def test_an_epoch_has_as_many_steps_as_there_are_problems_for(workspace):
    assert steps_of(workspace, "--trainer.epochs=1") == 2  # 10 problems, 4 per step
    assert steps_of(workspace, "--trainer.epochs=2") == 5
    assert steps_of(workspace, "--trainer.epochs=1", "--trainer.prompts_per_step=10", "--trainer.steps=77") == 1
    assert steps_of(workspace, "--trainer.epochs=null", "--trainer.steps=77") == 77


def test_a_run_that_goes_on_with_larger_steps_has_fewer_to_go(workspace):
    """10 problems, 3 epochs: 2 steps of 4 were made, 22 problems are left."""
    make_run(workspace)
    assert steps_of(workspace, "--trainer.epochs=3", "--run.allow_change=trainer.epochs") == 7
    more = ("--trainer.prompts_per_step=8", "--run.allow_change=trainer.epochs,trainer.prompts_per_step")
    assert steps_of(workspace, "--trainer.epochs=3", *more) == 2 + 22 // 8


def test_problems_that_are_left_out_do_not_count(workspace):
    rows = [{"problem": "1+1=" * repeats, "answer": "2"} for repeats in (1, 1, 1, 1, 1, 1, 60, 70)]
    write_rows(workspace.root / "train.jsonl", rows)
    assert steps_of(workspace, "--trainer.epochs=2") == 3


def test_the_same_epochs_are_the_same_run(workspace, capfd, monkeypatch):
    def train(settings, inputs):
        (workspace.root / "run" / "metrics.jsonl").write_text(json.dumps({"step": settings.trainer.steps}) + "\n")
        return {"accuracy_before": None, "accuracy_after": None, "steps": settings.trainer.steps, "wall_s": 1.0}

    monkeypatch.setitem(sys.modules, "tic_megatron.trainer", types.SimpleNamespace(train=train))
    monkeypatch.setattr("tic_megatron.commands.train.supervise", lambda drive, **_: drive(0))
    decay = [*workspace.base, "--actor.lr_decay=linear"]  # depends on the number of steps
    assert main([*decay, "--trainer.epochs=2"]) == 0
    assert main([*decay, "--trainer.epochs=2"]) == 0
    capfd.readouterr()
    assert "trainer.epochs (2 there, 3 here)" in refusal(capfd, [*decay, "--trainer.epochs=3"])
    assert "trainer.epochs (2 there, None here)" in refusal(capfd, decay)
