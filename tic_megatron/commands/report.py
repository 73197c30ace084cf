"""`tic-megatron report RUN... OUT`: the paper's tables and figures from finished runs, beside the paper's own numbers.

A run counts for the model and the method that its `config.yaml` names; runs of the same cell that differ in their seed are
averaged. Curves come from `metrics.jsonl`, accuracies from the run's `evaluation/` (`tic-megatron evaluate`).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tic_megatron.commands.run_folder import HARMLESS, HARMLESS_SECTIONS
from tic_megatron.config import SettingsError, resolve_folder
from tic_megatron.config_evaluate import HARMLESS as HARMLESS_IN_EVALUATION
from tic_megatron.evaluation.paper import (
    COLUMNS,
    FIGURES,
    GRPO,
    PUBLISHED,
    TABLES,
    Column,
    Figure,
    Method,
    method_of,
)
from tic_megatron.evaluation.results import PROBLEMS_FILE
from tic_megatron.observability.files import atomic_writer
from tic_megatron.observability.metrics import METRICS_FILE, Row, read_metrics
from tic_megatron.observability.plots import plot_methods

WORDS = {
    "RUN...": "Run folders. Their evaluations are read from RUN/evaluation.",
    "OUT": "The folder for report.md and the figures; files of these names in it are replaced.",
}
OF_THE_METHOD = {"algorithm.objective", "algorithm.normaliser", "algorithm.eps_low", "algorithm.eps_high"}
EVALUATION_FOLDER = "evaluation"
REPORT_FILE = "report.md"


@dataclass(frozen=True)
class Accuracies:
    """Of one benchmark. `by_problem`: problem id -> share of its k responses that were right; k is 1 for greedy ones."""

    by_problem: dict[str, float]
    k: int


@dataclass(frozen=True)
class FinishedRun:
    """What the report uses of a run folder. `evaluated`: benchmark -> its accuracies, as the paper's column wants them."""

    folder: Path
    model: str
    method: Method
    rows: list[Row]
    evaluated: dict[str, Accuracies]
    settings: dict[str, Any]
    """Those that change what is trained or, under `evaluation: ...`, measured, by their dotted names."""


def run(folders: Sequence[str], out: str) -> int:
    """Write the report; returns the exit code. Raises SettingsError for bad input, before anything is written."""
    target = Path(resolve_folder("report", out))
    if (target / "config.yaml").exists():
        raise SettingsError(f"report: {target} is a run folder or an evaluation; give the folder for the report last")
    runs = [read_run(Path(resolve_folder("report", folder))) for folder in folders]
    _refuse_doubles(runs)
    _refuse_mixed_cells(runs)
    try:
        target.mkdir(parents=True, exist_ok=True)
        figures = [path for figure in FIGURES if (path := _draw(figure, runs, target))]
        text = report(runs, [path.name for path in figures])
        with atomic_writer(target / REPORT_FILE) as stream:
            stream.write(text)
    except OSError as error:
        raise SettingsError(f"report: {target} cannot be written ({error.strerror}); give another folder") from error
    print(text, end="")
    print(f"\nwritten to {target / REPORT_FILE}", file=sys.stderr)
    return 0


def read_run(folder: Path) -> FinishedRun:
    """Raises SettingsError for what is no run folder, or is a run of no method of the paper."""
    settings = _read_settings(folder)
    if settings is None:
        raise SettingsError(f"report: {folder} is not a run folder (it has no config.yaml); give one")
    objective, normaliser = settings.get("algorithm.objective"), settings.get("algorithm.normaliser")
    method = method_of(objective, normaliser)
    if method is None:
        raise SettingsError(
            f"report: {folder} was trained with algorithm.objective {objective} and algorithm.normaliser {normaliser}, which is "
            "no method of the paper (see examples/paper/methods); leave it out"
        )
    try:
        rows = [dict(row) for row in read_metrics(folder / METRICS_FILE)]
        if not all(type(row["step"]) is int for row in rows):
            raise TypeError("a step is not a number")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise SettingsError(
            f"report: {folder / METRICS_FILE} is not a file of metrics; restore it, or leave the run out"
        ) from error
    evaluated = {column.benchmark: _read_accuracies(folder / EVALUATION_FOLDER, column) for column in COLUMNS}
    return FinishedRun(
        folder,
        Path(str(settings.get("model.path"))).name,
        method,
        rows,
        {name: found for name, found in evaluated.items() if found is not None},
        _telling(settings) | _telling_of_evaluation(_read_settings(folder / EVALUATION_FOLDER) or {}),
    )


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in a folder by their dotted names; None when it has none."""
    path = folder / "config.yaml"
    if not path.exists():
        return None
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {f"{section}.{name}": value for section, members in sections.items() for name, value in members.items()}
    except (OSError, yaml.YAMLError, AttributeError, ValueError, RecursionError) as error:
        raise SettingsError(f"report: {path} does not hold the settings of a run; give another folder") from error


def _telling(settings: dict[str, Any]) -> dict[str, Any]:
    """Those in which runs of the same experiment do not differ, but for their method."""
    nothing = HARMLESS | {"run.seed", "model.path"}
    sections = HARMLESS_SECTIONS
    return {key: value for key, value in settings.items() if key not in nothing and key.partition(".")[0] not in sections}


def _telling_of_evaluation(settings: dict[str, Any]) -> dict[str, Any]:
    return {f"evaluation: {key}": value for key, value in settings.items() if key not in HARMLESS_IN_EVALUATION}


def _read_accuracies(folder: Path, column: Column) -> Accuracies | None:
    """Of an evaluation's folder; None where the benchmark was not evaluated as the column wants it (sampled or greedily)."""
    path = folder / column.benchmark / PROBLEMS_FILE
    if not path.exists():
        return None
    try:
        rows = [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        if column.samples > 1:
            found = {row["problem"]: float(row["accuracy"]) for row in rows if "accuracy" in row}
            k = len(rows[0]["scores"]) if found else 0
        else:
            found, k = {row["problem"]: float(row["greedy_right"]) for row in rows if "greedy_right" in row}, 1
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SettingsError(f"report: {path} is not of an evaluation; evaluate again, or remove that folder") from error
    if len({row["problem"] for row in rows}) < len(rows):
        raise SettingsError(f"report: {path} has two problems of the same id, which cannot be told apart; give them others")
    return Accuracies(found, k) if found else None


def _refuse_doubles(runs: Sequence[FinishedRun]) -> None:
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise SettingsError(f"report: {folder} is given twice; give every run once")


def _refuse_mixed_cells(runs: Sequence[FinishedRun]) -> None:
    """Runs of a cell are averaged: they may differ in their seed, not in what they train or are asked."""
    for run in runs:
        first = next(other for other in runs if (other.model, other.method) == (run.model, run.method))
        for key, there in first.settings.items():
            if run.settings.get(key, there) != there:
                raise SettingsError(
                    f"report: {first.folder} and {run.folder} are both {run.method.label} on {run.model}, but differ in {key} "
                    f"({there}, {run.settings[key]}), so they cannot be averaged; leave one out"
                )


def report(runs: Sequence[FinishedRun], figures: Iterable[str]) -> str:
    """The report as Markdown."""
    parts = [
        "# The paper's experiment",
        "Accuracies in percent, ± their standard error over the problems; in brackets the difference to GRPO, problem by "
        "problem, with its standard error. *Paper* is arXiv 2508.02833, which gives no standard errors.",
        *(_table(table.title, table.cells, runs) for table in TABLES),
        _other_cells(runs),
        _differences(runs),
        *(f"![{name}]({name})" for name in figures),
        _runs(runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title: str, rows: Sequence[tuple[str, Method]], runs: Sequence[FinishedRun]) -> str:
    heads = " | ".join(f"{column.label} (Avg@{column.samples}) | paper" for column in COLUMNS)
    lines = [f"## {title}", "", f"| model | method | {heads} |", "|---|---|" + "--:|--:|" * len(COLUMNS)]
    for model, method in rows:
        cell, baseline = _cell(runs, model, method), _cell(runs, model, GRPO)
        published = PUBLISHED.get((model, method), (None,) * len(COLUMNS))
        cells = []
        for column, number in zip(COLUMNS, published, strict=True):
            base = None if method is GRPO else baseline.get(column.benchmark)
            cells += [_accuracy(cell.get(column.benchmark), base, column), "-" if number is None else f"{number:g}"]
        lines.append(f"| {model} | {method.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _other_cells(runs: Sequence[FinishedRun]) -> str:
    """A table of the same form of what is in none of the paper's: other models, and methods that it has in figures only."""
    known = {cell for table in TABLES for cell in table.cells}
    others = [cell for cell in dict.fromkeys((run.model, run.method) for run in runs) if cell not in known]
    return _table("Other runs", others, runs) if others else ""


def _cell(runs: Sequence[FinishedRun], model: str, method: Method) -> dict[str, Accuracies]:
    """Benchmark -> accuracies, problem by problem the mean over the runs of a cell that were evaluated on it."""
    chosen = [run for run in runs if (run.model, run.method) == (model, method)]
    cell = {}
    for column in COLUMNS:
        found = [run.evaluated[column.benchmark] for run in chosen if column.benchmark in run.evaluated]
        if found:
            problems = sorted(set.intersection(*(set(one.by_problem) for one in found)))
            means = {problem: statistics.fmean(one.by_problem[problem] for one in found) for problem in problems}
            cell[column.benchmark] = Accuracies(means, min(one.k for one in found))
    return cell


def _accuracy(found: Accuracies | None, baseline: Accuracies | None, column: Column) -> str:
    """`12.34 ± 1.20 (+2.10 ± 0.90)`; with `[Avg@4]` where k is not the column's."""
    if found is None or not found.by_problem:
        return "not measured"
    values = found.by_problem
    text = _mean_and_error(list(values.values())) + ("" if found.k == column.samples else f" [Avg@{found.k}]")
    if baseline is None:
        return text
    if set(values) != set(baseline.by_problem):
        return f"{text} (other problems than GRPO's)"
    difference = _mean_and_error([values[p] - baseline.by_problem[p] for p in values], sign="+")
    return f"{text} ({difference}{'' if found.k == baseline.k else f' to Avg@{baseline.k}'})"


def _mean_and_error(values: Sequence[float], sign: str = "") -> str:
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:{sign}.2f}"
    return f"{mean:{sign}.2f} ± {100 * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def _differences(runs: Sequence[FinishedRun]) -> str:
    """In what the runs of a model differ besides their methods: a comparison would compare that too."""
    lines = []
    for model in dict.fromkeys(run.model for run in runs):
        of_model = [run for run in runs if run.model == model]
        for key in sorted({key for run in of_model for key in run.settings} - OF_THE_METHOD):
            having: dict[str, list[str]] = {}
            for run in of_model:
                if key in run.settings:
                    having.setdefault(str(run.settings[key]), []).append(str(run.folder))
            if len(having) > 1:
                lines.append(
                    f"- {model}, {key}: " + "; ".join(f"{value} ({', '.join(names)})" for value, names in having.items())
                )
    if not lines:
        return ""
    return "\n".join(
        ["## Differences besides the method", "", "These runs differ in more than their method and seed:", "", *lines]
    )


def _runs(runs: Sequence[FinishedRun]) -> str:
    lines = ["## Runs", "", "| run | model | method | steps | evaluated on |", "|---|---|---|--:|---|"]
    for run in runs:
        evaluated = ", ".join(f"{name} ({len(found.by_problem)})" for name, found in run.evaluated.items()) or "nothing"
        steps = run.rows[-1]["step"] if run.rows else 0
        lines.append(f"| {run.folder} | {run.model} | {run.method.label} | {steps} | {evaluated} |")
    return "\n".join(lines)


def _draw(figure: Figure, runs: Sequence[FinishedRun], folder: Path) -> Path | None:
    """The figure, for its models of which there are runs; of other models when there are none of its own; None without any."""
    present = {run.model for run in runs if run.method in figure.methods}
    models = [model for model in figure.models if model in present] or sorted(present)
    if not models:
        return None
    curves = {
        model: {
            method.label: [run.rows for run in runs if (run.model, run.method) == (model, method)] for method in figure.methods
        }
        for model in models
    }
    return plot_methods(folder / f"figure_{figure.number}.png", f"Figure {figure.number}. {figure.title}", curves)
