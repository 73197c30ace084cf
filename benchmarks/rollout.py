"""How busy two engines are kept when responses are of very unequal length, by kind of dispatch.

    python -m benchmarks.rollout --out benchmarks/rollout.json

A tiny random Qwen3 whose responses end at random, after 1 token or never: those are cut at `--longest` tokens. Every
kind of dispatch samples the same prompts with the same seeds on the same two engines,
in turns, `--rounds` times after one that is not counted:

- `static`: prompts are dealt out before the start;
- `streaming`: an engine gets prompts when it has room, in the order of the data;
- `streaming, lengths known`: longest first, as from the second pass over the data on.

Idle is the share of the time of a rollout in which an engine has nothing to do, measured in the engine. Responses are graded
meanwhile by `math`, in worker processes; `reward` is what is left of that after the last response.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("static", "streaming", "streaming, lengths known")
WARM_UP = 1


def make_model(directory: Path) -> Path:
    """Two layers, random weights whose log-probs are far from uniform: the chance to end differs from response to response."""
    from tests.models import make_tiny_qwen3

    return make_tiny_qwen3(directory, seed=1, tie_word_embeddings=True, initializer_range=0.1, max_position_embeddings=2048)


def make_prompts(count: int) -> list[Any]:
    """Random tokens; prompts begin alike in nothing."""
    from tic_megatron.trajectory import Prompt

    draw = random.Random(0)
    return [Prompt(f"p{i}", "", "4", tuple(draw.randrange(3, 300) for _ in range(draw.randint(4, 40)))) for i in range(count)]


def one_round(engines: Any, kind: str, prompts: list[Any], arguments: argparse.Namespace, rewards: Any) -> dict[str, float]:
    """Figures of one rollout."""
    from tic_megatron.rewards.background import BackgroundGrader

    lengths = dict(engines._lengths)
    if kind != "streaming, lengths known":
        engines._lengths.clear()
    engines._dispatch = dataclasses.replace(engines._dispatch, static=kind == "static")
    grader = BackgroundGrader(rewards)
    begun = time.perf_counter()
    rollout = engines.sample(
        prompts, group_size=arguments.group, temperature=1.0, top_p=1.0, max_tokens=arguments.longest, seed=0, finished=grader.add
    )
    generated = time.perf_counter()
    grader.finish()
    graded = time.perf_counter()
    engines._lengths.update(lengths)
    tokens = [len(t.response_ids) for group in rollout.groups for t in group.trajectories]
    idle = {f"idle_engine_{index}": 1.0 - busy for index, busy in rollout.outcome.busy.items()}
    return {
        "generate_s": generated - begun,
        "reward_s": graded - generated,
        "tokens_per_s": sum(tokens) / (generated - begun),
        **idle,
        "tokens": sum(tokens),
        "length_median": statistics.median(tokens),
        "length_mean": statistics.mean(tokens),
        "length_max": max(tokens),
    }


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by kind."""
    import ray

    from tic_megatron.config import RewardSettings, Settings
    from tic_megatron.rewards import RewardWorkers
    from tic_megatron.rollout.engines import EngineGroup

    settings = Settings()
    settings.rollout.engines, settings.rollout.max_concurrent_responses = 2, arguments.concurrent
    settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens = 64, arguments.longest
    prompts = make_prompts(arguments.prompts)
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    with tempfile.TemporaryDirectory() as folder, RewardWorkers(RewardSettings()) as rewards:
        model = make_model(Path(folder) / "model")
        engines = EngineGroup.start(settings, model_path=str(model), device="cpu", log_dir=folder)
        engines.ready()
        for _ in range(arguments.rounds + WARM_UP):
            for kind in KINDS:
                rounds[kind].append(one_round(engines, kind, prompts, arguments, rewards))
        engines.stop()
    ray.shutdown()
    return {
        kind: {name: statistics.median(row[name] for row in rows[WARM_UP:]) for name in rows[0]} for kind, rows in rounds.items()
    }


def main() -> None:
    """Measure, print a table, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments)
    for kind, row in figures.items():
        idle = " and ".join(f"{value:.1%}" for name, value in row.items() if name.startswith("idle"))
        print(f"{kind}: idle {idle}, {row['tokens_per_s']:.0f} tokens/s, {row['generate_s']:.2f} s, then {row['reward_s']:.2f} s")
    if arguments.out:
        sizes = {name: getattr(arguments, name) for name in ("prompts", "group", "longest", "concurrent", "rounds")}
        report = {"sizes": sizes, "cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "medians": figures}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
