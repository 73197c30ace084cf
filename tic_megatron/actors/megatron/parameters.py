"""This rank's parameters under their Hugging Face names: loading from a checkpoint directory and reading out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import safe_open
from torch import Tensor, nn

from tic_megatron.weights.names import Weight, qwen3_weights


class LocalWeights:
    """The entries of the name table that this rank owns, with their parameters."""

    def __init__(self, chunks: list[nn.Module], hf):
        self.hf = hf
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.expert_tp_rank = parallel_state.get_expert_tensor_parallel_rank()
        self.expert_tp_size = parallel_state.get_expert_tensor_parallel_world_size()
        parameters = {name: parameter for chunk in chunks for name, parameter in _global_names(chunk, hf)}
        self.entries: list[tuple[Weight, nn.Parameter]] = []
        for weight in qwen3_weights(hf):
            name = next((name for name in weight.names if name in parameters), None)
            if name is not None:
                self.entries.append((weight, parameters.pop(name)))
        # With tied embeddings, the last of several stages holds a copy of the embedding under the name of the head.
        tied_head = parameters.pop("output_layer.weight", None)
        self.tied_copy = None if tied_head is None else (qwen3_weights(hf)[0], tied_head)
        assert not parameters, f"parameters without a place in the Hugging Face checkpoint: {sorted(parameters)}"

    def load(self, directory: str | Path) -> None:
        """Fill the parameters from a Hugging Face directory; every rank reads only its own slices."""
        reader = _SafetensorsReader(Path(directory))
        entries = self.entries + ([self.tied_copy] if self.tied_copy else [])
        with torch.no_grad():
            for weight, parameter in entries:
                shard = self.shard(weight)
                parameter.copy_(weight.join([reader.read(t.name, t.shard_slice(*shard)) for t in weight.parts]))

    def owned(self) -> Iterator[tuple[Weight, nn.Parameter]]:
        """The entries of this rank, the tied copy of the embedding left out."""
        return iter(self.entries)

    def shard(self, weight: Weight) -> tuple[int, int]:
        """(which, of how many) shard of a weight's sharded tensors is here."""
        if weight.expert is None:
            return self.tp_rank, self.tp_size
        return self.expert_tp_rank, self.expert_tp_size


def _global_names(chunk: nn.Module, hf) -> Iterator[tuple[str, nn.Parameter]]:
    """A model part's parameters, layers and experts numbered as in the whole model."""
    first_layer = get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage)
    n_experts = getattr(hf, "num_experts", None) or 0
    first_expert = n_experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert *= parallel_state.get_expert_model_parallel_rank()
    first_of = {
        r"^decoder\.layers\.(\d+)\.": first_layer,
        r"\.mlp\.experts\.local_experts\.(\d+)\.": first_expert,
        r"\.mlp\.experts\.linear_fc[12]\.weight(\d+)$": first_expert,  # experts in one grouped matrix multiplication
    }
    for local_name, parameter in chunk.named_parameters():
        name = local_name
        for pattern, first in first_of.items():
            name = _add_to_number(pattern, first, name)
        yield name, parameter


def _add_to_number(pattern: str, amount: int, name: str) -> str:
    """The name with `amount` added to the number that the pattern's group finds, if it finds one."""
    found = re.search(pattern, name)
    if not found:
        return name
    return f"{name[: found.start(1)]}{int(found[1]) + amount}{name[found.end(1) :]}"


class _SafetensorsReader:
    """Slices of the tensors of a directory with `model.safetensors` or an index of several files."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        self.weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else None
        self.files: dict[str, Any] = {}

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        file = self.weight_map[name] if self.weight_map else "model.safetensors"
        if file not in self.files:
            self.files[file] = safe_open(self.directory / file, framework="pt")
        return self.files[file].get_slice(name)[index]
