"""Avg@k on a set of problems, from the engines that also make the rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tic_megatron.config import EvalSettings
from tic_megatron.rewards import GradeReport, RewardWorkers
from tic_megatron.rollout.requests import stable_seed
from tic_megatron.trajectory import Group, Prompt

if TYPE_CHECKING:
    from tic_megatron.rollout.engines import Rollout  # and Ray, which bad input is told of without

FULL_REWARD = 1.0 - 1e-9


class Generator(Protocol):
    """What evaluation needs of the engines (`tic_megatron.rollout.engines.EngineGroup` has it)."""

    def generate(
        self, prompts: list[Prompt], *, group_size: int, temperature: float, top_p: float, top_k: int, max_tokens: int, seed: int
    ) -> Rollout:
        """`group_size` responses per prompt; some prompts may be set aside."""
        ...


@dataclass(frozen=True)
class EvalResult:
    """Outcome over `n` problems of k responses each; `groups` hold the graded responses, for saving or looking at.

    What could not be graded counts as wrong, as do the k responses of a problem that engines failed on or refused. `not_graded`:
    how many these are; `faults`: lines about them for the user, of every such problem and of the first few responses.
    `accuracy`: mean over the problems of the share of right responses (Avg@k); `standard_error`: of that mean, over the
    problems (a problem's k responses are not independent), NaN for a single problem; `pass_at_k`: share of the problems with
    at least one right response, None for k = 1, where it is the accuracy. Lengths and truncation are of the responses that are
    there.
    """

    name: str
    n: int
    accuracy: float
    standard_error: float
    pass_at_k: float | None
    length_mean: float
    truncated_fraction: float
    not_graded: int
    faults: list[str]
    groups: list[Group]

    def metrics(self) -> dict[str, float]:
        """`eval/<name>/accuracy` and, beside it, its standard error, pass@k, mean length (tokens), truncated share, and how many
        responses could not be graded."""
        values = {
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "pass_at_k": self.pass_at_k,
            "length_mean": self.length_mean,
            "truncated_fraction": self.truncated_fraction,
            "not_graded": float(self.not_graded),
        }
        return {f"eval/{self.name}/{key}": value for key, value in values.items() if value is not None}


def eval_name(path: str) -> str:
    """Name of an evaluation set in the metrics: the stem of its file (`heldout` for `data/heldout.jsonl`), without a split."""
    return Path(path).stem.partition(":")[0]


def evaluate(
    engines: Generator,
    prompts: Sequence[Prompt],
    rewards: RewardWorkers,
    options: EvalSettings,
    *,
    name: str,
    max_tokens: int,
    seed: int | None = None,
) -> EvalResult:
    """Accuracy with the weights that the engines hold now: a response is right with full reward (1.0 or more, up to the
    rounding of a dense reward's sum).

    The seeds derive from `options.seed` alone, so every evaluation of a run draws the same random numbers, and training none
    of them: its seeds derive from numbers only, these from a text too.

    Args:
        rewards: grades as in training.
        options: how many responses, and how they are sampled.
        name: of the evaluation set (`eval_name`).
        max_tokens: longest response; one that is cut there is graded as it stands.
        seed: of the samples; when not given, that of all sets without one of their own.

    Raises ValueError without prompts, and WorkerError when none of them is answered.
    """
    if not prompts:
        raise ValueError(f"evaluation set {name!r} is empty")
    rollout = engines.generate(
        list(prompts),
        group_size=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k or 0,
        max_tokens=max_tokens,
        seed=stable_seed("eval", options.seed) if seed is None else seed,
    )
    if not rollout.groups:
        prompt, reason = rollout.set_aside[0]
        raise nothing_answered(name, len(prompts), prompt.id, not_answered(reason))
    report = rewards.grade_groups(rollout.groups)
    responses = [trajectory for group in rollout.groups for trajectory in group.trajectories]
    assert len(responses) == len(rollout.groups) * options.samples, "every problem has its k responses"
    assert len(rollout.groups) + len(rollout.set_aside) == len(prompts), "or is set aside"
    shares = [sum(is_right(t.reward) for t in group.trajectories) / options.samples for group in rollout.groups]
    shares += [0.0] * len(rollout.set_aside)
    return EvalResult(
        name=name,
        n=len(prompts),
        accuracy=sum(shares) / len(shares),
        standard_error=standard_error(shares),
        pass_at_k=sum(share > 0 for share in shares) / len(shares) if options.samples > 1 else None,
        length_mean=sum(response.response_length for response in responses) / len(responses),
        truncated_fraction=sum(response.truncated for response in responses) / len(responses),
        not_graded=len(report.faults) + len(rollout.set_aside) * options.samples,
        faults=fault_lines(rollout, report),
        groups=rollout.groups,
    )


def fault_lines(rollout: Rollout, report: GradeReport) -> list[str]:
    """For the user: every problem that is not answered, and the first few responses that could not be graded."""
    unanswered = [f"prompt {prompt.id}, {not_answered(reason)}; it counts as wrong" for prompt, reason in rollout.set_aside]
    return [*unanswered, *report.first_faults()]


def not_answered(reason: str) -> str:
    """What is said of a problem that engines failed on or refused."""
    return f"not answered: {reason}"


def nothing_answered(name: str, n: int, problem: str, reason: str) -> Exception:
    """The error of an evaluation without a single response, of which no accuracy is worth a word."""
    from tic_megatron.remote import WorkerError  # and Ray, which bad input is told of without

    return WorkerError(f"none of the {n} problems of {name} is answered; the first, {problem}, {reason}")


def is_right(reward: float) -> bool:
    """Whether a response counts as right: it has full reward, 1.0 or more (up to the rounding of a dense reward's sum)."""
    return reward >= FULL_REWARD


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of n independent values: their standard deviation (with n - 1) over the root of n; NaN for a single one."""
    n = len(values)
    if n < 2:
        return math.nan
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n * (n - 1)))
