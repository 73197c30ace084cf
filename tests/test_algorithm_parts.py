"""Advantages, generator corrections, penalties, and the registration of an objective."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.algorithm_reference import Batch
from tic_megatron.algorithms import OBJECTIVES, Objective, clips, dense_advantages, group_advantages, normalisers, ratios
from tic_megatron.algorithms import objectives as objectives_module
from tic_megatron.algorithms.corrections import generator_correction
from tic_megatron.algorithms.objectives import register_objective
from tic_megatron.algorithms.penalties import k1, k2, k3
from tic_megatron.algorithms.ratios import Segments

seeded = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@seeded
@given(
    rewards=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=1, max_size=4),
    normalize_std=st.booleans(),
    leave_one_out=st.booleans(),
)
def test_group_advantages(rewards, normalize_std, leave_one_out):
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), normalize_std=normalize_std, leave_one_out=leave_one_out)
    for row, group in zip(found.tolist(), rewards, strict=True):
        for i, (advantage, reward) in enumerate(zip(row, group, strict=True)):
            others = group[:i] + group[i + 1 :] if leave_one_out else group
            expected = reward - math.fsum(others) / len(others)
            if normalize_std:
                expected /= np.std(group) + 1e-6
            assert math.isclose(advantage, expected, rel_tol=1e-6, abs_tol=1e-6)


def test_group_advantages_of_equal_rewards_and_bad_input():
    assert (group_advantages(torch.full((2, 16), 0.7)) == 0).all()  # 16 fp32 rewards of 0.7 have another mean
    assert (group_advantages(torch.full((2, 16), 0.7), normalize_std=True, leave_one_out=True) == 0).all()
    for bad in (torch.zeros(4), torch.zeros(4, 1), torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0, math.inf]])):
        with pytest.raises(ValueError, match="rewards must be"):
            group_advantages(bad)


@seeded
@given(
    rewards=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=2, max_size=4),
    normalize_std=st.booleans(),
    leave_one_out=st.booleans(),
)
def test_dense_advantages(rewards, normalize_std, leave_one_out):
    """Against plain floats: each token's credit, the sum of the advantages from it on, is its reward-to-go above the group's."""
    tensors = [torch.tensor(r, dtype=torch.float64) for r in rewards]
    found = dense_advantages(tensors, normalize_std=normalize_std, leave_one_out=leave_one_out)

    def to_go(row: list[float], t: int) -> float:
        return math.fsum(row[min(t, len(row) - 1) :])

    columns = [[to_go(row, t) for row in rewards] for t in range(max(map(len, rewards)))]
    scale = math.sqrt(np.mean([np.var(column) for column in columns])) + 1e-6 if normalize_std else 1.0
    for i, (advantages, row) in enumerate(zip(found, rewards, strict=True)):
        assert advantages.shape == (len(row),)
        for t in range(len(row)):
            others = columns[t][:i] + columns[t][i + 1 :] if leave_one_out else columns[t]
            expected = (columns[t][i] - math.fsum(others) / len(others)) / scale
            assert math.isclose(advantages[t:].sum().item(), expected, rel_tol=1e-6, abs_tol=1e-6 * max(1.0, 1 / scale))


@pytest.mark.parametrize("options", [{}, {"normalize_std": True}, {"leave_one_out": True}])
def test_a_dense_reward_at_the_last_tokens_is_the_plain_one(options):
    """Also when divided by the standard deviation: the same advantage, at the last token."""
    sums = torch.tensor([1.0, 0.0, 0.25, 1.0], dtype=torch.float64)
    lengths = [3, 1, 5, 2]
    rewards = [torch.cat([torch.zeros(n - 1, dtype=torch.float64), r[None]]) for n, r in zip(lengths, sums, strict=True)]
    plain = group_advantages(sums[None], **options)[0]
    for advantages, expected in zip(dense_advantages(rewards, **options), plain, strict=True):
        torch.testing.assert_close(advantages[-1], expected, rtol=1e-12, atol=0)
        assert (advantages[:-1] == 0).all()


def test_dense_advantages_of_equal_rewards_and_bad_input():
    same = [torch.tensor(r) for r in ([0.0, 0.7], [0.7], [0.0, 0.0, 0.7])]  # 0.7 to come at every token of each
    for options in ({}, {"normalize_std": True, "leave_one_out": True}):
        assert all((a == 0).all() for a in dense_advantages(same, **options))
    # Equal sums, but one response earned half of it at its first token.
    assert any((a != 0).any() for a in dense_advantages([torch.tensor([1.0]), torch.tensor([0.5, 0.5])]))
    one = torch.ones(1)
    for bad in ([], [one], [one, torch.ones(0)], [one, torch.tensor([0.0, math.nan])]):
        with pytest.raises(ValueError, match="rewards must be"):
            dense_advantages(bad)


@pytest.mark.parametrize("form", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "trajectory"])
def test_corrections(level, form):
    gaps = [[0.5, -0.2, 1.0], [0.3], [-0.9, -0.1], [9.0e3]]
    old = torch.tensor([x for row in gaps for x in row], dtype=torch.float64, requires_grad=True)
    segments = Segments(torch.tensor([0, 0, 0, 1, 2, 2, 3]), torch.tensor([3, 1, 2, 1]))
    options = {"level": level, "form": form, "bound": 2.0}

    def weight(gap):
        if form == "truncate":
            return min(math.exp(min(gap, 700)), 2.0)
        return math.exp(gap) if 0.5 <= math.exp(min(gap, 700)) <= 2.0 else 0.0

    tokens = [weight(x if level == "token" else sum(row)) for row in gaps for x in row]
    found = generator_correction(ratios.TOKEN, old, torch.zeros(7), segments, **options)
    torch.testing.assert_close(found, torch.tensor(tokens, dtype=torch.float64))
    assert not found.requires_grad
    for ratio in (ratios.TRAJECTORY, ratios.SEQUENCE):
        if level == "token":
            with pytest.raises(ValueError, match="trajectory level"):
                generator_correction(ratio, old, torch.zeros(7), segments, **options)
        else:
            found = generator_correction(ratio, old, torch.zeros(7), segments, **options)
            torch.testing.assert_close(found, torch.tensor([weight(sum(row)) for row in gaps], dtype=torch.float64))


FORMULAS = {k1: lambda d: d, k2: lambda d: d * d / 2, k3: lambda d: math.exp(min(-d, 30.0)) - 1 - min(-d, 30.0)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_penalties(dtype):
    gaps = torch.tensor([0.0, 0.5, -0.5, 3.0, -3.0, 29.0, -29.0, 1e4, -1e4], dtype=dtype)
    leaf = gaps.clone().requires_grad_()
    for estimator, formula in FORMULAS.items():
        found = estimator(leaf, torch.zeros_like(gaps))
        expected = [formula(d) for d in gaps.tolist()]
        torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
        assert torch.isfinite(found).all()
        if dtype != torch.float16:  # a gradient above 65504 does not fit
            assert torch.isfinite(torch.autograd.grad(found.sum(), leaf)[0]).all()


def test_a_new_objective_is_one_registration(monkeypatch):
    monkeypatch.setattr(objectives_module, "OBJECTIVES", dict(OBJECTIVES))
    mine = Objective(ratios.TRAJECTORY, clips.two_sided, normalisers.constant_length, 0.2, 0.3)
    register_objective("mine", mine)
    batch = Batch([0.4, -0.4], [2, 3], [1.0, -1.0], 0.0, 0.0, 0)
    value, _, _ = batch.run("mine", max_response_tokens=5)
    assert math.isclose(value, (1.3 - 0.8) / 10, rel_tol=1e-12)
    with pytest.raises(ValueError, match="exists already"):
        register_objective("mine", replace(mine, eps_high=1.0))
