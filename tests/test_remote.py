"""Workers that die, raise or hang: who is blamed, where they hang, and whether a fresh start may help."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
import torch
import torch.distributed as dist

from tic_megatron.config import ActorSettings, ClusterSettings
from tic_megatron.observability.logs import redirect_output
from tic_megatron.observability.stacks import Worker, almost_over, last_stack
from tic_megatron.remote import Deadline, WorkerError, WorkerPool

RAISED = {"memory", "fault", "disk", "device"}


class Rank(Worker):
    """Of a gloo group."""

    def __init__(self, log_file):
        redirect_output(log_file)

    def setup(self, rank, size, store):
        self.rank = rank
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)

    def pid(self):
        return os.getpid()

    def update(self, deeds):
        deed = deeds.get(self.rank, "")
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if deed == "hang":
            time.sleep(600)
        if "give up" in deeds.values():  # as NCCL ends a process whose collective has timed out, before the driver's deadline
            faulthandler.dump_traceback_later(0.5, file=sys.stderr)
            if not deed:
                time.sleep(600)
            threading.Timer(2.0, os.abort).start()
            dist.recv(torch.ones(1), src=1 - self.rank)
        if not deed and RAISED & set(deeds.values()):
            return self.rank  # a raise does not end its process, so the test need not start new ones
        if deed == "memory":
            raise torch.OutOfMemoryError("too small")
        if deed == "fault":
            raise ValueError("mine")
        if deed == "disk":
            raise OSError("the disk is gone")
        if deed == "device":
            raise torch.AcceleratorError("the device is gone")
        dist.all_reduce(torch.ones(1))
        return self.rank

    def begin_export(self):
        time.sleep(3)

    def shutdown(self):
        pass


@contextlib.contextmanager
def start(folder):
    """Two ranks."""
    cluster = ClusterSettings(timeout_s=6.0, weight_sync_timeout_s=1.0, start_timeout_s=60.0)
    logs = [str(folder / f"actor_{rank}.log") for rank in range(2)]
    workers = [ray.remote(Rank).options(num_cpus=0).remote(log) for log in logs]
    pool = WorkerPool("training rank", workers, logs, deadline=functools.partial(Deadline.of, cluster))
    pool.call_each("setup", [(rank, 2, folder / "store") for rank in range(2)])
    pids = pool.call("pid")
    yield pool
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def pool(ray_cluster, tmp_path_factory):
    with start(tmp_path_factory.mktemp("pool")) as pool:
        yield pool


@pytest.fixture
def doomed(ray_cluster, tmp_path):
    with start(tmp_path) as pool:
        yield pool


@pytest.mark.parametrize(
    ("deed", "may_pass", "words"),
    [
        ("disk", True, r"^training rank 1 failed in update: OSError: the disk is gone \(its log: .*actor_1.log\)$"),
        ("device", True, r"training rank 1 failed in update: .*AcceleratorError: the device is gone"),
        ("memory", False, r"training rank 1 failed in update: .*OutOfMemoryError: too small"),
        ("fault", False, r"training rank 1 failed in update: ValueError: mine"),
    ],
)
def test_whether_a_fresh_start_may_help(pool, deed, may_pass, words):
    assert pool.call("update", {}) == [0, 1]
    with pytest.raises(WorkerError, match=words) as error:
        pool.call("update", {1: deed})
    assert error.value.may_pass == may_pass


def test_the_one_that_died_is_blamed_and_not_the_one_that_lost_it(doomed):
    with pytest.raises(WorkerError, match=r"^training rank 1 failed in update: .*died.* \(its log: .*actor_1.log\)$") as error:
        doomed.call("update", {1: "die"})
    assert error.value.may_pass


def test_a_death_is_told_with_the_places_where_the_dead_and_the_others_were_stuck(doomed):
    words = r"^training rank 1 failed in update: .*died.*; stuck in 1: recv \(.*\); 0: update"
    with pytest.raises(WorkerError, match=words) as error:
        doomed.call("update", {1: "give up"})
    assert error.value.may_pass


STUCK = """
import os, sys, time
from tic_megatron.observability.logs import redirect_output
from tic_megatron.observability.stacks import Worker
class Slow(Worker):
    def update(self, end):
        time.sleep(0.5)
        end()
redirect_output(sys.argv[1])
if "slow" in sys.argv:
    Slow().perform("update", 0.1, lambda: None)
if "stuck" in sys.argv:
    Slow().perform("update", 0.1, lambda: os._exit(0))
"""


@pytest.mark.parametrize(
    ("processes", "place"),
    [
        ([], None),
        ([["stuck"]], "update"),
        ([["stuck"], []], None),
        ([["slow"]], None),
        ([["stuck"], ["slow", "stuck"]], "update"),
    ],
)
def test_stacks_of_a_call_that_has_ended_or_of_an_earlier_process_are_nobodys_place(tmp_path, processes, place):
    log = tmp_path / "actor_0.log"
    for deeds in processes:
        subprocess.run([sys.executable, "-c", STUCK, str(log), *deeds], check=True, timeout=60)
    stuck_in = last_stack(str(log))
    assert stuck_in is None if place is None else (stuck_in or "").startswith(place)


@pytest.mark.parametrize(("timeout_s", "minutes"), [(60, 1), (66, 1), (100, 1), (200, 3), (300, 4), (600, 9), (1800, 27)])
def test_collectives_on_gpus_give_up_when_the_stacks_are_written_and_before_the_driver(monkeypatch, timeout_s, minutes):
    """But for the shortest time-outs: Megatron takes whole minutes."""
    from megatron.core import parallel_state, tensor_parallel

    from tic_megatron.actors.megatron import runtime

    groups, world = {}, {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: world.update(options))
    monkeypatch.setattr(parallel_state, "destroy_model_parallel", lambda: None)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **options: groups.update(options))
    monkeypatch.setattr(tensor_parallel, "model_parallel_cuda_manual_seed", lambda seed, **options: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # put back at the end
    runtime.initialize(0, 1, dist.HashStore(), ActorSettings(), seed=0, timeout_s=timeout_s)
    assert groups["distributed_timeout_minutes"] == minutes
    assert world["timeout"].total_seconds() == pytest.approx(almost_over(timeout_s))
    assert almost_over(timeout_s) < timeout_s
    if timeout_s > 67:
        assert almost_over(timeout_s) == 60 * minutes


@pytest.mark.parametrize("deed", ["hang", "stop"])
def test_a_hang_is_told_with_the_place_where_every_rank_is_stuck(doomed, deed):
    with pytest.raises(WorkerError) as error:
        doomed.call("update", {1: deed})
    message = str(error.value)
    assert error.value.may_pass
    assert "no answer in 6 s (cluster.timeout_s), from 2 of 2" in message
    assert "0: all_reduce" in message
    assert {"hang": "1: update", "stop": "1: an unknown place (it wrote no stacks: it may have been stopped)"}[deed] in message
    with open(doomed.log_files[0]) as log:
        text = log.read()
    assert "in all_reduce" in text and "test_remote.py" in text


def test_phases_have_deadlines_of_their_own(pool):
    with pytest.raises(WorkerError, match=r"no answer in 1 s \(cluster.weight_sync_timeout_s\), from 2 of 2"):
        pool.call("begin_export")
