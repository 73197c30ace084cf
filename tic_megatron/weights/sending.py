"""The trainer's side of the weight transfer: buffers that engines can reach, and the driver's loop over the buckets."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tic_megatron.weights.wire import BucketLayout, SharedMemoryBuffer, WireTensor

N_SLOTS = 2
"""Buckets that exist at the same time: one is assembled while the engines load the other."""


class SendBuffer(Protocol):
    """Room for the buckets of an update, which take turns in its slots."""

    def begin_update(self) -> None:
        """Once per update, before the first bucket."""
        ...

    def view(self, tensor: WireTensor, slot: int) -> Tensor:
        """Where the tensor's values go."""
        ...

    def payload(self, layout: BucketLayout, slot: int) -> dict[str, Any]:
        """What tells the receivers where the filled bucket lies."""
        ...

    def close(self) -> None:
        """Free the room."""
        ...


class SharedMemorySendBuffer:
    """Shared memory of the machine, for CPU engines (backend `shared_memory`)."""

    def __init__(self, nbytes: int):
        self._buffers = [SharedMemoryBuffer.create(nbytes) for _ in range(N_SLOTS)]  # pages are taken when first written

    def begin_update(self) -> None:
        """Nothing to do."""

    def view(self, tensor: WireTensor, slot: int) -> Tensor:
        """A view of the shared bytes."""
        return self._buffers[slot].as_tensor(tensor)

    def payload(self, layout: BucketLayout, slot: int) -> dict[str, Any]:
        """The bucket in the project's wire format."""
        return layout.bucket(self._buffers[slot].handle).to_payload()

    def close(self) -> None:
        """Give the shared memory up."""
        for buffer in self._buffers:
            buffer.close()


class CudaIpcSendBuffer:
    """GPU memory opened to the other processes of the same GPU, for vLLM's `ipc` backend in packed mode.

    Every rank fills its own and the payloads of all ranks are merged: an engine picks the handle of its GPU's UUID.
    """

    def __init__(self, nbytes: int):
        self._flats = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(N_SLOTS)]
        self._uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        self._handles: dict[int, tuple] = {}

    def flat(self, slot: int) -> Tensor:
        """All bytes of a slot, uint8."""
        return self._flats[slot]

    def begin_update(self) -> None:
        """Export the memory anew: the receiver opens and releases one export per update, which keeps torch's count right."""
        self._handles = {}

    def view(self, tensor: WireTensor, slot: int) -> Tensor:
        """A view of the GPU's bytes."""
        return tensor.view(self._flats[slot])

    def payload(self, layout: BucketLayout, slot: int) -> dict[str, Any]:
        """vLLM's packed `ipc` update: tensors back to back, each with its size in bytes."""
        from torch.multiprocessing.reductions import reduce_tensor

        for before, after in zip(layout.tensors, layout.tensors[1:], strict=False):
            assert before.offset + before.nbytes == after.offset, f"a gap between {before.name} and {after.name}"
        torch.cuda.current_stream().synchronize()  # the copies must be done before another process reads
        if slot not in self._handles:
            self._handles[slot] = reduce_tensor(self._flats[slot])[1]
        return {
            "names": [t.name for t in layout.tensors],
            "dtype_names": [t.dtype for t in layout.tensors],
            "shapes": [list(t.shape) for t in layout.tensors],
            "tensor_sizes": [t.nbytes for t in layout.tensors],
            "ipc_handles": {self._uuid: self._handles[slot]},
        }

    def close(self) -> None:
        """Free the memory."""
        self._flats, self._handles = [], {}
        torch.cuda.ipc_collect()


def merge_payloads(payloads: list[dict[str, Any] | None]) -> dict[str, Any]:
    """One payload of those that the ranks returned for a bucket: the only one, or all IPC handles together."""
    sent = [payload for payload in payloads if payload is not None]
    merged = dict(sent[0])
    if "ipc_handles" in merged:
        merged["ipc_handles"] = {uuid: handle for payload in sent for uuid, handle in payload["ipc_handles"].items()}
    return merged


def send_weights(actors, engines, *, version: int) -> None:
    """Bring the actors' weights to every engine as `version`, by buckets, of which one is assembled while another is loaded.

    Args:
        actors: `tic_megatron.actors.group.ActorGroup`.
        engines: `tic_megatron.rollout.engines.EngineGroup`.
        version: recorded with every trajectory that these weights will make.
    """
    engines.start_weight_update()
    n_buckets = actors.begin_export()
    assembled = actors.export_bucket(0)
    for bucket in range(n_buckets):
        payload = merge_payloads(assembled())
        if bucket + 1 < n_buckets:
            # Into the other slot, whose bucket the engines have loaded before this one.
            assembled = actors.export_bucket(bucket + 1)
        engines.update_weights(payload)
    engines.finish_weight_update(version)
