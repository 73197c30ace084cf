"""Train the quickstart's task with every preset, and with some options, through the full stack.

    python -m benchmarks.presets --steps 60 --out benchmarks/presets.json

Makes the task and its warm-started model once, then runs `tic-megatron train` on it, one configuration after the other: one
seed, and one training rank, so that it is cheap. A configuration that is in the file already is run again and replaced.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from tic_megatron.observability.metrics import Row, read_metrics

ROOT = Path(__file__).resolve().parents[1]
NOISE = "policy/log_ratio_abs_max_first"
EXAMPLE = ROOT / "examples" / "quickstart"
LAST = 10
"""Metrics are means over so many last steps."""
COMMON = ("--algorithm.eps_high=null", "--cluster.gpus_per_node=1", "--actor.tensor_parallel_size=1")
"""Every preset's own clip range (the quickstart's is `tic_grpo`'s), and one training rank."""


@dataclass(frozen=True)
class Configuration:
    """What a run changes in the quickstart's settings besides `algorithm.objective`, and why."""

    objective: str
    changes: dict[str, str] = field(default_factory=dict)
    why: str = ""


CONFIGURATIONS = {
    "grpo": Configuration("grpo"),
    "dapo": Configuration("dapo"),
    "grpo2": Configuration("grpo2"),
    "traj_is": Configuration("traj_is"),
    "tic_grpo": Configuration("tic_grpo"),
    "gspo": Configuration(
        "gspo",
        {"algorithm.eps_low": "0.07", "algorithm.eps_high": "0.09"},
        "its own range is for responses of thousands of tokens; these have about 3, and exp(3 x 0.09) is about 1.28",
    ),
    "no_is": Configuration("no_is"),
    "gspo, its own clip range": Configuration("gspo", why="to see what 3e-4 / 4e-4 does here"),
    "tic_grpo, KL k3": Configuration("tic_grpo", {"algorithm.kl_coefficient": "0.01", "algorithm.kl_estimator": "k3"}),
    "tic_grpo, truncated correction": Configuration(
        "tic_grpo", {"algorithm.correction": "truncate", "algorithm.correction_level": "trajectory"}
    ),
    "tic_grpo, std": Configuration("tic_grpo", {"algorithm.normalize_std": "true"}),
}
"""All else is the quickstart's, the learning rate included: AdamW takes out the scale in which 1/T_i and 1/T differ."""


def make_task(folder: Path) -> Path:
    """The quickstart's task for seed 0; it is made when it is not there."""
    task = folder / "seed_0"
    if not task.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(EXAMPLE / "make_task.py"), "--out", str(task), "--seed", "0"], check=True)
    return task


def flags(configuration: Configuration, task: Path, run_dir: Path, steps: int) -> list[str]:
    """Arguments of `tic-megatron train`."""
    return [
        f"--config={EXAMPLE / 'quickstart.yaml'}",
        f"--model.path={task / 'model'}",
        f"--data.train={task / 'train.jsonl'}",
        f"--data.eval={task / 'eval.jsonl'}",
        f"--run.dir={run_dir}",
        f"--trainer.steps={steps}",
        f"--trainer.save_every={steps}",
        "--rollout.save_every=0",
        *COMMON,
        f"--algorithm.objective={configuration.objective}",
        *(f"--{name}={value}" for name, value in configuration.changes.items()),
    ]


def last_mean(rows: list[Row], name: str) -> float | None:
    """Mean over the last steps that measured it."""
    values = [row[name] for row in rows[-LAST:] if row.get(name) is not None]
    return float(f"{mean(values):.3g}") if values else None


def run(configuration: Configuration, task: Path, run_dir: Path, steps: int) -> dict[str, object]:
    """Train, and what came out. SystemExit with the end of the run's output when it fails."""
    shutil.rmtree(run_dir, ignore_errors=True)
    begun = time.monotonic()
    command = [sys.executable, "-m", "tic_megatron", "train", *flags(configuration, task, run_dir, steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    summary = json.loads((run_dir / "summary.json").read_text())
    rows = read_metrics(run_dir / "metrics.jsonl")
    return {
        "objective": configuration.objective,
        "changes": configuration.changes,
        "why": configuration.why,
        "steps": len(rows),
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "reward_first": rows[0]["reward/mean"],
        "reward_last": last_mean(rows, "reward/mean"),
        "log_ratio_std": last_mean(rows, "policy/log_ratio_std"),
        "capped": last_mean(rows, "policy/ratio_capped_fraction"),
        "grad_norm": last_mean(rows, "policy/grad_norm"),
        "entropy": last_mean(rows, "policy/entropy"),
        "kl": last_mean(rows, "policy/kl"),
        "noise_of_L_max": max(row[NOISE] for row in rows if NOISE in row),
        "step_s": last_mean(rows, "timing/step_s"),
        "seconds": round(time.monotonic() - begun),
    }


def table(results: dict[str, dict]) -> str:
    """The results in Markdown."""
    header = ("", "steps", "accuracy before", "after", "std of L", "capped", "grad norm", "seconds per step")
    lines = [header, ("---",) * len(header)]
    for label, row in results.items():
        name = f"`{label}`" if label == row["objective"] else label
        if "algorithm.eps_low" in row["changes"]:
            name += f" (clip {row['changes']['algorithm.eps_low']} / {row['changes']['algorithm.eps_high']})"
        capped = "" if row["capped"] is None else f"{row['capped']:.1%}"
        numbers = [f"{row[key]:.3f}" for key in ("accuracy_before", "accuracy_after", "log_ratio_std")]
        cells = (f"{row['steps']}", *numbers, capped, f"{row['grad_norm']:.2g}", f"{row['step_s']:.1f}")
        lines.append((name, *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def train_all(
    configurations: dict[str, Configuration],
    task_of: Callable[[str, Path], Path],
    *,
    description: str | None,
    steps: int,
    runs: str,
) -> None:
    """The command: train the configurations, one after the other, and keep what came out.

    Args:
        configurations: by name; the file and the table have their order.
        task_of: (name of a configuration, folder of the tasks) -> its task, made when it is not there.
        description: for `--help`.
        steps: default of `--steps`.
        runs: folder in `runs/` for the run folders.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--steps", type=int, default=steps, help="training steps of each run (the quickstart has 100)")
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=list(configurations), help="configurations; all by default")
    parser.add_argument("--task", type=Path, default=EXAMPLE / "task", help="folder of the tasks; made when they are not there")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / runs, help="folder for the runs")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for number, (name, configuration) in enumerate(configurations.items()):
        if args.only and name not in args.only:
            continue
        results[name] = run(configuration, task_of(name, args.task.resolve()), args.runs.resolve() / str(number), args.steps)
        results = {known: results[known] for known in configurations if known in results}
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({name: results[name]}), flush=True)
    print(table(results))


def main() -> None:
    train_all(CONFIGURATIONS, lambda name, folder: make_task(folder), description=__doc__, steps=60, runs="presets")


if __name__ == "__main__":
    main()
