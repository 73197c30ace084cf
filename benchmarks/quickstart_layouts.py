"""Train the quickstart's task, whole, in several parallel layouts, dense and mixture-of-experts.

    python -m benchmarks.quickstart_layouts --out benchmarks/quickstart_layouts.json

A configuration that is in the file already is run again and replaced.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.presets import EXAMPLE, ROOT, Configuration, make_task, run, table

EXPERTS = 4


def layout(ranks: int, **sizes: int) -> Configuration:
    """The quickstart's settings with these parallel sizes."""
    changes = {"algorithm.eps_high": "0.28", "actor.tensor_parallel_size": "1", "cluster.gpus_per_node": str(ranks)}
    return Configuration("tic_grpo", changes | {f"actor.{name}_parallel_size": str(size) for name, size in sizes.items()})


LAYOUTS = {
    "dense, one rank": layout(1),
    "dense, CP 2": layout(2, context=2),
    "dense, TP 2 x PP 2": layout(4, tensor=2, pipeline=2),
    "experts, one rank": layout(1),
    "experts, EP 2": layout(2, expert=2),
}


def make_experts_task(folder: Path) -> Path:
    """The task with a mixture-of-experts model, for seed 0; it is made when it is not there."""
    task = folder / f"seed_0_experts_{EXPERTS}"
    if not task.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(EXAMPLE / "make_task.py"), "--out", str(task), "--seed", "0", "--experts", str(EXPERTS)]
        subprocess.run(command, check=True)
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each run (the quickstart has 100)")
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=list(LAYOUTS), help="layouts; all by default")
    parser.add_argument("--task", type=Path, default=EXAMPLE / "task", help="folder of the tasks; made when they are not there")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "layouts", help="folder for the runs")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for number, (name, configuration) in enumerate(LAYOUTS.items()):
        if args.only and name not in args.only:
            continue
        task = (make_experts_task if name.startswith("experts") else make_task)(args.task.resolve())
        results[name] = run(configuration, task, args.runs.resolve() / str(number), args.steps)
        results = {known: results[known] for known in LAYOUTS if known in results}
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        before, after = results[name]["accuracy_before"], results[name]["accuracy_after"]
        print(f"{name}: accuracy {before:.3f} -> {after:.3f}, {results[name]['seconds']} s", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
