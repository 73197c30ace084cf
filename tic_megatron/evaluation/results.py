"""What an evaluation comes to: numbers from the saved responses, per problem and per benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tic_megatron.evaluation.accuracy import standard_error
from tic_megatron.evaluation.saved import Row
from tic_megatron.observability.files import atomic_writer
from tic_megatron.trajectory import Prompt

PROBLEMS_FILE = "problems.jsonl"
LONGEST_ANSWER = 10_000
"""Characters; longer ones, such as the tests of a program, are left out of the results."""


def per_problem(rows: Sequence[Row], samples: int) -> list[list[Row]]:
    """The rows of each problem."""
    return [list(rows[start : start + samples]) for start in range(0, len(rows), samples)]


def shares(rows: Sequence[Row], samples: int) -> list[float]:
    """Of each problem, the share of its responses that are right."""
    return [sum(row["right"] for row in problem) / samples for problem in per_problem(rows, samples)]


def numbers(rows: Sequence[Row], samples: int, name: str) -> dict[str, Any]:
    """Mean over the problems of the share of right responses, under `name`; its standard error over the problems (None for one);
    mean length in tokens and share of truncated ones, of those that are there, and how many could not be graded."""
    values = shares(rows, samples)
    error = standard_error(values)
    answered = [row for row in rows if row["tokens"]]
    prefix = "" if name == "avg_at_k" else f"{name}_"
    return {
        name: sum(values) / len(values),
        f"{name}_standard_error": error if math.isfinite(error) else None,
        f"{prefix}length_mean": sum(row["tokens"] for row in answered) / len(answered),
        f"{prefix}truncated_fraction": sum(row["truncated"] for row in answered) / len(answered),
        f"{prefix}not_graded": sum(row["fault"] is not None for row in rows),
    }


def benchmark_numbers(n: int, k: int, sampled: Sequence[Row], greedy: Sequence[Row]) -> dict[str, Any]:
    """A benchmark's part of `summary.json`. `k` is 0 without sampled responses; what was not measured is not there."""
    result: dict[str, Any] = {"n": n, "k": k}
    if sampled:
        result |= numbers(sampled, k, "avg_at_k")
        result["pass_at_k"] = sum(share > 0 for share in shares(sampled, k)) / n
    if greedy:
        result |= numbers(greedy, 1, "avg_at_1")
    return result


def write_problems(path: Path, prompts: Sequence[Prompt], k: int, sampled: Sequence[Row], greedy: Sequence[Row]) -> None:
    """A row per problem: what was asked, and how it was answered."""
    sampled_of, greedy_of = per_problem(sampled, k) if sampled else [], per_problem(greedy, 1) if greedy else []
    with atomic_writer(path) as stream:
        for index, prompt in enumerate(prompts):
            row: dict[str, Any] = {
                "problem": prompt.id,
                "prompt": prompt.text,
                "answer": prompt.answer if len(prompt.answer) <= LONGEST_ANSWER else None,
                "prompt_tokens": len(prompt.token_ids),
            }
            if sampled_of:
                row["scores"] = [sample["score"] for sample in sampled_of[index]]
                row["accuracy"] = sum(sample["right"] for sample in sampled_of[index]) / k
            if greedy_of:
                (response,) = greedy_of[index]
                row |= {"greedy_score": response["score"], "greedy_right": response["right"]}
            stream.write(json.dumps(row) + "\n")


def table(benchmarks: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The printed table, its head first: accuracies in percent, with their standard errors."""
    head = ["benchmark", "problems", "k", "Avg@k", "pass@k", "Avg@1 (greedy)", "tokens", "truncated"]
    return [head, *(_table_row(name, result) for name, result in benchmarks.items())]


def _table_row(name: str, result: dict[str, Any]) -> list[str]:
    sampled = "avg_at_k" in result
    prefix = "" if sampled else "avg_at_1_"
    return [
        name,
        str(result["n"]),
        str(result["k"]) if sampled else "-",
        _percent(result, "avg_at_k"),
        f"{100 * result['pass_at_k']:.2f}" if sampled else "-",
        _percent(result, "avg_at_1"),
        f"{result[f'{prefix}length_mean']:.0f}",
        f"{100 * result[f'{prefix}truncated_fraction']:.1f}%",
    ]


def _percent(result: dict[str, Any], name: str) -> str:
    if name not in result:
        return "-"
    error = result[f"{name}_standard_error"]
    return f"{100 * result[name]:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
