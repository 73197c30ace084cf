"""Checks before a run against the machine: its devices, its memory, the cluster that it is to join."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tic_megatron.commands.engine_layout import check_cache_memory, check_engine_devices, check_engine_memory, core_warnings
from tic_megatron.commands.model_files import count_parameters
from tic_megatron.config import Settings, SettingsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def choose_device(settings: Settings) -> None:
    """Replace `cluster.device: auto`; SettingsError for GPUs that the settings want and this machine lacks."""
    import torch

    cluster = settings.cluster
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cluster.device == "auto":
        cluster.device = "cuda" if gpus else "cpu"
    if cluster.device == "cpu":
        return
    if settings.rollout.steps_ahead and cluster.colocate:
        raise SettingsError(
            "rollout.steps_ahead is 1, but cluster.colocate has the engines share the actors' GPUs, where they sleep while the "
            "actors train; give 0, or engines with GPUs of their own"
        )
    if cluster.address is None and not gpus:  # a running cluster's nodes may differ from this machine
        raise SettingsError("cluster.device is cuda, but this machine has no GPU that torch can use; give cpu or auto")
    if cluster.address is None and cluster.nodes > 1:
        raise SettingsError(
            f"cluster.nodes is {cluster.nodes}, but without cluster.address the run has this machine only; start Ray on the "
            "nodes and give its address, or give 1"
        )
    if cluster.address is None and gpus < cluster.gpus_per_node:
        raise SettingsError(f"cluster.gpus_per_node is {cluster.gpus_per_node}, but this machine has {gpus} GPUs; lower it")
    if settings.rollout.replay is None:
        check_engine_devices(settings, gpus)


def check_cluster(address: str | None) -> None:
    """Refuse an address where nothing answers; joining it would hang, and then fail."""
    if address is None:
        return
    if address == "auto":
        address = _running_cluster()
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last of a name that cannot be one of a machine
        reason = getattr(error, "strerror", None) or "no answer"
        raise SettingsError(
            f"cluster.address: there is no Ray cluster at {address} ({reason}); start one with `ray start --head`, or correct it"
        ) from error


def _running_cluster() -> str:
    """What Ray takes `auto` for."""
    from ray._private.services import canonicalize_bootstrap_address

    with suppress(ConnectionError, ValueError):  # the second of a RAY_ADDRESS that is none
        address = canonicalize_bootstrap_address("auto")
        if address is not None:
            return address
    raise SettingsError(
        "cluster.address is auto, but no Ray cluster runs on this machine (and RAY_ADDRESS names none); start one with "
        "`ray start --head`, or leave it out"
    )


def check_engines(settings: Settings, hf_config: PretrainedConfig, directory: Path) -> None:
    """Memory, which vLLM would find too small when it has started, and kernels, which it would miss in the first rollout."""
    if settings.rollout.replay is not None:
        return
    check_engine_memory(hf_config, count_parameters(directory), settings, _gpu_bytes(settings))
    if settings.cluster.device == "cpu" and settings.cluster.address is None:
        check_cache_memory(settings, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if settings.cluster.device == "cpu" and hf_config.head_dim % 32:
        raise SettingsError(
            f"model.path: {settings.model.path} has head_dim {hf_config.head_dim}, but vLLM's attention on CPUs needs a multiple "
            "of 32; use a GPU, another model, or rollout.replay"
        )


def _gpu_bytes(settings: Settings) -> int | None:
    import torch

    known = settings.cluster.device == "cuda" and settings.cluster.address is None
    return torch.cuda.get_device_properties(0).total_memory if known else None


def cpu_warnings(settings: Settings) -> list[str]:
    """A line for the user when this machine has fewer cores than the run has processes that compute, or a cluster's GPUs would be
    left alone."""
    if settings.cluster.device != "cpu":
        return []
    if settings.cluster.address is not None:
        return ["cluster.device is cpu: GPUs that the cluster's nodes may have are not used; give cluster.device cuda for them"]
    return core_warnings(settings, len(os.sched_getaffinity(0)))
