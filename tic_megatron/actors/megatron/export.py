"""Reading the policy out of its shards, one bucket of Hugging Face tensors at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from tic_megatron.actors.megatron.parameters import LocalWeights
from tic_megatron.weights.plan import ExportBucket, plan_export
from tic_megatron.weights.sending import CudaIpcSendBuffer, SendBuffer, SharedMemorySendBuffer
from tic_megatron.weights.wire import WireTensor

SAFETENSORS_BYTES = 4 * 2**30
"""Largest file of an exported checkpoint."""


class WeightExporter:
    """This rank's part in exporting the weights; a collective of all actor ranks, in the order of the plan.

    On a CPU the first rank of each pipeline stage assembles the stage's buckets in shared memory. On CUDA every rank
    assembles every bucket on its own GPU, where the engine beside it opens it.
    """

    def __init__(self, weights: LocalWeights, dtype: torch.dtype, device: torch.device, max_bytes: int):
        self.parameters = {id_of(weight): parameter for weight, parameter in weights.owned()}
        self.hf, self.dtype, self.device = weights.hf, dtype, device
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.n_stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.replica = parallel_state.get_data_parallel_rank()
        self.plan = plan_export(self.hf, self.n_stages, dtype, max_bytes)
        self.buffer: SendBuffer | None = None

    def begin(self) -> int:
        """Start an update; returns the number of buckets."""
        if self.buffer is None:
            self.buffer = self._make_buffer()
        if self.buffer is not None:
            self.buffer.begin_update()
        return len(self.plan)

    def export(self, index: int) -> dict[str, Any] | None:
        """Assemble a bucket; what the engines need to reach it, from the ranks that hold it."""
        bucket = self.plan[index]
        if self.device.type == "cuda":
            self._assemble_everywhere(bucket)
            return self.buffer.payload(bucket.layout)
        if not self._takes_part(bucket):
            return None
        if self.buffer is None:
            self._gather(bucket, place=None)
            return None
        self._gather(bucket, self.buffer.view)
        return self.buffer.payload(bucket.layout)

    def save(self, directory: Path) -> dict[str, str]:
        """Write this rank's buckets as safetensors files; returns their `{tensor name: file name}`."""
        plan = plan_export(self.hf, self.n_stages, self.dtype, SAFETENSORS_BYTES)
        written: dict[str, str] = {}
        for index, bucket in enumerate(plan):
            if not self._takes_part(bucket):
                continue
            tensors: dict[str, Tensor] = {}

            def room(tensor: WireTensor, tensors=tensors) -> Tensor:
                return tensors.setdefault(tensor.name, torch.empty(tensor.shape, dtype=self.dtype))

            self._gather(bucket, room)
            if self.tp_group.rank() == 0:
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
        return bucket.stage == self.stage and self.replica == 0

    def _make_buffer(self) -> SendBuffer | None:
        if self.device.type == "cuda":
            return CudaIpcSendBuffer(max(bucket.layout.nbytes for bucket in self.plan))
        if self.replica > 0 or self.tp_group.rank() > 0:
            return None
        return SharedMemorySendBuffer(max(b.layout.nbytes for b in self.plan if b.stage == self.stage))

    def _gather(self, bucket: ExportBucket, place: Callable[[WireTensor], Tensor] | None) -> None:
        """Bring a bucket's slices to the stage's first TP rank, in one collective, and put them in their places there."""
        slices = self._local_slices(bucket)
        flat = torch.cat([s.reshape(-1) for s in slices])
        gathered = None
        if self.tp_group.rank() == 0:
            gathered = [torch.empty_like(flat) for _ in range(self.tp_group.size())]
        dist.gather(flat, gathered, group=self.tp_group, group_dst=0)
        if gathered is not None:
            _place(bucket, gathered, place)

    def _assemble_everywhere(self, bucket: ExportBucket) -> None:
        flat = self.buffer.flat[: bucket.layout.nbytes]
        if bucket.stage == self.stage:
            local = torch.cat([s.reshape(-1) for s in self._local_slices(bucket)])
            gathered = local.new_empty((self.tp_group.size(), local.numel()))
            dist.all_gather_into_tensor(gathered, local, group=self.tp_group)
            _place(bucket, list(gathered), self.buffer.view)
        if self.n_stages > 1:
            dist.broadcast(flat, group=parallel_state.get_pipeline_model_parallel_group(), group_src=bucket.stage)

    def _local_slices(self, bucket: ExportBucket) -> list[Tensor]:
        return [s.detach() for weight in bucket.weights for s in weight.split(self.parameters[id_of(weight)])]


def id_of(weight) -> str:
    """Name of a weight in the table, whatever the layer spec calls it."""
    return weight.names[0]


def _place(bucket: ExportBucket, ranks: list[Tensor], place: Callable[[WireTensor], Tensor]) -> None:
    """Cut each rank's flat slices up and copy them to their parts of the full tensors."""
    tp_size, start = len(ranks), 0
    for hf_tensor, wire_tensor in bucket.tensors():
        full = place(wire_tensor)
        shape = hf_tensor.shard_shape(tp_size) if hf_tensor.shard_dim is not None else hf_tensor.shape
        numel = int(torch.Size(shape).numel())
        for rank, flat in enumerate(ranks if hf_tensor.shard_dim is not None else ranks[:1]):
            full[hf_tensor.shard_slice(rank, tp_size)] = flat[start : start + numel].view(shape)
        start += numel
