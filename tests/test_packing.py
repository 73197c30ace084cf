"""Packing a rollout: everything exactly once, within the budget, balanced; and the learning-rate schedule beside it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tic_megatron.actors.schedule import learning_rate
from tic_megatron.config import AlgorithmSettings, Settings
from tic_megatron.data.packing import Packing, has_equal_rewards, pack_mini_batch, pack_rollout, split_into_mini_batches
from tic_megatron.data.quality import (
    SkippedInARow,
    SkippedUpdate,
    TooManyBadTrajectoriesError,
    drop_bad_trajectories,
    report_skipped_updates,
)
from tic_megatron.trainer import set_advantages
from tic_megatron.trajectory import Group, Prompt, Trajectory


def group(number: int, prompt_length: int, responses: list[tuple[int, float]]) -> Group:
    prompt = Prompt(f"p{number}", "", "", tuple(range(prompt_length)))
    trajectories = [
        Trajectory(prompt, [7] * n, [-1.0] * n, [1] * n, "", truncated=False, weight_version=0, reward=reward)
        for n, reward in responses
    ]
    return Group(prompt, trajectories)


groups_strategy = st.lists(
    st.tuples(
        st.integers(1, 30), st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0.0, 0.7, 1.0])), min_size=2, max_size=6)
    ),
    min_size=1,
    max_size=12,
).map(lambda drawn: [group(i, prompt, responses) for i, (prompt, responses) in enumerate(drawn)])


def test_a_step_that_lacks_groups_is_split_evenly_and_may_have_an_empty_mini_batch():
    """Prompts were set aside: every group once, in order, and a normaliser that can be divided by."""
    for n, k in itertools.product(range(1, 14), range(1, 6)):
        groups = [group(i, 3, [(2, 0.0), (4, 1.0)]) for i in range(n)]
        parts = split_into_mini_batches(groups, k)
        assert [g for part in parts for g in part] == groups and len(parts) == k
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for shard in pack_rollout(groups, k, Packing(2, 100)):
            for part, mini_batch in zip(parts, shard, strict=True):
                assert mini_batch.n_trajectories == max(1, 2 * len(part)) and mini_batch.n_tokens == max(1, 6 * len(part))
                assert mini_batch.micro_batches


@settings(max_examples=200, deadline=None)
@given(groups_strategy, st.integers(1, 5), st.integers(96, 300), st.booleans(), st.sampled_from([1, 4, 16]), st.integers(1, 4))
def test_every_trajectory_once_within_the_budget_and_balanced(groups, n_shards, budget, keep_all, alignment, multiple):
    packing = Packing(n_shards, budget, alignment, multiple, keep_all)
    shards = pack_mini_batch(groups, packing)
    assert len(shards) == n_shards
    packed = [t for shard in shards for m in shard.micro_batches for t in m.trajectories]
    expected = [t for g in groups if keep_all or not has_equal_rewards(g) for t in g.trajectories]
    assert sorted(map(id, packed)) == sorted(map(id, expected))
    for shard in shards:
        assert len(shard.micro_batches) == len(shards[0].micro_batches) >= 1
        assert len(shard.micro_batches) % multiple == 0
        assert all(sum(-(-len(t.tokens) // alignment) * alignment for t in m.trajectories) <= budget for m in shard.micro_batches)
        # The normaliser's totals count what was left out too, and are the same for every rank.
        assert shard.n_trajectories == sum(len(g.trajectories) for g in groups)
        assert shard.n_tokens == sum(len(t.response_ids) for g in groups for t in g.trajectories)
    loads = [sum(packing.tokens(t) for m in shard.micro_batches for t in m.trajectories) for shard in shards]
    assert max(loads) - min(loads) <= max((packing.tokens(t) for t in packed), default=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3))
def test_mini_batches_are_consecutive_prompts_whatever_their_rewards(n_updates, n_shards):
    groups = [group(i, 5, [(i + 1, 1.0), (2, 0.0)]) for i in range(n_updates * 3)]
    shards = pack_rollout(groups, n_updates, Packing(n_shards, 100))
    for k in range(n_updates):
        prompts = {t.prompt.id for shard in shards for m in shard[k].micro_batches for t in m.trajectories}
        assert prompts == {f"p{i}" for i in range(3 * k, 3 * k + 3)}


def test_a_trajectory_beyond_the_budget_is_named():
    with pytest.raises(ValueError, match=r"25 tokens \(prompt p3\)"):
        pack_mini_batch([group(3, 5, [(20, 1.0), (2, 0.0)])], Packing(1, 24))


def test_equal_rewards_are_compared_not_their_mean():
    assert has_equal_rewards(group(0, 1, [(1, 0.7)] * 16))
    assert not has_equal_rewards(group(0, 1, [(1, 0.7)] * 15 + [(1, 0.7000001)]))


def dense_group(*rewards: list[float]) -> Group:
    """A group graded by token, advantages set."""
    dense = group(0, 1, [(len(r), sum(r)) for r in rewards])
    for t, r in zip(dense.trajectories, rewards, strict=True):
        t.token_rewards = list(r)
    set_advantages([dense], AlgorithmSettings())
    return dense


def test_dense_rewards_teach_something_when_any_token_differs():
    assert has_equal_rewards(dense_group([0.0, 0.7], [0.7], [0.0, 0.0, 0.7]))
    assert has_equal_rewards(dense_group([0.5, 0.2], [0.5, 0.2]))
    assert not has_equal_rewards(dense_group([1.0], [0.5, 0.5]))  # equal sums
    assert not has_equal_rewards(dense_group([0.0, 0.7], [0.0, 0.6]))
    assert has_equal_rewards(dense_group([0.3, 0.4]))  # the others were left out
    assert pack_mini_batch([dense_group([0.2], [0.2])], Packing(1, 10))[0].micro_batches[0].trajectories == []


def test_dense_advantages_skip_tokens_that_were_not_sampled():
    dense = dense_group([1.0, 0.0, 2.0], [0.0, 0.0, 0.0])
    masked = group(0, 1, [(4, 3.0), (3, 0.0)])
    masked.trajectories[0].response_mask = [1, 0, 1, 1]
    masked.trajectories[0].token_rewards, masked.trajectories[1].token_rewards = [1.0, 0.0, 0.0, 2.0], [0.0] * 3
    set_advantages([masked], AlgorithmSettings())
    first, second = (t.unit_advantages for t in dense.trajectories)
    assert [t.unit_advantages for t in masked.trajectories] == [first, second] and len(first) == 3
    assert masked.trajectories[0].token_advantages == [first[0], 0.0, *first[1:]]
    assert masked.trajectories[0].advantage == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("rewards", "mask", "problem"),
    [
        ([0.0, 1.0], [1, 1, 1], "it has 2 token rewards for 3 response tokens"),
        ([0.0, float("nan"), 1.0], [1, 1, 1], "the reward of token 1 is nan"),
        ([0.0, 0.5, 1.0], [1, 0, 1], "token 1 has the reward 0.5, but the policy did not sample it"),
        ([0.0, 0.0, 0.0], [0, 0, 0], "it has token rewards, but no token that the policy sampled"),
    ],
)
def test_bad_dense_rewards_are_named_and_dropped(rewards, mask, problem):
    groups = [group(i, 2, [(3, 1.0), (3, 0.0), (3, 0.0)]) for i in range(4)]
    for trajectory in (t for g in groups for t in g.trajectories):
        trajectory.token_rewards = [0.0, 0.0, trajectory.reward]
    groups[2].trajectories[1].token_rewards, groups[2].trajectories[1].response_mask = rewards, mask
    assert drop_bad_trajectories(groups, max_fraction=0.1) == [f"prompt p2, response 1: {problem}"]
    assert [len(g.trajectories) for g in groups] == [3, 3, 2, 3]


def test_skipped_updates_are_reported_and_bounded():
    groups = [group(i, 2, [(3, 1.0)] * 5) for i in range(8)]  # 40 trajectories in 4 updates
    skipped = [SkippedUpdate(1, ["p2", "p3", "p3"]), SkippedUpdate(3, [])]
    first, second = report_skipped_updates(skipped, groups, 4, max_fraction=0.1)
    assert first == "update 2 of 4 was skipped: the trainer's log-probs are not finite in 3 of its trajectories (prompts p2, p3)"
    assert "update 4 of 4" in second and "loss or gradient is not finite" in second and "(prompts p6, p7)" in second
    with pytest.raises(TooManyBadTrajectoriesError, match=r"3 of 40 trajectories are not finite.*max_bad_fraction 0.05.*p2, p3"):
        report_skipped_updates(skipped, groups, 4, max_fraction=0.05)
    assert report_skipped_updates([], groups, 4, max_fraction=0.0) == []
    every = report_skipped_updates([SkippedUpdate(k, []) for k in range(4)], groups, 4, max_fraction=0.0)
    assert len(every) == 4  # how many in a row are too many is SkippedInARow's to say, also with one update per step


def test_bad_trajectories_are_named_dropped_and_bounded():
    def rollout():
        groups = [group(i, 2, [(3, 1.0), (3, 0.0), (3, 0.0)]) for i in range(4)]
        groups[1].trajectories[2].reward = float("nan")
        groups[3].trajectories[0].inference_logprobs[1] = float("-inf")
        return groups

    groups = rollout()
    lines = drop_bad_trajectories(groups, max_fraction=0.2)
    assert len(lines) == 2 and "prompt p1, response 2: its reward is nan" in lines[0]
    assert "prompt p3, response 0: the generator's log-prob of token 1 is -inf" in lines[1]
    assert [len(g.trajectories) for g in groups] == [3, 2, 3, 2]

    groups = rollout()
    with pytest.raises(TooManyBadTrajectoriesError, match=r"2 of 12 .* prompt p1"):
        drop_bad_trajectories(groups, max_fraction=0.1)
    assert sum(len(g.trajectories) for g in groups) == 12
    with pytest.raises(TooManyBadTrajectoriesError, match=r"1 of 1 .* which leaves none; .* nan"):
        drop_bad_trajectories([group(0, 2, [(3, float("nan"))])], max_fraction=1.0)


@pytest.mark.parametrize(("decay", "last"), [("constant", 1e-4), ("linear", 1e-5 + 9e-5 / 90), ("cosine", 1e-5)])
def test_learning_rate(decay, last):
    s = Settings()
    s.trainer.steps, s.trainer.updates_per_step = 25, 4
    s.actor.learning_rate, s.actor.min_learning_rate, s.actor.lr_warmup_updates, s.actor.lr_decay = 1e-4, 1e-5, 10, decay
    rates = [learning_rate(update, s) for update in range(100)]
    assert rates[0] == pytest.approx(1e-5) and rates[9] == rates[10] == pytest.approx(1e-4)
    assert all(a <= b for a, b in itertools.pairwise(rates[:10]))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(last, rel=0.05)
    s.trainer.updates_per_step = 2  # the run goes on with fewer: it does not come out at the other end
    assert learning_rate(90, s) == pytest.approx(1e-4 if decay == "constant" else 1e-5)


def test_updates_skipped_in_a_row_end_the_run_over_steps_too() -> None:
    skips = SkippedInARow(3)
    for indices in ([0, 1], [3], [0], [], [2, 3]):  # of four updates each: never three in a row
        skips.add([SkippedUpdate(k, ["p"]) for k in indices], 4)
    with pytest.raises(TooManyBadTrajectoriesError, match=r"3 updates in a row were skipped .*max_skipped_updates"):
        skips.add([SkippedUpdate(0, [])], 4)
    with pytest.raises(TooManyBadTrajectoriesError, match="3 updates in a row"):  # two of them before an interruption
        SkippedInARow(3, count=2).add([SkippedUpdate(0, [])], 4)
