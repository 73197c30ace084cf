"""This rank's parameters under their Hugging Face names: loading from a checkpoint directory and reading out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import safe_open
from torch import Tensor, nn

from tic_megatron.weights.names import Weight, qwen3_weights


class LocalWeights:
    """The entries of the name table that this rank owns, with their parameters."""

    def __init__(self, model: nn.Module, hf):
        self.hf = hf
        self.tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()
        offset = get_transformer_layer_offset(model.config)
        parameters = {_global_name(name, offset): parameter for name, parameter in model.named_parameters()}
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
                slices = [reader.read(t.name, t.shard_slice(self.tp_rank, self.tp_size)) for t in weight.parts]
                parameter.copy_(weight.join(slices))

    def owned(self) -> Iterator[tuple[Weight, nn.Parameter]]:
        """The entries of this rank, the tied copy of the embedding left out."""
        return iter(self.entries)


def _global_name(name: str, layer_offset: int) -> str:
    prefix, layer, rest = _split_layer(name)
    return name if layer is None else f"{prefix}{layer + layer_offset}.{rest}"


def _split_layer(name: str) -> tuple[str, int | None, str]:
    marker = "decoder.layers."
    if not name.startswith(marker):
        return name, None, ""
    number, rest = name[len(marker) :].split(".", 1)
    return marker, int(number), rest


class _SafetensorsReader:
    """Slices of the tensors of a directory with `model.safetensors` or an index of several files."""

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        self.weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else None
        self.files: dict[str, object] = {}

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        file = self.weight_map[name] if self.weight_map else "model.safetensors"
        if file not in self.files:
            self.files[file] = safe_open(self.directory / file, framework="pt")
        return self.files[file].get_slice(name)[index]
