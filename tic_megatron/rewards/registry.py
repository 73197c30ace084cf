"""The reward functions by name. A new one is a decorated function and an import in `tic_megatron.rewards`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from tic_megatron.config import SettingsError

RewardFunction = Callable[[str, str], float]
"""`(response, answer) -> reward`, a finite number; the response is the text without the stop token."""


@dataclass(frozen=True)
class Reward:
    """A registered reward.

    An `isolated` one runs in worker processes under a time limit; the others run in the caller's process and must be quick
    and harmless. `prepare` loads what the function needs, so that the first call's time limit is not spent on imports.
    """

    name: str
    function: RewardFunction
    isolated: bool = False
    prepare: Callable[[], None] | None = None


REWARDS: dict[str, Reward] = {}


def register_reward(
    name: str, *, isolated: bool = False, prepare: Callable[[], None] | None = None
) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator that registers a reward function under `name` (see `Reward` for the options)."""

    def register(function: RewardFunction) -> RewardFunction:
        assert name not in REWARDS, f"reward {name} is registered twice"
        REWARDS[name] = Reward(name, function, isolated, prepare)
        return function

    return register


def get_reward(name: str) -> Reward:
    """The reward of that name; SettingsError, naming the nearest one, when there is none."""
    if name in REWARDS:
        return REWARDS[name]
    nearest = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "use one of: " + ", ".join(sorted(REWARDS))
    raise SettingsError(f"reward.function: there is no reward {name!r}; {hint}")
