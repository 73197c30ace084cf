"""How a packed micro-batch lies on the ranks that share it. The one place that knows the token layout of context parallelism.

Every sequence is cut into 2 x CP equal chunks, and rank r holds chunks r and 2 CP - 1 - r of each: under a causal mask the
early, cheap chunks and the late, dear ones make the same work on every rank. Transformer Engine and Megatron's rotary embedding
expect the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """This rank's place among those that share a packed micro-batch.

    `rank`, `size`: in the context-parallel group `group` (None for one rank); `sequence_alignment`: every sequence is padded to
    a multiple of it, and it is a multiple of 2 x `size` where that is above 1; `sequence_parallel`: tensor-parallel ranks that
    the tokens of one context-parallel rank are spread over once more, between the attention blocks; 1 without.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence_alignment: int = 1
    sequence_parallel: int = 1

    @property
    def alignment(self) -> int:
        """A micro-batch is padded to a multiple of this."""
        return self.sequence_alignment * self.sequence_parallel

    def local_tokens(self, lengths: Sequence[int]) -> Tensor:
        """Index into the packed micro-batch of each token that this rank holds, in its order: [tokens / size].

        Args:
            lengths: tokens of each sequence, multiples of `sequence_alignment`.
        """
        return _tokens_of_rank(lengths, self.rank, self.size)


ALONE = TokenLayout()
"""One rank that holds everything."""


def aligned(n: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least n."""
    return -(-n // alignment) * alignment


def gathered_rows(lengths: Sequence[int], size: int) -> Tensor:
    """Where each token of the packed micro-batch lies once the ranks' tokens have been concatenated in rank order: [tokens]."""
    order = torch.cat([_tokens_of_rank(lengths, rank, size) for rank in range(size)])
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel())
    return rows


def positions_in_sequence(length: int, rank: int, size: int) -> Tensor:
    """Positions, within a sequence, of its tokens on one rank: [length / size]."""
    if size == 1:
        return torch.arange(length)
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


def _tokens_of_rank(lengths: Sequence[int], rank: int, size: int) -> Tensor:
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    parts = [start + positions_in_sequence(n, rank, size) for start, n in zip(starts, lengths, strict=False)]
    return torch.cat(parts)
