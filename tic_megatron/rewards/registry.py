"""Reward functions: what they take and give, and the registered ones by name.

A new registered one is a decorated function and an import in `tic_megatron.rewards`; functions of the user's own need neither
(`tic_megatron.rewards.user_functions`).
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from tic_megatron.config import RewardSettings, SettingsError

FIELDS = ("answer", "prompt", "problem_id")
"""What a reward function may ask for besides the response: the reference answer, the problem's text, and its id."""
RESPONSES = ("response", "responses", "tokens")
LARGEST_REWARD = 1e9
"""In size: sums of squares of more could leave fp32, and one response would spoil the update of all."""


@dataclass(frozen=True)
class CallForm:
    """What a reward function is given, by the names of its parameters, and whether it is awaited.

    - `response`: the text without the stop token; returns a finite number.
    - `responses`: a list of texts; returns a list of numbers. The other parameters are lists too, named in the plural.
    - `tokens`: the texts of the response's tokens, each decoded by itself; special tokens, the stop token too, are empty. Returns
      a number per token, which may depend on the tokens up to it only (a dense reward).

    Beside one of these, any of `answer`, `prompt` and `problem_id`; further parameters keep their default values.
    """

    parameters: tuple[str, ...]
    asynchronous: bool = False

    @property
    def batched(self) -> bool:
        """Whether several responses go into a call."""
        return "responses" in self.parameters

    @property
    def dense(self) -> bool:
        """Whether it gives a reward at every token."""
        return "tokens" in self.parameters

    @classmethod
    def of(cls, parameters: Sequence[tuple[str, bool]], *, asynchronous: bool) -> CallForm:
        """From names and whether they have a default value. ValueError, saying what is wrong, for what cannot be called."""
        names = [name for name, _ in parameters]
        first = [name for name in names if name in RESPONSES]
        if len(first) != 1:
            raise ValueError(f"it must have one parameter of the name response, responses or tokens, not {len(first)}")
        known = [first[0], *(f"{name}s" if first[0] == "responses" else name for name in FIELDS)]
        for name, has_default in parameters:
            if name not in known and not has_default:
                there = ", ".join(known[1:])
                raise ValueError(
                    f"nothing is given for its parameter {name!r}; remove it, or take of what goes with {known[0]}: {there}"
                )
        return cls(tuple(name for name in names if name in known), asynchronous)

    def arguments(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Keyword arguments of a call for these responses (one, when it is not batched)."""
        if self.batched:
            return {name: [item[name.removesuffix("s")] for item in items] for name in self.parameters}
        return {name: items[0][name] for name in self.parameters}

    def needs(self, item: dict[str, Any]) -> dict[str, Any]:
        """The part of a response's fields that the function is given."""
        return {name: item[name] for name in (p.removesuffix("s") if self.batched else p for p in self.parameters)}


def signature_form(function: Callable) -> CallForm:
    """The form of a function that is there (`inspect`)."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    return CallForm.of(
        [(p.name, p.default is not p.empty) for p in parameters], asynchronous=inspect.iscoroutinefunction(function)
    )


@dataclass(frozen=True)
class Reward:
    """A reward function.

    An `isolated` one runs in worker processes under a time limit; the others run in the caller's process and must be quick
    and harmless. `prepare` loads what the function needs, in the worker, so that the first call's time limit is not spent on
    imports; `check` is run once before the start of a run, in a worker too (both raise SettingsError). `form` is read from the
    function's signature when it is not given. The responses of a batch that fails are graded again one by one, if it `splits`.
    A dense one is for objectives with the trajectory ratio only (`with_dense_rewards`). `configure` gives the reward with its
    settings, where it has any (SettingsError for contradictions); `limit` names the one that says how long a response may take.
    """

    name: str
    function: Callable
    isolated: bool = False
    prepare: Callable[[], None] | None = None
    check: Callable[[], None] | None = None
    form: CallForm | None = None
    splits: bool = True
    configure: Callable[[RewardSettings], Reward] | None = None
    limit: str = "timeout_s"

    def __post_init__(self) -> None:
        if self.form is None:
            object.__setattr__(self, "form", signature_form(self.function))
        assert self.isolated or not (self.form.batched or self.form.asynchronous), "in the driver there is one response at a time"

    @property
    def dense(self) -> bool:
        """Whether it gives a reward at every token."""
        return self.form.dense

    def results(self, items: Sequence[dict[str, Any]], value: Any) -> list[dict[str, Any]]:
        """What a call returned, response by response: `{"reward": x}`, or `{"invalid": text}` for what is no finite number.
        InvalidRewardError when the value as a whole is of no use."""
        values = _listed(value, len(items), "response") if self.form.batched else [value]
        return [self._result(item, x) for item, x in zip(items, values, strict=True)]

    def _result(self, item: dict[str, Any], value: Any) -> dict[str, Any]:
        try:
            if not self.dense:
                return {"reward": finite_number(value)}
            return {"reward": [finite_number(x) for x in _listed(value, len(item["tokens"]), "token")]}
        except InvalidRewardError as error:
            return {"invalid": str(error)}


class InvalidRewardError(ValueError):
    """A reward function returned something else than finite numbers."""


def _listed(value: Any, n: int, unit: str) -> list:
    try:
        if isinstance(value, Mapping | Set | str | bytes | bytearray):  # their members are not in the order of the responses
            raise TypeError
        values = list(value)
    except TypeError:
        raise InvalidRewardError(f"the reward is {shown(value)}, not one number per {unit}") from None
    if len(values) != n:
        raise InvalidRewardError(f"the reward has {len(values)} numbers for {n} {unit}s")
    return values


def finite_number(value: Any) -> float:
    """A reward as a float: finite real numbers up to `LARGEST_REWARD` in size, numpy's and torch's scalars too; True and False
    are 1 and 0. No texts."""
    try:
        number = value.item() if hasattr(value, "item") else value
        number = float(number) if isinstance(number, numbers.Real) else math.nan
    except (OverflowError, TypeError, ValueError, RuntimeError):  # too large a number; an array of several
        number = math.nan
    if abs(number) <= LARGEST_REWARD:
        return number
    if math.isfinite(number):
        raise InvalidRewardError(f"the reward is {shown(value)}, more than {LARGEST_REWARD:g} in size")
    raise InvalidRewardError(f"the reward is {shown(value)}, not a finite number")


def shown(value: Any) -> str:
    """What it is, short and on one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = "unprintable"
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def describe(error: BaseException) -> str:
    """An exception on one line; its own `__str__` may fail."""
    try:
        text = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()  # a half of a character may be in it
    except Exception:
        text = "unprintable"
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


REWARDS: dict[str, Reward] = {}


def register_reward(
    name: str,
    *,
    isolated: bool = False,
    prepare: Callable[[], None] | None = None,
    configure: Callable[[RewardSettings], Reward] | None = None,
) -> Callable[[Callable], Callable]:
    """Decorator that registers a reward function under `name` (see `Reward` for the options)."""

    def register(function: Callable) -> Callable:
        assert name not in REWARDS, f"reward {name} is registered twice"
        REWARDS[name] = Reward(name, function, isolated, prepare, configure=configure)
        return function

    return register


def get_reward(name: str) -> Reward:
    """The reward of that name; SettingsError, naming the nearest one, when there is none."""
    if name in REWARDS:
        return REWARDS[name]
    nearest = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "use one of: " + ", ".join(sorted(REWARDS))
    raise SettingsError(
        f"reward.function: there is no reward {name[:60]!r}; {hint} (others: FILE.py:function, an address, or a sum `a + b`)"
    )
