"""`tic-megatron evaluate`: check, generate what is missing, grade, and say what came out."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tic_megatron.commands.driver import LOCK_FILE, drive, lock, say
from tic_megatron.commands.evaluate_preflight import (
    IDENTITY_FILE,
    EvaluateInputs,
    evaluate_preflight,
    modes,
    read_identity,
    response_file,
)
from tic_megatron.config import SettingsError
from tic_megatron.config_evaluate import EvaluateSettings, check_evaluate_settings
from tic_megatron.evaluation import EvalSet, grader_settings
from tic_megatron.evaluation.results import PROBLEMS_FILE, benchmark_numbers, table, write_problems
from tic_megatron.evaluation.saved import Mode, Row, complete, read_rows
from tic_megatron.observability.files import atomic_writer
from tic_megatron.observability.summary import SUMMARY_FILE
from tic_megatron.rewards import RewardWorkers
from tic_megatron.rewards.code import level_lines
from tic_megatron.supervisor import supervise

WIDTH = 110
"""Columns of the printed table."""


def run(settings: EvaluateSettings) -> int:
    """Evaluate; returns the exit code. Raises SettingsError before anything has started when the input is bad."""
    check_evaluate_settings(settings)
    settings = settings.resolve()
    inputs = evaluate_preflight(settings)
    with _folder(settings, inputs) as folder:
        for chosen in inputs.sets:
            say(_plan(chosen, modes(settings, chosen.benchmark)))
        for line in level_lines(settings.reward, (chosen.benchmark.reward for chosen in inputs.sets)):
            say(line)
        return supervise(
            lambda attempt: _drive(settings, inputs),
            max_restarts=settings.run.max_restarts,
            reached=_saved(settings, inputs),
            last_step=lambda: _saved(settings, inputs),
            leave=lambda number: _leave(folder, number),
            note=say,
        )


def _plan(chosen: EvalSet, chosen_modes: list[Mode]) -> str:
    benchmark = chosen.benchmark
    how = " and ".join(f"{mode.samples} sampled" if mode.seed is not None else "1 greedy" for mode in chosen_modes)
    return (
        f"{benchmark.name}: {len(chosen.prompts)} problems of {benchmark.source}, {how} "
        f"response{'s' if chosen_modes[0].samples > 1 or len(chosen_modes) > 1 else ''} each, graded by {benchmark.reward}"
    )


def _saved(settings: EvaluateSettings, inputs: EvaluateInputs) -> int:
    """Responses that are there, which tells a restart whether the one before got any further."""
    return sum(
        len(read_rows(response_file(settings, chosen.benchmark, mode), mode, len(chosen.prompts)))
        for chosen in inputs.sets
        for mode in modes(settings, chosen.benchmark)
    )


def _leave(folder: Path, number: signal.Signals) -> int:
    say(f"left at {number.name}; the same command goes on with what is missing in {folder}")
    return 128 + number


def _drive(settings: EvaluateSettings, inputs: EvaluateInputs) -> int:
    """The driver's process; its exit code."""
    folder = Path(settings.run.dir)

    def work() -> int:
        results = _evaluate(settings, inputs)
        _write_summary(settings, inputs, results)
        _print_table(results, folder)
        return 0

    return drive(
        work, folder, what="evaluation", interrupted=lambda: f"the same command goes on with what is missing in {folder}"
    )


def _evaluate(settings: EvaluateSettings, inputs: EvaluateInputs) -> dict[str, dict[str, Any]]:
    """Complete all benchmarks' files; the numbers by their names. Nothing is started when nothing is missing."""
    results = {}
    with ExitStack() as stack:
        engines = _Engines(settings, inputs, stack)
        for chosen in inputs.sets:
            rows = {mode.name: _complete(settings, chosen, mode, engines, stack) for mode in modes(settings, chosen.benchmark)}
            k = next((mode.samples for mode in modes(settings, chosen.benchmark) if mode.seed is not None), 0)
            sampled, greedy = rows.get("sampled", []), rows.get("greedy", [])
            folder = Path(settings.run.dir) / chosen.benchmark.name
            write_problems(folder / PROBLEMS_FILE, chosen.prompts, k, sampled, greedy)
            results[chosen.benchmark.name] = benchmark_numbers(len(chosen.prompts), k, sampled, greedy)
    return results


class _Engines:
    """The engines, started when they are first asked."""

    def __init__(self, settings: EvaluateSettings, inputs: EvaluateInputs, stack: ExitStack) -> None:
        self._settings, self._inputs, self._stack = settings, inputs, stack
        self._group: Any = None

    def generate(self, *arguments: Any, **options: Any) -> Any:
        if self._group is None:
            self._group = self._start()
        return self._group.generate(*arguments, **options)

    def _start(self) -> Any:
        from tic_megatron.cluster import start_cluster
        from tic_megatron.rollout.engines import EngineGroup

        cluster = self._stack.enter_context(start_cluster(self._inputs.engines, actors=False))
        group = EngineGroup.start(
            self._inputs.engines,
            model_path=str(self._inputs.model_dir),
            device=cluster.device,
            log_dir=Path(self._settings.run.dir) / "logs",
            places=cluster.engine_places(),
            note=say,
        )
        self._stack.callback(group.stop)
        group.ready()
        return group


def _complete(settings: EvaluateSettings, chosen: EvalSet, mode: Mode, engines: _Engines, stack: ExitStack) -> list[Row]:
    path, n = response_file(settings, chosen.benchmark, mode), len(chosen.prompts)
    if len(read_rows(path, mode, n)) == n * mode.samples:
        say(f"{chosen.benchmark.name}, {mode.name}: all responses are there")
        return read_rows(path, mode, n)

    def tell(rows: list[Row], faults: list[str]) -> None:
        right = sum(row["right"] for row in rows) / len(rows)
        done = f"{len(rows) // mode.samples} of {n} problems"
        say(f"{chosen.benchmark.name}, {mode.name}: {done}, {100 * right:.2f}% right so far")
        for fault in faults:
            say(f"warning: {chosen.benchmark.name}, {fault}")

    log = Path(settings.run.dir) / "logs" / "rewards.log"
    with RewardWorkers(grader_settings(chosen.benchmark, settings.reward), log) as rewards:
        batch = max(1, settings.eval.save_every // mode.samples)
        return complete(path, mode, chosen.prompts, engines, rewards, batch=batch, tell=tell)


@contextmanager
def _folder(settings: EvaluateSettings, inputs: EvaluateInputs) -> Iterator[Path]:
    """The folder with the evaluation's settings and identity in it, which is no other process's meanwhile."""
    folder = Path(settings.run.dir)
    with ExitStack() as stack:
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            lock(stack.enter_context((folder / LOCK_FILE).open("w")), folder)
            known = read_identity(folder) or inputs.identity
            identity = inputs.identity | {"benchmarks": known["benchmarks"] | inputs.identity["benchmarks"]}
            with atomic_writer(folder / "config.yaml") as file:
                file.write(settings.to_yaml())
            _write_json(folder / IDENTITY_FILE, identity)
        except OSError as error:
            raise SettingsError(f"run.dir: {folder} cannot be written ({error.strerror}); give another --out") from error
        yield folder


def _write_summary(settings: EvaluateSettings, inputs: EvaluateInputs, results: dict[str, dict[str, Any]]) -> None:
    """`summary.json`; benchmarks that were evaluated here before, by commands that did not name them all, stay in it."""
    path = Path(settings.run.dir) / SUMMARY_FILE
    with suppress(OSError, ValueError, KeyError, TypeError):
        results = {**json.loads(path.read_text(encoding="utf-8"))["benchmarks"], **results}
    options = {key: value for key, value in settings.flatten().items() if not key.startswith(("run.", "cluster."))}
    summary = {
        "model": settings.model.path,
        "fingerprint": inputs.identity["model"],
        "benchmarks": {
            name: {**numbers, **(read_identity(path.parent) or inputs.identity)["benchmarks"].get(name, {})}
            for name, numbers in results.items()
        },
        "settings": options,
    }
    _write_json(path, summary)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_writer(path) as stream:
        json.dump(content, stream, indent=2, allow_nan=False)
        stream.write("\n")


def _print_table(results: dict[str, dict[str, Any]], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    head, *rows = table(results)
    printed = Table(title="Accuracy in percent ± standard error over the problems", title_justify="left")
    for index, name in enumerate(head):
        printed.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        printed.add_row(*row)
    console = Console()
    console.width = max(console.width, WIDTH)  # numbers that are cut are of no use
    console.print(printed)
    console.print(f"outputs: {folder}", soft_wrap=True, highlight=False)
