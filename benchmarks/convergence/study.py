"""Run the study and write its numbers: `python -m benchmarks.convergence.study --out benchmarks/convergence/results.json`.

Every configuration is run on the same tasks with the same random numbers, so differences are paired by seed. "At its best step
size": the one that was best on tasks of their own, which are not reported.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.convergence.ascent import MEASURE_EVERY, Run, Trace, ascend, mean_token_weight, to_parameters
from benchmarks.convergence.environment import Task, logprob_table, make_task, return_and_gradient
from benchmarks.convergence.estimators import estimator_quality
from benchmarks.convergence.experiments import MATCHED, Experiment, Variant, all_experiments
from benchmarks.convergence.length_bias import length_bias

SEEDS, TUNING_SEEDS, UPDATES = 160, 80, 192
CURVE_POINTS = 25
METRICS = ("speed", "gain", "stationarity")
DETAILS = ("length_std", "largest", "peak", "uncontrolled", "capped")
STUDENT_T = 1.97
"""Two-sided 95%, for about 159 degrees of freedom."""

Outcome = dict[str, Tensor]
"""Per-seed results of one run, [S] each. Of what exact gradient ascent gains, `gain` is the share that the run has gained at its
end, `speed` the mean of that share over the run, `curve` [S, CURVE_POINTS] its course, and `half` the updates until it is a half
(inf: never). `stationarity`: mean of ||grad J||^2 over the run, the quantity of the theorems. And `DETAILS`: see `Trace`."""


class Laboratory:
    """Tasks by length, reference returns, a cache of runs. The first `tuning_seeds` tasks choose step sizes, the others count."""

    def __init__(self, seeds: int, tuning_seeds: int, updates: int, first_seed: int = 0):
        """`first_seed`: another number gives other tasks and other random numbers."""
        self.seeds, self.tuning_seeds, self.updates, self.first_seed = seeds, tuning_seeds, updates, first_seed
        self.tasks: dict[int, tuple[Task, Tensor]] = {}
        self.outcomes: dict[tuple[Run, int], Outcome] = {}
        self.weights: dict[tuple[Run, int], float] = {}

    def task(self, positions: int) -> tuple[Task, Tensor]:
        """(task, the return [S] that exact gradient ascent reaches)."""
        if positions not in self.tasks:
            generator = torch.Generator().manual_seed(self.first_seed + positions)
            task = make_task(self.tuning_seeds + self.seeds, positions=positions, generator=generator)
            self.tasks[positions] = task, exact_ascent(task)
        return self.tasks[positions]

    def weight(self, variant: Variant) -> float:
        """The mean token weight: the same for all K, clip ranges and group sizes of an objective."""
        calibration = Run(variant.run.objective, 0.0, lengths=variant.run.lengths, groups=64)
        key = (calibration, variant.positions)
        if key not in self.weights:
            task = self.task(variant.positions)[0]
            self.weights[key] = mean_token_weight(calibration, task, torch.Generator().manual_seed(0))
        return self.weights[key]

    def outcome(self, variant: Variant, step_size: float) -> Outcome:
        """On the tasks that count."""
        return {name: values[self.tuning_seeds :] for name, values in self._run(variant, step_size).items()}

    def best(self, variant: Variant, sizes: list[float]) -> float:
        """The step size with the greatest mean speed on the tuning tasks."""
        return max(sizes, key=lambda size: self._run(variant, size)["speed"][: self.tuning_seeds].mean().item())

    def _run(self, variant: Variant, step_size: float) -> Outcome:
        run = replace(variant.run, step_size=step_size, updates=self.updates)
        if (run, variant.positions) not in self.outcomes:
            task, reachable = self.task(variant.positions)
            trace = ascend(run, task, torch.Generator().manual_seed(self.first_seed + 1))
            self.outcomes[run, variant.positions] = summarise(trace, reachable)
        return self.outcomes[run, variant.positions]


def exact_ascent(task: Task, updates: int = 600, step: float = 20.0) -> Tensor:
    """The return [S] that gradient ascent with the exact gradient reaches."""
    theta = task.start()
    for _ in range(updates):
        table = logprob_table(task, theta)
        theta = theta + step * to_parameters(task, table, return_and_gradient(task, table)[1])
    return return_and_gradient(task, logprob_table(task, theta))[0]


def summarise(trace: Trace, reachable: Tensor) -> Outcome:
    start = trace.returns[:, :1]
    gained = (trace.returns - start) / (reachable[:, None] - start)
    reached = gained >= 0.5
    shown = torch.linspace(0, gained.shape[1] - 1, CURVE_POINTS).round().long()
    return {
        "speed": gained.mean(dim=1),
        "gain": gained[:, -1],
        "half": torch.where(reached.any(dim=1), MEASURE_EVERY * reached.double().argmax(dim=1), float("inf")),
        "stationarity": trace.gradient_squared.mean(dim=1),
        "length_std": trace.length_std,
        "curve": gained[:, shown],
        **trace.ratios,
    }


def short(value: float) -> float:
    return float(f"{value:.4g}")


def interval(values: Tensor) -> list[float]:
    """[mean, half width of its 95% interval] over the seeds."""
    return [short(values.mean().item()), short(STUDENT_T * values.std().item() / math.sqrt(len(values)))]


def intervals(outcome: Outcome, other: Outcome | None = None) -> dict[str, list[float]]:
    """Of the headline metrics, or of their paired differences from another run's."""
    return {m: interval(outcome[m] - other[m] if other else outcome[m]) for m in METRICS}


def point(step: float, step_size: float, outcome: Outcome) -> dict[str, object]:
    """The headline of a run at one step size, and how large its ratios grew."""
    return {
        "step": short(step),
        "step_size": short(step_size),
        **intervals(outcome),
        "peak": short(outcome["peak"].mean().item()),
    }


def row(outcome: Outcome) -> dict[str, object]:
    """Everything about the run at its best step size."""
    half = outcome["half"].median().item()
    return {
        **intervals(outcome),
        "updates_to_half": None if math.isinf(half) else half,
        **{name: short(outcome[name].mean().item()) for name in DETAILS},
        "curve": [round(x, 4) for x in outcome["curve"].mean(dim=0).tolist()],
    }


def measure(laboratory: Laboratory, experiment: Experiment) -> dict[str, object]:
    """All step sizes of all variants, and the paired differences at the best, the matched and the equal raw step sizes."""
    rows: dict[str, object] = {}
    outcomes: dict[str, dict[str, Outcome]] = {}
    for variant in experiment.variants:
        weight = laboratory.weight(variant)
        sizes = [step / weight for step in experiment.steps]
        size = laboratory.best(variant, sizes)
        best, best_step = laboratory.outcome(variant, size), size * weight
        raw = [step * variant.positions for step in experiment.raw_steps]
        rows[variant.label] = {
            "best_step": short(best_step),
            "best": row(best),
            "points": [point(size * weight, size, laboratory.outcome(variant, size)) for size in sorted(sizes + raw)],
        }
        outcomes[variant.label] = {"best": best, "matched": laboratory.outcome(variant, MATCHED / weight)}
        for size in raw:
            outcomes[variant.label][f"step size {size / variant.positions:g} T"] = laboratory.outcome(variant, size)
        print(experiment.name, variant.label, rows[variant.label]["best_step"], interval(best["speed"]), flush=True)
    found = [
        {"a": a, "b": b, "at": mode, **intervals(outcomes[a][mode], outcomes[b][mode])}
        for a, b in experiment.pairs
        for mode in outcomes[a]
    ]
    return {"rows": rows, "differences": found}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; experiments already in it are replaced")
    parser.add_argument("--quick", action="store_true", help="few seeds, updates and step sizes: to see that it runs")
    parser.add_argument("--only", nargs="*", help="names of experiments, all by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = (8, 4, 9) if options.quick else (SEEDS, TUNING_SEEDS, UPDATES)
    laboratory = Laboratory(*size)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    experiments = all_experiments()
    for name in options.only or ["estimators", "length_bias", *experiments]:
        begun = time.process_time()
        if name == "estimators":
            results[name] = estimator_quality(laboratory.task(12)[0], mini_batches=8 if options.quick else 128)
        elif name == "length_bias":
            results[name] = length_bias(*laboratory.task(12), updates=20 if options.quick else 800)
        else:
            experiment = experiments[name]
            where = Laboratory(*size, experiment.first_seed) if experiment.first_seed else laboratory
            results[name] = measure(where, replace(experiment, steps=experiment.steps[:2]) if options.quick else experiment)
        results[name]["cpu_seconds"] = round(time.process_time() - begun, 1)
        results["settings"] = {
            "seeds": laboratory.seeds,
            "tuning_seeds": laboratory.tuning_seeds,
            "updates": laboratory.updates,
        }
        options.out.write_text(json.dumps(results, separators=(",", ":"), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
