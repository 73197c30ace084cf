"""Giving a GPU's memory to the engines while they generate: tensors give theirs up, and get it back with the same values."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

PATIENCE_S = 30.0
"""Seconds to wait for memory that another process is about to give up."""


class Parked:
    """Tensors without memory.

    It is the storages that are emptied, so all views of them stay valid: the model's parameters and the optimizer's, which share
    their memory in fp32, still share it afterwards. Nothing may read the tensors in between.
    """

    def __init__(self, tensors: Iterable[Tensor], *, keep_values: bool = True):
        """Empty the tensors' storages; with `keep_values` they wait in host memory, without they come back as zeros."""
        self._parked: list[tuple[Tensor, int, Tensor | None]] = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() == 0:  # empty, or another view of a storage that has been parked
                continue
            everything = _bytes(tensor)
            on_host = None
            if keep_values:
                on_host = torch.empty(everything.shape, dtype=torch.uint8, device="cpu", pin_memory=tensor.is_cuda)
                on_host.copy_(everything)
            self._parked.append((tensor, storage.nbytes(), on_host))
            storage.resize_(0)

    @property
    def nbytes(self) -> int:
        """Memory that was given up."""
        return sum(nbytes for _, nbytes, _ in self._parked)

    def restore(self) -> None:
        """Give the tensors their memory and their values back."""
        for tensor, nbytes, on_host in self._parked:
            _take(tensor.untyped_storage(), nbytes)
            everything = _bytes(tensor)
            everything.zero_() if on_host is None else everything.copy_(on_host)
        self._parked = []


def _take(storage: torch.UntypedStorage, nbytes: int) -> None:
    """Resize a storage. On a GPU whose engine has just been killed, the memory may take seconds to come free: try for a while."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            storage.resize_(nbytes)
            return
        except torch.OutOfMemoryError:
            if time.monotonic() > end:
                raise
            torch.cuda.empty_cache()
            time.sleep(0.5)


def _bytes(tensor: Tensor) -> Tensor:
    """All bytes of the tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
