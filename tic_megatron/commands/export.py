"""`tic-megatron export RUN_OR_CHECKPOINT OUT`: a checkpoint, of any layout, as a Hugging Face directory.

One process on the CPU, without Ray: the files are read into a layout of one rank, which is written as a run writes its `hf/`.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import yaml

from tic_megatron.checkpoints import MANIFEST, MODEL_FOLDER, SETTINGS_FILE, Checkpoints, find_damage, is_checkpoint
from tic_megatron.commands.model_files import read_config
from tic_megatron.config import ActorSettings, Settings, SettingsError, resolve_folder
from tic_megatron.observability.files import disk_problem

WORDS = {
    "RUN_OR_CHECKPOINT": "A run folder, of which the newest intact checkpoint is taken, or one of its checkpoints/step_N.",
    "OUT": "The folder to write: absent or empty before; it appears when it is complete.",
}


def run(source: str, out: str) -> int:
    """Export; returns the exit code. Raises SettingsError for bad input, before anything is written."""
    checkpoint = choose_checkpoint(Path(resolve_folder("export", source)))
    target = _check_target(Path(resolve_folder("export", out)))
    precision = _precision(checkpoint)
    _check_model(checkpoint)
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        _copy_files(checkpoint / MODEL_FOLDER, unfinished)
        with _quiet_libraries():
            n_tensors = _write_weights(checkpoint / "actors", unfinished, precision)
        if target.exists():
            target.rmdir()  # empty
        unfinished.rename(target)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not checkpoint.exists():
            print(
                f"tic-megatron: error: the export failed: {checkpoint} has been removed meanwhile, by its run for a newer one; "
                "export again, or raise trainer.keep_checkpoints",
                file=sys.stderr,
            )
        elif isinstance(error, OSError):
            print(f"tic-megatron: error: the export failed: {disk_problem(error, unfinished)}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1
    print(f"{checkpoint}: {n_tensors} tensors ({precision}) exported to {target}")
    return 0


def choose_checkpoint(source: Path) -> Path:
    """The checkpoint that a path means, its files checked against their hashes; lines about damaged newer ones go to stderr."""
    if not source.exists():
        raise SettingsError(f"export: there is no {source}; give a run folder or one of its checkpoints/step_N")
    if is_checkpoint(source):
        problem = find_damage(source)
        if problem:
            raise SettingsError(f"export: {problem}; give another checkpoint")
        return source
    folder = source / "checkpoints"
    if not folder.is_dir():
        raise SettingsError(
            f"export: {source} is neither a run folder (no checkpoints/) nor a checkpoint (no {MANIFEST}); give one of them"
        )
    checkpoint, problems = Checkpoints(source, keep=1).newest()
    for problem in problems:
        print(f"warning: {problem}; an older checkpoint is used", file=sys.stderr)
    if checkpoint is None:
        raise SettingsError(f"export: {folder} holds no checkpoint; give a run that has saved one")
    return checkpoint


def _check_target(out: Path) -> Path:
    target = Path(os.path.realpath(out))  # of a link, what it leads to: that can be put in place by a rename
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise SettingsError(f"export: {out} exists already; give a folder that does not, or an empty one")
    inside = next((path for path in target.parents if (path / MANIFEST).is_file() and (path / "actors").is_dir()), None)
    if inside is not None:
        raise SettingsError(f"export: {out} lies in the checkpoint {inside}, which would be damaged by it; give another folder")
    if target.parent.name == "checkpoints" and target.name.startswith("step_"):
        raise SettingsError(f"export: {out} would be taken for a checkpoint of the run; give another folder")
    if os.path.ismount(target):
        raise SettingsError(f"export: {out} is where a file system is mounted, and cannot be put in place; give a folder in it")
    existing = next(path for path in target.parents if path.exists())
    if not existing.is_dir():
        raise SettingsError(f"export: {out} cannot be a folder, since {existing} is a file; give another one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(probe, ignore_errors=True)  # of an export that was killed
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise SettingsError(f"export: {out} cannot be written ({disk_problem(error, target)})") from error
    return target


def _copy_files(source: Path, target: Path) -> None:
    """Contents only: a checkpoint may be read-only."""
    target.mkdir()
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        place.mkdir() if path.is_dir() else shutil.copyfile(path, place)


def _precision(checkpoint: Path) -> Literal["fp32", "bf16", "fp16"]:
    """That of the run's actors, in which it exports too."""
    path = checkpoint / SETTINGS_FILE
    precision = None
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError):
        precision = yaml.safe_load(path.read_text(encoding="utf-8"))["actor"]["precision"]
    if precision not in get_args(get_type_hints(ActorSettings)["precision"]):
        raise SettingsError(f"export: {path} does not hold the settings of a run; give another checkpoint")
    return precision


def _check_model(checkpoint: Path) -> None:
    """Of a model that can be trained, the classes are our own, and no code of the checkpoint's is asked for."""
    try:
        read_config(checkpoint / MODEL_FOLDER)
    except SettingsError as error:
        reason = str(error).removeprefix("model.path: ")
        raise SettingsError(f"export: {reason}") from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Megatron and torch warn of what this process lacks and of their own plans, which says nothing to whoever exports."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _write_weights(actors: Path, out: Path, precision: Literal["fp32", "bf16", "fp16"]) -> int:
    """The weights as safetensors; the number of tensors."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the GPUs may be in use
    settings = Settings(actor=ActorSettings(precision=precision))
    from torch.distributed import HashStore

    from tic_megatron.actors.megatron import runtime

    device = runtime.initialize(0, 1, HashStore(), settings.actor, seed=0, timeout_s=60)
    from tic_megatron.actors.megatron.checkpoint import export_hf

    return export_hf(settings, device, actors, out)
