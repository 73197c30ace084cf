"""Weights and optimizer in Megatron's distributed checkpoint format, which other layouts can read.

Nothing of the generators' states needs saving: a Qwen3 forward pass draws no random numbers, and the engines' seeds derive
from the run's seed and the step.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import threading
import traceback
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo, _write_item
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from transformers import AutoConfig

from tic_megatron.actors.megatron.backend import MegatronBackend
from tic_megatron.actors.megatron.export import WeightExporter
from tic_megatron.actors.megatron.metadata import check_common, check_metadata
from tic_megatron.actors.megatron.model import PolicyModel, build_model, transformer_config
from tic_megatron.actors.megatron.optimizer_state import OptimizerState
from tic_megatron.actors.megatron.parameters import LocalWeights
from tic_megatron.config import Settings
from tic_megatron.observability.files import disk_problem, lower_priority
from tic_megatron.weights.names import write_index
from tic_megatron.weights.plan import ExportLayout

EXTRA_STATE = re.compile(r"_extra_state\d*$")
"""End of the names of what layers keep besides tensors. Transformer Engine's grouped linears number it, one for each expert."""


class Saving:
    """A checkpoint on its way: this rank's part has been copied to host memory, and a thread writes it.

        saving = Saving(backend, directory)     # a collective of all ranks; training may go on
        saving.written()                        # None until it is
        saving.complete(files)                  # on rank 0, when all ranks have written

    `directory` must exist, for all ranks. The disk is used by the thread and by `complete` alone, so a full one is no rank's
    failure, and leaves no other waiting for it. `check`: make sure that the ranks write every element once, which one save in a
    layout shows for all; it gathers what everybody is going to write.
    """

    def __init__(self, backend: MegatronBackend, directory: Path, *, check: bool = True):
        self.directory = directory
        sharded = _model_state(backend)
        model = _by_parameter(sharded)
        sharded["optimizer"] = _optimizer_state(backend).to_save(model)
        self._progress = {
            "updates_done": backend.updates_done,
            "updates_applied": backend.updates_applied,
            "loss_scale": _loss_scale(backend),
        }
        tensors, _ = save_preprocess(sharded, validate_access_integrity=check)
        main_replicas, *_ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
        self._writer = _Writer(directory, thread_count=1)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        plan = save_state_dict_async_plan(mcore_to_pyt_state_dict(main_replicas), self._writer, planner=planner)
        self._metadata = plan[0][1]
        self._answer: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def written(self, *, wait: bool = False) -> dict[str, Any] | None:
        """None while the thread writes; then `{"entries": [...], "file": name, "bytes": size}` for `complete` (no `file` when
        this rank had nothing to write), or `{"problem": text}`."""
        if wait:
            self._thread.join()
        return self._answer

    def complete(self, written: list[dict[str, Any]]) -> dict[str, Any]:
        """Write what says where everything is; `written` by all ranks. Returns `{}` or `{"problem": text}`."""
        try:
            self._writer.finish(self._metadata, [list(map(_result, answer["entries"])) for answer in written])
            common = io.BytesIO()
            torch.save({}, common)
            (self.directory / COMMON_STATE_FNAME).write_bytes(common.getvalue())
            save_config(CheckpointingConfig("torch_dist", 1), str(self.directory))
            (self.directory / "progress.json").write_text(json.dumps(self._progress), encoding="utf-8")
        except Exception as error:
            return _problem(error, self.directory)
        return {}

    def _write(self) -> None:
        try:
            lower_priority()
            self._answer = self._writer.write()
        except Exception as error:
            self._answer = _problem(error, self.directory)
        self._writer.staged = []


def _problem(error: Exception, directory: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError):  # the log may lie on the disk that fails
        traceback.print_exc()
    return {"problem": disk_problem(error, directory) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"}


def load(backend: MegatronBackend, directory: Path) -> None:
    """Read this rank's part of a checkpoint of any layout; a collective of all ranks."""
    progress = json.loads((directory / "progress.json").read_text(encoding="utf-8"))
    backend.updates_done, backend.updates_applied = progress["updates_done"], progress["updates_applied"]
    sharded = _model_state(backend)
    model, state = _by_parameter(sharded), _optimizer_state(backend)
    loaded = _read(sharded | {"optimizer": state.to_load(model)}, directory)
    for part, name in _named(backend.model_parts):
        _take(part.module, loaded[name])
    state.take(loaded["optimizer"], step=backend.updates_applied)
    _set_loss_scale(backend, progress["loss_scale"])


def load_weights(parts: list[PolicyModel], directory: Path) -> None:
    """Read the parameters alone, of a checkpoint of any layout; a collective of all ranks."""
    loaded = _read({name: _tensors(part) for part, name in _named(parts)}, directory)
    for part, name in _named(parts):
        _take(part, loaded[name])


def export_hf(settings: Settings, device: torch.device, actors: Path, directory: Path) -> int:
    """Write the weights of a checkpoint beside the `config.json` of `directory`, by one rank; the number of tensors."""
    hf = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    config = transformer_config(hf, settings.actor)
    parts = [part.to(device) for part in build_model(hf, config)]
    load_weights(parts, actors)
    layout = ExportLayout.of(settings, hf)
    weight_map = WeightExporter(LocalWeights(parts, hf), layout, config.params_dtype, device, 2**30, "shared_memory").save(
        directory
    )
    write_index(directory, weight_map)
    return len(weight_map)


def _read(sharded: dict[str, Any], directory: Path) -> dict[str, Any]:
    check_metadata(directory / ".metadata")
    check_common(directory / COMMON_STATE_FNAME)
    # Its check of who reads what is for ranks that read all of the optimizer's state.
    return dist_checkpointing.load(sharded, str(directory), validate_access_integrity=False)


def _named(parts: list) -> list[tuple]:
    """The parts of the model with the names that Megatron gives them in a checkpoint."""
    return [(part, f"model{i}" if len(parts) > 1 else "model") for i, part in enumerate(parts)]


def _model_state(backend: MegatronBackend) -> dict[str, Any]:
    return {name: _tensors(part.module) for part, name in _named(backend.model_parts)}


def _tensors(model: PolicyModel) -> dict[str, Any]:
    """Its sharded state without what some layers keep besides, for fp8: objects, which would have to be unpickled."""
    return {key: value for key, value in model.sharded_state_dict().items() if not EXTRA_STATE.search(key)}


def _take(model: PolicyModel, tensors: dict[str, Any]) -> None:
    own = {key: value for key, value in model.state_dict().items() if EXTRA_STATE.search(key)}
    model.load_state_dict(tensors | own)


def _by_parameter(sharded: dict[str, Any]) -> dict[nn.Parameter, Any]:
    found = {}
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            found[value.data] = value
    return found


def _optimizer_state(backend: MegatronBackend) -> OptimizerState:
    return OptimizerState(backend.optimizer.chained_optimizers, has_moments=backend.settings.actor.optimizer == "adamw")


def _loss_scale(backend: MegatronBackend) -> dict[str, float] | None:
    """The state of fp16's loss scaling."""
    scalers = backend.grad_scalers
    return {name: float(value) for name, value in scalers[0].state_dict().items()} if scalers else None


def _set_loss_scale(backend: MegatronBackend, state: dict[str, float] | None) -> None:
    for scaler in backend.grad_scalers if state else []:
        trackers = {name: int(value) for name, value in state.items() if name != "scale"}
        scaler.load_state_dict({"scale": torch.tensor([state["scale"]]), **trackers})


class _Writer(FileSystemWriterAsync):
    """Writes one file per rank, in two halves: `prepare_write_data` copies, without the disk; `write` writes, with nothing else.

    Megatron's own forks a process to write, and needs another for its answer.
    """

    staged: list[tuple[WriteItem, Tensor | io.BytesIO]]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to prepare: the directory is there."""
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Copy everything that this rank writes to host memory, so that the next update may change it."""
        self.file = f"{plan.storage_data.prefix}0.distcp"
        self.staged = []
        for item in plan.items:
            value = planner.resolve_data(item)
            if item.type != WriteItemType.BYTE_IO:
                live = value.detach()
                # Pinned memory is kept by torch for the next time.
                value = torch.empty(live.shape, dtype=live.dtype, device="cpu", pin_memory=live.is_cuda)
                value.copy_(live, non_blocking=True)
            self.staged.append((item, value))
        torch.cuda.synchronize()

    def write(self) -> dict[str, Any]:
        """Write what was copied; the answer for `Saving.written`. Raises OSError."""
        if not self.staged:
            return {"entries": []}
        form = SerializationFormat.TORCH_SAVE
        with (Path(self.checkpoint_dir) / self.file).open("wb", buffering=0) as raw:
            stream = _Stream(raw)
            entries = []
            for item, value in self.staged:
                entries.append(_entry(_write_item(self.transforms, stream, value, item, self.file, form)))
                stream.check()
            os.fsync(raw.fileno())
            return {"entries": entries, "file": self.file, "bytes": raw.tell()}


Entry = tuple[str, tuple[int, ...], int | None, int, str, int, int]
"""A `WriteResult` in plain data, which ranks pass on by the driver: name, place and number of the block; its bytes in memory;
file, place and bytes there."""


def _entry(result: WriteResult) -> Entry:
    block, there = result.index, result.storage_data
    assert not there.transform_descriptors
    place = tuple(block.offset or ())
    return block.fqn, place, block.index, result.size_in_bytes, there.relative_path, there.offset, there.length


def _result(entry: Entry) -> WriteResult:
    name, place, number, size, file, start, length = entry
    return WriteResult(MetadataIndex(name, place, number), size, _StorageInfo(file, start, length))


class _Stream(io.RawIOBase):
    """A file for `torch.save`, which turns an error of the disk into one about positions in its archive: it waits for `check`."""

    def __init__(self, raw: io.FileIO):
        self.raw, self.place = raw, 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """All of it, unless an error waits."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view) and self.error is None:
            try:
                written += self.raw.write(view[written:])
            except OSError as error:
                error.filename = error.filename or self.raw.name
                self.error = error
        self.place += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written, or meant to be."""
        return self.place

    def check(self) -> None:
        """Raise what went wrong."""
        if self.error is not None:
            raise self.error
