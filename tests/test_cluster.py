"""Places for actors and engines in a real Ray cluster. Its GPUs are logical ones: Ray deals them out as it does real ones."""

from __future__ import annotations

import os

import pytest
import ray
from ray.cluster_utils import Cluster as RayNodes

from tic_megatron import cluster as places
from tic_megatron.actors.group import ActorGroup
from tic_megatron.actors.worker import Place
from tic_megatron.cluster import start_cluster
from tic_megatron.commands.machine import check_cluster
from tic_megatron.config import Settings, SettingsError
from tic_megatron.remote import WorkerError


def settings_for(*, device="cpu", actors=2, engines=2, tp_size=2, colocate=False, replay=None, address=None):
    settings = Settings()
    settings.cluster.device, settings.cluster.gpus_per_node, settings.cluster.colocate = device, actors, colocate
    settings.cluster.address = address
    settings.rollout.engines, settings.rollout.tensor_parallel_size, settings.rollout.replay = engines, tp_size, replay
    return settings


class Worker:
    def place(self):
        context = ray.get_runtime_context()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        resources = {kind: n for kind, n in context.get_assigned_resources().items() if kind in ("CPU", "GPU")}
        return context.get_node_id(), resources, [int(gpu) for gpu in gpus.split(",") if gpu]


def start_all(settings, cluster):
    """(node, resources, visible GPUs) of every actor and of every engine."""
    remote = ray.remote(Worker)
    options = [cluster.actor_options(index) for index in range(settings.world_size)]
    workers = [remote.options(**o).remote() for o in [*options, *cluster.engine_places()]]
    found = ray.get([worker.place.remote() for worker in workers], timeout=120)
    return found[: settings.world_size], found[settings.world_size :]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engines_apart_have_their_own_devices(device):
    settings = settings_for(device=device)
    with start_cluster(settings) as cluster:
        actors, engines = start_all(settings, cluster)
        given = cluster.actor_options(0)["runtime_env"]["env_vars"].get("CUDA_VISIBLE_DEVICES")
    assert given == ("" if device == "cpu" else None)  # an actor on a CPU does not look at the machine's GPUs
    gpu = [{"GPU": 1.0}, {"GPU": 2.0}] if device == "cuda" else [{}, {}]
    assert [resources for _, resources, _ in actors] == [{"CPU": 1.0} | gpu[0]] * 2
    assert [resources for _, resources, _ in engines] == [{"CPU": 2.0} | gpu[1]] * 2
    visible = [gpus for _, _, gpus in [*actors, *engines]]
    assert [len(gpus) for gpus in visible] == ([1, 1, 2, 2] if device == "cuda" else [0] * 4)
    assert len({gpu for gpus in visible for gpu in gpus}) == (6 if device == "cuda" else 0)  # none is shared


@pytest.mark.parametrize("changes", [{"colocate": True}, {"replay": "runs/x"}], ids=["colocated", "no engines"])
def test_nothing_is_reserved_for_engines_without_devices_of_their_own(changes):
    assert [len(bundles) for bundles in places._wanted(settings_for()).values()] == [2, 2]
    assert [len(bundles) for bundles in places._wanted(settings_for(**changes)).values()] == [2]


@pytest.fixture
def nodes(monkeypatch):
    """A running cluster of two nodes."""
    monkeypatch.setattr(places, "RESERVE_TIMEOUT_S", 5.0)
    try:
        started = RayNodes(initialize_head=True, head_node_args={"num_cpus": 5})
    except RuntimeError:  # on a busy machine Ray's 15 seconds may not be enough
        started = RayNodes(initialize_head=True, head_node_args={"num_cpus": 5})
    started.add_node(num_cpus=4)
    yield started
    started.shutdown()


def test_colocated_engines_lie_where_their_actors_do(nodes, tmp_path):
    settings = settings_for(actors=8, engines=4, colocate=True, address=nodes.address)
    with start_cluster(settings) as cluster:
        actors = ActorGroup.start(settings, cluster, log_dir=tmp_path)
        assert cluster.engine_places() is None
        engines = [ray.remote(Worker).options(**place).remote() for place in actors.shared_places()]
        found = ray.get([engine.place.remote() for engine in engines], timeout=120)
        assert [node for node, _, _ in found] == [actors.places[rank].node for rank in (0, 2, 4, 6)]
        assert len({node for node, _, _ in found}) == 2
        assert all(not resources for _, resources, _ in found)  # beside the actors', which fill the places
        actors.stop()


def test_colocated_engines_see_the_gpus_of_their_actors():
    ranks = [Place("10.0.0.1", "a" * 56, [gpu]) for gpu in (4, 6, 7)] + [Place("10.0.0.2", "b" * 56, [0])]
    settings = settings_for(device="cuda", actors=4, engines=1, colocate=True)
    (place,) = ActorGroup(settings, None, ranks).shared_places()
    assert place["runtime_env"]["env_vars"] == {"CUDA_VISIBLE_DEVICES": "4,6"} and place["num_gpus"] == 0
    settings.rollout.engines = 2
    with pytest.raises(SettingsError, match="GPUs of actors 2 to 3, which an engine shares, lie on several nodes"):
        ActorGroup(settings, None, ranks).shared_places()


def test_cpus_of_several_machines_share_no_memory():
    settings = settings_for(actors=2, engines=1, colocate=True)
    ranks = [Place("10.0.0.1", "a" * 56, []), Place("10.0.0.2", "b" * 56, [])]
    with pytest.raises(SettingsError, match=r"CPUs of 2 machines \(10.0.0.1, 10.0.0.2\).*give --cluster.colocate false"):
        ActorGroup(settings, None, ranks).shared_places()


def test_an_engine_lies_on_one_node_and_too_small_clusters_are_refused(nodes):
    settings = settings_for(actors=3, engines=3, address=nodes.address)
    with start_cluster(settings) as cluster:
        actors, engines = start_all(settings, cluster)
        assert len({node for node, _, _ in actors}) == 1
        assert len({node for node, _, _ in engines}) == 2
    # One CPU too few altogether; and enough of them, but not on one node.
    for engines, tp_size, free in ((4, 2, 6), (1, 5, 6)):
        with (
            pytest.raises(
                SettingsError,
                match=rf"{engines} engines .*each on one node.* need {tp_size} CPUs each, but .* has {free} of 9 CPUs free",
            ),
            start_cluster(settings_for(actors=3, engines=engines, tp_size=tp_size, address=nodes.address)),
        ):
            raise AssertionError("the cluster is too small")
    with (
        pytest.raises(SettingsError, match=r"10 actors .* need 1 CPU each, but .* has 9 of 9 CPUs"),
        start_cluster(settings_for(actors=10, colocate=True, address=nodes.address)),
    ):
        raise AssertionError("the cluster is too small")
    # When the run had its places before, a node is missing, and may be replaced.
    settings = settings_for(actors=10, colocate=True, address=nodes.address)
    settings.cluster.start_timeout_s = 1.0
    message = r"10 actors .* need 1 CPU each, but .* has 9 of 9 CPUs free, 1 s after a failure \(cluster\.start_timeout_s\)"
    with pytest.raises(WorkerError, match=message) as error, start_cluster(settings, restart=True):
        raise AssertionError("the cluster is too small")
    assert error.value.may_pass


def test_a_start_of_ray_that_fails_may_be_tried_again(monkeypatch):
    def too_slow(**options):
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", too_slow)
    message = r"^Ray does not start: The current node timed out during startup\.$"
    with pytest.raises(WorkerError, match=message) as error, start_cluster(settings_for()):
        pass
    assert error.value.may_pass


def test_no_cluster_is_running(monkeypatch):
    def nothing(address):
        raise ConnectionError

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", nothing)
    with pytest.raises(SettingsError, match=r"cluster\.address is auto, but no Ray cluster runs on this machine"):
        check_cluster("auto")
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda address: None)  # RAY_ADDRESS=local
    with pytest.raises(SettingsError, match=r"RAY_ADDRESS names none"):
        check_cluster("auto")
