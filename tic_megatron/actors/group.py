"""All training ranks as one thing: the driver's side, which imports neither torch.distributed nor Megatron."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tic_megatron.actors.flops import usage_metrics
from tic_megatron.actors.metrics import skipped_updates, update_metrics
from tic_megatron.actors.worker import ActorWorker, Place
from tic_megatron.checkpoints import CheckpointError
from tic_megatron.cluster import Cluster
from tic_megatron.config import Settings, SettingsError
from tic_megatron.data.quality import SkippedUpdate
from tic_megatron.observability.timers import PhaseTimers
from tic_megatron.remote import Deadline, WorkerPool
from tic_megatron.trajectory import MiniBatch

if TYPE_CHECKING:
    from tic_megatron.weights.sending import Export


class ActorGroup:
    """The policy, spread over its ranks.

    actors = ActorGroup.start(settings, cluster, log_dir=...)
    actors.setup(model_path)
    actors.load_rollout(pack_rollout(...), step)
    actors.old_logprobs(check_noise=True)
    metrics, skipped = actors.update()
    """

    def __init__(self, settings: Settings, pool: WorkerPool, places: list[Place]):
        self.settings = settings
        self.pool = pool
        self.places = places
        """Of each rank."""

    @classmethod
    def start(
        cls, settings: Settings, cluster: Cluster, *, log_dir: str | Path, worker: type[ActorWorker] = ActorWorker
    ) -> ActorGroup:
        """Start one process per rank and number them by node and GPU, which keeps neighbours in TP on one node."""
        log_files = [str(Path(log_dir).absolute() / f"actor_{i}.log") for i in range(settings.world_size)]
        remote = ray.remote(worker)
        workers = [remote.options(**cluster.actor_options(i)).remote(settings, log) for i, log in enumerate(log_files)]
        deadline = functools.partial(Deadline.of, settings.cluster)
        places = WorkerPool("training process", workers, log_files, deadline=deadline).call("place")
        order = sorted(range(len(workers)), key=lambda i: (places[i].address, places[i].node, places[i].gpus, i))
        pool = WorkerPool("training rank", [workers[i] for i in order], [log_files[i] for i in order], deadline=deadline)
        return cls(settings, pool, [places[i] for i in order])

    def shared_places(self) -> list[dict[str, Any]]:
        """Per colocated engine, the Ray options of a process on the node, and on CUDA on the GPUs, of consecutive ranks.

        It takes no GPUs of Ray's: the actors have them already.
        """
        size = self.settings.rollout.tensor_parallel_size
        machines = sorted({place.address for place in self.places})
        if len(machines) > 1 and not any(place.gpus for place in self.places):
            raise SettingsError(
                f"cluster.colocate: the actors run on the CPUs of {len(machines)} machines ({', '.join(machines)}), which "
                "share no memory to pass weights by; give --cluster.colocate false, or start them on one machine"
            )
        options = []
        for first in range(0, self.settings.rollout.engines * size, size):
            hosts = [self.places[rank % len(self.places)] for rank in range(first, first + size)]
            gpus = [gpu for host in hosts for gpu in host.gpus]
            if gpus and len({host.node for host in hosts}) > 1:
                raise SettingsError(
                    f"rollout.tensor_parallel_size {size}: the GPUs of actors {first} to {first + size - 1}, which an engine "
                    "shares, lie on several nodes; wait until whole nodes are free, or give a smaller size"
                )
            options.append(
                {
                    "num_cpus": 0,
                    "num_gpus": 0,
                    "scheduling_strategy": NodeAffinitySchedulingStrategy(hosts[0].node, soft=False),
                    "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}},
                }
            )
        return options

    def setup(self, model_path: str) -> list[str]:
        """Load the model; remarks for the user. Engines that share the GPUs must have started, and sleep."""
        size = len(self.pool.workers)
        address = self.pool.call_each("open_store", [()])[0]
        ready = self.pool.call_each("setup", [(rank, size, address, model_path) for rank in range(size)])
        self.data_parallel_ranks: list[int] = [data_parallel_rank for data_parallel_rank, _ in ready]
        return sorted({remark for _, remark in ready if remark})

    def load_rollout(self, shards: list[list[MiniBatch]], step: int) -> None:
        """Give every rank its data-parallel share of a step's packed rollout: [data-parallel rank][mini-batch]."""
        self._step = step
        references = [ray.put(shard) for shard in shards]
        self.pool.call_each("load_rollout", [(references[d], step) for d in self.data_parallel_ranks])

    def old_logprobs(self, *, check_noise: bool) -> None:
        """Log-probs at theta_old, by forward-only passes in the update's own packing."""
        self.pool.call("old_logprobs", check_noise)

    def kl_to_reference(self) -> list[list[list[float]]]:
        """k1 to the reference policy of each trajectory, [its sum] or with a dense reward by sampled token: per data-parallel
        rank, in the order of its share."""
        kl = self.pool.call("kl_to_reference")
        by_shard = {d: values for d, values in zip(self.data_parallel_ranks, kl, strict=True) if values is not None}
        return [by_shard[d] for d in sorted(by_shard)]

    def set_advantages(self, shards: list[list[float]]) -> None:
        """Replace the advantages of the rollout's trajectories (with a dense reward, of their sampled tokens): per
        data-parallel rank, in the order of its share."""
        self.pool.call_each("set_advantages", [(shards[d],) for d in self.data_parallel_ranks])

    def update(self) -> tuple[dict[str, float], list[SkippedUpdate]]:
        """All optimizer updates of the rollout, one after another; `policy/*` and `mismatch/*` metrics, and which were
        skipped for a log-prob or gradient that is not finite."""
        updates = [self.pool.call("update", k) for k in range(self.settings.trainer.updates_per_step)]
        mismatch = self.pool.call("mismatch")
        return update_metrics(updates, mismatch), skipped_updates(updates)

    def finish_profile(self) -> str | None:
        """After the updates, write the ranks' profiles, if this step is to be profiled; one line about those that could not be
        written, which a run can do without."""
        if self._step not in self.settings.actor.profile_steps:
            return None
        problems = [problem for problem in self.pool.call("finish_profile") if problem]
        more = f" (and {len(problems) - 1} more ranks)" if len(problems) > 1 else ""
        return f"a profile of step {self._step} is not written: {problems[0]}{more}" if problems else None

    def usage(self, timers: PhaseTimers) -> dict[str, float]:
        """`throughput/mfu`, `throughput/model_tflops_per_rank` and `idle/actors_*` of the step that these have timed."""
        seconds = {phase: timers.seconds(phase) for phase in ("old_logprob", "update", "step")}
        return usage_metrics(self.pool.call("usage"), seconds, peak=self.settings.actor.peak_tflops)

    def begin_export(self) -> Export:
        """Start reading the weights out; the `Export` of all ranks together."""
        exports = self.pool.call("begin_export")
        return replace(exports[0], sources=[source for export in exports for source in export.sources])

    def connect(self, n_receivers: int) -> Callable[[], list[None]]:
        """Let so many receivers join the broadcasts; the function returned waits for them."""
        return self.pool.start("connect", n_receivers)

    def export_bucket(self, index: int) -> Callable[[], list[dict[str, Any] | None]]:
        """Begin to assemble one bucket; the function returned waits for it and gives each rank's payload."""
        return self.pool.start("export_bucket", index)

    def deliver_bucket(self, index: int) -> Callable[[], list[None]]:
        """Begin to broadcast an assembled bucket; the function returned waits for the end."""
        return self.pool.start("deliver_bucket", index)

    def weight_digests(self) -> list[dict[str, Any]]:
        """Digests of the parameters as Hugging Face tensors, of every rank that is the first to hold some."""
        return [digests for digests in self.pool.call("weight_digests") if digests is not None]

    def release_optimizer(self) -> None:
        """Leave colocated GPUs to the engines, but for the parameters, which are to be sent. (Nothing happens on CPUs.)"""
        self.pool.call("release_optimizer")

    def release_parameters(self) -> None:
        """Leave colocated GPUs to the engines."""
        self.pool.call("release_parameters")

    def restore(self) -> None:
        """Come back to the GPUs; engines there must sleep."""
        self.pool.call("restore")

    def save_hf(self, directory: str | Path) -> dict[str, str]:
        """Write the weights as safetensors files; `{tensor name: file name}`."""
        return {name: file for part in self.pool.call("save_hf", str(directory)) for name, file in part.items()}

    def begin_checkpoint(self, directory: Path) -> Callable[[], bool]:
        """Copy weights and optimizer, and begin to write them. The function returned says whether it is done, without waiting,
        from any thread; it raises CheckpointError if it cannot be done, or not in `cluster.timeout_s`."""
        self.pool.call("begin_checkpoint", str(directory))
        timeout_s, begun = self.settings.cluster.timeout_s, time.monotonic()

        def written() -> bool:
            answers = self.pool.call("checkpoint_written")
            if None in answers:
                if time.monotonic() - begun > timeout_s:
                    raise CheckpointError(
                        f"{answers.count(None)} of {len(answers)} ranks, rank {answers.index(None)} first, have not written "
                        f"to {directory} in {timeout_s:g} s (cluster.timeout_s); see whether that file system hangs, or raise it"
                    )
                return False
            _check_written(answers, directory)
            _check_written(self.pool.call_each("complete_checkpoint", [(answers,)]), directory)
            return True

        return written

    def load_checkpoint(self, directory: str | Path) -> None:
        """Read weights and optimizer."""
        self.pool.call("load_checkpoint", str(directory))

    def stop(self) -> None:
        """End all ranks, also those that hang or have died."""
        self.pool.stop()


def _check_written(answers: list[dict[str, Any]], directory: Path) -> None:
    """Every rank has written its file, where the driver sees it."""
    problems = [answer["problem"] for answer in answers if "problem" in answer]
    if problems:
        more = f" (and {len(problems) - 1} more ranks)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0] + more)
    for rank, answer in enumerate(answers):
        if "file" in answer:
            file = directory / answer["file"]
            if not file.exists() or file.stat().st_size != answer["bytes"]:
                raise CheckpointError(
                    f"rank {rank} has written {file}, but it is not there for the driver; give a --run.dir on a file system "
                    "that all nodes share"
                )
