"""How long a checkpoint holds training up, written while training goes on and written at once.

    python -m benchmarks.checkpoint --out benchmarks/checkpoint.json

One rank on the CPU, without Ray, with the actors' own code: Megatron's DDP and distributed optimizer, a dense Qwen3 of about
200 million parameters in fp32, so 16 bytes are saved per parameter. A step is what the actors do in one: old log-probs and K
updates (`--updates`) on a rollout of `--tokens` tokens; no generation, which would make it longer, and the shares smaller.

In turns, `--rounds` times after a first save of each kind that is not counted:

- `async`: the seconds for which the driver waits in `Checkpoints.save`, in front of a step during which the files are written;
- `sync`: the same until the checkpoint is published.

`step`: the seconds of a step after a `sync` save, with nothing beside it; `step_beside`: of one beside which a checkpoint is
written. The share that a save costs is (async + step_beside - step) / step, the stall alone async / step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.weight_sync import make_model


def actor(model: Path) -> Any:
    """The one rank's backend."""
    from torch.distributed import HashStore

    from tic_megatron.actors.megatron import runtime
    from tic_megatron.config import Settings

    settings = Settings()
    settings.model.path, settings.cluster.device = str(model), "cpu"
    settings.rollout.max_prompt_tokens = settings.rollout.max_response_tokens = 128
    settings.actor.max_tokens_per_microbatch = 1024
    settings.algorithm.objective = "tic_grpo"
    device = runtime.initialize(0, 1, HashStore(), settings.actor, seed=0, timeout_s=600)
    from tic_megatron.actors.megatron.backend import MegatronBackend

    return MegatronBackend(settings, str(model), device)


def make_step(backend: Any, n_tokens: int, n_updates: int) -> tuple[Callable[[], None], int]:
    """A function that does what the actors do in a step, and the number of its tokens."""
    from tests.rollouts import random_rollout
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    n_prompts = max(n_updates, round(n_tokens / (4 * 96)))
    groups = random_rollout(seed=0, n_prompts=n_prompts, group_size=4, vocab=1000, max_prompt=64, max_response=128)
    for group in groups:  # none of equal rewards, which would be left out
        for i, trajectory in enumerate(group.trajectories):
            trajectory.reward, trajectory.advantage = float(i % 2), i % 2 - 0.5
    step = PolicyStep(backend, backend.settings)
    shards = pack_rollout(groups, n_updates, Packing.of(backend.settings))

    def run() -> None:
        step.load(shards[0])
        step.old_logprobs(check_noise=False)
        for k in range(n_updates):
            step.update(k)

    return run, sum(len(t.tokens) for group in groups for t in group.trajectories)


def begin_actors(backend: Any) -> Callable[[Path], Callable[[], bool]]:
    """What `ActorGroup.begin_checkpoint` does, for one rank in this process."""
    from tic_megatron.actors.megatron.checkpoint import Saving

    def begin(directory: Path) -> Callable[[], bool]:
        saving = Saving(backend, directory)

        def written() -> bool:
            answer = saving.written()
            if answer is None:
                return False
            problem = answer.get("problem") or saving.complete([answer]).get("problem")
            if problem:
                sys.exit(problem)
            return True

        return written

    return begin


def seconds(function: Callable[[], Any]) -> float:
    """Those that a call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def measure(folder: Path, n_tokens: int, n_updates: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    from tic_megatron.checkpoints import Checkpoints, RunState

    n_parameters = make_model(folder / "model")
    backend = actor(folder / "model")
    step, n_tokens = make_step(backend, n_tokens, n_updates)
    checkpoints, begin = Checkpoints(folder, keep=2), begin_actors(backend)
    times: dict[str, list[float]] = {"async": [], "sync": [], "step": [], "step_beside": []}
    number = 0

    def save(*, wait: bool) -> None:
        nonlocal number
        number += 1
        checkpoints.save(RunState(step=number), begin, lambda checkpoint: None)
        if wait and checkpoints.finish():
            sys.exit(checkpoints.finish())

    step()
    for _ in range(rounds + 1):
        times["async"].append(seconds(lambda: save(wait=False)))
        times["step_beside"].append(seconds(step))
        if checkpoints.finish():
            sys.exit(checkpoints.finish())
        times["sync"].append(seconds(lambda: save(wait=True)))
        times["step"].append(seconds(step))
    newest = folder / "checkpoints" / f"step_{number}"
    counted = {name: [round(value, 3) for value in values[1:]] for name, values in times.items()}
    typical = statistics.median(counted["step"])
    return {
        "parameters": n_parameters,
        "checkpoint_mib": round(sum(f.stat().st_size for f in newest.rglob("*") if f.is_file()) / 2**20),
        "step": {"tokens": n_tokens, "updates": n_updates},
        "seconds": {
            name: {
                "median": round(statistics.median(values), 3),
                "max": round(max(values), 3),
                "all": [round(v, 3) for v in values],
            }
            for name, values in counted.items()
        },
        "stall_share_of_step": {
            name: {"median": round(statistics.median(counted[name]) / typical, 4), "max": round(max(counted[name]) / typical, 4)}
            for name in ("async", "sync")
        },
        "slower_step_share": round(statistics.median(counted["step_beside"]) / typical - 1, 4),
    }


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.tokens, options.updates, options.rounds)
    text = json.dumps(found | {"cores": len(os.sched_getaffinity(0)), "rounds": options.rounds}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
