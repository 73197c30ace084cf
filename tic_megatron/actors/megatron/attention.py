"""Causal attention over packed sequences (`thd`), without Transformer Engine: any dtype, CPU or CUDA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

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


def packed_causal_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Attention of each sequence over itself.

    Args:
        query: [tokens, heads, head_dim], sequences one after another.
        key, value: [tokens, kv_heads, head_dim]; heads is a multiple of kv_heads.
        lengths: tokens of each sequence; they sum to at most `tokens`, what is left over is alignment and gets zeros.
        scale: factor of the scores.

    Returns:
        [tokens, heads, head_dim]
    """
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    rows, outputs = [], []
    for bucket in length_buckets(lengths):
        longest = max(lengths[i] for i in bucket)
        bucket_lengths = torch.tensor([lengths[i] for i in bucket])
        position = torch.arange(longest)
        real = (position[None, :] < bucket_lengths[:, None]).to(query.device)  # [sequences, longest]
        index = (starts[bucket][:, None] + position[None, :].clamp(max=bucket_lengths[:, None] - 1)).to(query.device)
        # Padding repeats the last token of a sequence, behind all real ones, where the causal mask hides it.
        dense = [x[index].transpose(1, 2) for x in (query, key, value)]  # [sequences, heads, longest, head_dim]
        out = F.scaled_dot_product_attention(*dense, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(1, 2)[real])
        rows.append(index[real])
    result = torch.zeros_like(query)
    return result.index_copy(0, torch.cat(rows), torch.cat(outputs))


class PackedAttention(MegatronModule):
    """Megatron's core attention for packed sequences; takes the place of Transformer Engine's where there is none."""

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
        """[tokens, heads, head_dim] -> [tokens, heads * head_dim]."""
        lengths = (packed_seq_params.cu_seqlens_q[1:] - packed_seq_params.cu_seqlens_q[:-1]).tolist()
        return packed_causal_attention(query, key, value, lengths, self.scale).flatten(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """No parameters."""
        return {}
