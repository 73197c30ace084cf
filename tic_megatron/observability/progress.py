"""What a person sees while a run goes on: a live panel in a terminal, one line per step anywhere else (CI, log files)."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from contextlib import suppress
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_SPARKS = "▁▂▃▄▅▆▇█"
_HISTORY = 48
_RECENT_STEPS = 20


class ProgressDisplay:
    """Live progress of a run. Give `stream` a duplicate of the terminal when stdout itself goes to a log file.

    Example:

        with ProgressDisplay(settings.trainer.steps, start_step=0, title="quickstart") as progress:
            progress.phase("generate")
            ...
            progress.update(step, metrics)
    """

    def __init__(self, total_steps: int, *, start_step: int = 0, title: str = "run", stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._step = start_step
        self._title = title
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream)
        self._metrics: dict[str, float] = {}
        self._first_accuracy: float | None = None
        self._accuracy: float | None = None
        self._rewards: deque[float] = deque(maxlen=_HISTORY)
        self._durations: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._phase = "starting"
        self._last_update = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._panel,
                console=self._console,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)
        self._last_update = time.monotonic()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._live is not None:
            with suppress(OSError):
                self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """Name what the run does now; shown in a terminal only."""
        self._phase = name

    def note(self, text: str) -> None:
        """A line that stays, whatever characters a model or a library has put into it."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if self._live is not None:
            with suppress(OSError):
                self._console.print(text, markup=False, highlight=False)
        else:
            self._write(text)

    def accuracy(self, value: float) -> None:
        """Held-out accuracy measured outside of a step: before the first one."""
        self._first_accuracy = value if self._first_accuracy is None else self._first_accuracy
        self._accuracy = value

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """A step is done. Reads `reward/mean`, `eval/*/accuracy`, `policy/log_ratio_std`, ... where present."""
        now = time.monotonic()
        self._durations.append((now - self._last_update) / max(1, step - self._step))
        self._last_update, self._step, self._metrics = now, step, metrics
        if math.isfinite(metrics.get("reward/mean", math.nan)):
            self._rewards.append(metrics["reward/mean"])
        accuracies = [value for name, value in metrics.items() if name.startswith("eval/") and name.endswith("/accuracy")]
        for accuracy in accuracies[:1]:  # that of data.eval comes first
            self.accuracy(accuracy)
        if self._live is None:
            self._write(self._line())

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the mean duration of the recent steps; None before the first."""
        if not self._durations:
            return None
        return (self._total - self._step) * sum(self._durations) / len(self._durations)

    def _write(self, text: str) -> None:
        with suppress(OSError):  # whoever read it may be gone; that is no reason to end the run
            self._stream.write(text + "\n")
            self._stream.flush()

    def _fields(self) -> list[tuple[str, str]]:
        """(label, value) of what is known; a value that was not measured is left out."""
        metrics = self._metrics
        accuracy = "" if self._accuracy is None else f"{self._accuracy:.3f}"
        if self._first_accuracy != self._accuracy:
            accuracy = f"{self._first_accuracy:.3f} -> {accuracy}"
        fields = [
            ("reward", _format(metrics, "reward/mean", "{:.3f}")),
            ("held-out accuracy", accuracy),
            ("log-ratio std", _format(metrics, "policy/log_ratio_std", "{:.3f}")),
            ("capped", _format(metrics, "policy/ratio_capped_fraction", "{:.1%}")),
            ("tokens/s", _format(metrics, "throughput/tokens_per_s", "{:,.0f}")),
        ]
        if self._durations:
            fields.append(("s/step", f"{sum(self._durations) / len(self._durations):.2f}"))
        return [(label, value) for label, value in fields if value]

    def _line(self) -> str:
        parts = [f"step {self._step}/{self._total}", *(f"{label} {value}" for label, value in self._fields())]
        if self.seconds_left:
            parts.append(f"left {format_duration(self.seconds_left)}")
        return "  ".join(parts)

    def _panel(self) -> RenderableType:
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        left = self.seconds_left
        remaining = self._phase if left is None else f"{self._phase}   left {format_duration(left)}"
        head.add_row(f"step {self._step}/{self._total}", ProgressBar(total=self._total, completed=self._step), remaining)
        body = Table.grid(padding=(0, 3))
        fields = self._fields()
        if fields:
            body.add_row(*(Text(label, style="dim") for label, _ in fields))
            body.add_row(*(Text(value, style="bold") for _, value in fields))
        rows = [head, body]
        if len(self._rewards) > 1:
            rows.append(Text.assemble(("reward ", "dim"), (sparkline(self._rewards), "green")))
        return Panel(Group(*rows), title=self._title, title_align="left", border_style="cyan")


def sparkline(values: deque[float] | list[float]) -> str:
    """Values as a row of small bars between their smallest and largest."""
    low, high = min(values), max(values)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in values)


def format_duration(seconds: float) -> str:
    """`8s`, `4m05s`, `2h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _format(metrics: dict[str, float], name: str, pattern: str) -> str:
    return pattern.format(metrics[name]) if name in metrics else ""
