"""Process groups and seeds of one Megatron rank."""

from __future__ import annotations

import datetime
import math
import os

import torch
import torch.distributed as dist

from tic_megatron.actors.megatron import cpu
from tic_megatron.config import ActorSettings
from tic_megatron.observability.stacks import almost_over


def initialize(
    rank: int, world_size: int, store: dist.Store, settings: ActorSettings, *, seed: int, timeout_s: float
) -> torch.device:
    """Join the job's process groups and make Megatron's.

    Args:
        rank, world_size: of this process among all actors. TP ranks are neighbours, then CP, then DP, then PP (Megatron's order).
        store: common to all ranks; a `HashStore` does for one that is alone.
        settings: the layout.
        seed: of Megatron's random streams (nothing random happens in a Qwen3 forward pass; kept for checkpoints).
        timeout_s: seconds after which the driver gives a call up. On GPUs collectives give up earlier (`almost_over`, but those
            of Megatron's groups not within a minute), so that NCCL's recorder has written what hangs (`Cluster.actor_options`)
            before this process is ended.

    Returns:
        The device of this rank: its GPU, or the CPU through the adapter.
    """
    torch.set_num_threads(settings.threads)
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(0)  # Ray shows each actor its own GPU only
    else:
        cpu.install()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    timeout = datetime.timedelta(seconds=almost_over(timeout_s) if use_cuda else timeout_s)
    backend = "nccl" if use_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    arrange(settings, seed=seed, timeout=timeout)
    return torch.device("cuda", 0) if use_cuda else torch.device("cpu")


def arrange(settings: ActorSettings, *, seed: int, timeout: datetime.timedelta = datetime.timedelta(minutes=30)) -> None:
    """Make Megatron's process groups for a layout, in place of an earlier one's. `timeout` is that of their collectives."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    n_virtual = settings.virtual_pipeline_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=n_virtual if n_virtual > 1 else None,
        context_parallel_size=settings.context_parallel_size,
        expert_model_parallel_size=settings.expert_parallel_size,
        expert_tensor_parallel_size=settings.experts_tensor_parallel,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        # On GPUs nothing uses them, and gloo's choice of a network may be one that the nodes do not share.
        create_gloo_process_groups=not torch.cuda.is_available(),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
