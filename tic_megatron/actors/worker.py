"""One training rank in a process of its own (a Ray actor). Megatron is imported in `setup`, after the output has been
redirected and the environment is set."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tic_megatron.actors.flops import ModelFlops, Usage
from tic_megatron.config import Settings
from tic_megatron.observability.files import disk_problem
from tic_megatron.observability.logs import redirect_output
from tic_megatron.observability.memory import process_memory
from tic_megatron.observability.profiles import Profile
from tic_megatron.observability.stacks import Worker
from tic_megatron.observability.timers import PhaseTimers
from tic_megatron.trajectory import MiniBatch

if TYPE_CHECKING:
    from tic_megatron.actors.megatron.checkpoint import Saving
    from tic_megatron.weights.sending import Export


@dataclass(frozen=True)
class Place:
    """Address and Ray id of a process's node, and the ids of the GPUs there that Ray gave the process."""

    address: str
    node: str
    gpus: list[int]


class ActorWorker(Worker):
    """A rank without a number: `place` tells where it runs, `setup` makes it a rank."""

    def __init__(self, settings: Settings, log_file: str):
        redirect_output(log_file)
        self.settings = settings
        self.saving: Saving | None = None

    def place(self) -> Place:
        """Where Ray has put this process."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Place(ray.util.get_node_ip_address(), node, [int(i) for i in ray.get_gpu_ids()])

    def open_store(self) -> tuple[str, int]:
        """On the rank to be 0: open the store by which the ranks find each other; its host and port."""
        import ray

        from tic_megatron.rendezvous import open_store

        host = ray.util.get_node_ip_address()
        self.store = open_store(host, self.settings.cluster.start_timeout_s)
        return host, self.store.port

    def setup(self, rank: int, world_size: int, address: tuple[str, int], model_path: str) -> tuple[int, str | None]:
        """Join the process groups and load this rank's slices of the model. Returns the data-parallel rank, and a remark for the
        user."""
        import torch

        from tic_megatron.actors.megatron import runtime
        from tic_megatron.rendezvous import join_store

        settings = self.settings
        if settings.cluster.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU in this process, where cluster.device is cuda; see its driver, or give cpu")
        random.seed(settings.run.seed)
        store = self.store if rank == 0 else join_store(*address, settings.cluster.start_timeout_s)
        device = runtime.initialize(
            rank, world_size, store, settings.actor, seed=settings.run.seed, timeout_s=settings.cluster.timeout_s
        )
        from tic_megatron.actors.megatron.backend import MegatronBackend
        from tic_megatron.actors.megatron.export import WeightExporter
        from tic_megatron.actors.step import PolicyStep
        from tic_megatron.weights.plan import ExportLayout
        from tic_megatron.weights.sending import transport_of

        self.backend = MegatronBackend(settings, model_path, device)
        self.step = PolicyStep(self.backend, settings)
        self.exporter = WeightExporter(
            self.backend.weights,
            ExportLayout.of(settings, self.backend.hf),
            self.backend.config.params_dtype,
            device,
            int(settings.rollout.weight_bucket_mib * 2**20),
            transport_of(device.type, colocate=settings.cluster.colocate),
        )
        self.rank = rank
        self.profile: Profile | None = None
        self.flops = ModelFlops.of(self.backend.hf)
        self.busy = PhaseTimers()
        return self.backend.data_parallel_rank, self._remark()

    def _remark(self) -> str | None:
        from tic_megatron.actors.megatron.specs import transformer_engine_problem

        if self.settings.cluster.device == "cpu" or self.settings.actor.precision == "fp32" or not transformer_engine_problem():
            return None
        return (
            f"Transformer Engine cannot be used ({transformer_engine_problem()}): layers are of torch's operations, which are "
            "slower, above all with experts"
        )

    @contextmanager
    def at_work(self, phase: str) -> Iterator[None]:
        """Time a part of a phase, for `usage`."""
        with self.busy(phase):
            yield
            if self.backend.device.type == "cuda":
                import torch

                torch.cuda.synchronize()  # otherwise the next phase would pay for it

    def load_rollout(self, mini_batches: list[MiniBatch], step: int) -> None:
        """Take this rank's share of the rollout of a step, which is profiled from here on if it is one of those."""
        self.busy.reset()
        if step in self.settings.actor.profile_steps:
            self.profile = Profile(self.settings.run.dir, step, self.rank, on_gpu=self.backend.device.type == "cuda")
        with self.at_work("old_logprob"):
            self.step.load(mini_batches)

    def old_logprobs(self, check_noise: bool) -> None:
        """Forward-only passes at theta_old."""
        with self.at_work("old_logprob"):
            self.step.old_logprobs(check_noise=check_noise)

    def kl_to_reference(self) -> list[list[float]] | None:
        """k1 of this rank's trajectories, each [its sum] or by token; None on ranks that report nothing."""
        with self.at_work("old_logprob"):
            return self.step.kl_to_reference()

    def set_advantages(self, advantages: list[float]) -> None:
        """Replace the advantages of this rank's trajectories."""
        self.step.set_advantages(advantages)

    def update(self, k: int) -> Any:
        """One optimizer update; `UpdateStats`, or None on ranks that report nothing."""
        with self.at_work("update"):
            return self.step.update(k)

    def finish_profile(self) -> str | None:
        """Write the profile of this step; what the disk did, if it cannot be written."""
        profile, self.profile = self.profile, None
        try:
            profile.finish()
        except OSError as error:
            return disk_problem(error, profile.path)
        return None

    def usage(self) -> Usage:
        """What this rank has done since the rollout was loaded."""
        import torch

        on_gpu = self.backend.device.type == "cuda"
        return Usage(
            {phase: self.busy.seconds(phase) for phase in ("old_logprob", "update")},
            self.step.model_flops(self.flops) * self.settings.data_parallel_size / self.settings.world_size,
            torch.cuda.get_device_name(self.backend.device) if on_gpu else "cpu",
        )

    def mismatch(self) -> Any:
        """Trainer against generator on this rollout; None on ranks that report nothing."""
        return self.step.finish_mismatch()

    def begin_export(self) -> Export:
        """Start reading the weights out; this rank's `Export`."""
        import ray

        return self.exporter.begin(ray.util.get_node_ip_address(), self.settings.rollout.heartbeat_s)

    def connect(self, n_receivers: int) -> None:
        """Wait until the engines have joined this rank's broadcasts, if it has any."""
        self.exporter.connect(n_receivers, self.settings.rollout.heartbeat_s)

    def export_bucket(self, index: int) -> dict[str, Any] | None:
        """Assemble one bucket."""
        return self.exporter.export(index)

    def deliver_bucket(self, index: int) -> None:
        """Broadcast an assembled bucket, if it is this rank's."""
        self.exporter.deliver(index)

    def weight_digests(self) -> dict[str, Any] | None:
        """Digests of this rank's parameters as Hugging Face tensors."""
        return self.exporter.digests()

    def release_optimizer(self) -> None:
        """Leave the GPU to the engines, but for the parameters, which are to be sent."""
        self.backend.release_optimizer()

    def release_parameters(self) -> None:
        """Leave the GPU to the engines."""
        self.backend.release_parameters()

    def restore(self) -> None:
        """Come back to the GPU."""
        self.backend.restore()

    def save_hf(self, directory: str) -> dict[str, str]:
        """Write this rank's part of a Hugging Face checkpoint; `{tensor name: file name}`."""
        return self.exporter.save(Path(directory))

    def begin_checkpoint(self, directory: str) -> None:
        """Copy this rank's part of a checkpoint, and begin to write it."""
        from tic_megatron.actors.megatron.checkpoint import Saving

        self.saving = Saving(self.backend, Path(directory), check=self.saving is None)

    def checkpoint_written(self) -> dict[str, Any] | None:
        """None while it is being written; then what `complete_checkpoint` needs, or a problem."""
        return self.saving.written()

    def complete_checkpoint(self, written: list[dict[str, Any]]) -> dict[str, Any]:
        """On rank 0, when all ranks have written."""
        return self.saving.complete(written)

    def load_checkpoint(self, directory: str) -> None:
        """Read this rank's part of a checkpoint."""
        from tic_megatron.actors.megatron.checkpoint import load

        load(self.backend, Path(directory))

    def memory(self) -> dict[str, int]:
        """What this process holds, in bytes (`process_memory`)."""
        return process_memory(on_gpu=self.backend.device.type == "cuda")

    def shutdown(self) -> None:
        """Free what outlives the process: shared memory."""
        if hasattr(self, "exporter"):
            self.exporter.close()
