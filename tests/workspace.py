"""A folder with all that a good `tic-megatron train` needs, to be spoilt by tests in one place each."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tic_megatron.cli import main
from tic_megatron.commands import COMMANDS
from tic_megatron.commands.arguments import build_parser, read_settings
from tic_megatron.config import Settings


@dataclass
class Workspace:
    """A folder with everything that a good run needs; `base` is the command line that uses it."""

    root: Path
    model: Path

    @property
    def base(self) -> list[str]:
        sizes = {
            **{"rollout.max_prompt_tokens": 128, "rollout.max_response_tokens": 64, "rollout.group_size": 4},
            **{"trainer.prompts_per_step": 4, "trainer.updates_per_step": 2, "actor.max_tokens_per_microbatch": 512},
        }
        paths = {"model.path": self.model, "data.train": self.root / "train.jsonl", "run.dir": self.root / "run"}
        return ["train", *(f"--{key}={value}" for key, value in {**paths, **sizes}.items())]

    def edit_config(self, **changes) -> None:
        """Change `config.json` of the model; None takes an entry out."""
        config = json.loads((self.model / "config.json").read_text())
        config = {key: value for key, value in {**config, **changes}.items() if value is not None}
        (self.model / "config.json").write_text(json.dumps(config))


def make_workspace(root: Path, model: Path) -> Workspace:
    """Copy the model there and write a few problems."""
    shutil.copytree(model, root / "model")
    write_rows(root / "train.jsonl", [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(10)])
    return Workspace(root, root / "model")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refusal(capsys, argv) -> str:
    """The one line with which a command line is refused."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tic-megatron: error: ") and captured.err.endswith("\n"), repr(captured.err)
    line = captured.err.removesuffix("\n")
    assert "\n" not in line and "Traceback" not in line
    return line


def settings_of(*arguments) -> Settings:
    """The settings of a `train` command line, not yet validated."""
    return read_settings(build_parser("train", COMMANDS["train"]), Settings, arguments)[0]
