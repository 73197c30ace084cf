"""`tic-megatron data prepare`: a training set out of several sources, with a report and checksums; see docs/data.md."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tic_megatron.config import ModelSettings, SettingsError
from tic_megatron.config_prepare import PrepareSettings
from tic_megatron.data.prepare import REPORT, TokenCounter, name_sources, prepare
from tic_megatron.data.prepare_report import write_report
from tic_megatron.data.problem_text import TEMPLATES
from tic_megatron.observability.files import disk_problem


def run(settings: PrepareSettings) -> int:
    """Prepare, print the report, and return the exit code. SettingsError for bad input; then nothing is left behind."""
    settings = settings.resolve()
    target = _check(settings)
    count_tokens = _token_counter(settings.model) if settings.model else None
    try:
        with _folder_that_appears(target) as folder:
            result = prepare(settings, folder, count_tokens)
            report = write_report(result)
            (folder / REPORT).write_text(report, encoding="utf-8")
    except OSError as error:
        print(f"tic-megatron: error: the training set was not written: {disk_problem(error, target)}", file=sys.stderr)
        return 1
    print(report)
    print(f"{target}: {result.kept} problems; train on them with --data.train {target}")
    return 0


def _check(settings: PrepareSettings) -> Path:
    """Refuse settings that cannot work; the absolute path of the folder to make. Names of templates become their texts."""
    if not settings.sources:
        raise SettingsError("sources is not given: give --sources FILE,... or a --recipe")
    for names, setting in ((settings.sources, "sources"), (settings.held_out, "held_out")):
        name_sources(names, setting)
    settings.template = TEMPLATES.get(settings.template, settings.template)
    if settings.template.count("{problem}") != 1:
        raise SettingsError(
            f"template is {settings.template[:60]!r}: give {', '.join(TEMPLATES)}, or a text that holds {{problem}} once"
        )
    if settings.years and (len(settings.years) != 2 or settings.years[0] > settings.years[1]):
        raise SettingsError(f"years is {settings.years}: give the first and the last one, such as [1983, 2022]")
    if not 0 < settings.near_duplicate <= 1:
        raise SettingsError(f"near_duplicate is {settings.near_duplicate}: it must be more than 0 and at most 1")
    if settings.max_prompt_tokens is not None and settings.max_prompt_tokens < 1:
        raise SettingsError(f"max_prompt_tokens is {settings.max_prompt_tokens}: it must be at least 1")
    if settings.max_prompt_tokens is not None and settings.model is None:
        raise SettingsError("max_prompt_tokens needs a tokenizer to measure with: give --model, or leave it out")
    return _check_out(settings.out)


def _check_out(out: str) -> Path:
    if not out.strip():
        raise SettingsError("out is not given: set the folder to make with --out")
    try:
        target = Path(os.path.abspath(Path(out).expanduser()))
        if target.exists():
            raise SettingsError(f"out: {out} exists already; give a folder that does not, or remove it")
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"out: {out[:60]!r} cannot be a folder's name; give another one") from error
    existing = _existing_parent(target)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "may not be written" if existing.is_dir() else "is a file"
        raise SettingsError(f"out: {out} cannot be made, since {existing} {reason}; give another folder")
    return target


def _existing_parent(target: Path) -> Path:
    return next(path for path in target.parents if path.exists())


@contextmanager
def _folder_that_appears(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends without an error, and is removed otherwise, also at SIGTERM."""
    scratch = _existing_parent(target) / f".{target.name}.unfinished"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        scratch.mkdir()
        yield scratch
        for path in scratch.iterdir():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.rename(target)
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(scratch, ignore_errors=True)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _token_counter(model: str) -> TokenCounter:
    """Counts with the tokenizer and chat template of a model, as training does."""
    from tic_megatron.commands.model_files import locate_model
    from tic_megatron.commands.remote_code import check_remote_code
    from tic_megatron.commands.tokenizer_files import load_tokenizer_and_config
    from tic_megatron.data.prompts import Problem, tokenize_problems

    directory = locate_model(model)
    check_remote_code(directory, trusted=False)
    tokenizer, _ = load_tokenizer_and_config(directory, ModelSettings())

    def count(texts: Sequence[str]) -> list[int]:
        problems = [Problem("", ({"role": "user", "content": text},), "", "a problem") for text in texts]
        return [len(prompt.token_ids) for prompt in tokenize_problems(problems, tokenizer)]

    return count
