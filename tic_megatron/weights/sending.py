"""The trainer's side of the weight transfer: buffers that engines can reach, and the driver's loop over the buckets."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tic_megatron.weights.wire import BucketLayout, SharedMemoryBuffer, WireTensor


class SendBuffer(Protocol):
    """Room for one bucket; refilled for every bucket of every update."""

    def begin_update(self) -> None:
        """Once per update, before the first bucket."""
        ...

    def view(self, tensor: WireTensor) -> Tensor:
        """Where the tensor's values go."""
        ...

    def payload(self, layout: BucketLayout) -> dict[str, Any]:
        """What tells the receivers where the filled bucket lies."""
        ...

    def close(self) -> None:
        """Free the room."""
        ...


class SharedMemorySendBuffer:
    """Shared memory of the machine, for CPU engines (backend `shared_memory`)."""

    def __init__(self, nbytes: int):
        self._buffer = SharedMemoryBuffer.create(nbytes)

    def begin_update(self) -> None:
        """Nothing to do."""

    def view(self, tensor: WireTensor) -> Tensor:
        """A view of the shared bytes."""
        return self._buffer.as_tensor(tensor)

    def payload(self, layout: BucketLayout) -> dict[str, Any]:
        """The bucket in the project's wire format."""
        return layout.bucket(self._buffer.handle).to_payload()

    def close(self) -> None:
        """Give the shared memory up."""
        self._buffer.close()


class CudaIpcSendBuffer:
    """GPU memory opened to the other processes of the same GPU, for vLLM's `ipc` backend in packed mode.

    Every rank fills its own and the payloads of all ranks are merged: an engine picks the handle of its GPU's UUID.
    """

    def __init__(self, nbytes: int):
        self._flat = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        self._uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        self._handle: tuple | None = None

    @property
    def flat(self) -> Tensor:
        """All bytes, uint8."""
        return self._flat

    def begin_update(self) -> None:
        """Export the memory anew: the receiver opens and releases one export per update, which keeps torch's count right."""
        from torch.multiprocessing.reductions import reduce_tensor

        self._handle = reduce_tensor(self._flat)[1]

    def view(self, tensor: WireTensor) -> Tensor:
        """A view of the GPU's bytes."""
        return tensor.view(self._flat)

    def payload(self, layout: BucketLayout) -> dict[str, Any]:
        """vLLM's packed `ipc` update: tensors back to back, each with its size in bytes."""
        for before, after in zip(layout.tensors, layout.tensors[1:], strict=False):
            assert before.offset + before.nbytes == after.offset, f"a gap between {before.name} and {after.name}"
        torch.cuda.current_stream().synchronize()  # the copies must be done before another process reads
        return {
            "names": [t.name for t in layout.tensors],
            "dtype_names": [t.dtype for t in layout.tensors],
            "shapes": [list(t.shape) for t in layout.tensors],
            "tensor_sizes": [t.nbytes for t in layout.tensors],
            "ipc_handles": {self._uuid: self._handle},
        }

    def close(self) -> None:
        """Free the memory."""
        self._flat, self._handle = None, None
        torch.cuda.ipc_collect()


def merge_payloads(payloads: list[dict[str, Any] | None]) -> dict[str, Any]:
    """One payload of those that the ranks returned for a bucket: the only one, or all IPC handles together."""
    sent = [payload for payload in payloads if payload is not None]
    merged = dict(sent[0])
    if "ipc_handles" in merged:
        merged["ipc_handles"] = {uuid: handle for payload in sent for uuid, handle in payload["ipc_handles"].items()}
    return merged


def send_weights(actors, engines, *, version: int) -> None:
    """Bring the actors' weights to every engine, bucket by bucket, as `version`.

    Args:
        actors: `tic_megatron.actors.group.ActorGroup`.
        engines: `tic_megatron.rollout.engines.EngineGroup`.
        version: recorded with every trajectory that these weights will make.
    """
    engines.start_weight_update()
    for bucket in range(actors.begin_export()):
        engines.update_weights(merge_payloads(actors.export_bucket(bucket)))
    engines.finish_weight_update(version)
