"""Packing a rollout into mini-batches, shards and micro-batches. Pure Python.

Done once per rollout and kept: old log-probs and update see the same trajectories side by side, so their rounding cancels
(the noise rule). Deterministic: the same rollout packs the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

from tic_megatron.trajectory import Group, MicroBatch, MiniBatch, Trajectory


def split_into_mini_batches(groups: Sequence[Group], n_updates: int) -> list[list[Group]]:
    """Consecutive, equal parts. The prompts' order is random and fixed before generation, as unbiasedness asks
    (Lemma A.1): never sort by length or reward here."""
    size = len(groups) // n_updates
    assert size * n_updates == len(groups), "prompts_per_step is a multiple of updates_per_step"
    return [list(groups[k * size : (k + 1) * size]) for k in range(n_updates)]


def pack_rollout(
    groups: Sequence[Group], n_updates: int, n_shards: int, max_tokens: int, *, keep_all: bool = False
) -> list[list[MiniBatch]]:
    """The mini-batches of a rollout, for each data-parallel rank.

    Args:
        groups: the rollout, graded, advantages set.
        n_updates: number of mini-batches (K).
        n_shards: data-parallel size.
        max_tokens: token budget of a micro-batch; at least the longest trajectory.
        keep_all: keep groups of equal rewards too, which KL and entropy terms need.

    Returns:
        [n_shards][n_updates]
    """
    packed = [
        pack_mini_batch(part, n_shards, max_tokens, keep_all=keep_all) for part in split_into_mini_batches(groups, n_updates)
    ]
    return [list(shard) for shard in zip(*packed, strict=True)]


def pack_mini_batch(groups: Sequence[Group], n_shards: int, max_tokens: int, *, keep_all: bool = False) -> list[MiniBatch]:
    """One mini-batch, for each data-parallel rank: zero-advantage groups left out, balanced, packed into micro-batches.

    Guarantees: every trajectory of a group with unequal rewards (of all groups with `keep_all`) is in exactly one
    micro-batch; no micro-batch exceeds `max_tokens`; all shards have equally many micro-batches, at least one; the loads of
    two shards differ by at most the longest trajectory.
    """
    everything = [t for group in groups for t in group.trajectories]
    trained = [t for group in groups if keep_all or not has_equal_rewards(group) for t in group.trajectories]
    shards = [pack_tokens(shard, max_tokens) for shard in balance(trained, n_shards)]
    n_micro_batches = max(1, *(len(shard) for shard in shards))
    n_tokens = sum(t.response_length for t in everything)
    return [
        MiniBatch(shard + [MicroBatch() for _ in range(n_micro_batches - len(shard))], len(everything), n_tokens)
        for shard in shards
    ]


def has_equal_rewards(group: Group) -> bool:
    """Whether the group teaches nothing. Compares rewards, not advantages: rounding can leave a mean off by an ulp.

    With dense rewards equal sums are not enough: every token's reward-to-go must be the group's, and then (and only then)
    `dense_advantages` are exactly 0.
    """
    if any(t.token_advantages is not None for t in group.trajectories):
        return not any(a for t in group.trajectories for a in t.token_advantages)
    return len({t.reward for t in group.trajectories}) <= 1


def balance(trajectories: Sequence[Trajectory], n_shards: int) -> list[list[Trajectory]]:
    """Longest first, each to the shard with the fewest tokens so far; within a shard the given order is kept."""
    loads = [0] * n_shards
    chosen: list[list[int]] = [[] for _ in range(n_shards)]
    for i in sorted(range(len(trajectories)), key=lambda i: (-len(trajectories[i].tokens), i)):
        shard = min(range(n_shards), key=lambda s: (loads[s], s))
        chosen[shard].append(i)
        loads[shard] += len(trajectories[i].tokens)
    return [[trajectories[i] for i in sorted(indices)] for indices in chosen]


def pack_tokens(trajectories: Sequence[Trajectory], max_tokens: int) -> list[MicroBatch]:
    """First fit, longest first. Raises ValueError for a trajectory that exceeds the budget by itself."""
    micro_batches: list[MicroBatch] = []
    room: list[int] = []
    for trajectory in sorted(trajectories, key=lambda t: -len(t.tokens)):
        n = len(trajectory.tokens)
        if n > max_tokens:
            raise ValueError(
                f"a trajectory of {n} tokens (prompt {trajectory.prompt.id}) exceeds actor.max_tokens_per_microbatch={max_tokens}"
            )
        place = next((m for m, free in enumerate(room) if free >= n), None)
        if place is None:
            micro_batches.append(MicroBatch())
            room.append(max_tokens)
            place = len(room) - 1
        micro_batches[place].trajectories.append(trajectory)
        room[place] -= n
    return micro_batches
