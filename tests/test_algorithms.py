"""Every preset against plain Python over the whole range of its input; the packed path; sequences shared between ranks."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.algorithm_reference import PRESETS, Batch, near_a_kink, reference
from tic_megatron.algorithms import OBJECTIVES, group_advantages, policy_objective, ratios
from tic_megatron.algorithms.normalisers import Totals
from tic_megatron.algorithms.objectives import objective_terms, ratio_metrics
from tic_megatron.algorithms.ratios import Segments

NAMES = list(PRESETS)
LONG = 32768
GARBAGE = [float("nan"), float("inf"), float("-inf"), 1e4, 0.0]

seeded = settings(max_examples=60, deadline=None, derandomize=True, database=None)
few = settings(seeded, max_examples=12)


LOG_RATIOS = st.one_of(st.sampled_from([0.0, -1e4, 1e4, 29.9, 30.1, -700.0, 0.1, -0.1]), st.floats(-1e4, 1e4), st.floats(-2, 2))
ADVANTAGES = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-3, 3, width=16))
CLIPS = st.tuples(
    st.sampled_from([0.2, 3e-4, 0.9]), st.sampled_from([0.28, 4e-4, 5.0, 1e9]), st.sampled_from([None, 3.0, 1.1, 1e6])
)


@st.composite
def batches(draw, lengths=(0, 1, 2, 3, 17), log_ratios=LOG_RATIOS, max_rows=5, dtype=torch.float64):
    sizes = draw(st.lists(st.sampled_from(lengths), min_size=1, max_size=max_rows))
    return Batch(
        [draw(log_ratios) for _ in sizes],
        sizes,
        [draw(ADVANTAGES) for _ in sizes],
        draw(st.sampled_from([0.0, 0.05, 0.7])),
        draw(st.sampled_from(GARBAGE)),
        draw(st.integers(0, 2**20)),
        dtype,
    )


@pytest.mark.parametrize("name", NAMES)
@seeded
@given(batch=batches(), clip=CLIPS, T=st.sampled_from([17, 100]))
def test_value_and_gradient(name, batch, clip, T):
    assume(not near_a_kink(batch.deltas, name, *clip))
    batch.check(name, T, *clip, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@few
@given(batch=batches(lengths=(1, LONG), max_rows=3), clip=CLIPS)
def test_one_token_and_32768(name, batch, clip):
    assume(not near_a_kink(batch.deltas, name, *clip))
    batch.check(name, LONG, *clip, rtol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@settings(seeded, max_examples=15)
@given(batch=batches(dtype=torch.float32), clip=CLIPS)
def test_single_precision(name, batch, clip):
    assume(not near_a_kink(batch.deltas, name, *clip))
    batch.check(name, 17, *clip, rtol=5e-3 if PRESETS[name][0] != "token" else 1e-4, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@settings(seeded, max_examples=15)
@given(data=st.data(), clip=CLIPS)
def test_half_precision(name, dtype, data, clip):
    """The inputs are what is rounded, once: ratios are computed in fp32. (A gradient above 65504 does not fit fp16.)"""
    log_ratios = LOG_RATIOS if dtype == torch.bfloat16 else st.floats(-5, 5)
    batch = data.draw(batches(log_ratios=log_ratios, dtype=dtype))
    assume(not near_a_kink(batch.deltas, name, *clip))
    value, _, _ = batch.run(name, max_response_tokens=17, eps_low=clip[0], eps_high=clip[1], dual_clip=clip[2])
    expected, _ = reference(name, batch.deltas, batch.advantages.tolist(), 17, *clip)
    assert math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-4 * sum(map(abs, batch.advantages.tolist())))
    batch.check(name, 17, *clip, rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_default_clips_and_float64(name):
    batch = Batch([0.25, 0.3, -0.3, 0.0, 2e-4], [2, 3, 1, 4, 1], [1.0, -1.0, 0.5, 2.0, -0.2], 0.2, 0.0, 0)
    value, _, _ = batch.run(name, max_response_tokens=8)
    expected, _ = reference(name, batch.deltas, batch.advantages.tolist(), 8, *PRESETS[name][3:], None)
    assert value.dtype == torch.float64
    assert math.isclose(value, expected, rel_tol=1e-13)
    with pytest.raises(KeyError):
        policy_objective("tic", batch.new, batch.old, batch.mask, batch.advantages, max_response_tokens=8)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_masked_rows_has_no_gradient(name):
    batch = Batch([0.0, 0.0], [0, 0], [1.0, -1.0], 0.0, float("nan"), 0)
    value, gradient, metrics = batch.run(name, max_response_tokens=4)
    assert value == 0.0
    assert (gradient == 0).all()
    assert metrics["ess"] == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_one_group_only(name):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    batch = Batch([0.1, -0.2, 0.4, -3.0], [3, 5, 1, 2], group_advantages(rewards)[0].tolist(), 0.1, float("inf"), 1)
    batch.check(name, 6, 0.2, 0.28, None, rtol=1e-12)
    equal = Batch([0.1, -0.2], [3, 5], group_advantages(torch.full((1, 2), 0.7))[0].tolist(), 0.1, 0.0, 1)
    value, gradient, _ = equal.run(name, max_response_tokens=6)
    assert value == 0.0
    assert (gradient == 0).all()


def test_normaliser_option():
    """The paper's ablation puts the trajectory ratio on a token mean."""
    batch = Batch([0.1, -0.2], [3, 5], [1.0, -0.5], 0.1, 0.0, 1)
    value, _, _ = batch.run("traj_is", max_response_tokens=6, normaliser="token_mean")
    assert math.isclose(value, (math.exp(0.1) - 0.5 * math.exp(-0.2)) / 8, rel_tol=1e-12)


def test_metrics():
    batch = Batch([0.5, 0.1, -200.0, -50.0], [2, 2, 4, 4], [1.0, -1.0, 1.0, 1.0], 0.0, 0.0, 0)
    _, _, metrics = batch.run("tic_grpo", max_response_tokens=4)
    weights = [math.exp(x) for x in (0.5, 0.1)]
    assert metrics["capped_fraction"] == 0.25
    assert metrics["underflow_fraction"] == 0.25
    assert math.isclose(metrics["log_ratio_mean"], -249.4 / 4, rel_tol=1e-12)
    assert math.isclose(metrics["log_ratio_std"], np.std([0.5, 0.1, -200.0, -50.0]), rel_tol=1e-12)
    assert math.isclose(metrics["ess"], sum(weights) ** 2 / (4 * sum(w * w for w in weights)), rel_tol=1e-9)
    _, _, per_token = batch.run("grpo", max_response_tokens=4)  # row 0: its tokens are above 1.2; row 1: A < 0 has no upper side
    assert per_token["capped_fraction"] == 0.25
    assert ratio_metrics(torch.zeros(0), torch.zeros(0)) == {}


def test_of_a_token_ratio_the_share_of_the_tokens_is_capped():
    """One of 200 tokens beyond the clip costs a response one 200th of its gradient, not all of it."""
    delta = torch.zeros(2, 200)
    delta[0, 17], delta[1, :50] = 1.0, -1.0  # A > 0 is capped above, A < 0 below
    old = torch.full((2, 200), -1.0)
    given = {"mask": torch.ones(2, 200), "advantages": torch.tensor([1.0, -1.0]), "max_response_tokens": 200}
    _, metrics = policy_objective("dapo", old + delta, old, **given)
    assert metrics["capped_fraction"] == pytest.approx((1 / 200 + 50 / 200) / 2)
    _, metrics = policy_objective("grpo2", old + delta, old, **given)
    assert metrics["capped_fraction"] == pytest.approx(1 / 400)


# --- the packed path


@pytest.mark.parametrize("name", NAMES)
@settings(seeded, max_examples=15)
@given(batch=batches(), seed=st.integers(0, 1000))
def test_packed_equals_padded(name, batch, seed):
    """Bit for bit in one piece; to rounding when the trajectories are split into micro-batches, in any order."""
    value, gradient, _ = batch.run(name, max_response_tokens=17)
    lengths, objective = batch.mask.sum(dim=1), OBJECTIVES[name]
    totals = Totals(len(lengths), int(lengths.sum()), 17)

    def packed(rows):
        leaf = batch.new[rows][batch.mask[rows]].requires_grad_()
        segments = Segments(batch.mask[rows].nonzero()[:, 0], lengths[rows])
        old, advantages = batch.old[rows][batch.mask[rows]], batch.advantages[rows]
        terms = objective_terms(objective, leaf, old, segments, advantages, totals, objective.clip_range())
        terms.value.backward()
        return terms, leaf.grad

    everything = list(range(len(lengths)))
    terms, whole = packed(everything)
    assert torch.equal(terms.value.detach(), value)
    assert torch.equal(whole, gradient[batch.mask])
    torch.testing.assert_close(terms.log_ratio, torch.tensor([math.fsum(d) for d in batch.deltas]).double(), rtol=1e-6, atol=1e-6)
    order = np.random.default_rng(seed).permutation(everything).tolist()
    parts = [packed(part) for part in (order[: len(order) // 2], order[len(order) // 2 :])]
    torch.testing.assert_close(sum(p.value.detach() for p, _ in parts), value, rtol=1e-9, atol=1e-9 * (1 + abs(value.item())))
    expected = torch.cat([gradient[row][batch.mask[row]] for row in order])
    torch.testing.assert_close(torch.cat([g for _, g in parts]), expected, rtol=1e-9, atol=0)


def test_the_log_ratio_is_exactly_zero_at_the_old_policy():
    batch = Batch([0.0, 0.0], [LONG, 5], [1.0, -1.0], 0.0, 0.0, 3, torch.float32)
    logprobs = batch.old[batch.mask].requires_grad_()
    segments = Segments(batch.mask.nonzero()[:, 0], batch.mask.sum(dim=1))
    for name in NAMES:
        objective = OBJECTIVES[name]
        terms = objective_terms(
            objective, logprobs, logprobs.detach(), segments, batch.advantages, Totals(2, LONG + 5, LONG), objective.clip_range()
        )
        assert (terms.log_ratio == 0).all()
        assert not terms.capped.any()


def test_prefix_ratio():
    """Running sums restart at every trajectory, empty ones included."""
    new = torch.tensor([0.5, 0.25, -1.0, 1e4, 2.0], dtype=torch.float64)
    segments = Segments(torch.tensor([0, 0, 0, 2, 3]), torch.tensor([3, 0, 1, 1]))
    found = ratios.PREFIX.log_ratio(new, torch.zeros(5), segments)
    assert found.tolist() == [0.5, 0.75, -0.25, 1e4, 2.0]


def split_trajectories(rank: int, world_size: int, store: dist.Store) -> dict:
    """Every other token on the other rank: value and gradient of this rank's tokens for every preset."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    found = cross_rank_results(slice(rank, None, world_size), dist.group.WORLD)
    segments = Segments(torch.zeros(1, dtype=torch.long), torch.ones(1), dist.group.WORLD)
    with pytest.raises(ValueError, match="prefix"):
        segments.running_sum(torch.zeros(1))
    dist.destroy_process_group()
    return found


def cross_rank_results(held: slice, group) -> dict:
    batch = Batch([0.2, -0.3, 0.26, -1.0], [7, 1, 12, 4], [1.0, -0.5, 2.0, -1.0], 0.1, 0.0, 5)
    lengths = batch.mask.sum(dim=1)
    found = {}
    for name, objective in OBJECTIVES.items():
        leaf = batch.new[batch.mask][held].requires_grad_()
        segments = Segments(batch.mask.nonzero()[:, 0][held], lengths, group)
        clip = objective.clip_range(0.2, 0.28)
        totals = Totals(len(lengths), int(lengths.sum()), 16)
        terms = objective_terms(objective, leaf, batch.old[batch.mask][held], segments, batch.advantages, totals, clip)
        terms.value.backward()
        found[name] = (terms.value.detach(), leaf.grad, terms.log_ratio)
    return found


def test_a_sequence_shared_between_ranks(rank_pool):
    """The ranks' gradients together are one process's: forward sum, backward identity."""
    whole = cross_rank_results(slice(None), None)
    ranks = rank_pool.run("tests.test_algorithms:split_trajectories", world_size=2, timeout_s=100)
    for name, (value, gradient, log_ratio) in whole.items():
        per_token = OBJECTIVES[name].ratio.per_token
        values = [found[name][0] for found in ranks]
        for one in [sum(values)] if per_token else values:  # token terms are partial sums
            torch.testing.assert_close(one, value, rtol=1e-12, atol=1e-15)
        assert gradient.abs().max() > 1e-3
        for rank, found in enumerate(ranks):
            torch.testing.assert_close(found[name][1], gradient[rank::2], rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(found[name][2], log_ratio, rtol=1e-12, atol=1e-15)
