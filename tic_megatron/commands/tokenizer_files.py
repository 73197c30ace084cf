"""Checks before a run of a model's tokenizer and configuration, by loading them; and against those of a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tic_megatron.checkpoints import MODEL_FOLDER
from tic_megatron.commands.model_files import check_token_ids, read_config, read_json
from tic_megatron.commands.remote_code import check_remote_code
from tic_megatron.config import CHAT_TEMPLATES, ModelSettings, SettingsError
from tic_megatron.config_checks import shorten
from tic_megatron.data.chat_template import set_chat_template

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

OF_THE_FILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
"""Entries of a configuration that say nothing about the model."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def load_tokenizer_and_config(directory: Path, model: ModelSettings) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Those of a model directory, the tokenizer with the chat template of the settings. SettingsError when they are of no use."""
    trusted = model.trust_remote_code
    if not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise SettingsError(f"model.path: {directory} has no tokenizer (tokenizer.json); copy the model's tokenizer files there")
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (directory / name).exists():
            content = read_json(directory / name)
            if name == "generation_config.json":
                check_token_ids(content, directory / name, read_config(directory)["vocab_size"])
    for path in directory.glob("*.jinja"):
        try:
            path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"model.path: {path} is not UTF-8 text; download it again") from error
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # transformers lets all kinds through
        place = directory / "config.json"
        raise SettingsError(f"model.path: transformers cannot use {place}: {_reason(error)}; download it again") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
    except BaseException as error:  # the tokenizers' library panics, with exceptions that are not of the common kind
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise SettingsError(
            f"model.path: the tokenizer of {directory} cannot be loaded: {_reason(error)}; download tokenizer.json and "
            "tokenizer_config.json again"
        ) from error
    set_chat_template(tokenizer, model)
    _check_tokenizer(tokenizer, directory, config.vocab_size)
    _check_template(tokenizer, directory, model)
    return tokenizer, config


def check_same_model(checkpoint: Path | None, hf_config: PretrainedConfig, directory: Path, *, trusted: bool) -> None:
    """Refuse to continue a checkpoint with a model of another configuration; its path may be another one."""
    if checkpoint is None or not (checkpoint / MODEL_FOLDER / "config.json").exists():
        return
    place = checkpoint / MODEL_FOLDER
    check_remote_code(place, trusted=trusted)
    try:
        there = hf_config.__class__.from_pretrained(place, local_files_only=True).to_dict()
    except Exception as error:  # transformers lets all kinds through
        raise SettingsError(
            f"run.resume: {place / 'config.json'} cannot be used ({_reason(error)}); give another checkpoint"
        ) from error
    here = hf_config.to_dict()
    changed = [key for key in sorted({*there, *here} - OF_THE_FILE) if there.get(key) != here.get(key)]
    if changed:
        shown = ", ".join(f"{key} ({there.get(key)} there, {here.get(key)} here)" for key in changed[:3])
        raise SettingsError(
            f"model.path: the configuration is not that of the model of {checkpoint}: it differs in {shown}; give the model that "
            "the run began with, or another --run.dir"
        )
    ends = {folder: _end_tokens(folder, trusted=trusted) for folder in (place, directory)}
    if len({*ends.values()}) > 1:
        listed = ", ".join(f"{end} in {folder}" for folder, end in ends.items())
        raise SettingsError(
            f"model.path: responses would end elsewhere than those of {checkpoint}: the end tokens are {listed} "
            "(generation_config.json and the tokenizer); give the model that the run began with, or another --run.dir"
        )


def _end_tokens(directory: Path, *, trusted: bool) -> tuple[int | None, ...]:
    """What vLLM ends a response at: the tokenizer's token, and those of the generation's configuration."""
    from transformers import AutoTokenizer

    path = directory / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.exists() else None
    try:
        own = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted).eos_token_id
    except Exception as error:  # transformers lets all kinds through
        raise SettingsError(
            f"run.resume: the tokenizer in {directory} cannot be loaded ({_reason(error)}), so that nobody knows where responses "
            "ended; give another checkpoint"
        ) from error
    return (own, *sorted({*(ids if isinstance(ids, list) else [] if ids is None else [ids])} - {own}))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, vocabulary: int) -> None:
    if not tokenizer.chat_template:
        raise SettingsError(
            f"model.path: the tokenizer of {directory} has no chat template; add chat_template.jinja, or give "
            "model.chat_template (base for a base model)"
        )
    if tokenizer.eos_token_id is None:
        raise SettingsError(f"model.path: the tokenizer of {directory} has no end token; set eos_token in tokenizer_config.json")
    if len(tokenizer) > vocabulary:
        raise SettingsError(
            f"model.path: the tokenizer of {directory} has {len(tokenizer)} tokens, more than the model's vocab_size "
            f"{vocabulary}; give the model its own tokenizer"
        )


def _check_template(tokenizer: PreTrainedTokenizerBase, directory: Path, model: ModelSettings) -> None:
    what, advice = f"model.path: the chat template of {directory}", "correct chat_template.jinja"
    if model.chat_template not in CHAT_TEMPLATES:
        what, advice = f"model.chat_template: {model.chat_template}", "correct it"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "1"}], add_generation_prompt=True, tokenize=False)
    except Exception as error:
        raise SettingsError(f"{what} fails ({_reason(error)}); {advice}") from error
    if not text or not tokenizer(text, add_special_tokens=False)["input_ids"]:
        raise SettingsError(f"{what} makes no text of a message; {advice}")


def _reason(error: BaseException) -> str:
    """The first line of a library's message, or what it may mean when it is in the library's own terms."""
    reason = str(error).strip().partition("\n")[0]
    return (
        shorten(reason)
        if reason and not re.search(r"Error|Exception|NoneType|object|'str'|class", reason)
        else "a value is wrong"
    )
