"""Packed attention without Transformer Engine, against the definition in float64; and what it asks of torch's kernels."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tic_megatron.actors.context_parallel import TokenLayout, positions_in_sequence
from tic_megatron.actors.megatron.attention import packed_causal_attention


def defined(query, key, value, lengths, scale):
    """Softmax over the positions so far, head by head, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    outputs, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length] for x in (query, key, value))
        heads = []
        for head in range(q.shape[1]):
            scores = scale * q[:, head] @ k[:, head // shared].T
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, head // shared])
        outputs.append(torch.stack(heads, 1))
        start += length
    return torch.cat(outputs)


def inputs(seed, dtype, *, heads=6, kv_heads=2):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [8 * draw.randint(1, 9) for _ in range(7)]

    def states(n):
        return torch.randn(sum(lengths), n, 16, generator=generator).to(dtype).requires_grad_()

    return states(heads), states(kv_heads), states(kv_heads), lengths


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_definition(dtype, tolerance, kv_heads):
    query, key, value, lengths = inputs(kv_heads, dtype, kv_heads=kv_heads)
    states = query, key, value
    exact = [x.detach().double().requires_grad_() for x in states]
    weights = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(9)).double()
    out = packed_causal_attention(query, key, value, lengths, 0.25)
    expected = defined(exact[0], exact[1], exact[2], lengths, 0.25)
    (out.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for mine, other in zip(states, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_of_a_context_has_its_rows(size):
    query, key, value, lengths = inputs(3, torch.float32)
    whole = defined(query, key, value, lengths, 0.25)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for rank in range(size):
        rows = torch.cat([start + positions_in_sequence(n, rank, size) for start, n in zip(starts, lengths, strict=True)])
        out = packed_causal_attention(query[rows], key, value, lengths, 0.25, TokenLayout(rank, size))
        torch.testing.assert_close(out.double(), whole[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "grouped"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_no_kernel_is_asked_for_grouped_heads_in_fp32(monkeypatch, dtype, grouped):
    """On GPUs torch has none, and would compute all scores instead: memory that grows with the square of the length."""
    asked, kernel = [], F.scaled_dot_product_attention

    def note(query, key, value, **options):
        asked.append((query.shape[1] == key.shape[1] == value.shape[1], options["enable_gqa"]))
        return kernel(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    query, key, value, lengths = inputs(0, dtype)
    packed_causal_attention(query, key, value, lengths, 0.25)
    assert set(asked) == {(not grouped, grouped)}
