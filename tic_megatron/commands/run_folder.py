"""Which run a folder holds, and whether this run may continue it."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tic_megatron.checkpoints import SETTINGS_FILE, Checkpoints, RunState, find_damage, load_state
from tic_megatron.config import CHAT_TEMPLATES, GRADING_ONLY, RewardSettings, Settings, SettingsError
from tic_megatron.evaluation import eval_name
from tic_megatron.observability.metrics import METRICS_FILE, read_metrics
from tic_megatron.preemption import MARKER, has_left
from tic_megatron.rewards.user_functions import digest_files

CHANGES_FILE = "changes.jsonl"
OF_THIS_START = {"run.name", "run.dir", "run.resume", "run.allow_change", "run.max_restarts"}
FOLDERS = ("logs", "checkpoints", "rollouts", "tensorboard", "hf", "profiles")
FILES = ("config.yaml", METRICS_FILE, "summary.json", "curves.png", MARKER, CHANGES_FILE)
# Settings that change neither what is trained nor on what: a resumed run may have others.
HARMLESS_SECTIONS = {"logging", "cluster", "eval"}
HARMLESS = {
    *("run.name", "run.dir", "run.resume", "run.allow_change", "run.max_restarts", "run.deterministic"),
    "data.train",  # where the problems lie: that they are the same ones, the checkpoint knows
    *("data.eval", "data.eval_limit"),
    *GRADING_ONLY,
    *("trainer.eval_every", "trainer.save_every", "trainer.keep_checkpoints", "trainer.noise_check_every"),
    "trainer.async_save",
    *("rollout.engines", "rollout.tensor_parallel_size", "rollout.gpu_memory_utilization", "rollout.cpu_kv_cache_gib"),
    *("rollout.weight_bucket_mib", "rollout.save_every", "rollout.max_model_len", "rollout.sleep_level"),
    *("rollout.expert_parallel", "rollout.dispatch", "rollout.max_concurrent_responses", "rollout.heartbeat_s"),
    *("rollout.verify_weights_every", "rollout.threads"),
    # The layout of the actors: a checkpoint can be read in any other.
    *("actor.tensor_parallel_size", "actor.sequence_parallel", "actor.pipeline_parallel_size", "actor.threads"),
    *("actor.virtual_pipeline_parallel_size", "actor.layers_in_first_stage", "actor.layers_in_last_stage"),
    *("actor.context_parallel_size", "actor.expert_parallel_size", "actor.expert_tensor_parallel_size"),
    *("actor.max_tokens_per_microbatch", "actor.logprob_chunk_tokens", "actor.distributed_optimizer", "actor.recompute"),
    *("actor.profile_steps", "actor.peak_tflops", "algorithm.max_bad_fraction", "algorithm.max_skipped_updates"),
}


def check_run_folder(settings: Settings) -> None:
    """Refuse a run folder that cannot be written, or that holds a run which these settings do not continue.

    `settings` are resolved ones.
    """
    folder = Path(settings.run.dir)
    _check_writable(folder)
    if settings.run.dir == settings.model.path:
        raise SettingsError(f"run.dir: {folder} is model.path too; give the run a folder of its own")
    resume, continues = settings.run.resume, goes_on(settings)
    if resume not in ("auto", "never") and not continues:
        if not Path(resume).exists():
            raise SettingsError(f"run.resume: there is no checkpoint {resume}; give auto, never, or a checkpoint's path")
        origins = (Path(resume), Path(resume).parent.parent)  # a checkpoint has its settings with it; RUN/checkpoints/step_N
        origin = next((origin for origin in origins if (origin / SETTINGS_FILE).exists()), None)
        if origin is not None:
            _check_same_run("run.resume", origin, settings)
    if not (folder / "config.yaml").exists() and not has_trained(folder):
        return
    if resume == "never" and not continues:
        raise SettingsError(f"run.dir: {folder} holds a run already; give another --run.dir, or --run.resume auto to continue it")
    _check_same_run("run.dir", folder, settings)
    _check_metrics(folder / METRICS_FILE)


def goes_on(settings: Settings) -> bool:
    """Whether the run goes on from the last checkpoint of its own folder, if there is one: by `run.resume: auto`, and when the
    folder's run began by the same `run.resume` (`never`, or a path) and has left when it was told to. Without that marker the
    same command begins again."""
    folder, resume = Path(settings.run.dir), settings.run.resume
    return resume == "auto" or (has_left(folder) and _of_the_folder(folder) == resume)


def began_by(settings: Settings) -> str:
    """The `run.resume` by which the run began: with `auto`, that in the folder's `config.yaml`, where it stays."""
    resume = settings.run.resume
    return _of_the_folder(Path(settings.run.dir)) if resume == "auto" else resume


def _of_the_folder(folder: Path) -> str:
    try:
        resume = yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["run"]["resume"]
        return resume if isinstance(resume, str) else "auto"
    except (OSError, yaml.YAMLError, ValueError, RecursionError, KeyError, TypeError):
        return "auto"  # whoever compares the settings says what is wrong


def find_checkpoint(settings: Settings) -> tuple[Path | None, RunState, list[str]]:
    """What the run continues from: the checkpoint (None: nothing), its state, and why newer ones were passed over.

    A run that began at a checkpoint of elsewhere, and has none of its own yet, begins there again. Reads all of the checkpoint
    once, to compare it with its hashes. SettingsError when none is intact, or the one that is was not written by a run of these
    settings.
    """
    folder, resume = Path(settings.run.dir), settings.run.resume
    setting = "run.dir" if resume == "auto" else "run.resume"
    checkpoint: Path | None = None
    problems: list[str] = []
    if goes_on(settings):
        checkpoint, problems = Checkpoints(folder, settings.trainer.keep_checkpoints).newest()
    if checkpoint is None:
        origin = began_by(settings)
        if origin in ("auto", "never"):
            return None, RunState(), []
        checkpoint = Path(origin)
        problem = find_damage(checkpoint)
        if problem and resume == "auto":
            raise SettingsError(
                f"run.dir: the run in {folder} began elsewhere, but {problem}; restore it, or give another --run.dir"
            )
        if problem:
            raise SettingsError(f"run.resume: {problem}; give auto, never or another of checkpoints/step_N")
    try:
        state = load_state(checkpoint)
        sound = type(state.step) is int and (state.cursor is None or _is_cursor(state.cursor)) and type(state.programs) is dict
        sound &= state.unrecorded is None or type(state.unrecorded) is dict
    except (OSError, ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise SettingsError(
            f"{setting}: {checkpoint / 'state.json'} is not the state of a run; restore it from a copy, or give another one"
        )
    check_programs(checkpoint, state, settings)
    return checkpoint, state, problems


def digest_programs(settings: Settings) -> dict[str, str]:
    """SHA-256 of the user's Python files, by the setting that names them. What they import is not looked at."""
    plugin = settings.algorithm.plugin
    digests = {"reward.function": digest_reward(settings.reward), "algorithm.plugin": _digest([plugin] if plugin else [])}
    return {key: digest for key, digest in digests.items() if digest}


def digest_reward(reward: RewardSettings) -> str:
    """Of the files whose functions are terms of the reward, as they are now (`digest_files`)."""
    return _digest([term.function[0] for term in reward.terms if term.function])


def _digest(files: list[str]) -> str:
    try:
        return digest_files(Path(file).read_bytes() for file in files)
    except OSError:
        return ""  # who runs it says so


def begin_state(checkpoint: Path | None, settings: Settings) -> RunState:
    """What a driver starts with: the checkpoint's state, or a new one; with the programs that it will run, and without
    accuracies that those to come cannot be compared with."""
    state = load_state(checkpoint) if checkpoint else RunState()
    state.programs = digest_programs(settings)
    if checkpoint and (checkpoint / SETTINGS_FILE).exists() and _measures_otherwise(_all_changes(checkpoint, settings)):
        state.accuracy_before, state.benchmarks_before = None, {}
        state.accuracy, state.benchmarks = None, {}
    return state


def _measures_otherwise(changes: dict[str, tuple[Any, Any]]) -> bool:
    """Whether held-out problems are others, or answered in another way. They may have moved, and benchmarks have names."""
    there, here = changes.pop("data.eval", (None, None))
    moved = bool(there and here) and eval_name(there) == eval_name(here)
    others = {key for key in changes if key == "data.eval_limit" or key.startswith("eval.")} - {"eval.benchmarks"}
    return (there != here and not moved) or bool(others)


def check_programs(checkpoint: Path, state: RunState, settings: Settings) -> None:
    """Refuse to go on from a checkpoint with a file of the user's of the same name and another content."""
    here = digest_programs(settings)
    for key in sorted({*state.programs, *here}):
        if here.get(key) != state.programs.get(key) and key not in settings.run.allow_change:
            value = settings.flatten()[key]
            raise SettingsError(
                f"{key}: {value} has changed since {checkpoint} was written; restore the file, give another --run.dir, or "
                f"continue with --run.allow_change {key}"
            )


def _is_cursor(cursor: Any) -> bool:
    names = ("seed", "epoch", "position", "fingerprint")
    return isinstance(cursor, dict) and all(type(cursor.get(name)) is int for name in names)


def _check_same_run(setting: str, folder: Path, settings: Settings) -> None:
    """Refuse to continue the run of a folder under settings that would make another run of it."""
    changes = changed_settings(folder, settings, setting)
    refused = {key: values for key, values in changes.items() if key not in settings.run.allow_change}
    if changes.get("actor.optimizer") == ("sgd", "adamw"):
        raise SettingsError(
            f"{setting}: {folder} holds a run with actor.optimizer sgd, whose checkpoints have no moments for adamw; give "
            f"another --run.dir, and its exported model (tic-megatron export {folder} OUT) as --model.path"
        )
    if refused:
        listed = ", ".join(f"{key} ({old} there, {new} here)" for key, (old, new) in list(refused.items())[:4])
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise SettingsError(
            f"{setting}: {folder} holds another run: it differs in {listed}{more}; give another --run.dir, or continue that run "
            f"with --run.allow_change {','.join(refused)}"
        )


def _check_metrics(path: Path) -> None:
    """Refuse a metrics file that the run could not go on with."""
    advice = "restore it from a copy, or give another --run.dir"
    try:
        rows = read_metrics(path)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) if str(path) in str(error) else f"{path} is not a file of metrics"
        raise SettingsError(f"run.dir: {reason}; {advice}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise SettingsError(f"run.dir: {path}, line {number}: no row of metrics with a step; {advice}")
        other = next((name for name, value in row.items() if value is not None and not isinstance(value, int | float)), None)
        if other is not None:
            raise SettingsError(f"run.dir: {path}, line {number}: {other[:60]!r} is not a number; {advice}")


def changed_settings(folder: Path, settings: Settings, setting: str = "run.dir") -> dict[str, tuple[Any, Any]]:
    """The settings that matter to a resumed run and differ: name -> (value in the folder's config.yaml, value now)."""
    changes = _all_changes(folder, settings, setting)
    allowed = settings.run.allow_change
    return {k: values for k, values in changes.items() if not (_is_harmless(k, settings) or _has_moved(k, *values, allowed))}


def record_changes(settings: Settings, checkpoint: Path | None) -> str | None:
    """Before a run is continued: add the settings that differ from its `config.yaml`, or in a new folder from that of the
    checkpoint, to its `changes.jsonl`. Returns a line that tells them, None when there are none or nothing is continued. Raises
    OSError."""
    folder = Path(settings.run.dir)
    before = next((there for there in (folder, checkpoint) if there and (there / SETTINGS_FILE).exists()), None)
    if before is None:
        return None
    changes = {key: values for key, values in _all_changes(before, settings).items() if key not in OF_THIS_START}
    if not changes:
        return None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (folder / CHANGES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, "changes": changes}) + "\n")
    listed = ", ".join(f"{key} {new} (was {old})" for key, (old, new) in changes.items())
    return f"the run goes on with other settings: {listed} (recorded in {folder / CHANGES_FILE})"


def _all_changes(folder: Path, settings: Settings, setting: str = "run.dir") -> dict[str, tuple[Any, Any]]:
    path = folder / "config.yaml"
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        there = {f"{section}.{name}": value for section, members in sections.items() for name, value in members.items()}
    except OSError as error:
        raise SettingsError(
            f"{setting}: {folder} holds a run, but its config.yaml cannot be read ({error.strerror}); give another --{setting}"
        ) from error
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError) as error:
        raise SettingsError(f"{setting}: {path} is not the config.yaml of a run; give another --{setting}") from error
    here = settings.flatten()
    # A setting that the older run did not know yet had, in effect, its default value.
    there = {key: there.get(key, default) for key, default in Settings().flatten().items()}
    if here["trainer.epochs"] is not None:
        there["trainer.steps"] = here["trainer.steps"]  # follows from the problems, which the checkpoint knows
    return {key: (there[key], here[key]) for key in here if there[key] != here[key]}


def _is_harmless(key: str, settings: Settings) -> bool:
    if key in ("trainer.steps", "trainer.epochs"):  # a constant learning rate does not depend on how many steps are still to come
        return settings.actor.lr_decay == "constant"
    if key == "model.path":  # the weights come from the checkpoint, which also knows the configuration and the tokens
        return not settings.algorithm.kl_coefficient or settings.algorithm.reference_path is not None
    return key in HARMLESS or key.partition(".")[0] in HARMLESS_SECTIONS


def _has_moved(key: str, there: Any, here: Any, allowed: list[str]) -> bool:
    """Whether a setting names files that may have moved. That they are the same is seen elsewhere: the checkpoint has hashes of
    programs, and of what the chat template makes of the problems."""
    if key == "model.chat_template":
        return not any(value in CHAT_TEMPLATES for value in (there, here)) and "data.train" not in allowed
    if key == "algorithm.plugin":
        return bool(there and here)
    return key == "reward.function" and _without_files(there) == _without_files(here)


def _without_files(function: str) -> list[tuple[float, bool, str]] | None:
    """The terms of a reward, without the paths of files: weight, whether it is a function of one, and name."""
    try:
        terms = RewardSettings(function).terms
        return [(term.weight, bool(term.function), term.function[1] if term.function else term.source) for term in terms]
    except (SettingsError, TypeError):
        return None


def has_trained(folder: Path) -> bool:
    """Whether a run folder holds anything that a run has earned: a finished step or a checkpoint."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise SettingsError(f"run.dir: {folder} cannot be a folder, since {existing} is a file; give another --run.dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(f"run.dir: {folder} cannot be written ({existing} is read-only for you); give another --run.dir")
    for names, kind, is_kind in ((FOLDERS, "a folder", Path.is_dir), (FILES, "a file", Path.is_file)):
        for path in (folder / name for name in names):
            if path.exists() and not is_kind(path):
                raise SettingsError(f"run.dir: {path} is not {kind}, as the run needs it; remove it, or give another --run.dir")
            if path.is_symlink() and not path.exists():
                target = os.readlink(path)
                raise SettingsError(
                    f"run.dir: {path} is a link to {target}, which is not there; restore that, or give another --run.dir"
                )
            if path.exists() and not os.access(path, _needed(path)):
                raise SettingsError(f"run.dir: {path} is not yours to use; change its owner, or give another --run.dir")


def _needed(path: Path) -> int:
    """The permissions that the run needs. Most of its files are replaced, and not written."""
    if path.is_dir():
        return os.R_OK | os.W_OK | os.X_OK
    return os.R_OK | (os.W_OK if path.name in (METRICS_FILE, CHANGES_FILE) else 0)
