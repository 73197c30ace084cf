"""The export plan: which Hugging Face tensors travel together, and which pipeline stage has them.

Every rank computes the same plan from the model's configuration, so sending it needs no negotiation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from tic_megatron.config import ActorSettings
from tic_megatron.weights.names import HFTensor, Weight, qwen3_weights
from tic_megatron.weights.stages import layers_of_stages
from tic_megatron.weights.wire import BucketLayout, WireTensor, layout_bucket


@dataclass(frozen=True)
class ExportLayout:
    """What of the training layout decides who has which weight.

    `stage_of_layer` [layers]: pipeline stage; `expert_parallel`: ranks that share a layer's experts, each a block of them.
    """

    stage_of_layer: tuple[int, ...]
    n_stages: int
    expert_parallel: int = 1

    @classmethod
    def of(cls, actor: ActorSettings, n_layers: int) -> ExportLayout:
        """The layout of the settings."""
        n_stages = actor.pipeline_parallel_size
        stages = layers_of_stages(
            n_layers,
            n_stages,
            n_virtual=actor.virtual_pipeline_parallel_size,
            first=actor.layers_in_first_stage,
            last=actor.layers_in_last_stage,
        )
        stage_of = {layer: stage for stage, parts in enumerate(stages) for part in parts for layer in part}
        return cls(tuple(stage_of[layer] for layer in range(n_layers)), n_stages, actor.expert_parallel_size)

    def stage(self, weight: Weight) -> int:
        """The pipeline stage of a weight."""
        if weight.layer is None:
            return 0 if weight.names[0].startswith("embedding") else self.n_stages - 1
        return self.stage_of_layer[weight.layer]

    def expert_rank(self, weight: Weight, n_experts: int) -> int:
        """The expert-parallel rank that has an expert's weight."""
        return weight.expert // (n_experts // self.expert_parallel)


@dataclass(frozen=True)
class ExportBucket:
    """Whole Megatron parameters of one pipeline stage, and the places of their Hugging Face tensors in the bucket.

    `owners`: for weights of experts, the expert-parallel rank that has each; empty for a bucket of weights outside of experts,
    which every expert-parallel rank has. All owners have equally many bytes of a bucket.
    """

    stage: int
    weights: tuple[Weight, ...]
    owners: tuple[int, ...]
    layout: BucketLayout

    def tensors(self) -> Iterator[tuple[Weight, list[tuple[HFTensor, WireTensor]]]]:
        """The weights with their Hugging Face tensors' places."""
        places = iter(self.layout.tensors)
        for weight in self.weights:
            yield weight, [(part, next(places)) for part in weight.parts]


def plan_export(hf, layout: ExportLayout, dtype: torch.dtype, max_bytes: int) -> list[ExportBucket]:
    """Buckets of at most `max_bytes`, in the order of the forward pass.

    A parameter is never split, so a bucket of a single larger one exceeds the limit. (An embedding is the largest: 1.6 GB
    in bf16 for Qwen3-32B.) Nor is a set of experts with one per expert-parallel rank, which all ranks give a part of. A bucket
    ends with a module that vLLM fuses, q/k/v or gate/up, never inside one.
    """
    buckets = []
    for (stage, is_expert), run in groupby(qwen3_weights(hf), key=lambda w: (layout.stage(w), w.expert is not None)):
        for part in _fill(_expert_sets(list(run), layout, hf) if is_expert else [[w] for w in run], dtype, max_bytes):
            specs = [(tensor.name, dtype, tensor.shape) for weight in part for tensor in weight.parts]
            owners = tuple(layout.expert_rank(w, hf.num_experts) for w in part) if is_expert else ()
            buckets.append(ExportBucket(stage, tuple(part), owners, layout_bucket(specs)))
    return buckets


def _expert_sets(weights: list[Weight], layout: ExportLayout, hf) -> list[list[Weight]]:
    """One layer's experts in sets of one per expert-parallel rank."""
    per_rank = hf.num_experts // layout.expert_parallel
    return [[w for w in weights if w.expert % per_rank == place] for place in range(per_rank)]


def _fill(units: list[list[Weight]], dtype: torch.dtype, max_bytes: int) -> Iterator[list[Weight]]:
    """Runs of whole units whose tensors fit into a bucket."""
    current: list[Weight] = []
    for unit in units:
        tensors = [(t.name, dtype, t.shape) for w in (*current, *unit) for t in w.parts]
        if current and layout_bucket(tensors).nbytes > max_bytes:
            yield current
            current = []
        current = current + unit
    yield current
