"""Shared by all tests: settings of torch and Ray, before these are imported; and one pool of ranks."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# As `start_cluster` has it. Otherwise the workers of a test's own Ray starve beside those of a test that runs at the same time.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="module")
def ray_cluster():
    """A Ray of this module's own, on the loopback: without "local" it would join any that runs on the machine."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """Folder of the quickstart's task (`tests.runs.make_task`)."""
    from tests.runs import make_task

    return make_task(tmp_path_factory.mktemp("task") / "seed_0")


@pytest.fixture(scope="session")
def rank_pool():
    with RankPool() as pool:
        yield pool
