"""Evaluation of a policy on held-out problems."""

from tic_megatron.evaluation.greedy import EvalResult, eval_name, evaluate_greedy

__all__ = ["EvalResult", "eval_name", "evaluate_greedy"]
