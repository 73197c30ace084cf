"""`tic-megatron train`: check, train, and say what came out."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tic_megatron.checkpoints import Checkpoints, load_state
from tic_megatron.commands.driver import LOCK_FILE, drive, lock, say
from tic_megatron.commands.preflight import TrainInputs, preflight
from tic_megatron.commands.run_folder import began_by, check_programs, goes_on, has_trained, record_changes
from tic_megatron.config import Settings, SettingsError
from tic_megatron.config_checks import check_settings
from tic_megatron.observability.files import atomic_writer, disk_problem
from tic_megatron.observability.metrics import METRICS_FILE, last_step, read_metrics
from tic_megatron.observability.progress import format_duration
from tic_megatron.observability.rollouts import ROLLOUTS_FOLDER
from tic_megatron.preemption import MARKER, has_left, mark, taking_signals
from tic_megatron.rewards.code import level_lines
from tic_megatron.supervisor import supervise

HARDLY_REWARDED = 0.01
"""Mean reward, without the overlong punishment, below which in every step the end of a run says so."""


def run(settings: Settings) -> int:
    """Train; returns the exit code. Raises SettingsError before anything has started when the input is bad."""
    check_settings(settings)
    settings = settings.resolve()
    folder = Path(settings.run.dir)
    with ExitStack() as stack:
        # Until another process leaves the folder, what there is to continue from may change.
        locked = _is_file(folder / LOCK_FILE) and _lock(folder, stack)
        begun = goes_on(settings)
        with taking_signals(lambda number: _leave(settings, number, begun=begun)):
            inputs = preflight(settings)
            if not locked:
                _lock(folder, stack)
            _prepare(folder, settings, inputs)
            begun = True
            for warning in inputs.warnings:
                print(f"warning: {warning}", file=sys.stderr)
            graders = [settings.reward.function, *(chosen.benchmark.reward for chosen in inputs.benchmarks)]
            for line in level_lines(settings.reward, graders):
                say(line)
        return _supervised(settings, inputs, folder)


def _supervised(settings: Settings, inputs: TrainInputs, folder: Path) -> int:
    code = supervise(
        lambda attempt: _drive(settings, inputs, attempt),
        max_restarts=settings.run.max_restarts,
        reached=inputs.step,
        last_step=lambda: last_step(folder / METRICS_FILE),
        leave=lambda number: _leave(settings, number),
        note=say,
    )
    if code != 0:
        _forget_untrained(folder)
    return code


def _leave(settings: Settings, number: signal.Signals, *, begun: bool = True) -> int:
    """Told to leave when there was nothing to save, or it could not be: what was saved before is what the next one continues
    from."""
    if number == signal.SIGINT:
        return 130
    folder = Path(settings.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if begun or not has_left(folder):  # the marker of another command's run is not ours to change
            mark(folder, number.name, last_step(folder / METRICS_FILE), begun=begun)
    except OSError as error:
        say(f"error: left at {number.name} without saving, and without a marker: {disk_problem(error, folder)}")
        return 1
    what = f"{_what_continues(settings)} from the last checkpoint in {folder}" if begun else "the same command begins again"
    say(f"left at {number.name} without saving; {what}")
    return 0


def _what_continues(settings: Settings) -> str:
    """With `run.resume` it may begin again, or refuse to."""
    drop = has_trained(Path(settings.run.dir)) and not goes_on(settings)
    return f"the same command{' without --run.resume' if drop else ''} continues"


def _drive(settings: Settings, inputs: TrainInputs, attempt: int) -> int:
    """The driver's process, from start or checkpoint to end; its exit code. `attempt` is above 0 in a restart."""
    folder = Path(settings.run.dir)

    def work() -> int:
        from tic_megatron.trainer import train

        summary = train(settings, replace(_continue(inputs, settings), restart=True) if attempt else inputs)
        if summary is None:
            line = "left as it was told to"
            with suppress(OSError):  # whoever watches for the marker may have taken it
                line = (folder / MARKER).read_text().strip()
            say(f"{line}; {_what_continues(settings)}")
        else:
            with suppress(OSError, SystemExit):  # nobody reads it: rich would end the process
                print_summary(summary, folder)
        return 0

    def interrupted() -> str:
        return f"{_what_continues(settings)} from the last checkpoint in {folder}"

    return drive(work, folder, what="run", interrupted=interrupted)


def _continue(inputs: TrainInputs, settings: Settings) -> TrainInputs:
    """Those of a restart: it goes on from the run's own last checkpoint, once there is one, and until then from where it began.
    Checkpoints of another course have been moved aside."""
    own, damaged = Checkpoints(Path(settings.run.dir), settings.trainer.keep_checkpoints).newest()
    checkpoint = own or inputs.checkpoint
    if checkpoint is None:
        return inputs
    state = load_state(checkpoint)
    check_programs(checkpoint, state, settings)
    return replace(inputs, checkpoint=checkpoint, step=state.step, damaged=damaged)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False  # the checks of the folder say why


def _lock(folder: Path, stack: ExitStack) -> bool:
    """Keep other processes out of the folder, also after this one is killed while its driver is still there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(stack.enter_context((folder / LOCK_FILE).open("w")), folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return True


def _prepare(folder: Path, settings: Settings, inputs: TrainInputs) -> None:
    """Write the settings down, and how the run began; and move checkpoints of another course aside: a restart would take the last
    of them."""
    try:
        (folder / "logs").mkdir(exist_ok=True)
        changes = record_changes(settings, inputs.checkpoint)
        if changes:
            print(changes, file=sys.stderr)
        recorded = replace(settings, run=replace(settings.run, resume=began_by(settings)))
        with atomic_writer(folder / "config.yaml") as file:
            file.write(recorded.to_yaml())
        Checkpoints(folder, settings.trainer.keep_checkpoints).set_aside_others(inputs.checkpoint)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> SettingsError:
    return SettingsError(f"run.dir: {folder} cannot be written ({error.strerror}); give another --run.dir")


def _forget_untrained(folder: Path) -> None:
    """Keep the settings of a run that never finished a step out of the way of the next attempt in the same folder."""
    with suppress(OSError):
        if not has_trained(folder):
            (folder / "config.yaml").rename(folder / "logs" / "config.yaml")


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The table at the end of a run, and a plain word when nothing was ever rewarded."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="Training finished", title_justify="left")
    table.add_row("held-out accuracy before", _accuracy(summary["accuracy_before"]))
    table.add_row("held-out accuracy after", _accuracy(summary["accuracy_after"]))
    table.add_row("steps", str(summary["steps"]))
    table.add_row("wall time", format_duration(summary["wall_s"]))
    table.add_row("outputs", str(folder))
    console = Console()
    console.print(table)
    rows = [row for row in read_metrics(folder / METRICS_FILE) if isinstance(row.get("reward/mean"), int | float)]  # finite ones
    rewards = [row["reward/mean"] - row.get("reward/overlong_mean", 0.0) for row in rows]  # what long ones lose is no reward
    if rewards and abs(max(rewards)) < HARDLY_REWARDED:  # negative ones teach, too
        learned = "No response was ever rewarded, so the model has learned nothing"
        if any(rewards):
            learned = (
                f"Hardly any response was rewarded (mean reward at most {max(rewards):.4f}), so there was little to learn from"
            )
        console.print(
            f"{learned}: a group of equal rewards has no advantages. The problems may be too hard for the model, or its answers "
            f"not in the form that the grader reads; see the samples in {folder / ROLLOUTS_FOLDER}."
        )


def _accuracy(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
