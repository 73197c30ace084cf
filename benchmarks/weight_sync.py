"""How long the weights take from the actors to an engine, against a copy in memory, sending by tensors, and vLLM's own reload.

    python -m benchmarks.weight_sync --out benchmarks/weight_sync.json      # a table, and all figures
    python -m benchmarks.weight_sync --json                                 # the three ratios of the first case, 200M at TP 1

Everything is measured in one run, each in its turn in every round, on Qwen3 models in fp32, on CPU:

- `copy`: one copy of the weights' bytes in memory;
- `handover`: the actors gather every bucket into shared memory, and a process that does nothing with it is told where it lies;
- `per_tensor`: the same tensor by tensor: each is gathered, then told, then the next;
- `transfer`: the real thing, to a vLLM engine, until the weights are in use, and its phases: `begin` (all prepare), `gather`
  (what the engine waits for a bucket), `load` (the engine takes its buckets), `finish` (vLLM puts them to use);
- `reload`: vLLM loads the same tensors, which lie in its process already.

Medians of `--rounds` rounds after two that are not counted. `copy_over_transfer` is the share of a memory copy's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tic_megatron.actors.worker import ActorWorker
from tic_megatron.rollout.engine import EngineOptions, EngineWorker

MODELS = {
    "200M": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 13, "num_attention_heads": 16},
    "50M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 11, "num_attention_heads": 8},
    "200M experts": {
        **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 14, "num_attention_heads": 8},
        **{"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 480},
    },
}
LAYOUTS = {
    "TP 1": {},
    "TP 2": {"tensor_parallel_size": 2},
    "PP 2": {"pipeline_parallel_size": 2, "layers_in_first_stage": 7},
    "EP 2": {"expert_parallel_size": 2},
}
CASES = [
    ("200M", "TP 1"),
    ("200M", "TP 2"),
    ("200M", "PP 2"),
    ("50M", "TP 1"),
    ("200M experts", "TP 1"),
    ("200M experts", "EP 2"),
]
"""The first is that of `--json`."""
WARM_UP = 2
VOCABULARY = 32768


def make_model(directory: Path, sizes: dict[str, int] = MODELS["200M"]) -> int:
    """A random model with the quickstart's tokenizer; its number of parameters."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from examples.quickstart.make_task import make_tokenizer

    tokenizer = make_tokenizer()
    kinds = (Qwen3MoeConfig, Qwen3MoeForCausalLM) if "num_experts" in sizes else (Qwen3Config, Qwen3ForCausalLM)
    config = kinds[0](
        **sizes,
        vocab_size=VOCABULARY,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = kinds[1](config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def settings_for(layout: dict[str, int], model: Path, bucket_mib: int) -> Any:
    """One engine, and ranks in the layout."""
    from tic_megatron.config import Settings

    settings = Settings()
    settings.model.path = str(model)
    settings.cluster.device, settings.cluster.gpus_per_node = "cpu", 1
    settings.rollout.max_prompt_tokens = settings.rollout.max_response_tokens = 64
    settings.rollout.weight_bucket_mib, settings.rollout.precision = bucket_mib, "fp32"
    settings.actor.optimizer, settings.actor.distributed_optimizer = "sgd", False
    for name, size in layout.items():
        setattr(settings.actor, name, size)
        settings.cluster.gpus_per_node *= size if name.endswith("parallel_size") else 1
    return settings


class Listener:
    """Takes the engines' place in `send_weights`: tells the receiver of every bucket, and nobody loads it."""

    def __init__(self, receiver: Any):
        self.receiver = receiver

    def begin_receiving(self) -> int:
        """Nothing to join."""
        return 1

    def start_weight_update(self, sources: list[dict[str, Any]], *, record_digests: bool) -> None:
        """Nothing to do."""

    def update_weights(self, payloads: list[dict[str, Any]]) -> None:
        """Until the receiver has heard of it."""
        import ray

        ray.get(self.receiver.take.remote(payloads))

    def finish_weight_update(self, version: int) -> None:
        """Nothing to do."""


class TimedEngines:
    """Engines that note when the calls of a transfer begin and end."""

    def __init__(self, engines: Any):
        self.engines = engines
        self.calls: list[tuple[str, float, float]] = []

    def __getattr__(self, name: str) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = getattr(self.engines, name)(*args, **kwargs)
            self.calls.append((name, begun, time.perf_counter()))
            return result

        return noted


def timed_transfer(actors: Any, engines: Any) -> dict[str, float]:
    """Seconds of a transfer and of its phases."""
    from tic_megatron.weights.sending import send_weights

    noting = TimedEngines(engines)
    begun = time.perf_counter()
    send_weights(actors, noting, version=1)
    total = time.perf_counter() - begun
    prepared = next(end for name, _, end in noting.calls if name == "start_weight_update") - begun
    took = {
        which: sum(end - start for name, start, end in noting.calls if name == which)
        for which in ("update_weights", "finish_weight_update")
    }
    load, finish = took.values()
    return {"transfer": total, "begin": prepared, "gather": total - prepared - load - finish, "load": load, "finish": finish}


def measure(layout: dict[str, int], model: Path, bucket_mib: int, rounds: int) -> dict[str, float]:
    """Seconds of every kind: medians over rounds in which all take their turn, since a shared machine's speed drifts."""
    import ray

    from tic_megatron.actors.group import ActorGroup
    from tic_megatron.cluster import start_cluster
    from tic_megatron.rollout.engines import EngineGroup
    from tic_megatron.weights.sending import send_weights

    settings = settings_for(layout, model, bucket_mib)
    with tempfile.TemporaryDirectory() as logs, start_cluster(settings) as cluster:
        engines = EngineGroup.start(settings, model_path=str(model), device="cpu", log_dir=logs, worker=ReloadingEngine)
        engines.ready()
        receiver = ray.remote(num_cpus=0)(Receiver).remote(str(model))
        actors = ActorGroup.start(settings, cluster, log_dir=logs, worker=TwoWayActor)
        actors.setup(str(model))
        found: list[dict[str, float]] = []
        for _ in range(WARM_UP + rounds):
            actors.pool.call("send_by", "buckets")
            turn = {
                "copy": ray.get(receiver.copy.remote()),
                "handover": timed(send_weights, actors, Listener(receiver), version=1),
                **timed_transfer(actors, engines),
                "reload": engines.pool.call("reload")[0],
            }
            actors.pool.call("send_by", "tensors")
            found.append(turn | {"per_tensor": timed(send_one_by_one, actors, Listener(receiver))})
        actors.stop()
        engines.stop()
    return {kind: statistics.median(turn[kind] for turn in found[WARM_UP:]) for kind in found[0]}


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - begun


def send_one_by_one(actors: Any, listener: Listener) -> None:
    """Every bucket, of which each holds one tensor, after the one before."""
    from tic_megatron.weights.sending import merge_payloads

    export = actors.begin_export()
    for bucket in range(export.n_buckets):
        listener.update_weights(merge_payloads(actors.export_bucket(bucket)(), straight=export.straight))


class TwoWayActor(ActorWorker):
    """A rank that can also send every tensor in a bucket of its own."""

    def setup(self, *args: Any) -> tuple[int, str | None]:
        """With two exporters."""
        from tic_megatron.actors.megatron.export import WeightExporter

        ready, usual = super().setup(*args), self.exporter
        single = WeightExporter(usual.weights, usual.layout, usual.dtype, usual.device, 2**20, usual.transport)
        single.use_plan(
            [
                replace(bucket, pieces=(replace(piece, offset=0),), region_nbytes=end - piece.offset)
                for bucket in usual.plan
                for piece, end in zip(bucket.pieces, [*(p.offset for p in bucket.pieces[1:]), bucket.region_nbytes], strict=True)
            ]
        )
        self.exporters = {"buckets": usual, "tensors": single}
        return ready

    def send_by(self, what: str) -> None:
        """From now on."""
        self.exporter = self.exporters[what]


class Receiver:
    """A process that hears of buckets and does nothing with them; and that copies weights of its own."""

    def __init__(self, model: str):
        import torch
        from safetensors.torch import load_file

        tensors = load_file(Path(model, "model.safetensors"))
        self.weights = torch.cat([t.reshape(-1) for t in tensors.values()])
        self.room = torch.empty_like(self.weights)

    def take(self, payloads: list[dict[str, Any]]) -> None:
        """A bucket is there."""

    def copy(self) -> float:
        """Seconds of one copy."""
        begun = time.perf_counter()
        self.room.copy_(self.weights)
        return time.perf_counter() - begun


class ReloadingEngine(EngineWorker):
    """An engine that can load tensors which lie in its process."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        from safetensors.torch import load_file

        self.tensors = load_file(Path(options.model_path, "model.safetensors"))

    def reload(self) -> float:
        """Seconds of vLLM's reload, the packing for its CPU kernels included."""
        begun = time.perf_counter()
        self._llm.collective_rpc(_reload, args=(self.tensors,))
        return time.perf_counter() - begun


def _reload(worker: Any, tensors: dict[str, Any]) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from tic_megatron.weights.vllm_receiver import repack, tied_layers

    model = worker.model_runner.model
    initialize_layerwise_reload(model)
    model.load_weights(iter(tensors.items()))
    finalize_layerwise_reload(model, worker.model_config)
    repack(model, tied_layers(model))


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """What does not depend on the machine's speed."""
    return {
        "handover_over_copy": round(seconds["handover"] / seconds["copy"], 3),
        "per_tensor_over_handover": round(seconds["per_tensor"] / seconds["handover"], 3),
        "transfer_over_reload": round(seconds["transfer"] / seconds["reload"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="measure the first case only, and print its ratios as JSON")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS), metavar="NAME", help="by default all")
    parser.add_argument(
        "--layouts", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS), metavar="NAME", help="by default all"
    )
    parser.add_argument("--bucket-mib", type=int, default=256, help="largest bucket")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cases = CASES[:1] if args.json else [case for case in CASES if case[0] in args.models and case[1] in args.layouts]
    results = {", ".join(case): measured(*case, args.bucket_mib, args.rounds, quiet=args.json) for case in cases}
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.json:
        first = next(iter(results.values()))
        print(json.dumps({key: first[key] for key in ("handover_over_copy", "per_tensor_over_handover", "transfer_over_reload")}))


def measured(model: str, layout: str, bucket_mib: int, rounds: int, *, quiet: bool) -> dict[str, Any]:
    """All figures of one case."""
    with tempfile.TemporaryDirectory() as folder:
        n_parameters = make_model(Path(folder), MODELS[model])
        seconds = measure(LAYOUTS[layout], Path(folder), bucket_mib, rounds)
    result = ratios(seconds) | {
        "copy_over_transfer": round(seconds["copy"] / seconds["transfer"], 3),
        "parameters": n_parameters,
        "bucket_mib": bucket_mib,
        "rounds": rounds,
        "seconds": {kind: round(value, 4) for kind, value in seconds.items()},
        "transfer_gigabytes_per_s": round(4 * n_parameters / 1e9 / seconds["transfer"], 3),
    }
    if not quiet:
        print(f"{model}, {layout}:", json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
