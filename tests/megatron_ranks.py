"""What the ranks of the Megatron tests do (run by tests.ranks, in fresh processes)."""

from __future__ import annotations

import itertools

import torch
from torch.distributed import Store

from tests.rollouts import random_rollout
from tic_megatron.config import AlgorithmSettings, Settings
from tic_megatron.data.packing import Packing, pack_mini_batch, pack_rollout


def layout_settings(
    world_size: int, *, objective: str, tp=1, pp=1, sp=True, distributed=False, options: dict | None = None, **actor
) -> Settings:
    settings = Settings()
    settings.cluster.gpus_per_node = world_size
    settings.algorithm = AlgorithmSettings(objective=objective, **(options or {}))
    settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens = 40, 40
    settings.rollout.temperature = 0.8
    a = settings.actor
    a.tensor_parallel_size, a.pipeline_parallel_size, a.sequence_parallel = tp, pp, sp
    a.distributed_optimizer = distributed
    a.max_tokens_per_microbatch, a.learning_rate, a.logprob_chunk_tokens = 300, 1e-3, 37
    for key, value in actor.items():
        setattr(a, key, value)
    return settings


def rollout(vocab: int, *, dense: bool = False):
    return random_rollout(seed=3, n_prompts=10, group_size=3, vocab=vocab, dense=dense)


def two_updates(rank: int, world_size: int, store: Store, cases: list[dict]) -> list[dict]:
    """For each case: two updates on a rollout of two mini-batches. Returns, per case, this rank's view: statistics of each
    update and, of the second (where the ratio is in use), the gradient's slices under Hugging Face names."""
    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep

    results = []
    for i, case in enumerate(cases):
        model, dense = case.pop("model"), case.pop("dense", False)
        settings = layout_settings(world_size, **case)
        if i == 0:
            device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
        else:
            runtime.arrange(settings.actor, seed=0)
        settings.reward.function = "exact_dense" if dense else "exact"
        backend = MegatronBackend(settings, model, device)
        groups = rollout(backend.hf.vocab_size, dense=dense)
        step = PolicyStep(backend, settings)
        shards = pack_rollout(groups, 2, Packing.of(settings))
        step.load(shards[backend.data_parallel_rank])
        step.old_logprobs(check_noise=True)
        stats0, stats1 = step.update(0), step.update(1)
        gradient = {
            hf.name: (hf.shard_dim, backend.weights.tp_rank, piece.clone())
            for weight, parameter in backend.weights.owned()
            for hf, piece in zip(weight.parts, weight.split(parameter.main_grad), strict=True)
        }
        parameters = {
            hf.name: (hf.shard_dim, backend.weights.tp_rank, piece.detach().clone())
            for weight, parameter in backend.weights.owned()
            for hf, piece in zip(weight.parts, weight.split(parameter), strict=True)
        }
        results.append({"stats": [stats0, stats1], "gradient": gradient, "parameters": parameters})
    return results


def nothing_to_learn(rank: int, world_size: int, store: Store, model: str, layouts: list[dict]) -> list:
    """Two updates on groups of equal rewards, for each layout: every micro-batch is empty. This rank's statistics."""
    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep

    results = []
    for i, layout in enumerate(layouts):
        settings = layout_settings(world_size, objective="tic_grpo", distributed=True, **layout)
        if i == 0:
            device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
        else:
            runtime.arrange(settings.actor, seed=0)
        backend = MegatronBackend(settings, model, device)
        before = [p.detach().clone() for p in backend.model_parts[0].parameters()]
        groups = rollout(backend.hf.vocab_size)
        for trajectory in (t for group in groups for t in group.trajectories):
            trajectory.reward = trajectory.advantage = 0.0
        step = PolicyStep(backend, settings)
        step.load(pack_rollout(groups, 2, Packing.of(settings))[backend.data_parallel_rank])
        step.old_logprobs(check_noise=True)
        stats = [step.update(k) for k in range(2)]
        unchanged = all(torch.equal(a, b) for a, b in zip(before, backend.model_parts[0].parameters(), strict=True))
        results.append((stats, unchanged))
    return results


def repacked_noise(rank: int, world_size: int, store: Store, model: str) -> list[float]:
    """max |L| at theta_old with the packing kept, and with another packing between the two passes."""
    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep, pack_inputs

    settings = layout_settings(world_size, objective="tic_grpo")
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    backend = MegatronBackend(settings, model, device)
    groups = rollout(backend.hf.vocab_size)
    step = PolicyStep(backend, settings)
    step.load(pack_mini_batch(groups, Packing(1, 300)))
    step.old_logprobs(check_noise=True)
    kept = step.update(0).noise

    # The same trajectories, one per micro-batch: other shapes, other kernels.
    backend = MegatronBackend(settings, model, device)
    step = PolicyStep(backend, settings)
    step.load(pack_mini_batch(groups, Packing(1, 300)))
    for m, micro_batch in enumerate(step.mini_batches[0].micro_batches):
        alone = [type(micro_batch)([t]) for t in micro_batch.trajectories]
        inputs = [pack_inputs(a, device=device) for a in alone]
        step.old.setdefault(0, []).append(torch.cat(backend.forward(inputs)))
        assert step.old[0][m].shape == step.inputs[0][m].targets.shape
    return [kept, step.update(0).noise]


def logits(rank: int, world_size: int, store: Store, models: list[str], token_ids: list[int]) -> list[torch.Tensor]:
    """Full logits [tokens, vocab] of one sequence, from each model directory."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend

    settings = layout_settings(world_size, objective="tic_grpo")
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    n = len(token_ids)
    ids = torch.tensor([token_ids], device=device)
    starts = torch.tensor([0, n], dtype=torch.int32, device=device)
    packed = PackedSeqParams("thd", starts, starts, max_seqlen_q=n, max_seqlen_kv=n)
    packed.cp_group = parallel_state.get_context_parallel_group()
    outputs = []
    for model in models:
        backend = MegatronBackend(settings, model, device)
        with torch.no_grad():
            outputs.append(backend.model_parts[0](ids, torch.arange(n)[None], attention_mask=None, packed_seq_params=packed)[0])
    return outputs


def parameters_seen(rank: int, world_size: int, store: Store, model: str, precision: str) -> dict:
    """Under `no_is`: the parameters that each of four gradients is evaluated at, and those before and after all updates."""
    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep

    settings = layout_settings(world_size, objective="no_is", distributed=True, precision=precision)
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    backend = MegatronBackend(settings, model, device)
    step = PolicyStep(backend, settings)
    step.load(pack_rollout(rollout(backend.hf.vocab_size)[:8], 4, Packing(1, 300))[0])

    def snapshot() -> list[torch.Tensor]:
        return [p.detach().clone() for p in backend.model_parts[0].parameters()]

    seen, run_schedule = [], backend._run_schedule
    before = snapshot()
    backend._run_schedule = lambda *args, **kwargs: (seen.append(snapshot()), run_schedule(*args, **kwargs))
    step.old_logprobs(check_noise=False)
    after = []
    for k in range(4):
        step.update(k)
        after.append(snapshot())
    return {"before": before, "seen": seen, "after": after}


def _poison_embedding(backend, value: float) -> list:
    """From now on the first token of every micro-batch has the embedding `value`. Returns the hook, to be removed."""
    from megatron.core import parallel_state

    def poison(module, arguments, output):
        output = output.clone()
        output[0] = value
        return output

    if parallel_state.is_pipeline_first_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        return [backend.model_parts[0].module.embedding.register_forward_hook(poison)]
    return []


def bad_updates(rank: int, world_size: int, store: Store, model: str, layouts: list[dict]) -> list[dict]:
    """For each layout: an update that meets log-probs which are not finite, for the first trajectories of the micro-batches;
    one that meets a gradient which is not, in rank 0's shard only; and a good one. This rank's view of each."""
    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep

    results = []
    for i, layout in enumerate(layouts):
        value, loss_scale = layout.pop("value"), layout.pop("loss_scale", None)
        gradient = layout.pop("gradient", value)
        settings = layout_settings(world_size, objective="tic_grpo", **layout)
        if i == 0:
            device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
        else:
            runtime.arrange(settings.actor, seed=0)
        backend = MegatronBackend(settings, model, device)
        for scaler in backend.grad_scalers if loss_scale else []:
            scaler._scale.fill_(loss_scale)
        groups = rollout(backend.hf.vocab_size)[:9]
        step = PolicyStep(backend, settings)
        step.load(pack_rollout(groups, 3, Packing.of(settings))[backend.data_parallel_rank])
        step.old_logprobs(check_noise=False)
        snapshots = [[p.detach().clone() for p in backend.model_parts[0].parameters()]]

        def update(k: int, step=step, backend=backend, snapshots=snapshots):
            stats = step.update(k)
            snapshots.append([p.detach().clone() for p in backend.model_parts[0].parameters()])
            return stats

        hooks = _poison_embedding(backend, value)
        stats = [update(0)]
        for hook in hooks:
            hook.remove()
        run_schedule = backend._run_schedule

        def overflow(*args, backend=backend, run_schedule=run_schedule, gradient=gradient, **kwargs):
            run_schedule(*args, **kwargs)
            if rank == 0:
                next(p for p in backend.model_parts[0].parameters() if p.dim() == 2).main_grad.view(-1)[1] = gradient

        backend._run_schedule = overflow
        stats.append(update(1))
        backend._run_schedule = run_schedule
        stats.append(update(2))
        first = [m.trajectories[0].prompt.id for m in step.mini_batches[0].micro_batches if m.trajectories]
        same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(snapshots)]
        finite = all(torch.isfinite(p).all() for p in snapshots[-1])
        results.append({"stats": stats, "same": same, "finite": finite, "first": first})
    return results


def export_memory(rank: int, world_size: int, store: Store, model: str, max_bytes: int, **layout) -> dict:
    """Bytes by which this process has grown at most while it sent its weights, the buckets' sizes, and whether it was first."""
    import gc

    from tic_megatron.actors.megatron import runtime
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.megatron.export import WeightExporter
    from tic_megatron.weights.plan import ExportLayout

    settings = layout_settings(world_size, objective="tic_grpo", **layout)
    device = runtime.initialize(rank, world_size, store, settings.actor, seed=0, timeout_s=60)
    backend = MegatronBackend(settings, model, device)
    export_layout = ExportLayout.of(settings, backend.hf)
    exporter = WeightExporter(backend.weights, export_layout, backend.config.params_dtype, device, max_bytes, "shared_memory")
    gc.collect()
    torch.distributed.barrier()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins here
    before = _kibibytes("VmRSS")
    n_sent = sum(exporter.export(index) is not None for index in range(exporter.begin().n_buckets))
    grown = 1024 * (_kibibytes("VmHWM") - before)
    torch.distributed.barrier()  # a rank that is slow may not have attached yet; a run's driver waits for all
    exporter.close()
    return {"grown": grown, "buckets": [bucket.nbytes for bucket in exporter.plan], "sent": n_sent}


def _kibibytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))
