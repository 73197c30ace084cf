"""The export plan: which Hugging Face tensors travel together, and which pipeline stage has them.

Every rank computes the same plan from the model's configuration, so sending it needs no negotiation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from tic_megatron.weights.names import HFTensor, Weight, qwen3_weights
from tic_megatron.weights.wire import BucketLayout, WireTensor, layout_bucket


@dataclass(frozen=True)
class ExportBucket:
    """Whole Megatron parameters of one pipeline stage, and the places of their Hugging Face tensors in the bucket."""

    stage: int
    weights: tuple[Weight, ...]
    layout: BucketLayout

    def tensors(self) -> Iterator[tuple[HFTensor, WireTensor]]:
        """The Hugging Face tensors with their places, in the order of the parameters' parts."""
        return zip((part for weight in self.weights for part in weight.parts), self.layout.tensors, strict=True)


def plan_export(hf, n_stages: int, dtype: torch.dtype, max_bytes: int) -> list[ExportBucket]:
    """Buckets of at most `max_bytes`, in the order of the forward pass.

    A parameter is never split, so a bucket of a single larger one exceeds the limit. (An embedding is the largest: 1.6 GB
    in bf16 for Qwen3-32B.) A bucket ends with a module that vLLM fuses, q/k/v or gate/up, never inside one.
    """
    last = n_stages - 1
    layers_per_stage = hf.num_hidden_layers // n_stages

    def stage_of(weight: Weight) -> int:
        if weight.layer is None:
            return 0 if weight.names[0].startswith("embedding") else last
        return weight.layer // layers_per_stage

    buckets = []
    for stage, weights in groupby(qwen3_weights(hf), key=stage_of):
        for part in _split(list(weights), dtype, max_bytes):
            specs = [(tensor.name, dtype, tensor.shape) for weight in part for tensor in weight.parts]
            buckets.append(ExportBucket(stage, tuple(part), layout_bucket(specs)))
    return buckets


def _split(weights: list[Weight], dtype: torch.dtype, max_bytes: int) -> Iterator[list[Weight]]:
    current: list[Weight] = []
    for weight in weights:
        tensors = [(t.name, dtype, t.shape) for w in (*current, weight) for t in w.parts]
        if current and layout_bucket(tensors).nbytes > max_bytes:
            yield current
            current = []
        current.append(weight)
    yield current
