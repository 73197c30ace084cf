"""A checkpoint's pickles: only checkpoint classes may come out of `.metadata`, and nothing out of `common.pt`."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


def check_metadata(file: Path) -> None:
    """Raise UnpicklingError if a checkpoint's `.metadata`, which torch unpickles, would make anything but checkpoint classes, or
    says that there is anything but tensors: torch reads these with `weights_only`, but would unpickle other entries."""
    with file.open("rb") as stream:
        entries = _CheckpointUnpickler(stream).load().state_dict_metadata
    others = [name for name, entry in entries.items() if type(entry) is not TensorStorageMetadata]
    if others:
        raise pickle.UnpicklingError(f"the checkpoint's entry {others[0]} is no tensor, and none of ours is anything else")


def check_common(file: Path) -> None:
    """Raise UnpicklingError if a checkpoint's archive of what is common to all ranks holds anything; in ours nothing is.

    Megatron leaves it to the environment (`TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD`) whether it may hold any pickle.
    """
    if torch.load(file, weights_only=True) != {}:
        raise pickle.UnpicklingError(f"the checkpoint's {file.name} is not empty, as it is in all of ours")


class _CheckpointUnpickler(pickle._Unpickler):
    """The one of the standard library that is written in Python, for one more check: a pickle can also set attributes of what it
    names, functions and classes, and these would still be set when torch reads the file for itself."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's .metadata asks for {module}.{name}, which no checkpoint needs")

    def load_build(self) -> None:
        """Give an object its state; only instances of the checkpoint's own data classes have one."""
        changed = self.stack[-2]  # type: ignore[attr-defined]
        if not dataclasses.is_dataclass(type(changed)):
            raise pickle.UnpicklingError(f"the checkpoint's .metadata changes {changed!r}, which no checkpoint needs")
        super().load_build()  # type: ignore[misc]

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore[dict-item]  # noqa: RUF012
