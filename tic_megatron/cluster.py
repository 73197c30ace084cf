"""Ray: joining or starting a cluster, and where the training ranks go."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tic_megatron.config import Settings, SettingsError

OBJECT_STORE_BYTES = 512 * 2**20
"""Object store of a local cluster without GPUs: rollouts pass through it, weights do not."""


class Cluster:
    """One bundle per training rank: a CPU, and a GPU where the actors run on CUDA."""

    def __init__(self, settings: Settings, group: PlacementGroup):
        self.device = settings.cluster.device
        self.threads = settings.actor.threads
        self.group = group

    def actor_options(self, index: int) -> dict[str, Any]:
        """Ray options of one training process."""
        on_gpu = self.device == "cuda"
        environment = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        if on_gpu:
            # Megatron's overlap wants one hardware queue, set before CUDA starts, and in training processes only.
            environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        return {
            "num_cpus": 1,
            "num_gpus": 1 if on_gpu else 0,
            "runtime_env": {"env_vars": environment},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index),
        }


@contextmanager
def start_cluster(settings: Settings) -> Iterator[Cluster]:
    """Connect to `cluster.address`, or start Ray on this machine (on the loopback, without a dashboard), and reserve places.

    Raises SettingsError when the cluster has fewer places than the layout needs.
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
        options |= {
            "include_dashboard": False,
            "num_cpus": settings.world_size,  # logical: how many ranks fit, whatever the machine has
            "num_gpus": settings.cluster.gpus_per_node if on_gpu else 0,
            "_node_ip_address": "127.0.0.1",
        }
        if not on_gpu:
            options["object_store_memory"] = OBJECT_STORE_BYTES
    ray.init(address=settings.cluster.address or "local", **options)
    group = None
    try:
        group = _reserve(settings)
        yield Cluster(settings, group)
    finally:
        if group is not None and not local:
            remove_placement_group(group)
        ray.shutdown()


def _reserve(settings: Settings) -> PlacementGroup:
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if settings.cluster.device == "cuda" else {})
    group = placement_group([bundle] * settings.world_size, strategy="PACK")
    if not group.wait(timeout_seconds=120):
        have = {kind: ray.cluster_resources().get(kind, 0) for kind in bundle}
        remove_placement_group(group)
        raise SettingsError(
            f"cluster: {settings.world_size} ranks (cluster.nodes x cluster.gpus_per_node) need {bundle} each, "
            f"but the Ray cluster has {have} in all; lower the layout or wait for free nodes"
        )
    return group
