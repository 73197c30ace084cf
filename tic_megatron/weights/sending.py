"""The trainer's side of the weight transfer: buffers that engines can reach, and the driver's loop over the buckets."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tic_megatron.rendezvous import open_store
from tic_megatron.weights.wire import SharedMemoryBuffer, broadcast, make_group

N_SLOTS = 2
"""Buckets that exist at the same time: one is assembled while the engines load the other."""

MOST_BROADCASTS = 3
"""So many broadcasts of an update that lose an engine end the run."""

Transport = Literal["shared_memory", "cuda_ipc", "broadcast"]
"""How an engine reaches a bucket: in memory of its machine, in memory of its GPU, or by a broadcast to all engines."""


def transport_of(device: str, *, colocate: bool) -> Transport:
    """The transport for engines beside the actors, or elsewhere."""
    if not colocate:
        return "broadcast"
    return "shared_memory" if device == "cpu" else "cuda_ipc"


class SendBuffer(Protocol):
    """Room for the buckets of an update, which take turns in its slots."""

    def begin_update(self) -> None:
        """Once per update, before the first bucket."""
        ...

    def flat(self, slot: int) -> Tensor:
        """All bytes of a slot, uint8."""
        ...

    def handle(self, slot: int) -> dict[str, Any]:
        """What tells the receivers how to reach a slot that has been filled."""
        ...

    def close(self) -> None:
        """Free the room."""
        ...


class SharedMemorySendBuffer:
    """Shared memory of the machine, for engines on its CPUs. All ranks that have parts of a bucket write them there."""

    def __init__(self, buffers: list[SharedMemoryBuffer]):
        """Use `create` or `attach`."""
        self._buffers = buffers

    @classmethod
    def create(cls, nbytes: int) -> SharedMemorySendBuffer:
        """Room of `nbytes` per slot; pages are taken when they are first written."""
        return cls([SharedMemoryBuffer.create(nbytes) for _ in range(N_SLOTS)])

    @classmethod
    def attach(cls, names: list[str]) -> SharedMemorySendBuffer:
        """What another rank has created under these names."""
        return cls([SharedMemoryBuffer.attach(name) for name in names])

    @property
    def names(self) -> list[str]:
        """For `attach`."""
        return [buffer.name for buffer in self._buffers]

    def begin_update(self) -> None:
        """Nothing to do."""

    def flat(self, slot: int) -> Tensor:
        """All bytes of a slot, uint8."""
        return self._buffers[slot].flat

    def handle(self, slot: int) -> dict[str, Any]:
        """The memory's name."""
        return self._buffers[slot].handle

    def close(self) -> None:
        """Give the shared memory up."""
        for buffer in self._buffers:
            buffer.close()


class CudaIpcSendBuffer:
    """GPU memory opened to the other processes of the same GPU.

    Every rank fills its own, and the handles of all ranks are merged: a receiver picks that of its GPU's UUID.
    """

    def __init__(self, nbytes: int):
        self._flats = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(N_SLOTS)]
        self._uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        self._exported: set[int] = set()  # in this update

    def begin_update(self) -> None:
        """Export the memory anew: a receiver opens and releases one export per update, which keeps torch's count right."""
        self._exported = set()

    def flat(self, slot: int) -> Tensor:
        """All bytes of a slot, uint8."""
        return self._flats[slot]

    def handle(self, slot: int) -> dict[str, Any]:
        """The slot; the first time in an update also the arguments of torch's `rebuild_cuda_tensor`, by GPU. (With every bucket,
        those of hundreds of GPUs would be most of what the driver sends.)"""
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.current_stream().synchronize()  # the copies must be done before another process reads
        if slot in self._exported:
            return {"slot": slot}
        self._exported.add(slot)
        return {"slot": slot, "cuda_ipc": {self._uuid: reduce_tensor(self._flats[slot])[1]}}

    def close(self) -> None:
        """Free the memory."""
        self._flats = []
        torch.cuda.ipc_collect()


class BroadcastSendBuffer:
    """Memory of this process, broadcast to all receivers by a process group that lives for one update: so engines may come and
    go in between. NCCL on GPUs, gloo on CPUs."""

    def __init__(self, nbytes: int, device: torch.device, source: int):
        self._flats = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(N_SLOTS)]
        self._source = source
        self._store: dist.TCPStore | None = None
        self._group: dist.ProcessGroup | None = None

    def begin_update(self) -> None:
        """Leave the group of the last update."""
        self._group = self._store = None

    def open(self, host: str, timeout_s: float) -> dict[str, Any]:
        """Start to listen; what receivers need to join. `source` numbers the senders."""
        self._store = open_store(host, timeout_s)
        return {"source": self._source, "host": host, "port": self._store.port, "timeout_s": timeout_s}

    def connect(self, n_receivers: int, timeout_s: float) -> None:
        """Wait until all receivers have joined."""
        self._group = make_group(self._store, 0, 1 + n_receivers, self._flats[0].device, timeout_s)
        self._timeout_s = timeout_s

    def flat(self, slot: int) -> Tensor:
        """All bytes of a slot, uint8."""
        return self._flats[slot]

    def handle(self, slot: int) -> dict[str, Any]:
        """Which sender will broadcast."""
        return {"broadcast": self._source}

    def deliver(self, slot: int, nbytes: int) -> None:
        """Send a filled slot to all receivers, who must have been told of it. RuntimeError when one has died; the others are
        cut off then, so that they need not wait for what will not come."""
        try:
            broadcast(self._group, self._flats[slot][:nbytes], self._timeout_s)
        except RuntimeError:
            self._group = None
            raise

    def close(self) -> None:
        """Free the memory."""
        self._flats, self._group, self._store = [], None, None


@dataclass(frozen=True)
class Export:
    """What the driver has to know of an update that begins: how many buckets, whether each rank's shards go straight to its
    engine rank, and what receivers need to join broadcasts (`BroadcastSendBuffer.open`), of this rank or of all."""

    n_buckets: int
    straight: bool
    sources: list[dict[str, Any]]


def merge_payloads(payloads: Sequence[dict[str, Any] | None], *, straight: bool) -> list[dict[str, Any]]:
    """What the ranks returned for a bucket, as one payload for every receiver, or as one per rank of an engine."""
    sent = [payload for payload in payloads if payload is not None]
    if straight:
        by_rank: dict[int, list[dict[str, Any]]] = {}
        for payload in sent:
            by_rank.setdefault(payload["rank"], []).append(payload)
        return [_merge(by_rank[rank]) for rank in sorted(by_rank)]
    return [_merge(sent)]


def _merge(payloads: list[dict[str, Any]]) -> dict[str, Any]:
    """The only one, or all GPUs' handles together."""
    handle = dict(payloads[0]["handle"])
    if "cuda_ipc" in handle:
        handle["cuda_ipc"] = {uuid: args for p in payloads for uuid, args in p["handle"]["cuda_ipc"].items()}
    return {name: payloads[0][name] for name in ("blocks", "nbytes")} | {"handle": handle}


class WeightTransferError(RuntimeError):
    """An engine holds other bytes than the actors."""


def send_weights(actors, engines, *, version: int, verify: bool = False) -> None:
    """Bring the actors' weights to every engine as `version`, by buckets, of which one is assembled while another is loaded.

    A broadcast from which an engine is lost is broken for all; it is begun again with those that are left.

    Args:
        actors: `tic_megatron.actors.group.ActorGroup`.
        engines: `tic_megatron.rollout.engines.EngineGroup`.
        version: recorded with every trajectory that these weights will make.
        verify: compare the digests of all tensors, of the actors' parameters with what the engines have received.

    Raises:
        WeightTransferError: they differ; the message names engine and tensor.
    """
    attempts = 0
    while True:
        attempts += 1
        plan = actors.begin_export()
        try:
            _replay(plan, actors, engines, version=version, record_digests=verify)
            break
        except RuntimeError:  # WorkerError
            if not plan.sources or not engines.lost_receivers or attempts == MOST_BROADCASTS:
                raise
    if verify:
        compare_digests(actors.weight_digests(), engines.received_digests(), straight=plan.straight)


def _replay(plan: Export, actors, engines, *, version: int, record_digests: bool) -> None:
    """The buckets of an update that the actors have begun."""
    n_receivers = engines.begin_receiving()
    connected = actors.connect(n_receivers) if plan.sources else None
    engines.start_weight_update(plan.sources, record_digests=record_digests)
    if connected:
        connected()
    # Every slot has a bucket under way, and takes the next one as soon as the engines have loaded it. A broadcast comes before
    # the next bucket: the engines wait for it.
    n_ahead = 1 if plan.sources else N_SLOTS
    assembled = deque(actors.export_bucket(bucket) for bucket in range(min(n_ahead, plan.n_buckets)))
    for bucket in range(plan.n_buckets):
        payloads = merge_payloads(assembled.popleft()(), straight=plan.straight)
        delivered = actors.deliver_bucket(bucket) if plan.sources else None
        if delivered and bucket + 1 < plan.n_buckets:
            assembled.append(actors.export_bucket(bucket + 1))
        engines.update_weights(payloads)
        if delivered:
            delivered()
        elif bucket + N_SLOTS < plan.n_buckets:
            assembled.append(actors.export_bucket(bucket + N_SLOTS))
    engines.finish_weight_update(version)


def compare_digests(sent: Sequence[dict[str, Any]], received: Mapping[int, Sequence[dict[str, int]]], *, straight: bool) -> None:
    """Raise WeightTransferError unless every rank of every engine received what the actors have.

    Args:
        sent: of every actor rank that holds weights first: `rank` (tensor-parallel), digests of its `sharded` tensors' shards,
            and of its `replicated` tensors, by Hugging Face name.
        received: of every engine, by its index, [rank] digest by name.
        straight: an engine's rank received the shards of the actors' rank only.
    """
    whole: dict[str, int] = {}
    by_rank: dict[int, dict[str, int]] = {}
    for part in sent:
        for name, digest in part["sharded"].items():
            whole[name] = (whole.get(name, 0) + digest) % 2**64
        by_rank.setdefault(part["rank"], {}).update(part["sharded"])
    replicated = {name: digest for part in sent for name, digest in part["replicated"].items()}
    for engine, ranks in received.items():
        for rank, digests in enumerate(ranks):
            expected = (by_rank[rank] if straight else whole) | replicated
            wrong = [name for name in expected.keys() | digests.keys() if expected.get(name) != digests.get(name)]
            if wrong:
                raise WeightTransferError(
                    f"engine {engine}, rank {rank}: {len(wrong)} of {len(expected)} tensors differ from the actors' after the "
                    f"weight update, the first is {min(wrong)}"
                )
