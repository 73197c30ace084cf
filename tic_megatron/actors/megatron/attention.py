"""Causal attention over packed sequences (`thd`), without Transformer Engine: any dtype, CPU or CUDA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from tic_megatron.actors.context_parallel import ALONE, TokenLayout, gathered_rows, positions_in_sequence

_WASTE = 1.25
"""A bucket's padded area is at most this many times its real one."""


def length_buckets(lengths: list[int]) -> list[list[int]]:
    """Group sequences of similar length, so that each group is one dense attention call with little padding.

    Args:
        lengths: tokens of each sequence.

    Returns:
        Lists of indices into `lengths`, covering each once; within a list the longest is at most 1.25 times the shortest.
        The grouping depends on the lengths only, so two passes over one micro-batch use the same kernels on the same shapes.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    buckets: list[list[int]] = []
    for i in order:
        if lengths[i] == 0:
            continue
        if not buckets or lengths[i] > _WASTE * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(i)
    return buckets


def packed_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, layout: TokenLayout = ALONE
) -> Tensor:
    """Attention of each sequence over itself.

    Args:
        query: [tokens / layout.size, heads, head_dim], this rank's tokens of the sequences one after another.
        key, value: [tokens, kv_heads, head_dim] of all tokens; heads is a multiple of kv_heads.
        lengths: tokens of each sequence, which sum to `tokens`.
        scale: factor of the scores.
        layout: which tokens are this rank's; by default all.

    Returns:
        [tokens / layout.size, heads, head_dim]
    """
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    rows, outputs = [], []
    for bucket in length_buckets(lengths):
        sizes = torch.tensor([lengths[i] for i in bucket])
        keys, _ = _padded_rows(starts[bucket], sizes)
        queries, real = _padded_rows(starts[bucket] // layout.size, sizes // layout.size)
        dense = [x[index.to(x.device)].transpose(1, 2) for x, index in ((query, queries), (key, keys), (value, keys))]
        mask = None if layout.size == 1 else _causal_mask(sizes.tolist(), queries.shape[1], keys.shape[1], layout)
        if mask is not None:
            mask = mask.to(query.device)
        states, grouped = _heads_for_kernel(*dense)
        out = F.scaled_dot_product_attention(*states, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2)[real.to(query.device)])
        rows.append(queries[real])
    result = torch.zeros_like(query)
    return result.index_copy(0, torch.cat(rows).to(query.device), torch.cat(outputs))


def _heads_for_kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """Heads as a kernel takes them which needs memory linear in the length, and whether query heads share keys in it.

    On GPUs there is none for grouped heads in fp32: torch would compute all scores, [heads, length, length], without a word. The
    keys and values of its memory-efficient one have every query head's own copy. (The same on CPUs, where tests are.)
    """
    if query.dtype != torch.float32:
        return (query, key, value), True
    shared = query.shape[1] // key.shape[1]
    return (query, key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)), False


def _padded_rows(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of several sequences, made equally long, and which of them are real: both [sequences, longest].

    Padding repeats the last token of a sequence, behind all real ones, where the causal mask hides it.
    """
    position = torch.arange(int(sizes.max()))
    real = position[None, :] < sizes[:, None]
    return starts[:, None] + position[None, :].clamp(max=sizes[:, None] - 1), real


def _causal_mask(sizes: list[int], n_queries: int, n_keys: int, layout: TokenLayout) -> Tensor:
    """Whether a query may look at a key, [sequences, 1, n_queries, n_keys]; padding queries look at the first key only."""
    positions = torch.zeros(len(sizes), n_queries, dtype=torch.long)
    for i, n in enumerate(sizes):
        positions[i, : n // layout.size] = positions_in_sequence(n, layout.rank, layout.size)
    return torch.arange(n_keys) <= positions[:, None, :, None]


class PackedAttention(MegatronModule):
    """Megatron's core attention for packed sequences; takes the place of Transformer Engine's where there is none.

    Under context parallelism every rank gathers the keys and values of all its sequences' tokens: exact, for any dtype. (They
    are a small part of the activations with grouped queries; Transformer Engine's ring holds less at a time.)
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **unused):
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[tokens of this rank, heads, head_dim] -> [tokens of this rank, heads * head_dim]."""
        lengths = (packed_seq_params.cu_seqlens_q[1:] - packed_seq_params.cu_seqlens_q[:-1]).tolist()
        group = packed_seq_params.cp_group
        if group is None or group.size() == 1:
            return packed_causal_attention(query, key, value, lengths, self.scale).flatten(1)
        gathered = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=group)
        rows = gathered_rows(lengths, group.size()).to(gathered.device)
        key, value = gathered.index_select(0, rows).split(key.shape[1], dim=1)
        layout = TokenLayout(rank=group.rank(), size=group.size())
        return packed_causal_attention(query, key, value, lengths, self.scale, layout).flatten(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """No parameters."""
        return {}
