"""What the ranks of the gradient proof do."""

from __future__ import annotations

from tests.layouts.cases import N_UPDATES, Layout, rollout, settings_of


def second_updates(rank: int, world_size: int, master: str, layout: Layout, cases: list[dict]) -> list[dict]:
    """For each case (`paths`, `objectives`, `rollout`, `max_tokens`, `actor`): log-probs at theta_old, the first update (at
    learning rate 0), then theta is loaded, and the second update gives its gradient. Returns this rank's view, a list of
    dictionaries, one per case and objective."""
    from tic_megatron.actors.megatron import runtime

    first = settings_of(layout, "tic_grpo", max_tokens=cases[0]["max_tokens"])
    device = runtime.initialize(rank, world_size, master, first.actor, seed=0, timeout_s=60)
    return [view for case in cases for view in _views(layout, device, **case)]


def _views(layout, device, *, paths, objectives, rollout_kind, max_tokens, actor) -> list[dict]:
    from tic_megatron.actors.megatron.backend import MegatronBackend
    from tic_megatron.actors.step import PolicyStep
    from tic_megatron.data.packing import Packing, pack_rollout

    views, groups = [], rollout(rollout_kind)
    # The reference routes the tokens at theta, so nothing is replayed here.
    settings = settings_of(layout, objectives[0], max_tokens=max_tokens, **({"router_replay": "off"} | actor))
    backend = MegatronBackend(settings, paths["old"], device)
    for objective in objectives:
        settings.algorithm = settings_of(layout, objective, max_tokens=max_tokens).algorithm
        backend.load_weights(paths["old"])
        step = PolicyStep(backend, settings)
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
