"""The subcommands of `tic-megatron`. A new one is a module here with `run(settings) -> int`, and one entry in the table."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from tic_megatron.config import Settings


@dataclass(frozen=True)
class Command:
    """A subcommand: where its `run` is, what it does in one line, and the dataclass of its settings."""

    module: str
    summary: str
    settings: type = Settings

    def run(self) -> Callable[[Settings], int]:
        """The function that does the work: takes the parsed settings, returns the exit code. Imported only now."""
        return importlib.import_module(self.module).run


COMMANDS = {
    "train": Command("tic_megatron.commands.train", "Train a model with reinforcement learning from verifiable rewards."),
}
