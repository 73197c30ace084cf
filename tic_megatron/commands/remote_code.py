"""Python code that a model brings along: found from its JSON files, before anything could run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tic_megatron.commands.model_files import read_json
from tic_megatron.config import SettingsError

FILES = ("config.json", "tokenizer_config.json", "generation_config.json")


def check_remote_code(directory: Path, *, trusted: bool) -> None:
    """SettingsError for a model whose files name code of its own (`auto_map`), unless `model.trust_remote_code` is on.

    transformers would pass the code over in silence and use its own classes, which may compute something else.
    """
    for path in (directory / name for name in FILES):
        if not trusted and path.is_file() and _has_auto_map(read_json(path)):
            raise SettingsError(
                f"model.path: {path} names Python code of the model's own (auto_map), which would run with your rights; read it, "
                "and set model.trust_remote_code true, or give a model without"
            )


def _has_auto_map(content: Any) -> bool:
    """At any depth, which may be more than Python can recurse."""
    parts = [content]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if part.get("auto_map"):
                return True
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return False
