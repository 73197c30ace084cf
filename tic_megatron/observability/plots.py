"""`curves.png`: the metrics of a run on one page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tic_megatron.observability.metrics import METRICS_FILE, Row, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_FILE = "curves.png"
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#2b6cb0", "#dd6b20", "#2f855a", "#c53030", "#6b46c1"
_PHASES = {
    "generate": _BLUE,
    "reward": _GREEN,
    "old_logprob": _ORANGE,
    "update": _RED,
    "weight_sync": _PURPLE,
    "eval": "#718096",
    "save": "#a0aec0",
}


def plot_curves(run_dir: Path | str, before: dict[str, float] | None = None) -> Path | None:
    """Draw the run's `metrics.jsonl` to `curves.png` and return its path; None when there are no metrics yet.

    `before`: metrics that were measured before step 1, and so are in no row: first points of their curves. Missing metrics leave
    their panel empty, with a remark.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / METRICS_FILE)
    if not rows:
        return None
    if before:
        rows = [{"step": 0, **before}, *rows]
    # The object-oriented interface: pyplot would load a GUI backend and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run_dir.resolve().name, fontsize=14, fontweight="bold")
    panels = (_reward, _accuracy, _log_ratio, _effective_sample_size, _gradient_norm, _timings)
    for panel, axes in zip(panels, figure.subplots(2, 3).flat, strict=True):
        panel(axes, rows)
        _finish(axes, rows)
    return _save(figure, run_dir / CURVES_FILE)


def plot_methods(path: Path, title: str, curves: Mapping[str, Mapping[str, Sequence[Sequence[Row]]]]) -> Path:
    """Draw methods against each other: per model a row of panels, accuracy on AIME24 (any evaluation where that was not measured)
    beside the mean reward of the rollouts.

    Args:
        path: of the PNG file.
        curves: model -> method -> the metrics of its runs (several seeds: the mean, with their range as a band).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.5 + 4 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    for (model, methods), (left, right) in zip(curves.items(), figure.subplots(len(curves), 2, squeeze=False), strict=True):
        names = {name for runs in methods.values() for rows in runs for name in _accuracy_names(rows)}
        accuracy = "eval/aime24/accuracy" if "eval/aime24/accuracy" in names else min(names, default="")
        left.set_title(f"{model}: accuracy" + (f" ({accuracy.split('/')[1]})" if accuracy else ""))
        right.set_title(f"{model}: mean reward of the rollout")
        for (method, runs), color in zip(methods.items(), (_BLUE, _ORANGE, _GREEN, _RED, _PURPLE), strict=False):
            _band(left, runs, accuracy, color=color, label=method)
            _band(right, runs, "reward/mean", color=color, label=method)
        rows = [row for runs in methods.values() for run in runs for row in run] or [{"step": 0}]
        for axes in (left, right):
            _finish(axes, sorted(rows, key=lambda row: row["step"]))
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
    return path


def _band(axes: Axes, runs: Sequence[Sequence[Row]], name: str, *, color: str, label: str) -> None:
    """The mean over the runs that have a step, and their range."""
    values: dict[float, list[float]] = {}
    for rows in runs:
        for step, value in zip(*_series(rows, name), strict=True):
            values.setdefault(step, []).append(value)
    if not values:
        return
    steps = sorted(values)
    mean = [sum(values[step]) / len(values[step]) for step in steps]
    smooth = max(1, len(mean) // 20)
    if len(runs) > 1:
        low, high = [min(values[step]) for step in steps], [max(values[step]) for step in steps]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    marker = "o" if len(steps) < 40 else None
    axes.plot(steps, _running_mean(mean, smooth), color=color, label=label, marker=marker, markersize=3)


def _series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) where the metric was measured and finite."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _line(axes: Axes, rows: Sequence[Row], name: str, *, color: str, label: str | None = None, smooth: bool = True) -> None:
    """The metric, faint, with its running mean over it when there are many steps."""
    steps, values = _series(rows, name)
    if not values:
        return
    window = max(1, len(values) // 20) if smooth else 1
    if window == 1:
        axes.plot(steps, values, color=color, label=label, marker="o" if len(values) < 40 else None, markersize=3)
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(steps, _running_mean(values, window), color=color, label=label)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and its neighbours, up to `window // 2` on each side."""
    reach = window // 2
    means = []
    for centre in range(len(values)):
        near = values[max(0, centre - reach) : centre + reach + 1]
        means.append(sum(near) / len(near))
    return means


def _reward(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Mean reward of the rollout")
    _line(axes, rows, "reward/mean", color=_BLUE, label="reward")
    _line(axes, rows, "reward/zero_advantage_fraction", color="#a0aec0", label="groups without signal")
    if axes.dataLim.y0 >= 0:  # rewards may be negative
        axes.set_ylim(bottom=0)


def _accuracy(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Held-out accuracy")
    for name, color in zip(_accuracy_names(rows), (_GREEN, _BLUE, _ORANGE, _RED, _PURPLE), strict=False):
        _line(axes, rows, name, color=color, label=name.split("/")[1], smooth=False)
        steps, values = _series(rows, name)
        if values:
            axes.annotate(f"{values[0]:.3f}", (steps[0], values[0]), xytext=(2, -14), textcoords="offset points")
        if len(values) > 1:
            axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(4, 6), textcoords="offset points", ha="right")
    axes.set_ylim(0, 1)


def _accuracy_names(rows: Sequence[Row]) -> list[str]:
    return sorted({name for row in rows for name in row if name.startswith("eval/") and name.endswith("/accuracy")})


def _log_ratio(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Trajectory log-ratio L and clipping")
    _line(axes, rows, "policy/log_ratio_std", color=_ORANGE, label="std of L")
    _line(axes, rows, "policy/ratio_capped_fraction", color=_RED, label="share capped")
    axes.set_ylim(bottom=0)


def _effective_sample_size(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Effective sample size of W / N")
    _line(axes, rows, "policy/ess", color=_PURPLE)
    axes.set_ylim(0, 1.05)


def _gradient_norm(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Gradient norm")
    _line(axes, rows, "policy/grad_norm", color=_BLUE)
    axes.set_ylim(bottom=0, top=1.05 * max(_series(rows, "policy/grad_norm")[1], default=1.0) or None)


def _timings(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Where a step's time goes (s)")
    timed = [row for row in rows if any(row.get(f"timing/{phase}_s") for phase in _PHASES)]
    if not timed:
        return
    stacks = {phase: [row.get(f"timing/{phase}_s") or 0.0 for row in timed] for phase in _PHASES}
    stacks = {phase: seconds for phase, seconds in stacks.items() if any(seconds)}
    # A step's column reaches from half a step before it to half a step after it.
    edges = [row["step"] - 0.5 for row in timed] + [timed[-1]["step"] + 0.5]
    columns = [[*seconds, seconds[-1]] for seconds in stacks.values()]
    colors = [_PHASES[phase] for phase in stacks]
    axes.stackplot(edges, *columns, labels=list(stacks), colors=colors, alpha=0.85, step="post")
    # The first steps warm caches up; their times would flatten all others. The space above is for the legend.
    totals = sorted(map(sum, zip(*stacks.values(), strict=True)))
    axes.set_ylim(0, 1.35 * (totals[int(0.97 * (len(totals) - 1))] or 1.0))


def _finish(axes: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    margin = 0.5 + 0.02 * (rows[-1]["step"] - rows[0]["step"])
    axes.set_xlim(rows[0]["step"] - margin, rows[-1]["step"] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    labels = axes.get_legend_handles_labels()[1]
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#718096")
    elif len(labels) > 3:
        axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=3, columnspacing=1.2)
    elif len(labels) > 1:
        axes.legend(frameon=False, fontsize=9)
