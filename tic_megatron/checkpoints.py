"""The run folder's checkpoints: complete or absent, the newest never removed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tic_megatron.config import SettingsError
from tic_megatron.observability.files import disk_problem, lower_priority

MANIFEST = "manifest.json"
UNFINISHED, PENDING = ".unfinished", ".pending"
SETTINGS_FILE = "config.yaml"
MODEL_FOLDER = "model"
POLL_S = 0.02, 1.0
"""Seconds between questions whether the actors have written, the first and the longest."""


@dataclass
class RunState:
    """What the driver has to remember beside the actors' weights and optimizer.

    `step`: last step that was trained; `unrecorded`: its metrics, as long as its evaluation is to come; `cursor`: place in the
    training problems; `accuracy_before`, `accuracy`: measured before step 1 and last, as `benchmarks_before`, `benchmarks` by
    their names; `wall_s`: seconds spent so far; `programs`: SHA-256 of the user's Python files, by the setting that names them;
    `skipped_in_a_row`: the last updates, as far as all were skipped.
    """

    step: int = 0
    unrecorded: dict[str, float] | None = None
    cursor: dict | None = None
    accuracy_before: float | None = None
    accuracy: float | None = None
    benchmarks_before: dict[str, float] = field(default_factory=dict)
    benchmarks: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    programs: dict[str, str] = field(default_factory=dict)
    skipped_in_a_row: int = 0


class CheckpointError(RuntimeError):
    """A checkpoint could not be written: why, where, and what to do."""


Written = Callable[[], bool]
"""Whether the actors have written their files; raises CheckpointError when they could not."""


class Checkpoints:
    """`checkpoints/step_N/` of a run folder.

    Each has the actors' files in `actors/`, the driver's `state.json`, the settings in `config.yaml`, the model's configuration
    and tokenizer in `model/`, and a `manifest.json` with size and SHA-256 of every file.

    A save only holds the run up until the actors have copied their state. A thread waits until it is on the disk, hashes it and
    publishes it; `finish` waits for the thread. One save is under way at a time.
    """

    def __init__(self, run_dir: Path, keep: int):
        self.folder = run_dir / "checkpoints"
        self.keep = max(1, keep)
        self.failed = 0
        """Saves that have failed."""
        self.error: Exception | None = None
        """Of the last that has failed."""
        self._saving: threading.Event | None = None  # set at the end of the save that is under way
        self._problem: str | None = None  # of the last save
        self._untold: list[str] = []

    def save(self, state: RunState, begin_actors: Callable[[Path], Written], describe: Callable[[Path], None]) -> None:
        """Begin to write a checkpoint, when the one before is finished; it is published by a rename, and the oldest beyond `keep`
        are removed. What lies there under the same name, because it was found damaged, is moved aside.

        Args:
            state: the driver's, as it is now.
            begin_actors: takes the folder for the actors' files; returns when the actors may go on.
            describe: writes the settings, and the model's configuration and tokenizer, into the checkpoint's folder.

        A save that fails leaves the checkpoints before it as they are; `problems` tells.
        """
        self.finish()
        unfinished = self.folder / f".step_{state.step}{UNFINISHED}"
        self._problem = None
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            for part in ("actors", MODEL_FOLDER):
                (unfinished / part).mkdir(parents=True)
            written = begin_actors(unfinished / "actors")
        except (OSError, CheckpointError) as error:
            self._fail(f"the checkpoint of step {state.step}", unfinished, error)
            return
        arguments = (state.step, json.dumps(asdict(state)), unfinished, written, describe)
        self._saving = threading.Event()
        threading.Thread(target=self._complete, args=(self._saving, *arguments), name="checkpoint", daemon=True).start()

    def finish(self, *, timeout_s: float | None = None) -> str | None:
        """Wait for the save that is under way, not longer than given; why the last one failed, None if it did not."""
        if self._saving is not None and self._saving.wait(timeout_s):
            self._saving = None
        return self._problem

    def problems(self) -> list[str]:
        """A line for everything that has failed since the last call."""
        told, self._untold = self._untold, []
        return told

    def remove_unfinished(self) -> None:
        """Remove what a run that was killed has left of a save."""
        for unfinished in self.folder.glob(f".step_*{UNFINISHED}"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def _complete(
        self, ended: threading.Event, step: int, state: str, unfinished: Path, written: Written, describe: Callable[[Path], None]
    ) -> None:
        try:
            pause_s = POLL_S[0]
            while not written():
                time.sleep(pause_s)
                pause_s = min(1.5 * pause_s, POLL_S[1])
            (unfinished / "state.json").write_text(state, encoding="utf-8")
            describe(unfinished)
            _seal(unfinished)
            self._publish(unfinished, self.folder / f"step_{step}")
        except Exception as error:
            self._fail(f"the checkpoint of step {step}", unfinished, error)
        finally:
            ended.set()

    def add_pending(self, step: int, write: Callable[[Path], None]) -> None:
        """Put a rollout that was ready too late beside the checkpoint of this step, which is finished: `step_N.pending`, complete
        or absent too. `write` takes its folder."""
        unfinished = self.folder / f".step_{step}{PENDING}{UNFINISHED}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write(unfinished)
            _seal(unfinished)
            place = _pending_of(self.folder / f"step_{step}")
            shutil.rmtree(place, ignore_errors=True)  # a damaged one
            unfinished.rename(place)
            _sync(self.folder)
        except OSError as error:
            self._fail(f"the rollout ahead of step {step}", unfinished, error)

    def _publish(self, unfinished: Path, target: Path) -> None:
        for folder in (unfinished / "actors", unfinished / MODEL_FOLDER):
            _sync(folder)
        if target.exists():
            self._set_aside(target)
        shutil.rmtree(_pending_of(target), ignore_errors=True)  # of a checkpoint that somebody has removed
        unfinished.rename(target)
        _sync(self.folder)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(_pending_of(old), ignore_errors=True)
            try:
                shutil.rmtree(old)
            except OSError as error:
                self._untold.append(f"the old checkpoint {old.name} could not be removed: {disk_problem(error, old)}")

    def own_step(self, checkpoint: Path | None) -> int | None:
        """The step of one of this folder's, perhaps named by a link; None of a copy elsewhere, and of none."""
        place = checkpoint and checkpoint.resolve()
        return next((_step_of(own) for own in self._all() if own.resolve() == place), None)

    def set_aside_others(self, origin: Path | None) -> None:
        """Move checkpoints aside that are of another course than a run which continues from `origin` (None: which begins): those
        of later steps if the origin is one of this folder's, and all of them if it is not."""
        last = self.own_step(origin)
        for checkpoint in self._all():
            if last is None or _step_of(checkpoint) > last:
                self._set_aside(checkpoint)

    def _set_aside(self, checkpoint: Path) -> None:
        names = (f"{checkpoint.name}.replaced{number or ''}" for number in itertools.count())
        place = next(place for name in names if not (place := self.folder / name).exists())
        if _pending_of(checkpoint).exists():
            shutil.rmtree(_pending_of(place), ignore_errors=True)
            _pending_of(checkpoint).rename(_pending_of(place))
        checkpoint.rename(place)

    def _fail(self, what: str, unfinished: Path, error: Exception) -> None:
        reason = disk_problem(error, unfinished) if isinstance(error, OSError) else str(error)
        self._problem = f"{what} was not saved: {reason}"
        self.error = error
        self._untold.append(self._problem)
        self.failed += 1
        shutil.rmtree(unfinished, ignore_errors=True)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, None if there has been none; and why newer ones were passed over, a line each.

        Raises SettingsError when all are damaged.
        """
        listed: list[Path] | None = None
        problems: list[str] = []
        while listed != self._all():  # again, when the run goes on meanwhile: it saves newer ones and removes older ones
            listed, problems = self._all(), []
            for checkpoint in reversed(listed):
                problem = find_damage(checkpoint)
                if problem is None:
                    return checkpoint, problems
                problems.append(problem)
                if listed != self._all():
                    break
        if problems:
            raise SettingsError(
                f"run.dir: no checkpoint of {self.folder.parent} is intact: {problems[0]}; restore one from a copy, or start "
                "again with another --run.dir"
            )
        return None, []

    def _all(self) -> list[Path]:
        """By step; also those that lack a file. SettingsError for a folder that cannot be read: it may hold checkpoints."""
        if not os.path.lexists(self.folder):
            return []
        try:
            names = os.listdir(self.folder)
        except OSError as error:
            raise SettingsError(
                f"run.dir: {self.folder} cannot be read ({error.strerror}) and may hold checkpoints; restore it, or give another "
                "--run.dir"
            ) from error
        found = [self.folder / name for name in names if name.startswith("step_") and name.removeprefix("step_").isdigit()]
        return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def is_checkpoint(path: Path) -> bool:
    """Whether a path is meant as a checkpoint, perhaps a damaged one."""
    return (path / MANIFEST).is_file() or (path / "actors").is_dir()


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, against its manifest; None when nothing is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (FileNotFoundError, NotADirectoryError):
        return f"{checkpoint} is not a complete checkpoint (no {MANIFEST})"
    except OSError as error:
        return f"{checkpoint} cannot be used: its {MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{checkpoint} is damaged: its {MANIFEST} cannot be read"
    try:
        present = {name: (entry["bytes"], entry["sha256"]) for name, entry in _describe(checkpoint).items()}
    except OSError as error:
        return f"{checkpoint} is damaged: {error.filename or 'a file'} cannot be read ({error.strerror})"
    wrong = sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))
    if not wrong:
        return None
    how = (
        "is missing" if wrong[0] not in present else "is not what was saved" if wrong[0] in expected else "was not saved with it"
    )
    return f"{checkpoint} is damaged: {wrong[0]} {how}" + (f", and {len(wrong) - 1} more files" if len(wrong) > 1 else "")


def _describe(folder: Path, *, sync: bool = False) -> dict[str, dict]:
    """Size and SHA-256 of every file but the manifest, by relative path. Hashing releases the interpreter's lock, so threads
    help. With `sync`, what was read is on the disk afterwards, should the machine fail."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)

    def describe(name: str) -> dict:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                os.fsync(file.fileno())
            return {"bytes": file.tell(), "sha256": digest}

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), initializer=lower_priority) as threads:
        return dict(zip(names, threads.map(describe, names), strict=True))


def _seal(folder: Path) -> None:
    """Write the manifest of a folder that is complete, and have all of it on the disk."""
    (folder / MANIFEST).write_text(json.dumps(_describe(folder, sync=True), indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _pending_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}{PENDING}")


def find_pending(checkpoint: Path) -> tuple[Path | None, str | None]:
    """Where the rollout that was made ahead of a checkpoint would be, in it or beside it (or what it is a link to); and why one
    beside it is not used."""
    places = (_pending_of(checkpoint), _pending_of(checkpoint.resolve()))
    beside = next((place for place in places if place.is_dir()), None)
    if beside is None:
        return checkpoint, None
    problem = find_damage(beside)
    return (None, problem) if problem else (beside, None)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk, should the machine fail."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(checkpoint: Path) -> RunState:
    """The driver's part of a checkpoint."""
    return RunState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
