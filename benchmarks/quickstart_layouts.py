"""Train the quickstart's task, whole, in several parallel layouts, dense and mixture-of-experts.

    python -m benchmarks.quickstart_layouts --out benchmarks/quickstart_layouts.json

A configuration that is in the file already is run again and replaced.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.presets import EXAMPLE, Configuration, make_task, train_all

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


def task_of(name: str, folder: Path) -> Path:
    """The task for seed 0, with a dense or a mixture-of-experts model; it is made when it is not there."""
    if not name.startswith("experts"):
        return make_task(folder)
    task = folder / f"seed_0_experts_{EXPERTS}"
    if not task.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(EXAMPLE / "make_task.py"), "--out", str(task), "--seed", "0", "--experts", str(EXPERTS)]
        subprocess.run(command, check=True)
    return task


if __name__ == "__main__":
    train_all(LAYOUTS, task_of, description=__doc__, steps=100, runs="layouts")
