"""From real actors to real engines: what an engine holds after a transfer is what a fresh one loads from the exported model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.models import make_tiny_qwen3
from tests.test_weight_transfer import mixture, untied
from tic_megatron.actors.group import ActorGroup
from tic_megatron.cluster import start_cluster
from tic_megatron.config import Settings
from tic_megatron.rollout.engine import EngineWorker
from tic_megatron.rollout.engines import EngineGroup
from tic_megatron.weights.sending import WeightTransferError, send_weights

LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "ep2": {"expert_parallel_size": 2},
}
BUCKET_MIB = 1 / 32
"""Smaller than the embedding."""


class SpoilableEngine(EngineWorker):
    """An engine that can lose its weights."""

    def spoil(self):
        """Set every tensor to 0."""
        self._llm.collective_rpc(_zero)

    def update_weights(self, payload):
        """Dies in the bucket whose number is in a file beside its log, once."""
        file = Path(self._options.log_file + ".dies")
        if file.exists():
            left = int(file.read_text()) - 1
            file.write_text(str(left))
            if left < 0:
                file.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        super().update_weights(payload)


def _zero(worker):
    for parameter in worker.model_runner.model.parameters():
        parameter.data.zero_()


def settings_of(model, layout=None, *, engine_tp=1, colocate=True):
    settings = Settings()
    settings.model.path = str(model)
    settings.cluster.device, settings.cluster.colocate = "cpu", colocate
    settings.rollout.max_prompt_tokens = settings.rollout.max_response_tokens = 32
    settings.rollout.tensor_parallel_size, settings.rollout.weight_bucket_mib = engine_tp, BUCKET_MIB
    settings.actor.optimizer, settings.actor.distributed_optimizer = "sgd", False
    settings.cluster.gpus_per_node = 1
    for name, size in (layout or {}).items():
        setattr(settings.actor, name, size)
        settings.cluster.gpus_per_node *= size
    return settings


def start_engine(model, log_dir, engine_tp):
    log_dir.mkdir(exist_ok=True)
    settings = settings_of(model, engine_tp=engine_tp)
    return EngineGroup.start(settings, model_path=str(model), device="cpu", log_dir=log_dir, worker=SpoilableEngine)


@pytest.fixture(scope="module")
def cluster():
    settings = settings_of("unused", LAYOUTS["tp2-pp2"])
    with start_cluster(settings) as cluster:
        yield cluster


def export(actors, model, directory):
    """A Hugging Face directory with the actors' weights; its tensors."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    index = {"metadata": {}, "weight_map": actors.save_hf(directory)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    files = [load_file(file) for file in sorted(directory.glob("*.safetensors"))]
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


@contextmanager
def started(group):
    """Actors or engines, which are ended also when the test fails: they would take the processors from those that follow."""
    try:
        yield group
    finally:
        group.stop()


def check_transfers(cluster, tmp_path, make_model, layouts, engine_tp):
    old, new = make_model(tmp_path / "old", seed=1), make_model(tmp_path / "new", seed=2)
    expected = load_file(new / "model.safetensors")
    fresh = None
    with started(start_engine(old, tmp_path / "receiver", engine_tp)) as engine:
        for version, layout in enumerate(layouts, start=1):
            settings = settings_of(new, LAYOUTS[layout], engine_tp=engine_tp)
            with started(ActorGroup.start(settings, cluster, log_dir=tmp_path)) as actors:
                actors.setup(str(new))
                exported = export(actors, new, tmp_path / layout)
                if fresh is None:
                    with started(start_engine(tmp_path / layout, tmp_path / "fresh", engine_tp)) as fresh_engine:
                        fresh = fresh_engine.checksums()
                assert exported.keys() == expected.keys()
                assert all(exported[name].equal(tensor) for name, tensor in expected.items())
                assert actors.begin_export().straight == (engine_tp == 2 and layout == "tp2")
                engine.pool.call("spoil")
                assert engine.checksums() != fresh
                send_weights(actors, engine, version=version, verify=True)
                assert engine.weight_versions() == [version]
                assert engine.checksums() == fresh, layout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine_tp", [pytest.param(1, marks=pytest.mark.repeat), 2])
def test_an_engine_gets_the_bytes_of_a_dense_model(cluster, tmp_path, engine_tp):
    check_transfers(cluster, tmp_path, untied, ["tp1", "tp2", "pp2", "tp2-pp2"], engine_tp)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine_tp", [pytest.param(1, marks=pytest.mark.repeat), 2])
def test_an_engine_gets_the_bytes_of_a_mixture_of_experts(cluster, tmp_path, engine_tp):
    check_transfers(cluster, tmp_path, mixture, list(LAYOUTS), engine_tp)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights_are_broadcast_to_engines_elsewhere(cluster, tmp_path):
    """`cluster.colocate` false: two stages broadcast to two engines; a change on the way is found, and a loss survived."""
    old, new = untied(tmp_path / "old", seed=1), untied(tmp_path / "new", seed=2)
    settings = settings_of(new, LAYOUTS["tp2-pp2"], colocate=False)
    settings.rollout.engines = 2
    started_engines = EngineGroup.start(settings, model_path=str(old), device="cpu", log_dir=tmp_path, worker=SpoilableEngine)
    with started(started_engines) as engines, started(ActorGroup.start(settings, cluster, log_dir=tmp_path)) as actors:
        check_broadcasts(engines, actors, new, tmp_path)


def check_broadcasts(engines, actors, new, tmp_path):
    actors.setup(str(new))
    for version in (1, 2):
        assert len(actors.begin_export().sources) == 2
        send_weights(actors, engines, version=version, verify=True)
        first, second = engines.checksums().values()
        assert first == second
        assert engines.weight_versions() == [version] * 2
        engines.pool.call("spoil")
        assert engines.checksums()[0] != first

    class Liar:
        """Engines that say they have received something else."""

        def __getattr__(self, name):
            return getattr(engines, name)

        def received_digests(self):
            found = engines.received_digests()
            found[1][0]["model.layers.1.mlp.up_proj.weight"] += 1
            return found

    with pytest.raises(WeightTransferError, match=r"engine 1, rank 0: 1 of \d+ tensors .* model\.layers\.1\.mlp\.up_proj"):
        send_weights(actors, Liar(), version=3, verify=True)
    (tmp_path / "engine_0.log.dies").write_text("3")
    send_weights(actors, engines, version=4, verify=True)
    assert [engine.index for engine in engines.serving()] == [1]
    assert engines.checksums()[1] == first
    engines.pool.wait_for_any(all_engines=True)
    send_weights(actors, engines, version=5, verify=True)
    assert list(engines.checksums().values()) == [first, first] and engines.weight_versions() == [5, 5]


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "pp": 2}], ids=["tp1", "tp2", "tp2-pp2"])
def test_sending_takes_the_memory_of_two_buckets(rank_pool, tmp_path, layout):
    """Beyond the shards, whatever the size of a tensor: here the embedding is four buckets large."""
    bucket, world_size = 16 * 2**20, layout.get("tp", 1) * layout.get("pp", 1)
    model = make_tiny_qwen3(
        tmp_path, seed=0, tie_word_embeddings=False, hidden_size=512, intermediate_size=1536, layers=6, vocab_size=32768
    )
    job = {"model": str(model), "max_bytes": bucket, **layout}
    views = rank_pool.run("tests.megatron_ranks:export_memory", world_size=world_size, timeout_s=120, **job)
    assert max(views[0]["buckets"]) <= bucket
    assert sum(views[0]["buckets"]) > 10 * bucket
    assert sum(view["sent"] for view in views) == len(views[0]["buckets"])
    for view in views:
        # An eighth of a bucket for what one parameter takes while it is cut up, and for messages.
        assert view["grown"] < 2 * bucket + bucket // 8, view["grown"] / bucket
