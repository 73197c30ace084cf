"""The wire format of a weight update: what the trainer and an engine have to agree on.

An update is a sequence of *buckets*. A bucket is a flat run of bytes that holds *blocks*, rectangular parts of tensors that
are named and shaped as in the Hugging Face model, and a *handle* that tells a process how to reach those bytes. A rank's shard
of a tensor is a block, and so are some rows of a tensor that is larger than a bucket; so nobody on the sender's side ever has
to hold, or put together, more than a bucket. The receiver makes tensors of blocks (`TensorAssembler`). The sender refills its
buffers, so a receiver copies what it wants to keep before it answers.

    layout = layout_blocks([Block.whole("model.norm.weight", torch.float32, (64,))])
    buffer = SharedMemoryBuffer.create(layout.nbytes)
    for block in layout.blocks:
        buffer.as_tensor(block).copy_(...)
    payload = layout.bucket(buffer.handle).to_payload()      # a plain dict, for `update_weights`
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

ALIGNMENT = 64
"""Bytes; offsets are multiples of it, so that a view of any dtype is possible and copies run at full speed."""
DIGEST_CHUNK = 2**20
"""Elements whose digest is computed at a time."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A rectangular part of a Hugging Face tensor, and its place in a bucket.

    `shape`: of the whole tensor; `start`, `size`: of the block, per dimension; `offset`: in bytes; `expected`: elements of the
    tensor that a receiver gets in all (fewer than the whole where it only has a use for its own shard).
    """

    name: str
    dtype: str
    shape: Shape
    start: Shape
    size: Shape
    expected: int
    offset: int = 0

    @classmethod
    def whole(cls, name: str, dtype: torch.dtype, shape: Shape) -> Block:
        """A whole tensor."""
        return cls(name, str(dtype).removeprefix("torch."), shape, (0,) * len(shape), shape, math.prod(shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return getattr(torch, self.dtype)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the tensor."""
        return self.size == self.shape

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.size)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.torch_dtype.itemsize

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The block as a view of a bucket's bytes, `flat`: uint8, [at least offset + nbytes]."""
        return flat[self.offset : self.offset + self.nbytes].view(self.torch_dtype).view(self.size)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of the whole tensor."""
        return tensor[tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))]


@dataclass(frozen=True)
class BucketLayout:
    """Which blocks a bucket holds and where, the bytes' whereabouts left open."""

    blocks: tuple[Block, ...]
    nbytes: int

    def bucket(self, handle: dict[str, Any]) -> Bucket:
        """The bucket whose bytes `handle` reaches."""
        return Bucket(self.blocks, self.nbytes, handle)


@dataclass(frozen=True)
class Bucket:
    """One message of an update: blocks, size in bytes, and how to reach the bytes."""

    blocks: tuple[Block, ...]
    nbytes: int
    handle: dict[str, Any]

    def to_payload(self) -> dict[str, Any]:
        """As plain lists and dicts, which is what vLLM's `update_weights` takes."""
        blocks = [[b.name, b.dtype, list(b.shape), list(b.start), list(b.size), b.expected, b.offset] for b in self.blocks]
        return {"blocks": blocks, "nbytes": self.nbytes, "handle": self.handle}

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Bucket:
        """Inverse of `to_payload`."""
        blocks = tuple(
            Block(name, dtype, tuple(shape), tuple(start), tuple(size), expected, offset)
            for name, dtype, shape, start, size, expected, offset in payload["blocks"]
        )
        return cls(blocks, payload["nbytes"], payload["handle"])


def layout_blocks(blocks: Iterable[Block]) -> BucketLayout:
    """Lay the blocks out in one bucket, in the given order."""
    placed, end = [], 0
    for block in blocks:
        placed.append(replace(block, offset=end))
        end = aligned(end + block.nbytes)
    return BucketLayout(tuple(placed), end)


class TensorAssembler:
    """Makes whole tensors of the blocks of an update."""

    def __init__(self) -> None:
        self._rooms: dict[str, torch.Tensor] = {}
        self._missing: dict[str, int] = {}

    def take(self, block: Block, values: torch.Tensor) -> torch.Tensor | None:
        """The tensor, when this block completes it: `values` itself if that is all of it, otherwise memory of its own.

        Where a receiver gets only a shard of a tensor, the rest of it is not initialised.
        """
        if block.is_whole:
            return values
        if block.name not in self._rooms:
            self._rooms[block.name] = torch.empty(block.shape, dtype=block.torch_dtype, device=values.device)
            self._missing[block.name] = block.expected
        block.of(self._rooms[block.name]).copy_(values)
        self._missing[block.name] -= block.numel
        if self._missing[block.name]:
            return None
        del self._missing[block.name]
        return self._rooms.pop(block.name)

    def take_all(self, blocks: Iterable[Block], flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of every tensor that the blocks of a bucket complete."""
        for block in blocks:
            tensor = self.take(block, block.view(flat))
            if tensor is not None:
                yield block.name, tensor

    @property
    def incomplete(self) -> list[str]:
        """Names of the tensors of which blocks are missing."""
        return list(self._missing)


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

    def as_tensor(self, block: Block) -> torch.Tensor:
        """View of the block's bytes; its values last until the sender refills the buffer."""
        return block.view(self.flat)

    @property
    def flat(self) -> torch.Tensor:
        """All bytes, uint8."""
        if self._flat is None:
            raise ValueError(f"shared memory {self.name} is closed")
        return self._flat

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


def make_group(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> dist.ProcessGroup:
    """A process group beside the default one, of processes that share nothing but the store."""
    timeout = timedelta(seconds=timeout_s)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * timeout  # NCCL's watchdog ends the process: `broadcast` gives up before it
    return dist.ProcessGroupNCCL(store, rank, size, options)


def broadcast(group: dist.ProcessGroup, flat: torch.Tensor, timeout_s: float) -> None:
    """From rank 0 to all others; done when this returns. RuntimeError when a peer has died, and in time when one does not answer;
    the group is of no use then."""
    work = group.broadcast(flat, 0)
    if flat.device.type != "cuda":
        work.wait()
        return
    try:
        # Without a time only the stream would wait, and nobody hear of a peer's death before NCCL's watchdog.
        work.wait(timedelta(seconds=timeout_s))
    except RuntimeError:
        group.abort()  # its kernel would occupy the stream for ever
        raise


def block_digest(values: torch.Tensor, shape: Shape, start: Shape) -> int:
    """64 bits of a block's bits and of their places in the whole tensor. Digests of disjoint blocks add up, modulo 2**64, to
    that of the whole tensor, so ranks can digest their own shards of the parameters, and a receiver what it was sent.

    Each element's bits are multiplied by an odd number that depends on its place: a changed element always shows, and so does
    an exchange (up to chance, 2**-63 and less). It is no protection against somebody who wants to deceive.

    Args:
        values: the block, [*size].
        shape: of the whole tensor.
        start: of the block, per dimension.
    """
    if not values.numel():
        return 0
    rows, inner = values.reshape(values.shape[0], -1), math.prod(values.shape[1:])
    columns = _flat_positions(values.shape[1:], shape[1:], start[1:], values.device)
    row_stride = math.prod(shape[1:])
    bits = rows.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    step = max(1, DIGEST_CHUNK // inner)
    total = 0
    for first in range(0, len(rows), step):
        part = bits[first : first + step].long()
        index = torch.arange(start[0] + first, start[0] + first + len(part), device=values.device)
        factors = _mix((index * row_stride)[:, None] + columns[None, :])
        total += int(((part + 0x5DEECE66D) * factors).sum())
    return total % 2**64


def _flat_positions(size: Shape, shape: Shape, start: Shape, device: torch.device) -> torch.Tensor:
    """Places in the row-major whole of a block's elements, [prod(size)]."""
    positions = torch.zeros((), dtype=torch.long, device=device)
    for count, total, first in zip(size, shape, start, strict=True):
        positions = positions[..., None] * total + torch.arange(first, first + count, device=device)
    return positions.reshape(-1)


def _mix(position: torch.Tensor) -> torch.Tensor:
    """An odd int64 for each place, spread over all bits."""
    mixed = (position + 1) * -7046029254386353131
    mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * -4658895280553007687
    return (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)) | 1


def aligned(offset: int) -> int:
    """The next offset at which a tensor may lie."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
