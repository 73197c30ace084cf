"""What the ranks of the gradient proof do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed import Store

from tests.layouts.cases import N_UPDATES, Layout, rollout, settings_of
from tic_megatron.config import AlgorithmSettings

MOVE = 4e-3
"""Relative size of a random move of all weights: about the last digit of bf16."""

MISTAKES = {
    "loss times CP": lambda loss, layout, n: loss * layout.cp,
    "loss over micro-batches": lambda loss, layout, n: loss / n,
}


def make_mistake(step, name: str | None, layout: Layout) -> None:
    """Break the step in one of the ways that the proof must see."""
    if name is None:
        return
    from tic_megatron.algorithms import ratios

    if name == "no all-reduce of trajectories":
        ratios.sum_over_group = lambda partial, group: partial
        return
    update = step.backend.update

    def wrong_update(inputs, loss):
        return update(inputs, lambda *args: MISTAKES[name](loss(*args), layout, len(inputs)))

    step.backend.update = wrong_update


def second_updates(rank: int, world_size: int, store: Store, layout: Layout, cases: list[dict]) -> list[dict]:
    """For each case (`paths`, `objectives`, `rollout`, `max_tokens`, `actor`): log-probs at theta_old, the first update (at
    learning rate 0), then theta is loaded, and the second update gives its gradient. Returns this rank's view, a list of
    dictionaries, one per case and objective."""
    from tic_megatron.actors.megatron import runtime

    first = settings_of(layout, "tic_grpo", max_tokens=cases[0]["max_tokens"])
    device = runtime.initialize(rank, world_size, store, first.actor, seed=0, timeout_s=60)
    return [view for case in cases for view in _views(layout, device, **case)]


def _views(layout, device, *, paths, objectives, rollout_kind, max_tokens, actor=None, mistake=None) -> list[dict]:
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    views, groups = [], rollout(rollout_kind)
    # The reference routes the tokens at theta, so nothing is replayed here.
    settings = settings_of(layout, objectives[0], max_tokens=max_tokens, **({"router_replay": "off"} | (actor or {})))
    backend = MegatronBackend(settings, paths["old"], device)
    for objective in objectives:
        settings.algorithm = settings_of(layout, objective, max_tokens=max_tokens).algorithm
        backend.load_weights(paths["old"])
        step = PolicyStep(backend, settings)
        make_mistake(step, mistake, layout)
        step.load(pack_rollout(groups, N_UPDATES, Packing.of(settings))[backend.data_parallel_rank])
        step.old_logprobs(check_noise=True)
        first = step.update(0)
        backend.load_weights(paths["new"])
        second = step.update(1)
        views.append(
            {
                "noise": None if first is None else first.noise,
                "stats": second,
                "gradient": slices(backend, "main_grad"),
                "micro_batches": [len(m.trajectories) for m in step.mini_batches[1].micro_batches],
            }
        )
    return views


def slices(backend, what: str) -> dict:
    """{Hugging Face name: (sharded dimension, shard, number of shards, slice)} of this rank's gradients or parameters."""
    found = {}
    for weight, parameter in backend.weights.owned():
        value = parameter.main_grad if what == "main_grad" else parameter.detach()
        for hf, piece in zip(weight.parts, weight.split(value), strict=True):
            found[hf.name] = (hf.shard_dim, *backend.weights.shard(weight), piece.clone())
    return found


def adam_steps(rank: int, world_size: int, store: Store, layout: Layout, paths: dict, max_tokens: int) -> dict:
    """Parameters after one step of AdamW with the distributed optimizer, at rate 1 and with an epsilon of 1."""
    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    adam = {"optimizer": "adamw", "distributed_optimizer": True, "learning_rate": 1.0, "adam_eps": 1.0, "router_replay": "off"}
    settings = settings_of(layout, "tic_grpo", max_tokens=max_tokens, **adam)
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    backend = MegatronBackend(settings, paths["old"], device)
    step = PolicyStep(backend, settings)
    step.load(pack_rollout(rollout("many"), N_UPDATES, Packing.of(settings))[backend.data_parallel_rank])
    step.old_logprobs(check_noise=False)
    backend.load_weights(paths["new"])
    step.update(1)
    return slices(backend, "data")


def exports(rank: int, world_size: int, store: Store, layout: Layout, path: str, folder: str, max_bytes: int) -> dict:
    """What this rank reads of a model, sends to engines, and writes: element counts, tensors by name, a file map, digests."""
    import torch.distributed as dist

    from tic_megatron.actors.megatron import parameters, runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.megatron.export import WeightExporter
    from tic_megatron.weights.plan import ExportLayout
    from tic_megatron.weights.wire import Bucket, TensorAssembler

    settings = settings_of(layout, "tic_grpo", max_tokens=300)
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    n_read, read = [], parameters._SafetensorsReader.read
    parameters._SafetensorsReader.read = lambda *args: (tensor := read(*args), n_read.append(tensor.numel()))[0]
    try:
        backend = MegatronBackend(settings, path, device)
    finally:
        parameters._SafetensorsReader.read = read
    n_held = sum(p.numel() for part in backend.model_parts for p in part.parameters())
    export_layout = ExportLayout.of(settings, backend.hf)
    dtype = backend.config.params_dtype
    exporter = WeightExporter(backend.weights, export_layout, dtype, device, max_bytes, "shared_memory")
    for _ in range(2):  # updates: the second one finds the buffers of the first
        sent, assembler = {}, TensorAssembler()
        for index in range(exporter.begin().n_buckets):
            payload = exporter.export(index)
            dist.barrier()  # the driver tells engines when all ranks have written
            if payload is not None:
                flat = exporter.buffer.flat(index % 2)
                blocks = Bucket.from_payload({name: payload[name] for name in ("blocks", "nbytes", "handle")}).blocks
                sent |= {name: tensor.clone() for name, tensor in assembler.take_all(blocks, flat)}
        assert not assembler.incomplete
    n_bytes = [b.nbytes for b in exporter.plan]
    digests = exporter.digests()
    written = exporter.save(Path(folder))
    exporter.close()
    return {"read": sum(n_read), "held": n_held, "sent": sent, "files": written, "bytes": n_bytes, "digests": digests}


def replay_noise(rank: int, world_size: int, store: Store, path: str) -> dict[tuple[str, str], dict]:
    """{(precision, router replay): {"L": of each trajectory after all weights have moved, "noise": max |L| at theta_old}}; the
    weights are the same numbers in both precisions."""
    import torch

    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    found, device = {}, None
    for precision, replay in (("bf16", "off"), ("bf16", "on"), ("fp32", "off"), ("fp32", "on")):
        settings = settings_of(Layout(), "tic_grpo", max_tokens=300, precision=precision, router_replay=replay)
        device = device or runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
        backend = MegatronBackend(settings, path, device)
        generator = torch.Generator().manual_seed(0)

        def move(size: float, backend=backend, generator=generator) -> None:
            with torch.no_grad():
                for parameter in (p for part in backend.model_parts for p in part.parameters()):
                    moved = parameter.float() * (1 + size * torch.randn(parameter.shape, generator=generator))
                    parameter.copy_(moved.bfloat16())

        move(0.0)
        step = PolicyStep(backend, settings)
        step.load(pack_rollout(rollout("many"), N_UPDATES, Packing.of(settings))[0])
        step.old_logprobs(check_noise=True)
        noise = step.update(0).noise
        move(MOVE)
        found[precision, replay] = {"L": step.update(1).log_ratio, "noise": noise}
    return found


def out_of_memory(rank: int, world_size: int, store: Store, path: str) -> str:
    """The message when the second micro-batch does not fit, and what that is."""
    import torch

    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    settings = settings_of(Layout(), "tic_grpo", max_tokens=120)
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    backend = MegatronBackend(settings, path, device)
    step = PolicyStep(backend, settings)
    step.load(pack_rollout(rollout("many"), N_UPDATES, Packing.of(settings))[0])
    n_calls = 0

    def fail_the_second_time(*args) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    backend.model_parts[0].module.decoder.layers[0].register_forward_pre_hook(fail_the_second_time)
    try:
        step.update(0)
    except MemoryError as error:
        return f"{error} [{len(step.inputs[0])} micro-batches, the second of {sum(step.inputs[0][1].lengths)} tokens]"
    return ""


def parked(rank: int, world_size: int, store: Store, layout: Layout, path: str, precision: str) -> dict:
    """Two updates with AdamW, without and with all memory given up in between: bytes given up, parameters after both."""
    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    adam = {"optimizer": "adamw", "distributed_optimizer": True, "learning_rate": 1e-3, "precision": precision}
    settings = settings_of(layout, "tic_grpo", max_tokens=300, **adam)
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    found = {}
    for park in (False, True):
        backend = MegatronBackend(settings, path, device)
        backend._parks = park  # on a CPU there is no other use for it
        step = PolicyStep(backend, settings)
        step.load(pack_rollout(rollout("many"), N_UPDATES, Packing.of(settings))[backend.data_parallel_rank])
        step.old_logprobs(check_noise=False)
        step.update(0)
        backend.release_optimizer()
        backend.release_parameters()
        found["bytes", park] = sum(p.nbytes for p in backend._parked)
        found["left", park] = sum(p.untyped_storage().nbytes() for part in backend.model_parts for p in part.parameters())
        backend.restore()
        step.update(1)
        found["parameters", park] = slices(backend, "data")
    return found


def resumed(rank: int, world_size: int, store: Store, layout: Layout, path: str, folder: str, options: dict) -> dict:
    """Two updates, the second by the same backend and by a fresh one that reads a checkpoint made in between: the parameters
    after each, and the gradient norms."""
    import math

    from tic_megatron.actors.megatron import runtime

    adam = {"optimizer": "adamw", "distributed_optimizer": True, "learning_rate": 1e-3, "grad_clip": 1.0}
    settings = settings_of(layout, "tic_grpo", max_tokens=300, **(adam | options))
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    from tic_megatron.actors.megatron import checkpoint
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    backend = MegatronBackend(settings, path, device)
    step = PolicyStep(backend, settings)
    step.load(pack_rollout(rollout("many"), N_UPDATES, Packing.of(settings))[backend.data_parallel_rank])
    step.old_logprobs(check_noise=False)
    skipped = backend.update(step.inputs[0], lambda index, logprobs, entropy: logprobs.sum() * math.nan)
    assert not skipped.applied
    step.update(0)
    save(backend, Path(folder))
    found = {}
    for name in ("same", "fresh"):
        if name == "fresh":
            step.backend = MegatronBackend(settings, path, device)
            checkpoint.load(step.backend, Path(folder))
        stats = step.update(1)
        found[name] = slices(step.backend, "data")
        found["norm", name] = None if stats is None else stats.result.grad_norm
    return found


def save(backend, directory: Path) -> None:
    """A checkpoint of all ranks, as the driver has it made."""
    import torch.distributed as dist

    from tic_megatron.actors.megatron.checkpoint import Saving

    saving = Saving(backend, directory)
    finish(saving)
    dist.barrier()


def finish(saving) -> None:
    """Wait until all ranks have written, and complete the checkpoint."""
    import torch.distributed as dist

    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, saving.written(wait=True))
    if dist.get_rank() == 0:
        assert saving.complete(answers) == {}


def continued(
    rank: int, world_size: int, store: Store, layout: Layout, path: str, read: str | None, write: str, options: dict
) -> dict:
    """Two updates on a rollout, of a run that has made one update before and saved, or that has read (`read`) what another layout
    saved then, and saved it again: losses, gradient norms, and the parameters."""
    from tic_megatron.actors.megatron import runtime

    adam = {"optimizer": "adamw", "distributed_optimizer": True, "learning_rate": 1e-3, "grad_clip": 1.0, "lr_warmup_updates": 3}
    settings = settings_of(layout, "tic_grpo", max_tokens=300, **(adam | options))
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    from tic_megatron.actors.megatron import checkpoint
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    backend = MegatronBackend(settings, path, device)
    step = PolicyStep(backend, settings)

    def start(groups: list, n_updates: int) -> None:
        step.load(pack_rollout(groups, n_updates, Packing.of(settings))[backend.data_parallel_rank])
        step.old_logprobs(check_noise=False)

    if read is None:
        start(rollout("few"), 1)
        step.update(0)
    else:
        checkpoint.load(backend, Path(read))
    save(backend, Path(write))
    start(rollout("many"), 2)
    stats = [step.update(k) for k in range(2)]
    return {
        "values": [None if s is None else s.value for s in stats],
        "norms": [None if s is None else s.result.grad_norm for s in stats],
        "rates": [None if s is None else s.result.learning_rate for s in stats],
        "parameters": slices(backend, "data"),
    }


def layers_by_megatron(rank: int, world_size: int, store: Store, splits: list[tuple]) -> list:
    """The layers of every part of every stage as Megatron-core counts them, for each (layers of the model, stages, parts of a
    stage, layers of the first, of the last stage)."""
    from transformers import Qwen3Config

    from tic_megatron.actors.megatron import runtime
    from tic_megatron.config import ActorSettings

    runtime.initialize(rank, world_size, store, ActorSettings(), seed=0, timeout_s=60)
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from tic_megatron.actors.megatron.model import transformer_config

    found = []
    for n_layers, n_stages, n_virtual, first, last in splits:
        actor = ActorSettings(pipeline_parallel_size=n_stages, virtual_pipeline_parallel_size=n_virtual)
        actor.layers_in_first_stage, actor.layers_in_last_stage = first, last
        config = transformer_config(Qwen3Config(num_hidden_layers=n_layers, hidden_size=64, head_dim=16), actor)

        def layers(stage: int, part: int, config=config, n_virtual=n_virtual) -> list[int]:
            place = {"vp_stage": part if n_virtual > 1 else None, "pp_rank": stage}
            start = get_transformer_layer_offset(config, **place)
            return list(range(start, start + get_num_layers_to_build(config, **place)))

        found.append([[layers(stage, part) for part in range(n_virtual)] for stage in range(n_stages)])
    return found


def with_options(
    rank: int, world_size: int, store: Store, layout: Layout, paths: dict, options: dict, bad_token: int | None = None
) -> dict:
    """The second update of a rollout with settings of the algorithm, the reference policy's weights being the model `new`:
    statistics and gradient; with `bad_token`, after that token's embedding has become NaN."""
    import math

    import torch

    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    settings = settings_of(layout, options["objective"], max_tokens=120)
    settings.algorithm = AlgorithmSettings(**options, reference_path=paths["new"])
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    backend = MegatronBackend(settings, paths["old"], device)
    step = PolicyStep(backend, settings)
    step.load(pack_rollout(rollout("many"), N_UPDATES, Packing.of(settings))[backend.data_parallel_rank])
    trajectories = [t for batch in step.mini_batches for m in batch.micro_batches for t in m.trajectories]
    kl = None
    if settings.algorithm.kl_in_reward:
        kl = step.kl_to_reference()
        step.set_advantages([t.advantage / 2 for t in trajectories])
    step.old_logprobs(check_noise=True)
    updates = [step.update(0)]
    backend.load_weights(paths["new"])
    with torch.no_grad():
        for weight, parameter in backend.weights.owned():
            if weight.layer is not None and parameter.dim() > 1:
                parameter.mul_(1.01)  # neither pi_old nor the reference
            if bad_token is not None and weight.names[0].startswith("embedding"):
                which, _ = backend.weights.shard(weight)
                row = bad_token - which * parameter.shape[0]
                if 0 <= row < parameter.shape[0]:
                    parameter[row] = math.nan
    updates.append(step.update(1))
    return {
        "kl": kl and sorted((t.prompt.id, *values) for t, values in zip(trajectories, kl, strict=True)),
        "updates": updates,
        "mismatch": step.finish_mismatch(),
        "gradient": slices(backend, "main_grad"),
    }


def overtaken(rank: int, world_size: int, store: Store, layout: Layout, path: str, folders: list[str], options: dict) -> dict:
    """Two checkpoints of the same state: one is written at once, of the other the writing begins when training has gone on and
    all that it changes has been spoilt. Then what the second one restores. Returns whether that is the state, bit by bit."""
    import threading

    import torch

    from tic_megatron.actors.megatron import runtime

    adam = {"optimizer": "adamw", "distributed_optimizer": True, "learning_rate": 1e-3, "grad_clip": 1.0}
    settings = settings_of(layout, "tic_grpo", max_tokens=300, **(adam | options))
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    from tic_megatron.actors.megatron import checkpoint
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    backend = MegatronBackend(settings, path, device)
    step = PolicyStep(backend, settings)
    step.load(pack_rollout(rollout("many"), N_UPDATES, Packing.of(settings))[backend.data_parallel_rank])
    step.old_logprobs(check_noise=False)
    step.update(0)

    def state() -> list[torch.Tensor]:
        parameters = [p.detach() for part in backend.model_parts for p in part.parameters()]
        optimizers = [o.optimizer for o in backend.optimizer.chained_optimizers]
        mains = [(o, p) for o in optimizers for group in o.param_groups for p in group["params"]]
        moments = [o.state[main][name] for o, main in mains for name in sorted(o.state[main])]
        return parameters + [main.detach() for _, main in mains] + moments

    saved = [tensor.clone() for tensor in state()]
    save(backend, Path(folders[0]))

    may_write, write = threading.Event(), checkpoint._Writer.write
    checkpoint._Writer.write = lambda writer: (may_write.wait(), write(writer))[1]
    saving = checkpoint.Saving(backend, Path(folders[1]))
    assert saving.written() is None
    step.update(1)
    for tensor in state():
        tensor.fill_(7.0)
    backend.updates_done = backend.updates_applied = 70
    may_write.set()
    finish(saving)
    torch.distributed.barrier()
    checkpoint.load(backend, Path(folders[1]))
    same = [torch.equal(a, b) for a, b in zip(saved, state(), strict=True)]
    return {"same": all(same), "n": len(same), "updates": (backend.updates_done, backend.updates_applied)}


def failing_disk(rank: int, world_size: int, store: Store, layout: Layout, path: str, folder: str) -> dict:
    """What a rank says of a limit on the size of files, of a full disk and of a folder that is not there, on rank 1 only; and of
    a good disk after that, in between two updates."""
    import resource

    import torch.distributed as dist

    from tic_megatron.actors.megatron import runtime

    adam = {"optimizer": "adamw", "distributed_optimizer": True, "learning_rate": 1e-3}
    settings = settings_of(layout, "tic_grpo", max_tokens=300, **adam)
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    from tic_megatron.actors.megatron import checkpoint
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    backend = MegatronBackend(settings, path, device)
    step = PolicyStep(backend, settings)
    step.load(pack_rollout(rollout("many"), N_UPDATES, Packing.of(settings))[backend.data_parallel_rank])
    step.old_logprobs(check_noise=False)
    said = {}
    for k, case in enumerate(("limit", "full", "absent", "good")):
        directory = Path(folder) / case
        directory.mkdir(exist_ok=True)
        dist.barrier()
        if rank == 1 and case == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        if rank == 1 and case == "full":
            (directory / "__1_0.distcp").symlink_to("/dev/full")
        if rank == 1 and case == "absent":
            directory /= "nowhere"
        saving = checkpoint.Saving(backend, directory)
        if k < N_UPDATES:
            step.update(k)  # training goes on
        answers: list[Any] = [None] * world_size
        dist.all_gather_object(answers, saving.written(wait=True))
        said[case] = [answer.get("problem") for answer in answers]
        if rank == 0 and not any(said[case]):
            assert saving.complete(answers) == {}
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return said


def exported(
    rank: int, world_size: int, store: Store, layout: Layout, path: str, actors: str, hf: str, precision: str
) -> dict[str, str]:
    """After an update: a checkpoint, and what a run exports of the same state; this rank's part of the file map."""
    from tic_megatron.actors.megatron import runtime

    adam = {"optimizer": "adamw", "distributed_optimizer": True, "learning_rate": 1e-2, "precision": precision}
    settings = settings_of(layout, "tic_grpo", max_tokens=300, **adam)
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.megatron.export import WeightExporter
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout
    from tic_megatron.weights.plan import ExportLayout

    backend = MegatronBackend(settings, path, device)
    step = PolicyStep(backend, settings)
    step.load(pack_rollout(rollout("many"), N_UPDATES, Packing.of(settings))[backend.data_parallel_rank])
    step.old_logprobs(check_noise=False)
    step.update(0)
    save(backend, Path(actors))
    layout_of_export = ExportLayout.of(settings, backend.hf)
    dtype = backend.config.params_dtype
    exporter = WeightExporter(backend.weights, layout_of_export, dtype, device, 2**20, "shared_memory")
    return exporter.save(Path(hf))


def command(rank: int, world_size: int, store: Store, arguments: list[str]) -> tuple[int, str, str]:
    """A `tic-megatron` command line: exit code and output."""
    import contextlib
    import io

    from tic_megatron.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def loss_scales(rank: int, world_size: int, store: Store, layout: Layout, path: str) -> list[list[float]]:
    """fp16: the scale of every optimizer after each of three updates that overflow in an expert's gradient on the last rank."""
    import math

    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    adam = {"optimizer": "adamw", "distributed_optimizer": True, "precision": "fp16"}
    settings = settings_of(layout, "tic_grpo", max_tokens=300, **adam)
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    backend = MegatronBackend(settings, path, device)
    step = PolicyStep(backend, settings)
    step.load(pack_rollout(rollout("many"), 3, Packing.of(settings))[backend.data_parallel_rank])
    step.old_logprobs(check_noise=False)
    run_schedule = backend._run_schedule

    def overflow(*args, **kwargs):
        run_schedule(*args, **kwargs)
        if rank == world_size - 1:
            backend.model_parts[0].expert_parallel_buffers[0].grad_data[0] = math.inf

    backend._run_schedule = overflow
    scales = []
    for k in range(3):
        step.update(k)
        scales.append([scaler.scale.item() for scaler in backend.grad_scalers])
    assert backend.updates_applied == 0
    return scales
