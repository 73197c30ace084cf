"""Reading the policy out of its shards, one bucket of Hugging Face tensors at a time."""

from __future__ import annotations

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
from tic_megatron.weights.sending import (
    N_SLOTS,
    BroadcastSendBuffer,
    CudaIpcSendBuffer,
    Export,
    SendBuffer,
    SharedMemorySendBuffer,
    Transport,
)
from tic_megatron.weights.wire import Block, TensorAssembler, block_digest

OwnBlock = tuple[Weight, int, Block]
"""A parameter, the index of one of its Hugging Face tensors, and rows of that tensor."""
SAFETENSORS_BYTES = 4 * 2**30
"""Largest file of an exported checkpoint."""


class WeightExporter:
    """This rank's part in exporting the weights, which replays the plan; a collective of all actor ranks.

    On a CPU the ranks of each pipeline stage write the stage's buckets into memory that they share. Where engines have GPUs of
    their own, the stage's first rank assembles them. For engines on the actors' GPUs every rank assembles every bucket on its own
    GPU, where the engine beside it opens it. Where an engine's shards are the actors' (`ExportLayout.straight`), every rank's
    bucket is its own shards.
    """

    def __init__(
        self,
        weights: LocalWeights,
        layout: ExportLayout,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int,
        transport: Transport,
    ):
        self.parameters = {id_of(weight): parameter for weight, parameter in weights.owned()}
        self.weights, self.hf, self.layout, self.dtype, self.device = weights, weights.hf, layout, dtype, device
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.transport = transport
        self.buffer: SendBuffer | None = None
        self._has_buffers = False
        self._shared: dict[bool, SharedMemorySendBuffer] = {}
        self._outgoing: Tensor | None = None
        self.use_plan(plan_export(self.hf, layout, dtype, max_bytes))

    def use_plan(self, plan: list[ExportBucket]) -> None:
        """Send by this plan from now on."""
        self.close()
        self.plan = plan
        self._own = [b.blocks(self._group(b).rank()) if b.stage == self.stage else [] for b in plan]
        self._messages: dict[int, dict[str, Any]] = {}
        planned = {id_of(w) for b in plan if b.stage == self.stage for w, _, _ in b.blocks(self._first_of_owner(b))}
        assert planned == self.parameters.keys(), f"plan and model differ: {sorted(planned ^ self.parameters.keys())[:4]}"

    def begin(self, host: str = "127.0.0.1", timeout_s: float = 60.0) -> Export:
        """Start an update. `host`: address of this machine, for engines on others."""
        if not self._has_buffers:  # the same on all ranks, also on those without a buffer of their own
            self.buffer = self._make_buffer()
            self._share_buffers()
            self._has_buffers = True
        sources = []
        if self.buffer is not None:
            self.buffer.begin_update()
            if isinstance(self.buffer, BroadcastSendBuffer):
                sources.append(self.buffer.open(host, timeout_s))
        return Export(len(self.plan), self.layout.straight, sources)

    def connect(self, n_receivers: int, timeout_s: float) -> None:
        """Wait until all receivers of this rank's broadcasts have joined."""
        if isinstance(self.buffer, BroadcastSendBuffer):
            self.buffer.connect(n_receivers, timeout_s)

    def export(self, index: int) -> dict[str, Any] | None:
        """Assemble a bucket; what the engines need to reach it, from the ranks that hold it."""
        bucket, slot = self.plan[index], index % N_SLOTS
        everywhere = self.transport == "cuda_ipc"
        if bucket.stage == self.stage and (everywhere or self._takes_part(bucket)):
            buffer = self._shared.get(bucket.is_expert, self.buffer)
            flat = None if buffer is None else buffer.flat(slot)[: bucket.nbytes]
            if self.transport == "shared_memory":
                self._write(self._own[index], flat)
            else:
                self._assemble(bucket, self._own[index], flat, everywhere=everywhere)
        if everywhere and self.layout.n_stages > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(self.buffer.flat(slot)[: bucket.nbytes], group=group, group_src=bucket.stage)
        if self.buffer is None or not (everywhere or self._holds(bucket)):
            return None
        if index not in self._messages:
            rank = self._group(bucket).rank() if bucket.straight else 0
            self._messages[index] = bucket.layout(rank).bucket({}).to_payload() | {"rank": rank}
        return self._messages[index] | {"handle": self.buffer.handle(slot)}

    def deliver(self, index: int) -> None:
        """Broadcast an assembled bucket, if this rank is its sender."""
        bucket = self.plan[index]
        if isinstance(self.buffer, BroadcastSendBuffer) and self._holds(bucket):
            self.buffer.deliver(index % N_SLOTS, bucket.nbytes)

    def save(self, directory: Path) -> dict[str, str]:
        """Write this rank's buckets as safetensors files; returns their `{tensor name: file name}`."""
        gathered = ExportLayout(**{**vars(self.layout), "straight": False})
        plan = plan_export(self.hf, gathered, self.dtype, SAFETENSORS_BYTES)
        written: dict[str, str] = {}
        assembler = TensorAssembler()
        for index, bucket in enumerate(plan):
            if not self._takes_part(bucket):
                continue
            rank = self._group(bucket).rank()
            flat = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self.device) if rank == 0 else None
            self._assemble(bucket, bucket.blocks(rank), flat, everywhere=False)
            if flat is not None:
                file = f"model-{index + 1:05d}-of-{len(plan):05d}.safetensors"
                tensors = {name: tensor.cpu() for name, tensor in assembler.take_all(bucket.layout().blocks, flat)}
                save_file(tensors, directory / file, metadata={"format": "pt"})
                written |= dict.fromkeys(tensors, file)
        assert not assembler.incomplete
        self._outgoing = None  # the files' buckets are larger than those to the engines
        return written

    def digests(self) -> dict[str, Any] | None:
        """Digests of this rank's parameters as Hugging Face tensors (see `compare_digests`); None from ranks that hold copies
        of what others have."""
        found: dict[str, Any] = {"rank": self.weights.tp_rank, "sharded": {}, "replicated": {}}
        with torch.no_grad():
            for weight, parameter in self.weights.owned():
                rank, size = self.weights.shard(weight)
                if not self._is_first_replica(weight.expert is not None):
                    continue
                for tensor, values in zip(weight.parts, weight.split(parameter), strict=True):
                    if tensor.shard_dim is None and rank > 0:
                        continue
                    start = tuple(s.start for s in tensor.shard_slice(rank, size))
                    kind = "replicated" if tensor.shard_dim is None else "sharded"
                    found[kind][tensor.name] = block_digest(values.detach(), tensor.shape, start)
        return found if found["sharded"] or found["replicated"] else None

    def close(self) -> None:
        """Free the buffers."""
        self._outgoing = None
        for shared in self._shared.values():
            shared.close()
        self._shared, self._has_buffers = {}, False
        if self.buffer is not None:
            self.buffer.close()
            self.buffer = None

    def _is_first_replica(self, is_expert: bool) -> bool:
        if is_expert:
            return parallel_state.get_expert_data_parallel_rank() == 0
        return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0

    def _takes_part(self, bucket: ExportBucket) -> bool:
        """Whether this rank is in the one group, of all replicas, that assembles the bucket."""
        return bucket.stage == self.stage and self._is_first_replica(bucket.is_expert)

    def _holds(self, bucket: ExportBucket) -> bool:
        """Whether the assembled bucket is here, where only one group of all replicas assembles it."""
        return self._takes_part(bucket) and (bucket.straight or self._group(bucket).rank() == 0)

    def _group(self, bucket: ExportBucket) -> dist.ProcessGroup:
        """The ranks that hold a bucket's shards together: TP; for experts ETP x EP, of which ETP counts faster."""
        if bucket.is_expert:
            return parallel_state.get_expert_tensor_and_model_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()

    def _first_of_owner(self, bucket: ExportBucket) -> int:
        """The rank that has all kinds of a bucket's tensors which this rank's expert-parallel rank has."""
        return self._group(bucket).rank() // bucket.cuts * bucket.cuts

    def _make_buffer(self) -> SendBuffer | None:
        if self.transport == "cuda_ipc":
            return CudaIpcSendBuffer(max(bucket.nbytes for bucket in self.plan))
        mine = [bucket.nbytes for bucket in self.plan if self._holds(bucket)]
        if not mine:
            return None
        if self.transport == "broadcast":
            return BroadcastSendBuffer(max(mine), self.device, source=self.stage)
        return SharedMemorySendBuffer.create(max(mine))

    def _share_buffers(self) -> None:
        """Open the shared memory of the first of each group whose buckets this rank has a part of."""
        if self.transport != "shared_memory" or self.layout.straight:
            return
        for bucket in {b.is_expert: b for b in self.plan if self._takes_part(b)}.values():
            group = self._group(bucket)
            names = [self.buffer.names if group.rank() == 0 else None]  # type: ignore[union-attr]
            dist.broadcast_object_list(names, group=group, group_src=0)
            if group.rank() > 0:
                self._shared[bucket.is_expert] = SharedMemorySendBuffer.attach(names[0])

    def _region(self, nbytes: int) -> Tensor:
        """Room for what this rank sends to the first of its group, the same in every bucket: an allocator may keep many."""
        if self._outgoing is None or len(self._outgoing) < nbytes:
            self._outgoing = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self._outgoing[:nbytes]

    def _assemble(self, bucket: ExportBucket, own: list[OwnBlock], flat: Tensor | None, *, everywhere: bool) -> None:
        """Bring a bucket's regions together in `flat`, on the first rank of its group or on all; every rank's own is written
        into its place at once, and nobody holds more than the bucket."""
        group = self._group(bucket)
        rank, size, nbytes = group.rank(), group.size(), bucket.region_nbytes
        if bucket.straight or size == 1:
            self._write(own, flat)
        elif everywhere:
            region = flat[rank * nbytes : (rank + 1) * nbytes]
            self._write(own, region, rank * nbytes)
            dist.all_gather_into_tensor(flat, region, group=group)  # in place
        elif rank == 0:
            regions = [flat[r * nbytes : (r + 1) * nbytes] for r in range(1, size)]
            coming = [dist.irecv(region, group=group, group_src=r) for r, region in enumerate(regions, start=1)]
            self._write(own, flat)  # meanwhile
            for work in coming:
                work.wait()
        else:
            region = self._region(nbytes)
            self._write(own, region, rank * nbytes)
            dist.send(region, group=group, group_dst=0)

    @torch.no_grad()
    def _write(self, own: list[OwnBlock], room: Tensor, base: int = 0) -> None:
        """Copy this rank's rows to their places; `room` begins `base` bytes into the bucket."""
        split: tuple[Weight | None, list[Tensor]] = (None, [])
        for weight, part, block in own:
            if weight is not split[0]:
                split = weight, weight.split(self.parameters[id_of(weight)])
            first = block.start[0] - weight.parts[part].shard_slice(*self.weights.shard(weight))[0].start
            begin = block.offset - base
            place = room[begin : begin + block.nbytes].view(block.torch_dtype).view(block.size)
            place.copy_(split[1][part][first : first + block.size[0]])


def id_of(weight: Weight) -> str:
    """Name of a weight in the table, whatever the layer spec calls it."""
    return weight.names[0]
