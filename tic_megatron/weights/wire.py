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

import hashlib
import math
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

ALIGNMENT = 64
"""Bytes; offsets are multiples of it, so that a view of any dtype is possible and copies run at full speed."""


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
    """A run of bytes that processes of one machine and user share.

    The memory has no name in /dev/shm: others reach it through its creator's open file. So nothing is left behind, whoever
    is killed (Ray kills a worker together with the resource tracker that would clean up for it), and the size of /dev/shm,
    which is small in containers, does not matter. It is freed with the last process that maps it.
    """

    def __init__(self, name: str, nbytes: int, file: int | None) -> None:
        """Use `create` or `attach`."""
        self.name = name
        self.nbytes = nbytes
        self._file = file
        path, _ = _parse_name(name)
        self._flat: torch.Tensor | None = torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)

    @classmethod
    def create(cls, nbytes: int) -> SharedMemoryBuffer:
        """Allocate `nbytes`; pages are taken when they are first written."""
        token = secrets.token_hex(8)
        file = os.memfd_create(f"tic-weights-{token}")
        os.ftruncate(file, nbytes)
        return cls(f"{os.getpid()}/{file}/{token}", nbytes, file)

    @classmethod
    def attach(cls, name: str) -> SharedMemoryBuffer:
        """Map what another process created under this name. Raises FileNotFoundError if that is gone."""
        path, token = _parse_name(name)
        if token not in os.readlink(path):  # the numbers of a process and a file come round again, the token doesn't
            raise FileNotFoundError(f"shared memory {name} is gone: its process or its buffer is another one now")
        return cls(name, os.stat(path).st_size, None)

    @property
    def handle(self) -> dict[str, Any]:
        """What a `Bucket` carries so that a receiver can attach."""
        return {"shared_memory": self.name}

    def as_tensor(self, tensor: WireTensor) -> torch.Tensor:
        """View of the tensor's bytes; its values last until the sender refills the buffer."""
        if self._flat is None:
            raise ValueError(f"shared memory {self.name} is closed")
        return tensor.view(self._flat)

    def close(self) -> None:
        """Give up this process's mapping, once the last view of it is gone too; from the creator, nobody can attach any more."""
        self._flat = None
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _parse_name(name: str) -> tuple[str, str]:
    """`process/file/token` -> path of the process's open file, token."""
    process, file, token = name.split("/")
    return f"/proc/{process}/fd/{file}", token


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256, in hex, of a tensor's contiguous bytes: equal at sender and receiver if the bytes arrived."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
