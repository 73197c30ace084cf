"""The terms of `reward.function`: a weight, a name for the metrics, and the reward itself."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from tic_megatron.config import RewardSettings, RewardTerm, SettingsError
from tic_megatron.rewards.endpoint import endpoint_reward
from tic_megatron.rewards.registry import Reward, get_reward
from tic_megatron.rewards.user_functions import read_program, user_reward

RESERVED = "overlong"
"""`reward/overlong_mean` is that of the punishment."""


@dataclass(frozen=True)
class Term:
    """A term of the sum. `name` is unlike those of the others: `math`, `concise`, `http`; with `_2`, `_3` where two would be
    alike. `open_reward` finds it by `source` and `program`."""

    name: str
    weight: float
    source: RewardTerm
    program: bytes | None
    reward: Reward


def read_terms(settings: RewardSettings) -> list[Term]:
    """What `reward.function` stands for. SettingsError for what is not there, and for a dense reward in a sum. No code of the
    user's is run."""
    terms: list[Term] = []
    taken = {RESERVED}
    for source in settings.terms:
        program = read_program(source.function[0]) if source.function else None
        reward = open_reward(source, settings, program)
        names = (f"{reward.name}_{number}" if number > 1 else reward.name for number in itertools.count(1))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        terms.append(Term(name, source.weight, source, program, reward))
    for term in terms:
        if term.reward.dense and len(terms) > 1:
            raise SettingsError(
                f"reward.function: {term.name} gives a reward per token, which cannot be added to rewards per response; "
                "give it alone"
            )
    return terms


def open_reward(source: RewardTerm, settings: RewardSettings, program: bytes | None) -> Reward:
    """The reward of a term, whose file, if it is a function of one, held this program. SettingsError as for `read_terms`."""
    if source.is_endpoint:
        return endpoint_reward(source.source, settings)
    if source.function is not None:
        return user_reward(*source.function, program)
    if source.source.endswith(".py"):
        raise SettingsError(f"reward.function: {Path(source.source).name} names no function; give FILE.py:function")
    reward = get_reward(source.source)
    return reward.configure(settings) if reward.configure else reward


def is_dense(settings: RewardSettings) -> bool:
    """Whether rewards are given at tokens."""
    return read_terms(settings)[0].reward.dense
