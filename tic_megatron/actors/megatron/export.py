"""Reading the policy out of its shards, one bucket of Hugging Face tensors at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from tic_megatron.actors.megatron.parameters import LocalWeights
from tic_megatron.weights.names import Weight
from tic_megatron.weights.plan import ExportBucket, ExportLayout, plan_export
from tic_megatron.weights.sending import N_SLOTS, CudaIpcSendBuffer, SendBuffer, SharedMemorySendBuffer
from tic_megatron.weights.wire import WireTensor

SAFETENSORS_BYTES = 4 * 2**30
"""Largest file of an exported checkpoint."""


class WeightExporter:
    """This rank's part in exporting the weights; a collective of all actor ranks, in the order of the plan.

    On a CPU the first rank of each pipeline stage assembles the stage's buckets in shared memory. On CUDA every rank
    assembles every bucket on its own GPU, where the engine beside it opens it.
    """

    def __init__(self, weights: LocalWeights, layout: ExportLayout, dtype: torch.dtype, device: torch.device, max_bytes: int):
        self.parameters = {id_of(weight): parameter for weight, parameter in weights.owned()}
        self.hf, self.layout, self.dtype, self.device = weights.hf, layout, dtype, device
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.expert_rank = parallel_state.get_expert_model_parallel_rank()
        self.plan = plan_export(self.hf, layout, dtype, max_bytes)
        self._check_plan()
        self.buffer: SendBuffer | None = None

    def _check_plan(self) -> None:
        planned = {id_of(w) for bucket in self.plan if bucket.stage == self.stage for w in self._own(bucket)}
        assert planned == self.parameters.keys(), f"plan and model differ: {sorted(planned ^ self.parameters.keys())[:4]}"

    def begin(self) -> int:
        """Start an update; returns the number of buckets."""
        if self.buffer is None:
            self.buffer = self._make_buffer()
        if self.buffer is not None:
            self.buffer.begin_update()
        return len(self.plan)

    def export(self, index: int) -> dict[str, Any] | None:
        """Assemble a bucket; what the engines need to reach it, from the ranks that hold it."""
        bucket, slot = self.plan[index], index % N_SLOTS
        if self.device.type == "cuda":
            self._assemble_everywhere(bucket, slot)
            return self.buffer.payload(bucket.layout, slot)
        if not self._takes_part(bucket):
            return None
        if self.buffer is None:
            self._gather(bucket, place=None)
            return None
        self._gather(bucket, partial(self.buffer.view, slot=slot))
        return self.buffer.payload(bucket.layout, slot)

    def save(self, directory: Path) -> dict[str, str]:
        """Write this rank's buckets as safetensors files; returns their `{tensor name: file name}`."""
        plan = plan_export(self.hf, self.layout, self.dtype, SAFETENSORS_BYTES)
        written: dict[str, str] = {}
        for index, bucket in enumerate(plan):
            if not self._takes_part(bucket):
                continue
            tensors: dict[str, Tensor] = {}

            def room(tensor: WireTensor, tensors=tensors) -> Tensor:
                return tensors.setdefault(tensor.name, torch.empty(tensor.shape, dtype=self.dtype))

            self._gather(bucket, room)
            if _group(bucket).rank() == 0:
                file = f"model-{index + 1:05d}-of-{len(plan):05d}.safetensors"
                save_file(tensors, directory / file, metadata={"format": "pt"})
                written |= dict.fromkeys(tensors, file)
        return written

    def close(self) -> None:
        """Free the buffer."""
        if self.buffer is not None:
            self.buffer.close()
            self.buffer = None

    def _takes_part(self, bucket: ExportBucket) -> bool:
        """Whether this rank is in the one group, of all replicas, that assembles the bucket."""
        if bucket.owners:
            replica = parallel_state.get_expert_data_parallel_rank()
        else:
            replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return bucket.stage == self.stage and replica == 0

    def _make_buffer(self) -> SendBuffer | None:
        if self.device.type == "cuda":
            return CudaIpcSendBuffer(max(bucket.layout.nbytes for bucket in self.plan))
        mine = [b.layout.nbytes for b in self.plan if self._takes_part(b) and _group(b).rank() == 0]
        return SharedMemorySendBuffer(max(mine)) if mine else None

    def _gather(self, bucket: ExportBucket, place: Callable[[WireTensor], Tensor] | None) -> None:
        """Bring a bucket's slices to the first rank of its group, in one collective, and put them in their places there."""
        group = _group(bucket)
        if group.size() == 1:
            self._place_own(bucket, place)
            return
        flat = self._local_slices(bucket)
        gathered = [torch.empty_like(flat) for _ in range(group.size())] if group.rank() == 0 else None
        dist.gather(flat, gathered, group=group, group_dst=0)
        if gathered is not None:
            _place(bucket, gathered, place)

    def _assemble_everywhere(self, bucket: ExportBucket, slot: int) -> None:
        flat = self.buffer.flat(slot)[: bucket.layout.nbytes]
        if bucket.stage == self.stage:
            place = partial(self.buffer.view, slot=slot)
            if _group(bucket).size() == 1:
                self._place_own(bucket, place)
            else:
                local = self._local_slices(bucket)
                gathered = local.new_empty((_group(bucket).size(), local.numel()))
                dist.all_gather_into_tensor(gathered, local, group=_group(bucket))
                _place(bucket, list(gathered), place)
        if self.layout.n_stages > 1:
            dist.broadcast(flat, group=parallel_state.get_pipeline_model_parallel_group(), group_src=bucket.stage)

    def _own(self, bucket: ExportBucket) -> list[Weight]:
        """The bucket's weights that this rank has a shard of."""
        if not bucket.owners:
            return list(bucket.weights)
        return [w for w, owner in zip(bucket.weights, bucket.owners, strict=True) if owner == self.expert_rank]

    def _place_own(self, bucket: ExportBucket, place: Callable[[WireTensor], Tensor]) -> None:
        """Where one rank has whole tensors they go straight to their places."""
        for weight, tensors in bucket.tensors():
            for (_, wire_tensor), piece in zip(tensors, weight.split(self.parameters[id_of(weight)]), strict=True):
                place(wire_tensor).copy_(piece.detach())

    def _local_slices(self, bucket: ExportBucket) -> Tensor:
        slices = [s.detach() for weight in self._own(bucket) for s in weight.split(self.parameters[id_of(weight)])]
        return torch.cat([s.reshape(-1) for s in slices])


def _group(bucket: ExportBucket) -> dist.ProcessGroup:
    """The ranks that hold a bucket's shards together: TP; for experts ETP x EP, of which ETP counts faster."""
    if bucket.owners:
        return parallel_state.get_expert_tensor_and_model_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def id_of(weight) -> str:
    """Name of a weight in the table, whatever the layer spec calls it."""
    return weight.names[0]


def _place(bucket: ExportBucket, ranks: list[Tensor], place: Callable[[WireTensor], Tensor]) -> None:
    """Cut each rank's flat slices up and copy them to their parts of the full tensors."""
    n_owners = max(bucket.owners) + 1 if bucket.owners else 1
    tp_size = len(ranks) // n_owners
    starts = [0] * n_owners
    for (_, tensors), owner in zip(bucket.tensors(), bucket.owners or [0] * len(bucket.weights), strict=True):
        shards = ranks[owner * tp_size : (owner + 1) * tp_size]
        for hf_tensor, wire_tensor in tensors:
            full, shape = place(wire_tensor), hf_tensor.shard_shape(tp_size)
            end = starts[owner] + math.prod(shape)
            for rank, flat in enumerate(shards if hf_tensor.shard_dim is not None else shards[:1]):
                full[hf_tensor.shard_slice(rank, tp_size)] = flat[starts[owner] : end].view(shape)
            starts[owner] = end
