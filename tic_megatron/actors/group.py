"""All training ranks as one thing: the driver's side, which imports neither torch.distributed nor Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from tic_megatron.actors.metrics import update_metrics
from tic_megatron.actors.worker import ActorWorker
from tic_megatron.cluster import Cluster
from tic_megatron.config import Settings
from tic_megatron.trajectory import MiniBatch


class ActorError(RuntimeError):
    """A rank failed: which one, in what, and where its log lies."""


class ActorGroup:
    """The policy, spread over its ranks.

    actors = ActorGroup.start(settings, cluster, log_dir=...)
    actors.setup(model_path)
    actors.load_rollout(pack_rollout(...))
    actors.old_logprobs(check_noise=True)
    metrics = actors.update()
    """

    def __init__(self, settings: Settings, workers: list[ActorHandle], log_files: list[str], gpu_ids: list[int]):
        self.settings = settings
        self.workers = workers
        self.log_files = log_files
        self.gpu_ids = gpu_ids
        """GPU of each rank, on its node; empty on CPUs."""

    @classmethod
    def start(cls, settings: Settings, cluster: Cluster, *, log_dir: str | Path) -> ActorGroup:
        """Start one process per rank and number them by node and GPU, which keeps neighbours in TP on one node."""
        log_files = [str(Path(log_dir).absolute() / f"actor_{i}.log") for i in range(settings.world_size)]
        remote = ray.remote(ActorWorker)
        workers = [remote.options(**cluster.actor_options(i)).remote(settings, log) for i, log in enumerate(log_files)]
        places = _wait([w.place.remote() for w in workers], "place", log_files)
        order = sorted(range(len(workers)), key=lambda i: (places[i][0], places[i][1], i))
        gpu_ids = [gpu for i in order for gpu in places[i][1]]
        return cls(settings, [workers[i] for i in order], [log_files[i] for i in order], gpu_ids)

    def setup(self, model_path: str) -> None:
        """Load the model. Engines that share the GPUs must have started, and sleep."""
        master = ray.get(self.workers[0].free_address.remote())
        calls = [w.setup.remote(rank, len(self.workers), master, model_path) for rank, w in enumerate(self.workers)]
        self.data_parallel_ranks: list[int] = _wait(calls, "setup", self.log_files)

    def load_rollout(self, shards: list[list[MiniBatch]]) -> None:
        """Give every rank its data-parallel share of a packed rollout: [data-parallel rank][mini-batch]."""
        references = [ray.put(shard) for shard in shards]
        calls = [w.load_rollout.remote(references[d]) for w, d in zip(self.workers, self.data_parallel_ranks, strict=True)]
        _wait(calls, "load_rollout", self.log_files)

    def old_logprobs(self, *, check_noise: bool) -> None:
        """Log-probs at theta_old, by forward-only passes in the update's own packing."""
        self._call("old_logprobs", check_noise)

    def kl_to_reference(self) -> list[list[float]]:
        """k1 to the reference policy, summed over each trajectory: per data-parallel rank, in the order of its share."""
        kl = self._call("kl_to_reference")
        by_shard = {d: values for d, values in zip(self.data_parallel_ranks, kl, strict=True) if values is not None}
        return [by_shard[d] for d in sorted(by_shard)]

    def set_advantages(self, shards: list[list[float]]) -> None:
        """Replace the advantages of the rollout's trajectories: per data-parallel rank, in the order of its share."""
        calls = [w.set_advantages.remote(shards[d]) for w, d in zip(self.workers, self.data_parallel_ranks, strict=True)]
        _wait(calls, "set_advantages", self.log_files)

    def update(self) -> dict[str, float]:
        """All optimizer updates of the rollout, one after another; `policy/*` and `mismatch/*` metrics."""
        updates = [self._call("update", k) for k in range(self.settings.trainer.updates_per_step)]
        return update_metrics(updates, self._call("mismatch"))

    def begin_export(self) -> int:
        """Start reading the weights out; returns the number of buckets."""
        return self._call("begin_export")[0]

    def export_bucket(self, index: int) -> list[dict[str, Any] | None]:
        """Assemble one bucket; each rank's payload."""
        return self._call("export_bucket", index)

    def save_hf(self, directory: str | Path) -> dict[str, str]:
        """Write the weights as safetensors files; `{tensor name: file name}`."""
        return {name: file for part in self._call("save_hf", str(directory)) for name, file in part.items()}

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write weights and optimizer."""
        self._call("save_checkpoint", str(directory))

    def load_checkpoint(self, directory: str | Path) -> None:
        """Read weights and optimizer."""
        self._call("load_checkpoint", str(directory))

    def stop(self) -> None:
        """End all ranks, also those that hang or have died."""
        ray.wait([w.shutdown.remote() for w in self.workers], num_returns=len(self.workers), timeout=10)
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return _wait([getattr(w, method).remote(*arguments) for w in self.workers], method, self.log_files)


def _wait(calls: list[ray.ObjectRef], method: str, log_files: list[str]) -> list[Any]:
    """Results of all ranks. The first failure is raised at once: the other ranks may hang in a collective because of it."""
    pending = {call: rank for rank, call in enumerate(calls)}
    results: list[Any] = [None] * len(calls)
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        rank = pending.pop(done[0])
        try:
            results[rank] = ray.get(done[0])
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()[-1]
            raise ActorError(f"training rank {rank} failed in {method}: {cause} (its log: {log_files[rank]})") from error
    return results
