"""The reward functions by name. A new one is a decorated function and an import in `tic_megatron.rewards`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from tic_megatron.config import SettingsError

RewardFunction = Callable[[str, str], float] | Callable[[list[str], str], list[float]]
"""`(response, answer) -> reward`, a finite number; the response is the text without the stop token.

A dense one is `(tokens, answer) -> rewards`, one finite number per token: `tokens` are the texts of the response's tokens, each
decoded by itself; special tokens, the stop token too, are empty. The reward of a token may depend on the tokens up to it only.
"""


@dataclass(frozen=True)
class Reward:
    """A registered reward.

    An `isolated` one runs in worker processes under a time limit; the others run in the caller's process and must be quick
    and harmless. `prepare` loads what the function needs, so that the first call's time limit is not spent on imports. A `dense`
    one gives a reward at every token; for objectives with the trajectory ratio only (`with_dense_rewards`).
    """

    name: str
    function: RewardFunction
    isolated: bool = False
    prepare: Callable[[], None] | None = None
    dense: bool = False

    def __call__(self, response: str | list[str], answer: str) -> float | list[float]:
        """Grade one response; a dense reward wants the texts of its tokens."""
        value = self.function(response, answer)
        return [float(x) for x in value] if self.dense else float(value)


REWARDS: dict[str, Reward] = {}


def register_reward(
    name: str, *, isolated: bool = False, prepare: Callable[[], None] | None = None, dense: bool = False
) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator that registers a reward function under `name` (see `Reward` for the options)."""

    def register(function: RewardFunction) -> RewardFunction:
        assert name not in REWARDS, f"reward {name} is registered twice"
        REWARDS[name] = Reward(name, function, isolated, prepare, dense)
        return function

    return register


def get_reward(name: str) -> Reward:
    """The reward of that name; SettingsError, naming the nearest one, when there is none."""
    if name in REWARDS:
        return REWARDS[name]
    nearest = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "use one of: " + ", ".join(sorted(REWARDS))
    raise SettingsError(f"reward.function: there is no reward {name!r}; {hint}")
