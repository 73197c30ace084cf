"""One row of numbers per training step: to `metrics.jsonl` always, to TensorBoard and Weights & Biases when asked.

`metrics.jsonl` is the record that everything else reads (plots, summary, tests): a resumed run drops the rows that its
checkpoint does not know and writes them anew, so it ends with the same file as an uninterrupted run, up to timings.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import threading
import time
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tic_megatron.config import LoggingSettings, SettingsError
from tic_megatron.observability.files import atomic_writer

METRICS_FILE = "metrics.jsonl"
Row = dict[str, float | None]
"""`step` (int) and the metrics by name; None where the value was not finite."""


def check_logging(settings: LoggingSettings) -> None:
    """SettingsError when a logger is asked for that is not installed. Imports nothing."""
    if settings.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise SettingsError(
            "logging.wandb_project: the package wandb is not installed; run `pip install wandb`, or leave the setting out"
        )


def read_metrics(path: Path | str) -> list[Row]:
    """Rows of a `metrics.jsonl`; a last line that a crash cut short is left out. ValueError for any other bad line."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # complete lines end in a newline, so the last piece is empty unless it was cut
                break
            raise ValueError(f"{path}, line {number}: not a JSON object") from error
    return rows


def last_step(path: Path | str) -> int:
    """The step of the last row of a `metrics.jsonl`; 0 when there is none."""
    rows = read_metrics(path)
    return int(rows[-1].get("step") or 0) if rows else 0


class MetricsLogger:
    """Writes the metrics of a run. Call `truncate_after(N)` first when a run continues from step N."""

    def __init__(self, run_dir: Path | str, settings: LoggingSettings, run_name: str, config: dict[str, Any]) -> None:
        """`config` holds the resolved settings, for Weights & Biases. SettingsError when a logger is not installed."""
        check_logging(settings)
        self._path = Path(run_dir) / METRICS_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._waiting = b""  # rows that the disk has not taken
        self._writing = threading.Lock()
        self._sinks: list[_Sink] = []
        if settings.tensorboard:
            self._sinks.append(_TensorBoard(self._path.parent / "tensorboard"))
        if settings.wandb_project is not None:
            self._sinks.append(_WeightsAndBiases(self._path.parent, settings.wandb_project, run_name, config))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append the row of a step; on disk when this returns. Values that are not finite become null.

        Raises OSError when the disk does not take it. The row is kept then, and comes with the next one, or by `flush`.
        """
        row: Row = {"step": step}
        for name, value in metrics.items():
            number = float(value)
            row[name] = number if math.isfinite(number) else None
        with self._writing:
            self._waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
        for sink in self._sinks:
            with suppress(OSError):  # its curves lack a point then
                sink.log(step, {name: value for name, value in row.items() if name != "step" and value is not None})
        self.flush()

    def flush(self) -> None:
        """Write the rows that wait, if any: all or none. From any thread. Raises OSError."""
        with self._writing:
            if not self._waiting:
                return
            with open(self._path, "ab", buffering=0) as stream:
                end = stream.tell()
                try:
                    view = memoryview(self._waiting)
                    while view:
                        view = view[stream.write(view) :]
                    os.fsync(stream.fileno())
                    self._waiting = b""
                except BaseException as error:  # an interruption too
                    with suppress(OSError):
                        os.ftruncate(stream.fileno(), end)
                    if isinstance(error, OSError):
                        error.filename = error.filename or str(self._path)
                    raise

    def set_aside(self) -> Path | None:
        """Move the rows that are there away, as the run begins again; where to, None if there are none."""
        if not self._path.exists() or not self._path.stat().st_size:
            return None
        names = (f"{METRICS_FILE}.replaced{number or ''}" for number in itertools.count())
        place = next(place for name in names if not (place := self._path.with_name(name)).exists())
        return self._path.rename(place)

    def truncate_after(self, step: int) -> list[tuple[int, dict[str, float]]]:
        """Forget the rows of later steps, as the run continues after this one; those that are left, as they were logged."""
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        if self._path.exists():
            with atomic_writer(self._path) as stream:
                stream.writelines(json.dumps(row) + "\n" for row in kept)
        for sink in self._sinks:
            sink.truncate_after(step)
        return [(int(row.pop("step")), {name: math.nan if x is None else x for name, x in row.items()}) for row in kept]

    def close(self) -> None:
        """End all loggers."""
        with suppress(OSError):  # then no checkpoint counts on these rows
            self.flush()
        for sink in self._sinks:
            sink.close()


class _Sink(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def truncate_after(self, step: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    """TensorBoard's own file writer: `torch.utils.tensorboard` does the same, but needs torch."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._open = partial(EventFileWriter, str(directory))
        self._writer = self._open()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        try:
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._writer.flush()
        except OSError:
            self._writer = self._open()  # one that has failed does nothing any more
            raise

    def truncate_after(self, step: int) -> None:
        """A START mark at step N+1 makes TensorBoard drop what earlier files hold from there on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        mark = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=mark))

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run that keeps its identity when it is resumed (`wandb_run_id` in the run folder)."""

    def __init__(self, run_dir: Path, project: str, run_name: str, config: dict[str, Any]) -> None:
        import wandb

        id_file = run_dir / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=project,
            name=run_name,
            config=config,
            dir=str(run_dir),
            id=id_file.read_text().strip(),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),  # it would print into the progress display, and record it
        )
        # Our own step as the x axis: wandb's counter can't go back, so steps repeated after a resume would be dropped.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def truncate_after(self, step: int) -> None:
        """Points of steps that are run again stay in wandb; the new ones lie beside them."""

    def close(self) -> None:
        self._run.finish()
