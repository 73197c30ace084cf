"""Advantages, ratios, clips and objectives: tensors in, tensors out."""

from tic_megatron.algorithms.advantages import dense_advantages, group_advantages
from tic_megatron.algorithms.objectives import OBJECTIVES, Objective, policy_objective, register_objective

__all__ = ["OBJECTIVES", "Objective", "dense_advantages", "group_advantages", "policy_objective", "register_objective"]
