"""What the objective itself costs, beside a training step.

    python -m benchmarks.objective_cost --run runs/NAME [--json FILE]

Takes the shapes of a run's last rollout, times value and gradient of every preset on them (one thread, median of 30), and
prints each as a share of the run's median step and as a ratio to `grpo`, measured alternately in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from tic_megatron.algorithms import OBJECTIVES
from tic_megatron.algorithms.normalisers import Totals
from tic_megatron.algorithms.objectives import objective_terms
from tic_megatron.algorithms.ratios import Segments
from tic_megatron.observability.metrics import read_metrics
from tic_megatron.observability.rollouts import find_rollout, read_rollout

REPEATS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    rows = read_metrics(args.run / "metrics.jsonl")
    trajectories = [t for group in read_rollout(find_rollout(args.run, int(rows[-1]["step"]))) for t in group.trajectories]
    lengths = torch.tensor([t.response_length for t in trajectories])
    seconds = time_objectives(lengths)
    step_s = statistics.median(row["timing/step_s"] for row in rows)
    result = {
        "trajectories": len(trajectories),
        "tokens": int(lengths.sum()),
        "step_s": step_s,
        "objectives": {
            name: {"ms": 1e3 * s, "share_of_step": s / step_s, "over_grpo": s / seconds["grpo"]} for name, s in seconds.items()
        },
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def time_objectives(lengths: torch.Tensor) -> dict[str, float]:
    """Median seconds of value and gradient on a whole rollout of these response lengths, as one micro-batch."""
    n = lengths.shape[0]
    ids = torch.repeat_interleave(torch.arange(n), lengths)
    segments = Segments(ids, lengths)
    totals = Totals(n, int(lengths.sum()), int(lengths.max()))
    old = -torch.rand(ids.shape[0])
    advantages = torch.randn(n, dtype=torch.float64)
    measured: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    for _ in range(REPEATS + 3):
        for name, objective in OBJECTIVES.items():
            trainer = (old + 0.01 * torch.randn_like(old)).requires_grad_()
            start = time.perf_counter()
            terms = objective_terms(objective, trainer, old, segments, advantages, totals, objective.clip_range())
            terms.value.backward()
            measured[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[3:]) for name, values in measured.items()}


if __name__ == "__main__":
    main()
