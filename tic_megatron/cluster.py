"""Ray: joining or starting a cluster, and where the training ranks go."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tic_megatron.config import Settings, SettingsError
from tic_megatron.preemption import kept_from_children
from tic_megatron.remote import WorkerError

OBJECT_STORE_BYTES = 512 * 2**20
"""Object store of a local cluster without GPUs: rollouts pass through it, weights do not."""


RESERVE_TIMEOUT_S = 120.0
"""Seconds to wait for places that others hold, or for nodes that are still joining."""


class Cluster:
    """Reserved places: a bundle per training rank; and where engines have devices of their own, a bundle per engine, which lies
    on one node. A rank has a CPU, and a GPU where the device is CUDA."""

    def __init__(self, settings: Settings, actors: PlacementGroup | None, engines: PlacementGroup | None):
        self.device = settings.cluster.device
        self.threads = settings.actor.threads
        self.run_dir = settings.run.dir
        self.actors = actors
        self.engines = engines

    def engine_places(self) -> list[dict[str, Any]] | None:
        """Per engine, the Ray options that put it into its bundle; None when the engines share the actors' devices."""
        if self.engines is None:
            return None
        return [
            {
                "num_cpus": bundle["CPU"],
                "num_gpus": bundle.get("GPU", 0),
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self.engines, placement_group_bundle_index=index),
            }
            for index, bundle in enumerate(self.engines.bundle_specs)
        ]

    def actor_options(self, index: int) -> dict[str, Any]:
        """Ray options of one training process."""
        on_gpu = self.device == "cuda"
        environment = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        if not on_gpu:
            environment |= {"CUDA_VISIBLE_DEVICES": ""}  # on a machine with GPUs, which a rank would take otherwise
        if on_gpu:
            # Megatron's overlap wants one hardware queue, set before CUDA starts, and in training processes only.
            environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
            # NCCL's record of its collectives, written when one has timed out: which one, and which rank is missing in it.
            environment |= {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
            environment |= {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{self.run_dir}/logs/nccl_trace_"}
        return {
            "num_cpus": 1,
            "num_gpus": 1 if on_gpu else 0,
            "runtime_env": {"env_vars": environment},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.actors, placement_group_bundle_index=index),
        }


@contextmanager
def start_cluster(settings: Settings, *, actors: bool = True, restart: bool = False) -> Iterator[Cluster]:
    """Connect to `cluster.address`, or start Ray on this machine (on the loopback, without a dashboard, with a token that only
    this run knows), and reserve places; without `actors`, for engines apart alone.

    Raises SettingsError when the cluster has fewer places than the layout needs. In a `restart` there were enough, and a lost
    node may be replaced: they are waited for (`cluster.start_timeout_s`), and then it is a WorkerError.
    """
    local = settings.cluster.address is None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its workers a low priority (nice 15): beside anything else on a shared machine, training would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray would hide the GPUs from the engines, which take none of its own but share the actors'.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if local:
        on_gpu = settings.cluster.device == "cuda"
        own_ranks = settings.rollout.engines * settings.rollout.tensor_parallel_size if _engines_apart(settings) else 0
        actor_cpus, actor_gpus = (settings.world_size, settings.cluster.gpus_per_node) if actors else (0, 0)
        options |= {
            "include_dashboard": False,
            "num_cpus": actor_cpus + own_ranks,  # logical: how many ranks fit, whatever the machine has
            "num_gpus": actor_gpus + own_ranks if on_gpu else 0,
            "_node_ip_address": "127.0.0.1",
        }
        if not on_gpu:
            options["object_store_memory"] = OBJECT_STORE_BYTES
    with closed_to_others() if local else nullcontext():
        with kept_from_children():
            _connect(settings.cluster.address or "local", options)
        groups: list[PlacementGroup] = []
        try:
            for what, bundles in _wanted(settings, actors=actors).items():
                groups.append(_reserve(what, bundles, settings.cluster.start_timeout_s if restart else None))
            yield Cluster(settings, groups[0] if actors else None, groups[-1] if _engines_apart(settings) else None)
        finally:
            if not local:
                for group in groups:
                    remove_placement_group(group)
            ray.shutdown()


def _connect(address: str, options: dict[str, Any]) -> None:
    """Start Ray or join it. WorkerError when it is too slow or fails, as on a machine that is busy: another try may do."""
    try:
        ray.init(address=address, **options)
    except (TypeError, ValueError):
        raise
    except Exception as error:  # Ray has no exceptions of its own for this
        raise WorkerError(f"Ray does not start: {str(error).strip().partition(chr(10))[0]}", may_pass=True) from error


@contextmanager
def closed_to_others() -> Iterator[None]:
    """A Ray cluster that is started meanwhile listens on the loopback only, to those only who know a new token.

    Ray takes `127.0.0.1` for the machine's public address, and then listens on all of them; what it does on a Mac, where it has
    no clusters of several machines, is what is wanted. Its token authentication is on for a cluster on one machine, but with a
    token that all of a user's clusters share, in a file of the home directory. Ours is in the environment of this process and
    its children only. A token that the user gives (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH), and RAY_AUTH_MODE, are left as they are.
    """
    environment = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    before = {name: os.environ.get(name) for name in environment}
    several_machines = ray_constants.ENABLE_RAY_CLUSTER  # read from the environment when Ray was imported
    os.environ.update(environment)
    ray_constants.ENABLE_RAY_CLUSTER = False
    AuthenticationTokenLoader.instance().reset_cache()  # of an earlier cluster of this process
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = several_machines
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})
        AuthenticationTokenLoader.instance().reset_cache()


def _engines_apart(settings: Settings) -> bool:
    """Whether there are engines with devices of their own."""
    return not settings.cluster.colocate and settings.rollout.replay is None


def _wanted(settings: Settings, *, actors: bool = True) -> dict[str, list[dict[str, float]]]:
    """Bundles of the actors, and of engines with devices of their own, under the words for them in a message.

    The actors come first, so that they lie on as few nodes as they fit on; a bundle, and so an engine, is never split.
    """

    def bundle(ranks: int) -> dict[str, float]:
        return {"CPU": float(ranks)} | ({"GPU": float(ranks)} if settings.cluster.device == "cuda" else {})

    wanted = {}
    if actors:
        wanted[f"{settings.world_size} actors (cluster.nodes x cluster.gpus_per_node)"] = [bundle(1)] * settings.world_size
    if _engines_apart(settings):
        engines, size = settings.rollout.engines, settings.rollout.tensor_parallel_size
        besides = ", besides the actors" if actors else ""
        wanted[f"{engines} engines (rollout.engines, each on one node{besides})"] = [bundle(size)] * engines
    return wanted


def _reserve(what: str, bundles: list[dict[str, float]], patience_s: float | None = None) -> PlacementGroup:
    """`patience_s`: of a run that had its places before."""
    group = placement_group(bundles, strategy="PACK")
    end = time.monotonic() + (RESERVE_TIMEOUT_S if patience_s is None else patience_s)
    while not (placed := group.wait(timeout_seconds=1.0)) and time.monotonic() < end:
        pass  # Ray's wait lets no signal through
    if not placed:
        have, free = ray.cluster_resources(), ray.available_resources()
        there = ", ".join(f"{free.get(kind, 0):g} of {have.get(kind, 0):g} {kind}s" for kind in bundles[0])
        remove_placement_group(group)
        need = " and ".join(f"{amount:g} {kind}{'s' if amount > 1 else ''}" for kind, amount in bundles[0].items())
        problem = f"cluster: {what} need {need} each, but the Ray cluster has {there} free"
        if patience_s is not None:
            raise WorkerError(f"{problem}, {patience_s:g} s after a failure (cluster.start_timeout_s)", may_pass=True)
        raise SettingsError(f"{problem}; lower the layout or wait for free nodes")
    return group
