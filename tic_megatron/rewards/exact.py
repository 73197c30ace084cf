"""The plainest reward: the whole response is the answer."""

from __future__ import annotations

from tic_megatron.rewards.registry import register_reward


@register_reward("exact")
def grade_exact(response: str, answer: str) -> float:
    """1.0 when the response equals the answer, white space around both left out; otherwise 0.0."""
    return float(response.strip() == answer.strip())
