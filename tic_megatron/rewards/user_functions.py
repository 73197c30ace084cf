"""Reward functions in files of the user's: `reward.function: rewards.py:concise`.

The driver never runs such a file. It reads from the source what the function takes; worker processes run it, the first one
before the start of a run, to see that it can be. All run what the driver has read, also those that are started after the file has
been changed: one run has one reward.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tic_megatron.config import SettingsError
from tic_megatron.rewards.registry import CallForm, Reward, describe


def read_program(path: str) -> bytes:
    """The file. SettingsError when it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"reward.function: {path} cannot be read ({error.strerror}); give a Python file") from error


def digest_files(programs: Iterable[bytes]) -> str:
    """SHA-256 of each, joined by `+`; empty without any."""
    return "+".join(hashlib.sha256(program).hexdigest() for program in programs)


def user_reward(path: str, name: str, program: bytes) -> Reward:
    """The reward that the function `name` of a file is, which held this program. SettingsError when it cannot be parsed, or
    defines no such function, or one that cannot be called."""
    function = UserFunction(path, name, program)
    return Reward(name, function, isolated=True, prepare=function.load, form=read_form(path, name, program))


def read_form(path: str, name: str, program: bytes) -> CallForm:
    """What a function takes, from its source. SettingsError as for `user_reward`."""
    if not name.isidentifier():
        raise SettingsError(f"reward.function: {name!r} is no name of a function of {path}; give FILE.py:function")
    try:
        tree = ast.parse(program, path)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        place = f"{path}, line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else path
        reason = error.msg if isinstance(error, SyntaxError) else "it cannot be parsed"
        raise SettingsError(f"reward.function: {place}: {reason}; correct the file") from error
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    if name not in functions:
        there = ", ".join(list(functions)[:8]) or "none"
        raise SettingsError(f"reward.function: {path} defines no function {name} (its functions: {there}); add or correct it")
    node = functions[name]
    try:
        return CallForm.of(_parameters(node.args), asynchronous=isinstance(node, ast.AsyncFunctionDef))
    except ValueError as error:
        raise SettingsError(f"reward.function: {path}, line {node.lineno}: {name} cannot be called: {error}") from error


def _parameters(arguments: ast.arguments) -> list[tuple[str, bool]]:
    """Names, and whether they have a default value."""
    if arguments.posonlyargs:
        raise ValueError("its parameters are given by name; remove the / from them")
    n_required = len(arguments.args) - len(arguments.defaults)
    plain = [(parameter.arg, number >= n_required) for number, parameter in enumerate(arguments.args)]
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return plain + [(parameter.arg, default is not None) for parameter, default in named]


class UserFunction:
    """Calls the function, once it is loaded."""

    def __init__(self, path: str, name: str, program: bytes) -> None:
        self.path, self.name, self.program = path, name, program
        self._function: Callable | None = None

    def __call__(self, **arguments: Any) -> Any:
        return self._function(**arguments)

    def load(self) -> None:
        """Run the program, as a module beside which others can be imported. SettingsError, naming its line, when it fails."""
        sys.path.append(str(Path(self.path).parent))
        module = types.ModuleType(f"user_rewards_{Path(self.path).stem}")
        module.__file__ = self.path
        sys.modules[module.__name__] = module
        try:
            exec(compile(self.program, self.path, "exec", dont_inherit=True), module.__dict__)
            self._function = getattr(module, self.name)
        except BaseException as error:  # of sys.exit too
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.path]
            place = f"{self.path}, line {lines[-1]}" if lines else self.path
            raise SettingsError(f"reward.function: {place}: {describe(error)}; correct the file") from error
