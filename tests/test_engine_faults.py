"""Engines that die, hang, raise, return rubbish or do not start: every prompt is answered once, or set aside and named."""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import threading
import time
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests import fake_engines as fake
from tests.fake_engines import FakeEngine
from tests.models import make_tiny_qwen3
from tests.processes import wait_until_gone
from tic_megatron.config import Settings
from tic_megatron.preemption import Preempted, Preemption
from tic_megatron.remote import WorkerError
from tic_megatron.rollout import pool
from tic_megatron.rollout.engine import EngineWorker
from tic_megatron.rollout.engines import EngineGroup
from tic_megatron.rollout.source import SampledRollouts
from tic_megatron.trajectory import Prompt
from tic_megatron.weights.sending import Export


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=1, tie_word_embeddings=True, layers=1)


@pytest.fixture
def start(ray_cluster, model_dir, tmp_path):
    """Starts engines, and stops them at the end of the test. `lines` is what the user was told."""
    groups = []

    def start(engines=2, worker=FakeEngine, **rollout):
        settings = Settings()
        settings.cluster.device, timeout_s = "cpu", rollout.pop("timeout_s", 30.0)
        settings.cluster.timeout_s = settings.cluster.weight_sync_timeout_s = timeout_s
        settings.run.deterministic = rollout.pop("deterministic", False)
        settings.rollout.engines, settings.rollout.heartbeat_s = engines, 5.0
        settings.rollout.max_concurrent_responses = 8
        for name, value in rollout.items():
            assert hasattr(settings.rollout, name)
            setattr(settings.rollout, name, value)
        lines = []
        group = EngineGroup.start(
            settings, model_path=str(model_dir), device="cpu", log_dir=tmp_path, worker=worker, note=lines.append
        )
        groups.append(group)
        group.lines, group.settings = lines, settings
        group.ready()
        return group

    yield start
    for group in groups:
        group.stop()


def prompts_of(count, *special, tokens=8):
    """Well-behaved prompts, and among them some with a special first token."""
    prompts = [Prompt(f"p{i}", "", "", (i, 1, tokens)) for i in range(count)]
    for place, (deed, when) in zip(range(1, count, 2), special, strict=False):
        prompts[place] = Prompt(f"p{place}", "", "", (deed, when, tokens))
    return prompts


def sample(group, prompts, finished=lambda groups: None):
    return group.sample(prompts, group_size=2, temperature=1.0, top_p=1.0, max_tokens=16, seed=3, finished=finished)


def answers(rollout):
    return [[t.response_ids for t in group.trajectories] for group in rollout.groups]


@pytest.mark.parametrize(
    ("engines", "deed", "reason"),
    [
        (1, fake.DIE, "died"),
        (2, fake.DIE, "died"),
        (1, fake.HANG, r"no sign of life for 3 s (rollout.heartbeat_s)"),
        (2, fake.HANG, r"no sign of life for 3 s (rollout.heartbeat_s)"),
        (2, fake.RAISE, "an illegal memory access"),
        (1, fake.SHORT, "it returns rubbish: a response has 8 tokens and 7 log-probs"),
        (2, fake.STRANGER, "it returns rubbish: it answers what it was not asked"),
    ],
)
def test_a_failing_engine_is_replaced_and_its_prompts_are_issued_again(start, engines, deed, reason):
    group = start(engines, heartbeat_s=3.0 if deed == fake.HANG else 60.0)
    pids = group.ready()
    expected = answers(sample(group, prompts_of(12)))
    seen = []
    prompts = prompts_of(12, (deed, fake.ONCE))
    rollout = sample(group, prompts, seen.extend)
    assert [g.prompt for g in rollout.groups] == prompts and not rollout.set_aside
    assert answers(rollout) == expected
    assert sorted(g.prompt.id for g in seen) == sorted(p.id for p in prompts)  # told once each
    assert group.pool.failures == group.pool.restarts == 1 and rollout.outcome.reissued >= 1
    (line,) = group.lines
    assert reason in line and "engine_" in line and ".log" in line
    group.pool.wait_for_any(all_engines=True)
    assert len(set(pids) - {engine.pid for engine in group.pool.engines}) == 1
    assert wait_until_gone(list(set(pids) - {engine.pid for engine in group.pool.engines})) == []
    assert answers(sample(group, prompts_of(12))) == expected


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize("deed", [fake.DIE, fake.FOREIGN])
def test_a_prompt_that_kills_engines_is_set_aside_and_named(start, tmp_path, deed, engines):
    group = start(engines)
    prompts = prompts_of(10, (deed, 0))
    rollout = sample(group, prompts)
    ((prompt, reason),) = rollout.set_aside
    assert prompt.id == "p1" and "engines failed on it" in reason
    assert [g.prompt.id for g in rollout.groups] == [f"p{i}" for i in range(10) if i != 1]
    (mark,) = tmp_path.glob("done_*")
    assert 2 <= len(mark.read_text().splitlines()) == group.pool.failures <= 3
    held_out = group.generate(prompts, group_size=2, temperature=1.0, top_p=1.0, max_tokens=16, seed=3)
    assert held_out.set_aside == rollout.set_aside and answers(held_out) == answers(rollout)


def test_a_refused_prompt_costs_no_engine(start):
    group = start(2)
    once, always = prompts_of(6, (fake.REFUSE, fake.ONCE)), prompts_of(6, (fake.REFUSE, 0))
    assert len(sample(group, once).groups) == 6
    rollout = sample(group, always)
    assert [(p.id, reason) for p, reason in rollout.set_aside] == [("p1", "it is too long")]
    nothing = group.generate(always[1:2], group_size=2, temperature=1.0, top_p=1.0, max_tokens=16, seed=3)
    assert nothing.groups == [] and nothing.set_aside == [(always[1], "it is too long")]
    assert group.pool.failures == 0


def test_an_engine_that_does_not_start_any_more_ends_the_run(start, tmp_path):
    group = start(1)
    (tmp_path / "no_start_0").touch()
    with pytest.raises(WorkerError, match=r"engine 0 failed in its start: .*3 starts in a row.*engine_0\.log"):
        sample(group, prompts_of(4, (fake.DIE, fake.ONCE)))


def test_an_engine_that_never_starts_is_named_at_once(start, tmp_path):
    (tmp_path / "no_start_1").touch()
    with pytest.raises(WorkerError, match=r"engine 1 failed in ready: .*no room on this GPU.*engine_1\.log"):
        start(2)


class Unloadable(EngineWorker):
    """The real one, with a vLLM that loads nothing."""

    ERROR: Exception

    def __init__(self, options):
        vllm, config = ModuleType("vllm"), ModuleType("vllm.config")
        vllm.LLM, config.WeightTransferConfig = self._load, dict
        sys.modules |= {"vllm": vllm, "vllm.config": config}
        super().__init__(options)

    def _load(self, **arguments):
        raise self.ERROR


class TooLarge(Unloadable):
    ERROR = ValueError("no memory is left for the cache blocks")


class Unreadable(Unloadable):
    ERROR = OSError("stale file handle")


class Untold(Unloadable):
    ERROR = Exception("a process of the engine did not start")


@pytest.mark.parametrize(("worker", "may_pass"), [(TooLarge, False), (Unreadable, True), (Untold, True)])
def test_a_failed_load_is_judged_by_its_cause(start, worker, may_pass):
    """What a second try would meet again does not start the run again."""
    words = rf"^engine 0 failed in ready: {type(worker.ERROR).__name__}: {worker.ERROR} \(its log: .*engine_0\.log\)$"
    with pytest.raises(WorkerError, match=words) as error:
        start(1, worker)
    assert error.value.may_pass == may_pass


def test_hung_and_stopped_processes_do_not_outlive_the_engines(start, monkeypatch):
    monkeypatch.setattr(pool, "STOP_TIMEOUT_S", 2.0)
    group = start(2)
    pids = group.ready()
    os.kill(pids[0], signal.SIGSTOP)
    group.stop()
    assert wait_until_gone(pids) == []


def test_a_rollout_that_was_given_up_leaves_nothing_to_the_next(start):
    """A rollout ends with an error of the caller's; its requests are still with the engines."""
    group = start(1)

    def fail(_):
        raise KeyError("no room on the disk")

    with pytest.raises(KeyError):
        sample(group, prompts_of(12), fail)
    assert [g.prompt.id for g in sample(group, prompts_of(12)[::-1]).groups] == [f"p{i}" for i in range(12)][::-1]
    assert group.pool.failures == 0


def test_random_kills_during_rollouts(start):
    """Process after process is killed from outside; no prompt is lost or answered twice, and all are answered alike."""
    group = start(2)
    prompts = prompts_of(40, tokens=16)
    expected = answers(sample(group, prompts))
    draw, over = random.Random(0), threading.Event()
    killed = []

    def kill():
        while not over.wait(draw.uniform(0.3, 1.0)) and len(killed) < 8:
            engine = draw.choice(group.pool.engines)
            # Not again before the last one is replaced: a prompt that is alone at the end would be met twice, and set aside.
            if not group.pool.loading and psutil.pid_exists(engine.pid):
                killed.append(engine.pid)
                os.kill(engine.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while len(killed) < 8:
            rollout = sample(group, prompts)
            assert not rollout.set_aside and answers(rollout) == expected
    finally:
        over.set()
        killer.join()
    assert group.pool.failures >= 4


# ---- weight updates, with actors that only count ----


class FakeActors:
    """Sends nothing but a payload that tells engines what to do; remembers the order of calls."""

    def __init__(self):
        self.calls = []
        self.payloads = [{}]

    def begin_export(self):
        return Export(n_buckets=2, straight=False, sources=[])

    def export_bucket(self, index):
        handle = self.payloads[0] if index == 0 else {}
        if index == 0 and len(self.payloads) > 1:
            self.payloads.pop(0)
        return lambda: [{"blocks": [], "nbytes": 0, "handle": handle}]

    def weight_digests(self):
        return []

    def __getattr__(self, name):
        return lambda: self.calls.append(name)


class NoRewards:
    """Grades nothing."""

    def grade_groups(self, groups):
        from tic_megatron.rewards.workers import GradeReport

        return GradeReport(len(groups))


def rollouts_of(group):
    rewards: Any = NoRewards()
    source = SampledRollouts(group.settings, group, rewards, note=group.lines.append)
    source.settings.rollout.group_size, source.settings.rollout.max_response_tokens = 2, 16
    return source


def run(source, prompts, step):
    source.begin(prompts, step)
    groups = source.collect()
    source.grade(groups)
    return groups


@pytest.mark.parametrize("deed", ["die", "raise", "hang"])
def test_an_engine_that_fails_in_an_update_is_replaced_and_the_others_go_on(start, deed):
    group, actors = start(2, timeout_s=4.0), FakeActors()
    source = rollouts_of(group)
    actors.payloads = [{1: deed}, {}]
    source.use_weights(actors, 1)
    assert [engine.index for engine in group.serving()] == [0]
    groups = run(source, prompts_of(6), 2)
    assert {t.weight_version for g in groups for t in g.trajectories} == {1}
    group.pool.wait_for_any(all_engines=True)
    assert [engine.index for engine in group.serving()] == [0]  # the other one has no weights yet
    source.use_weights(actors, 2)
    assert group.weight_versions() == [2, 2]
    assert group.pool.call("seen") == [([], 0, 2), ([], 1, 2)]
    assert group.pool.failures == 1


def test_all_engines_fail_in_an_update(start):
    group, actors = start(2), FakeActors()
    source = rollouts_of(group)
    actors.payloads = [{0: "die", 1: "die"}, {0: "die"}, {}]
    source.use_weights(actors, 1)
    assert group.serving()
    groups = run(source, prompts_of(6), 2)
    assert {t.weight_version for g in groups for t in g.trajectories} == {1}
    assert actors.calls[:3] == ["release_optimizer", "release_parameters", "restore"]


def test_an_error_of_the_sender_is_not_taken_for_one_of_the_engines(start):
    group, actors = start(2), FakeActors()
    source = rollouts_of(group)
    actors.payloads = [{0: "raise", 1: "raise"}]
    with pytest.raises(WorkerError, match=r"engine 0 failed in update_weights: .*illegal memory access.*engine_0\.log"):
        source.use_weights(actors, 1)
    assert group.pool.failures == 0


@pytest.mark.parametrize("engines", [1, 2])
def test_without_any_engine_left_a_replacement_gets_the_last_weights(start, engines):
    group, actors = start(engines), FakeActors()
    source = rollouts_of(group)
    source.use_weights(actors, 7)
    for process in group.pool.engines:
        os.kill(process.pid, signal.SIGKILL)
    groups = run(source, prompts_of(6), 8)
    assert len(groups) == 6 and {t.weight_version for g in groups for t in g.trajectories} == {7}
    metrics = source.metrics()
    assert metrics["rollout/engine_failures"] == metrics["rollout/engine_restarts"] == engines
    assert metrics["rollout/reissued_prompts"] >= 6
    assert source.metrics()["rollout/engine_failures"] == 0  # counted once


def test_all_prompts_set_aside_ends_the_run_with_a_reason(start):
    group = start(1)
    source = rollouts_of(group)
    source.use_weights(FakeActors(), 1)
    source.begin(prompts_of(2, (fake.REFUSE, 0))[1:], 1)
    with pytest.raises(WorkerError, match="all 1 prompts of the step were set aside; the first, p1: it is too long"):
        source.collect()


def test_one_step_ahead_the_last_engine_waits_for_the_actors(start):
    """The weights of the rollout under way are gone when the actors have moved on: the rest is made by the next ones."""
    group, actors = start(1), FakeActors()
    source = rollouts_of(group)
    source.settings.rollout.steps_ahead = 1
    source.use_weights(actors, 1)
    before = list(actors.calls)
    source.begin(prompts_of(20, tokens=16), 2)
    time.sleep(0.3)
    os.kill(group.pool.engines[0].pid, signal.SIGKILL)
    time.sleep(3.0)
    assert actors.calls == before  # they train
    source.use_weights(actors, 2)
    groups = source.collect()
    versions = [{t.weight_version for t in g.trajectories} for g in groups]
    assert all(len(version) == 1 for version in versions)
    assert set.union(*versions) == {1, 2}


def test_one_step_ahead_a_signal_does_not_wait_for_the_rollout_and_loses_nothing_of_it(start):
    group, actors = start(1), FakeActors()
    source = rollouts_of(group)
    source.settings.rollout.steps_ahead = 1
    source.use_weights(actors, 1)
    source.begin(prompts_of(200, tokens=16), 2)
    preemption, before = Preemption(), signal.getsignal(signal.SIGTERM)
    preemption.listen()
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Preempted), preemption.breakable():
            source.wait(actors, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert source._under_way.at_work and source.pending(1) is None  # the first save has none
    calls = list(actors.calls)
    os.kill(group.pool.engines[0].pid, signal.SIGKILL)
    time.sleep(3.0)
    assert actors.calls == calls  # they are being saved
    source.wait(actors, 1)
    pending = source.pending(1)
    assert pending.step == 2 and len(pending.groups) == 200
    assert {t.weight_version for g in pending.groups for t in g.trajectories} == {1}


# ---- dispatch ----


def test_static_dispatch_deals_the_prompts_out(start, tmp_path):
    class Recording(FakeEngine):
        def advance(self, order):
            with (self.folder / f"order_{self.index}").open("a") as file:
                file.write("".join(f"{number}\n" for number, _ in order.requests))
            return super().advance(order)

    group = start(2, worker=Recording, dispatch="static")
    sample(group, prompts_of(9))
    given = [[int(x) for x in (tmp_path / f"order_{i}").read_text().split()] for i in range(2)]
    assert given == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]


@pytest.mark.parametrize("deed", [fake.DIE, fake.RAISE])
def test_a_deterministic_rollout_that_loses_an_engine_is_made_again_as_a_whole(start, tmp_path, deed):
    """By all engines, each with the prompts that it had; and graders see it when it is there."""

    class Recording(FakeEngine):
        def advance(self, order):
            with (self.folder / f"order_{self.index}").open("a") as file:
                file.write("".join(f"{number}\n" for number, _ in order.requests) + "fresh\n" * order.fresh)
            return super().advance(order)

    group = start(2, worker=Recording, dispatch="static", deterministic=True)
    seen = []
    rollout = sample(group, prompts_of(9, (deed, fake.ONCE)), seen.extend)
    assert [g.prompt.id for g in rollout.groups] == [g.prompt.id for g in seen] == [f"p{i}" for i in range(9)]
    assert rollout.outcome.reissued == 0 and not rollout.set_aside and group.pool.failures == 1
    assert "the rollout is generated again as a whole" in group.lines[0]
    for index in range(2):
        first, second = (tmp_path / f"order_{index}").read_text().split("fresh\n")[:2]
        assert first == second == "".join(f"{number}\n" for number in range(index, 9, 2))


def test_a_deterministic_rollout_is_not_made_again_for_ever(start):
    group = start(2, dispatch="static", deterministic=True)
    with pytest.raises(WorkerError, match="4 times in a row an engine was lost in the same rollout") as error:
        sample(group, prompts_of(4, (fake.DIE, 0)))
    assert error.value.may_pass


def test_streaming_dispatch_gives_work_to_the_engine_that_has_room(start, tmp_path):
    """One prompt takes as long as twenty others: the other engine does these."""

    class Recording(FakeEngine):
        def advance(self, order):
            with (self.folder / f"order_{self.index}").open("a") as file:
                file.write("".join(f"{number}\n" for number, _ in order.requests))
            if any(job.request.prompt_ids[0] == 0 for job in self.jobs):
                time.sleep(0.2)
            return super().advance(order)

    group = start(2, worker=Recording, max_concurrent_responses=2)
    prompts = [Prompt("long", "", "", (0, 1, 16)), *prompts_of(21)[1:]]
    sample(group, prompts)
    given = [[int(x) for x in (tmp_path / f"order_{i}").read_text().split()] for i in range(2)]
    assert sorted(given[0] + given[1]) == list(range(21))
    slow = next(part for part in given if 0 in part)
    assert len(slow) < 8

    # Known lengths: the long one comes first.
    shuffled = prompts[1:] + prompts[:1]
    assert group._order(shuffled, group._dispatch)[0] == 20
    one = copy.copy(group)
    one.pool = type("Pool", (), {"engines": [None]})
    assert one._order(shuffled, group._dispatch) == list(range(21))  # batches of one engine do not depend on history


def test_the_tail_is_cut(start):
    group = start(2, cut_tail_fraction=0.75)
    prompts = prompts_of(12, tokens=4)
    prompts[5] = Prompt("p5", "", "", (5, 1, 10_000))
    rollout = group.sample(prompts, group_size=2, temperature=1.0, top_p=1.0, max_tokens=10_000, seed=3)
    assert [g.prompt for g in rollout.groups] == prompts
    cut = [t for g in rollout.groups for t in g.trajectories if t.truncated]
    assert rollout.outcome.cut == len(cut) >= 2
    for t in cut:
        assert 1 <= len(t.response_ids) == len(t.inference_logprobs) == len(t.response_mask)
    assert not any(t.truncated for t in rollout.groups[0].trajectories)
    # Evaluation is not cut.
    rollout = group.generate(prompts[:4], group_size=1, temperature=0.0, top_p=1.0, max_tokens=16, seed=0)
    assert not any(t.truncated for g in rollout.groups for t in g.trajectories)
