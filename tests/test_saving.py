"""What a run keeps: when it waits for a save, what goes into a checkpoint, and the export of the trained model."""

from __future__ import annotations

import contextlib
import errno
import re
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock, call

import pytest
import torch
from transformers import AutoConfig

from tests.models import make_tokenizer
from tic_megatron.checkpoints import CheckpointError, Checkpoints, RunState
from tic_megatron.config import ActorSettings, RunSettings, Settings
from tic_megatron.remote import WorkerError
from tic_megatron.saving import Saving


@pytest.mark.parametrize(
    ("failure", "patience_s"),
    [(WorkerError("gone"), 20.0), (KeyboardInterrupt(), 20.0), (RuntimeError("the graders do not start"), None), (None, None)],
)
def test_a_failed_run_does_not_wait_for_its_save_for_ever(tmp_path, monkeypatch, failure, patience_s):
    """When it may be the actors that have failed; otherwise they write on, until `cluster.timeout_s` at most."""
    waited = Mock()
    saving = Saving(Settings(run=RunSettings(dir=str(tmp_path))), cast(Any, None), flush=lambda: None, note=print)
    monkeypatch.setattr(saving._checkpoints, "finish", waited)
    with contextlib.suppress(BaseException), contextlib.ExitStack() as stack:
        stack.push(saving.end)
        if failure is not None:
            raise failure
    assert waited.call_args_list == [call(timeout_s=patience_s)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_configuration_says_how_the_weights_are_stored(tmp_path, precision):
    """And not how the base model's were: loaded by that, they would be rounded."""
    settings = Settings(run=RunSettings(dir=str(tmp_path)), actor=ActorSettings(precision=precision))
    base = AutoConfig.for_model("qwen3", dtype="bfloat16")
    inputs: Any = SimpleNamespace(hf_config=base, tokenizer=make_tokenizer(tmp_path), model_dir=tmp_path)
    Saving(settings, inputs, flush=lambda: None, note=print)._write_model_files(tmp_path / "hf")
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert (AutoConfig.from_pretrained(tmp_path / "hf").dtype, base.dtype) == (stored, torch.bfloat16)


@pytest.mark.parametrize("linked", [False, True])
def test_the_export_of_a_run_replaces_an_older_one_where_it_lies(tmp_path, linked):
    def save_hf(folder):
        (folder / "model.safetensors").write_bytes(b"new")
        return {"w": "model.safetensors"}

    run, disk = tmp_path / "run", tmp_path / "disk"
    for folder in (run, disk / "exported"):
        folder.mkdir(parents=True)
    if linked:
        (run / "hf").symlink_to(disk / "exported")
    else:
        (run / "hf").mkdir()
    (run / "hf" / "old").touch()
    (run / ".hf.unfinished").mkdir()  # the export command is at work there
    inputs: Any = SimpleNamespace(
        hf_config=AutoConfig.for_model("qwen3"), tokenizer=make_tokenizer(tmp_path), model_dir=tmp_path / "none"
    )
    saving = Saving(Settings(run=RunSettings(dir=str(run))), inputs, flush=lambda: None, note=print)
    saving.export(cast(Any, SimpleNamespace(save_hf=save_hf)))
    assert (run / "hf").is_symlink() == linked
    assert (run / "hf" / "model.safetensors").read_bytes() == b"new" and not (run / "hf" / "old").exists()
    assert sorted(path.name for path in (*run.iterdir(), *disk.iterdir())) == [".hf.unfinished", "exported", "hf"]


def test_no_checkpoint_without_the_rows_before_it(tmp_path):
    """Where the run would go on, they would be missing."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))

    notes: list[str] = []
    saving = Saving(Settings(run=RunSettings(dir=str(tmp_path))), cast(Any, None), flush=full, note=notes.append)
    saving.save(RunState(step=10), cast(Any, SimpleNamespace(begin_checkpoint=lambda folder: lambda: True)), None)
    assert not saving.has(10) and saving.failed == 1
    saving.tell_failed()
    assert re.search(r"step 10 was not saved: No space left on device: .*metrics\.jsonl \(make room", "".join(notes))
    with pytest.raises(CheckpointError, match="step 10 was not saved"):
        saving.check()
    assert Checkpoints(tmp_path, keep=1).newest() == (None, []) and list((tmp_path / "checkpoints").iterdir()) == []
