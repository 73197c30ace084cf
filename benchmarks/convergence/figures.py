"""The figures of the report, from the study's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.convergence.tables import Results

COLOURS = {
    "grpo": "#D55E00",
    "traj_is": "#E69F00",
    "dapo": "#CC79A7",
    "gspo": "#999999",
    "no_is": "#000000",
    "grpo2": "#56B4E9",
    "tic_grpo": "#0072B2",
}
"""Okabe-Ito: readable with colour blindness."""
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 3.0,  # long enough to tell dashes
}


def band(axes: Axes, x: list[float], intervals: list[list[float]], **style: object) -> None:
    """A line with its 95% intervals as a band."""
    mean, half = [i[0] for i in intervals], [i[1] for i in intervals]
    (line,) = axes.plot(x, mean, marker="o", markersize=3, **style)
    low, high = [m - h for m, h in zip(mean, half, strict=True)], [m + h for m, h in zip(mean, half, strict=True)]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)


def log2_axis(axes: Axes, ticks: list[float] | tuple[float, ...] | None = None) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if ticks:
        axes.set_xticks(list(ticks))


def hierarchy(results: Results, updates: int) -> plt.Figure:
    figure, ((course, raw), (matched, stationary)) = plt.subplots(2, 2, figsize=(9.5, 7.2), layout="constrained")
    for name, row in results["hierarchy"]["rows"].items():
        style = {"color": COLOURS[name], "label": name}
        curve = row["best"]["curve"]
        course.plot([i * updates / (len(curve) - 1) for i in range(len(curve))], curve, **style)
        points = row["points"]
        band(raw, [p["step_size"] / 12 for p in points], [p["speed"] for p in points], **style)
        band(matched, [p["step"] for p in points], [p["speed"] for p in points], **style)
        band(stationary, [p["step"] for p in points], [p["stationarity"] for p in points], **style)
    course.set(title="each at its best step size", xlabel="update", ylabel="share of the possible gain")
    course.legend(ncol=2)
    raw.set(title="at the same step size", xlabel="step size / T", ylabel="speed (mean gain over the run)")
    matched.set(title="at the same size of update", xlabel="step size x mean token weight", ylabel="speed")
    stationary.set(title="the quantity of the theorems", xlabel="step size x mean token weight", ylabel="mean ‖∇J‖² over the run")
    for axes in (raw, matched, stationary):
        log2_axis(axes)
    return figure


def staleness(results: Results, updates: int) -> plt.Figure:
    figure, ((speed, final), (cosine, efficiency)) = plt.subplots(2, 2, figsize=(9.5, 7.2), layout="constrained")
    ks, rows = (1, 2, 4, 8, 16), results["staleness"]["rows"]
    for name in ("grpo", "traj_is", "no_is", "grpo2", "tic_grpo"):
        style = {"color": COLOURS[name], "label": name}
        band(speed, list(ks), [rows[f"{name} K={k}"]["best"]["speed"] for k in ks], **style)
        band(final, list(ks), [rows[f"{name} K={k}"]["best"]["gain"] for k in ks], **style)
    speed.set(title="speed, at the best step size", xlabel="K (updates per refresh of pi_old)")
    final.set(title="final gain, at the best step size", xlabel="K (updates per refresh of pi_old)")
    log2_axis(speed, ks)
    log2_axis(final, ks)
    speed.legend()
    bias_and_noise(results["estimators"]["rows"], cosine, efficiency)
    return figure


def bias_and_noise(found: list[dict], cosine: Axes, efficiency: Axes) -> None:
    for name in dict.fromkeys(row["objective"] for row in found):
        mine = [row for row in found if row["objective"] == name]
        base, open_ended = name.split(",")[0], "," in name
        style = {"color": COLOURS[base], "linestyle": "--" if open_ended else "-", "label": name, "marker": "o", "markersize": 3}
        since = [row["updates_since_old"] for row in mine]
        cosine.plot(since, [min(row["cosine"], 1.0) for row in mine], **style)  # Monte Carlo leaves up to 1.02
        efficiency.plot(since, [row["efficiency"] for row in mine], **style)
    cosine.set(title="bias: cosine of E[g] with ∇J(θ)", xlabel="updates since pi_old", ylim=(0, 1.05), xticks=since)
    efficiency.set(
        title="bias and noise: efficiency of one mini-batch", xlabel="updates since pi_old", ylim=(0, None), xticks=since
    )
    cosine.legend(fontsize=7, ncol=2)


def ablations(results: Results, updates: int) -> plt.Figure:
    figure, ((variance, uncontrolled), (groups, longest)) = plt.subplots(2, 2, figsize=(9.5, 7.2), layout="constrained")
    length_spread(results["length_variance"]["rows"], variance)
    clip_sides(results["uncontrolled_ratio"]["rows"], uncontrolled)
    sizes, rows = (2, 4, 8, 16, 32), results["group_size"]["rows"]
    for baseline, colour in (("group", "#D55E00"), ("leave_one_out", "#0072B2"), ("running", "#009E73"), ("value", "#000000")):
        intervals = [rows[f"{baseline} G={g}"]["best"]["speed"] for g in sizes]
        band(groups, list(sizes), intervals, color=colour, label=baseline.replace("_", " "))
    groups.set(title="speed and group size, 32 responses per update", xlabel="G")
    log2_axis(groups, sizes)
    positions, rows = (6, 12, 24), results["response_length"]["rows"]
    for name in ("grpo", "grpo2", "tic_grpo"):
        intervals = [rows[f"{name} T={t}"]["best"]["speed"] for t in positions]
        band(longest, list(positions), intervals, color=COLOURS[name], label=name)
    longest.set(title="speed and the longest response, K = 8", xlabel="T")
    log2_axis(longest, positions)
    for axes in (variance, uncontrolled, groups, longest):
        axes.legend(fontsize=7, ncol=2, loc="upper right")
    return figure


def length_spread(rows: dict, axes: Axes) -> None:
    for name in ("grpo", "dapo", "gspo"):
        labels = [f"{name} equal", *(f"{name} long_answers +-{spread}" for spread in (6, 12, 18))]
        best = [max((p["speed"] for p in rows[label]["points"]), key=lambda interval: interval[0]) for label in labels]
        band(axes, [0, 6, 12, 18], best, color=COLOURS[name], label=name)  # in hindsight: one choice went wrong, see the page
    level = rows["tic_grpo equal"]["best"]["speed"][0]
    axes.axhline(level, color=COLOURS["tic_grpo"], label="tic_grpo: the same at every spread")
    axes.set(
        title="speed and the spread of lengths", xlabel="T_i between 30 - x and 30 + x", xticks=[0, 6, 12, 18], ylim=(0.55, 0.85)
    )


def clip_sides(rows: dict, axes: Axes) -> None:
    lines = {"two-sided": "-", "two-sided, no lower bound": "--", "up-only": "-.", "none": ":"}
    for word, colour in (("token", COLOURS["grpo2"]), ("trajectory", COLOURS["tic_grpo"])):
        for clip, line in lines.items():
            points = rows[f"{word}: {clip}"]["points"]
            style = {"color": colour, "linestyle": line, "label": f"{word}: {clip.removeprefix('two-sided, ')}"}
            band(axes, [p["step"] for p in points], [p["speed"] for p in points], **style)
    axes.set(title="speed and the sides of the clip, K = 16", xlabel="step size x mean token weight")
    axes.set_ylim(0.2, 1.0)  # room for the legend
    log2_axis(axes)


FIGURES: dict[str, tuple[tuple[str, ...], Callable[[Results, int], plt.Figure]]] = {
    "hierarchy": (("hierarchy",), hierarchy),
    "staleness": (("staleness", "estimators"), staleness),
    "ablations": (("length_variance", "uncontrolled_ratio", "group_size", "response_length"), ablations),
}
"""By name: the experiments needed, and the figure."""


def draw(results: Results, folder: Path) -> None:
    """Write `convergence_<name>.png` for every figure whose experiments are there."""
    with plt.rc_context(STYLE):
        for name, (needed, make) in FIGURES.items():
            if all(part in results for part in needed):
                figure = make(results, results["settings"]["updates"])
                figure.savefig(folder / f"convergence_{name}.png", dpi=110)
                plt.close(figure)
