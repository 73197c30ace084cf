"""`tic-megatron export`: from a checkpoint of any layout, what the run itself exports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.layouts.cases import FULL, Layout, settings_of
from tests.workspace import refusal
from tic_megatron.checkpoints import Checkpoints, RunState

EXPORTED = [
    ("untied", Layout(tp=2), "fp32", True),
    ("experts", Layout(ep=2, dp=2), "bf16", True),
    ("tied", Layout(pp=2, vpp=2), "bf16", False),
    ("tied", Layout(tp=2, cp=2), "fp32", False),
    ("experts", Layout(tp=2, pp=2, ep=2, etp=2, cp=2), "fp32", False),
    ("untied", Layout(pp=2, dp=2), "fp16", False),
]


def save_run(prover, rank_pool, run: Path, model: str, layout: Layout, precision: str) -> Path:
    """A checkpoint in a run folder, and the tensors that the run would export beside it in `hf`; the checkpoint."""
    path = Path(prover.paths(model)["old"])
    (run / "hf").mkdir(parents=True)

    def write(folder: Path):
        job = {"layout": layout, "path": str(path), "actors": str(folder), "hf": str(run / "hf"), "precision": precision}
        rank_pool.run("tests.layouts.ranks:exported", world_size=layout.world_size, timeout_s=180, **job)
        return lambda: True

    def describe(folder: Path) -> None:
        settings_of(layout, "tic_grpo", max_tokens=300, precision=precision).save(folder / "config.yaml")
        shutil.copy(path / "config.json", folder / "model")
        (folder / "model" / "tokenizer.json").write_text("{}")

    checkpoints = Checkpoints(run, keep=2)
    checkpoints.save(RunState(step=1), write, describe)
    assert checkpoints.finish() is None
    return checkpoints.folder / "step_1"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("model", "layout", "precision"),
    [pytest.param(m, x, p, id=f"{m}-{x}-{p}", marks=() if fast else FULL) for m, x, p, fast in EXPORTED],
)
def test_the_export_of_a_checkpoint_is_that_of_the_run(prover, rank_pool, tmp_path, model, layout, precision):
    checkpoint = save_run(prover, rank_pool, tmp_path / "run", model, layout, precision)
    out = tmp_path / "some" / "out"
    arguments = ["export", str(checkpoint), str(out)]
    code, said, problem = rank_pool.run("tests.layouts.ranks:command", world_size=1, timeout_s=120, arguments=arguments)[0]
    assert (code, problem) == (0, ""), problem
    assert said == f"{checkpoint}: {len(tensors(out))} tensors ({precision}) exported to {out}\n"
    expected, got = tensors(tmp_path / "run" / "hf"), tensors(out)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == got[name].dtype and torch.equal(tensor, got[name]), name
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == got.keys() and all(name in load_file(out / file) for name, file in index.items())
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (checkpoint / "model" / name).read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_bad_input_is_refused_and_good_input_done_by_the_command(prover, rank_pool, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    checkpoint = save_run(prover, rank_pool, run, "untied", Layout(), "fp32")
    out = tmp_path / "out"
    out.mkdir()
    capsys.readouterr()  # of the first model that is made
    assert "there is no" in refusal(capsys, ["export", str(tmp_path / "nothing"), str(out)])
    assert "neither a run folder" in refusal(capsys, ["export", str(run / "hf"), str(out)])
    assert "takes 2 words" in refusal(capsys, ["export", str(run)])
    assert "exists already" in refusal(capsys, ["export", str(run), str(run)])
    assert "lies in the checkpoint" in refusal(capsys, ["export", str(run), str(checkpoint / "state.json" / "out")])
    (tmp_path / "file").touch()
    assert "since" in refusal(capsys, ["export", str(run), str(tmp_path / "file" / "out")])
    assert "cannot be written" in refusal(capsys, ["export", str(run), "/proc/out"])
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: Path(path) == out)  # a volume of a container's
        assert "a file system is mounted" in refusal(capsys, ["export", str(run), str(out)])
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "holds no checkpoint" in refusal(capsys, ["export", str(tmp_path / "empty"), str(out)])

    newer = run / "checkpoints" / "step_2"
    shutil.copytree(checkpoint, newer)
    damaged = newer / "actors" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "step_2 is damaged" in refusal(capsys, ["export", str(newer), str(out)])
    # The run's newest intact one, in a process of its own.
    command = [sys.executable, "-m", "tic_megatron", "export", str(run), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ})
    assert result.returncode == 0, result.stderr
    assert "step_2 is damaged" in result.stderr and "an older checkpoint is used" in result.stderr
    assert str(checkpoint) in result.stdout
    expected, got = tensors(run / "hf"), tensors(out)
    assert expected.keys() == got.keys() and all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
