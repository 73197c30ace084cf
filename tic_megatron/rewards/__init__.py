"""Rewards: graders by name, and the worker processes that run them. Importing this loads no heavy library."""

from tic_megatron.rewards.exact import grade_exact, grade_exact_dense
from tic_megatron.rewards.math_grader import grade_math
from tic_megatron.rewards.registry import REWARDS, Reward, get_reward, register_reward
from tic_megatron.rewards.workers import GradeReport, RewardWorkers

__all__ = [
    "REWARDS",
    "GradeReport",
    "Reward",
    "RewardWorkers",
    "get_reward",
    "grade_exact",
    "grade_exact_dense",
    "grade_math",
    "register_reward",
]
