"""Gradients at theta_old while the optimizer moves on: what an objective without importance sampling needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class HeldParameters:
    """A copy of the parameters as they are now, to be put in use for the passes of later updates.

    In fp32 Megatron's optimizer steps the very tensors that the forward pass reads, so holding back its copy from main to
    model parameters would do nothing; exchanging the values around the passes is right for every precision. It costs two
    copies of this rank's parameters.
    """

    def __init__(self, parts: list[nn.Module]):
        self._parameters = [p for part in parts for p in part.parameters()]
        self._held = [p.detach().clone() for p in self._parameters]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the model has the held values; afterwards its own again, for the optimizer's step."""
        current = [p.detach().clone() for p in self._parameters]
        self._copy(self._held)
        try:
            yield
        finally:
            self._copy(current)

    @torch.no_grad()
    def _copy(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
