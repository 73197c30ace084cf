"""The wire format of a weight update: what the trainer and an engine have to agree on.

An update is a sequence of *buckets*. A bucket is a flat run of bytes that holds whole tensors, named and shaped as in the
Hugging Face model, and a *handle* that tells a process on the same machine how to reach those bytes. The sender owns one
buffer and refills it for every bucket, so a receiver copies what it wants to keep before it answers.

    layout = layout_bucket([("model.norm.weight", torch.float32, (64,)), ("lm_head.weight", torch.float32, (320, 64))])
    buffer = SharedMemoryBuffer.create(layout.nbytes)
    for tensor in layout.tensors:
        buffer.as_tensor(tensor).copy_(...)
    payload = layout.bucket(buffer.handle).to_payload()      # a plain dict, for `update_weights`
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import torch

ALIGNMENT = 64
"""Bytes; offsets are multiples of it, so that a view of any dtype is possible and copies run at full speed."""

_SHARED_MEMORY_DIR = Path("/dev/shm")


@dataclass(frozen=True)
class WireTensor:
    """A tensor's place in a bucket.

    Example: `WireTensor("model.norm.weight", "bfloat16", (1024,), offset=128)`; `offset` is in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of a bucket's bytes, `flat`: uint8, [at least offset + nbytes]."""
        return flat[self.offset : self.offset + self.nbytes].view(self.torch_dtype).view(self.shape)


@dataclass(frozen=True)
class BucketLayout:
    """Which tensors a bucket holds and where, the bytes' whereabouts left open."""

    tensors: tuple[WireTensor, ...]
    nbytes: int

    def bucket(self, handle: dict[str, Any]) -> Bucket:
        """The bucket whose bytes `handle` reaches."""
        return Bucket(self.tensors, self.nbytes, handle)


@dataclass(frozen=True)
class Bucket:
    """One message of an update: tensors, size in bytes, and how to reach the bytes."""

    tensors: tuple[WireTensor, ...]
    nbytes: int
    handle: dict[str, Any]

    def to_payload(self) -> dict[str, Any]:
        """As plain lists and dicts, which is what vLLM's `update_weights` takes."""
        tensors = [[tensor.name, tensor.dtype, list(tensor.shape), tensor.offset] for tensor in self.tensors]
        return {"tensors": tensors, "nbytes": self.nbytes, "handle": self.handle}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Bucket:
        """Inverse of `to_payload`."""
        tensors = tuple(WireTensor(name, dtype, tuple(shape), offset) for name, dtype, shape, offset in payload["tensors"])
        return cls(tensors, payload["nbytes"], payload["handle"])


def layout_bucket(specs: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> BucketLayout:
    """Lay the tensors `(name, dtype, shape)` out in one bucket, in the given order."""
    tensors, end = [], 0
    for name, dtype, shape in specs:
        tensor = WireTensor(name, str(dtype).removeprefix("torch."), tuple(shape), offset=_aligned(end))
        tensors.append(tensor)
        end = tensor.offset + tensor.nbytes
    return BucketLayout(tuple(tensors), _aligned(end))


class SharedMemoryBuffer:
    """A named run of bytes that processes of one machine share. The creator unlinks it; attaching leaves no trace.

    Only the creator's segment is known to Python's resource tracker (which removes it even if the creator is killed): attaching
    maps the segment's file, because `SharedMemory(name)` of Python 3.11 and 3.12 would have every receiver's tracker unlink it.
    """

    def __init__(self, name: str, nbytes: int, segment: SharedMemory | None) -> None:
        """Use `create` or `attach`."""
        self.name = name
        self.nbytes = nbytes
        self._segment = segment
        self._flat: torch.Tensor | None = torch.from_file(
            str(_SHARED_MEMORY_DIR / name), shared=True, size=nbytes, dtype=torch.uint8
        )

    @classmethod
    def create(cls, nbytes: int) -> SharedMemoryBuffer:
        """Allocate `nbytes` under a new name. Raises OSError if the machine's shared memory cannot hold them."""
        disk = os.statvfs(_SHARED_MEMORY_DIR)
        if nbytes > (available := disk.f_bavail * disk.f_frsize):
            raise OSError(
                errno.ENOSPC,
                f"{nbytes / 2**20:.0f} MiB of shared memory for the weight transfer do not fit: {_SHARED_MEMORY_DIR} has "
                f"{available / 2**20:.0f} MiB left; lower rollout.weight_bucket_mib, or enlarge it "
                "(in a container: --shm-size or --ipc=host)",
            )
        segment = SharedMemory(create=True, size=nbytes)
        segment.close()  # only its own mapping: the segment lives until `unlink`
        with (_SHARED_MEMORY_DIR / segment.name).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # now; a full /dev/shm would otherwise be a SIGBUS at the first write
        return cls(segment.name, nbytes, segment)

    @classmethod
    def attach(cls, name: str) -> SharedMemoryBuffer:
        """Map the segment that another process created. Raises FileNotFoundError if there is none of that name."""
        return cls(name, (_SHARED_MEMORY_DIR / name).stat().st_size, None)

    @property
    def handle(self) -> dict[str, Any]:
        """What a `Bucket` carries so that a receiver can attach."""
        return {"shared_memory": self.name}

    def as_tensor(self, tensor: WireTensor) -> torch.Tensor:
        """View of the tensor's bytes, valid until `close` and only while the sender does not refill the buffer."""
        if self._flat is None:
            raise ValueError(f"shared memory buffer {self.name} is closed")
        return tensor.view(self._flat)

    def close(self) -> None:
        """Give up this process's mapping, once the last view of it is gone too."""
        self._flat = None

    def unlink(self) -> None:
        """Remove the name; for the creator. The memory is freed when the last process has closed it."""
        self.close()
        if self._segment is not None:
            self._segment.unlink()
            self._segment = None


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256, in hex, of a tensor's contiguous bytes: equal at sender and receiver if the bytes arrived."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
