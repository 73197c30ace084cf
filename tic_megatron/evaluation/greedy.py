"""Evaluation during training: one greedy response per held-out problem, from the engines that also make the rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tic_megatron.rewards import RewardWorkers
from tic_megatron.trajectory import Group, Prompt

FULL_REWARD = 1.0 - 1e-9


class Generator(Protocol):
    """What evaluation needs of the engines (`tic_megatron.rollout.engines.EngineGroup` has it)."""

    def generate(
        self, prompts: list[Prompt], *, group_size: int, temperature: float, top_p: float, max_tokens: int, seed: int
    ) -> list[Group]:
        """`group_size` responses per prompt, groups in the order of the prompts."""
        ...


@dataclass(frozen=True)
class EvalResult:
    """Outcome over `n` problems; `groups` hold the graded responses, one each, for saving or looking at."""

    name: str
    n: int
    accuracy: float
    length_mean: float
    truncated_fraction: float
    groups: list[Group]

    def metrics(self) -> dict[str, float]:
        """`eval/<name>/accuracy` and, beside it, the mean response length (tokens) and the truncated share."""
        return {
            f"eval/{self.name}/accuracy": self.accuracy,
            f"eval/{self.name}/length_mean": self.length_mean,
            f"eval/{self.name}/truncated_fraction": self.truncated_fraction,
        }


def eval_name(path: str) -> str:
    """Name of an evaluation set in the metrics: the stem of its file, e.g. `heldout` for `data/heldout.jsonl`."""
    return Path(path).stem


def evaluate_greedy(
    engines: Generator, prompts: Sequence[Prompt], rewards: RewardWorkers, *, name: str, max_tokens: int, seed: int = 0
) -> EvalResult:
    """Greedy accuracy with the weights that the engines hold now: the share of problems with full reward (1.0 or more, up to
    the rounding of a dense reward's sum).

    Args:
        rewards: grades as in training.
        name: of the evaluation set (`eval_name`).
        max_tokens: longest response; one that is cut there is graded as it stands.
        seed: has no effect on greedy responses; the engines want one.

    Raises ValueError without prompts.
    """
    if not prompts:
        raise ValueError(f"evaluation set {name!r} is empty")
    groups = engines.generate(list(prompts), group_size=1, temperature=0.0, top_p=1.0, max_tokens=max_tokens, seed=seed)
    rewards.grade_groups(groups)
    responses = [trajectory for group in groups for trajectory in group.trajectories]
    assert len(responses) == len(prompts), "one response per problem"
    n = len(responses)
    return EvalResult(
        name=name,
        n=n,
        accuracy=sum(response.reward >= FULL_REWARD for response in responses) / n,
        length_mean=sum(response.response_length for response in responses) / n,
        truncated_fraction=sum(response.truncated for response in responses) / n,
        groups=groups,
    )
