"""Group-relative advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STD_FLOOR = 1e-6
"""Added to a group's standard deviation before dividing by it."""


def group_advantages(rewards: Tensor, *, normalize_std: bool = False, leave_one_out: bool = False) -> Tensor:
    """A[b, g] = r[b, g] - mean of r[b, :] (the paper's group mean; no division by the standard deviation).

    A group whose rewards are all equal gets exactly 0, whatever the rounding of its mean.

    Args:
        rewards: [B, G], G >= 2, any floating dtype.
        normalize_std: divide by the group's (biased) standard deviation + 1e-6.
        leave_one_out: the baseline is the mean of the *others*, which is unbiased. It is a pure scale: the group mean's
            advantages times 1 / (1 - 1/G).

    Returns:
        [B, G]

    Raises:
        ValueError: a group of fewer than two, or a reward that is not finite.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, group] with groups of at least 2, got shape {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    centred = torch.where(equal, torch.zeros_like(centred), centred)
    if leave_one_out:
        centred = centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    if normalize_std:
        centred = centred / (rewards.std(dim=1, keepdim=True, correction=0) + STD_FLOOR)
    return centred


def dense_advantages(rewards: Sequence[Tensor], *, normalize_std: bool = False, leave_one_out: bool = False) -> list[Tensor]:
    """Advantages of one group whose rewards are given at tokens, for `objectives.with_dense_rewards`.

    With R[i, t] = sum of r[i, t..T_i], the reward-to-go, and b[t] = mean over the group's j of R[j, min(t, T_j)],

        A[i, t] = r[i, t] - b[t] + b[t + 1]   for t < T_i,        A[i, T_i] = r[i, T_i] - b[T_i].

    Why the baseline enters so. The gradient of the value sum_t W[1..t] A[t] credits A[t] to the tokens 1..t:
    sum_t A[t] W[1..t] (s_1 + ... + s_t), with the scores s_k = grad log pi(token k). For A = r its expectation under pi_old
    is the gradient of E_pi[sum of rewards]. At theta_old (W = 1) the sum of A[t..T_i] telescopes to R[t] - b[t]: token t is
    credited with its own reward-to-go above the group's, what a policy gradient asks for. Away from it, take b from the
    *other* members, so that it does not depend on the trajectory. What it adds is, written by token,
    -sum_t b[t] (grad W[1..t] - grad W[1..t-1]), over the tokens that exist. Whether token t exists is decided by the tokens
    before it, and given those E_old[rho_t] = 1 at every theta; so the expectations of W[1..t] 1{T_i >= t} and
    W[1..t-1] 1{T_i >= t} are the same function of theta, and so are their gradients: the sum has mean zero, for any b and any
    lengths. (r[t] - b[t] without the + b[t + 1] is biased: it makes longer responses less or more likely.)
    A member that has ended counts with its last reward-to-go. So rewards of 0 before the last token give exactly the
    advantage of `group_advantages` at the last token and 0 before it; and with the member's own rewards in the mean,
    R[i, t] - b[t] is (1 - 1/G) times that with the others' mean, at each of its tokens: a pure scale here too.

    Args:
        rewards: [T_i] of each of the group's G >= 2 members, T_i >= 1, any floating dtype.
        normalize_std: divide by sqrt(mean over t of the variance of R[:, t]) + 1e-6, one scale for the group.
        leave_one_out: b is the mean of the *others*, which is unbiased.

    Returns:
        [T_i] for each member. All exactly 0 when no token has a reward-to-go other than the group's.

    Raises:
        ValueError: a group of fewer than two, an empty member, or a reward that is not finite.
    """
    lengths = [r.numel() for r in rewards]
    if len(lengths) < 2 or min(lengths) < 1:
        raise ValueError(f"rewards must be those of at least 2 responses, each of at least 1 token, got lengths {lengths}")
    to_go = [r.flip(0).cumsum(0).flip(0) for r in rewards]
    table = torch.stack([torch.cat([r, r[-1:].expand(max(lengths) - r.numel())]) for r in to_go], dim=1)  # [T, G]
    above = group_advantages(table, leave_one_out=leave_one_out)
    if normalize_std:
        above = above / (table.var(dim=1, correction=0).mean().sqrt() + STD_FLOOR)
    advantages = []
    for i, r in enumerate(rewards):
        own = above[: r.numel(), i]
        advantages.append(own - torch.cat([own[1:], own.new_zeros(1)]))
    return advantages
