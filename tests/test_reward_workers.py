"""Worker processes that outlive hostile ones."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.rollouts import group_of
from tic_megatron.config import RewardSettings
from tic_megatron.rewards import REWARDS, Reward, RewardWorkers, grade_exact, worker_main

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"  # SymPy would compute it
HUGE = r"\boxed{2^{99999999999}}"  # one C call that no signal handler interrupts, and 12 GB


@pytest.fixture(scope="module")
def workers():
    with RewardWorkers(RewardSettings(function="math", timeout_s=5.0)) as workers:
        yield workers


def test_stuck_graders_are_killed_and_the_others_go_on(workers: RewardWorkers) -> None:
    workers.grade([("1", "1")])  # all started
    pairs = [("46", "46")] * 50 + [(ENDLESS, "46"), (HUGE, "46")] + [("45", "46"), (r"\boxed{46}", "46")] * 50
    start = time.perf_counter()
    rewards, report = workers.grade(pairs)
    assert rewards == [1.0] * 50 + [0.0, 0.0] + [0.0, 1.0] * 50
    # HUGE may end by the memory limit (graded wrong) or by the time limit, whichever comes first.
    assert 1 <= report.timed_out <= 2 and report.failed == 0 and report.graded == 152
    assert time.perf_counter() - start < 40  # 5 s at the same time, and new workers on a busy machine
    assert workers.grade([("46", "46")] * 10)[0] == [1.0] * 10
    assert len(_worker_pids()) == 2
    for pid in _worker_pids():
        limits = (Path("/proc") / str(pid) / "limits").read_text()
        assert re.search(rf"Max address space +{4 << 30} ", limits)


def test_a_worker_that_dies_idle_is_replaced(workers: RewardWorkers) -> None:
    workers.grade([("46", "46")] * 10)
    for pid in _worker_pids():
        os.kill(pid, 9)
    rewards, report = workers.grade([("46", "46")] * 10)
    assert rewards == [1.0] * 10
    assert report.failed == report.timed_out == 0


def test_graders_that_cannot_start_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(REWARDS, "only_here", Reward("only_here", grade_exact, isolated=True))  # the workers do not know it
    workers = RewardWorkers(RewardSettings(function="only_here"), log_path=tmp_path / "rewards.log")
    with pytest.raises(RuntimeError, match=r"only_here.*rewards\.log"):
        workers.grade([("1", "1")])
    assert "there is no reward 'only_here'" in (tmp_path / "rewards.log").read_text()
    assert _worker_pids() == [] or len(_worker_pids()) == 2  # at most those of the other tests


def test_grading_a_rollout_in_place(workers: RewardWorkers) -> None:
    groups = [group_of(index, answer=str(index), responses=[str(index), "no", f"\\boxed{{{index}}}"]) for index in range(20)]
    report = workers.grade_groups(groups)
    assert [[trajectory.reward for trajectory in group.trajectories] for group in groups] == [[1.0, 0.0, 1.0]] * 20
    assert report.graded == 60


def test_the_worker_process_grades_dense_rewards(tmp_path: Path) -> None:
    (tmp_path / "nothing").touch()
    no_program = (tmp_path / "nothing").open()
    reward = Reward("dense", lambda tokens, answer: [1.0 / len(token) for token in tokens])
    assert worker_main._grade(reward, [{"tokens": ["a", "bc"], "answer": ""}]) == {"results": [{"reward": [1.0, 0.5]}]}
    assert "ZeroDivisionError" in worker_main._grade(reward, [{"tokens": ["a", ""], "answer": ""}])["fault"]["failed"]
    process = subprocess.run(
        [
            *(sys.executable, "-m", "tic_megatron.rewards.worker_main"),
            *(json.dumps({"source": "exact_dense", "settings": asdict(RewardSettings())}), str(no_program.fileno())),
        ],
        pass_fds=[no_program.fileno()],
        input=json.dumps({"call": 0, "items": [{"tokens": ["4", "6", ""], "answer": "46"}]}) + "\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(process.stdout.splitlines()[1])["results"][0]["reward"] == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_short_responses_are_graded_quickly(workers: RewardWorkers) -> None:
    rng = random.Random(0)
    pairs = [(str(rng.randint(0, 198)), str(rng.randint(0, 198))) for _ in range(1024)]
    workers.grade(pairs[:10])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        rewards, _ = workers.grade(pairs)
        seconds.append(time.perf_counter() - start)
    assert rewards == [float(response == answer) for response, answer in pairs]
    assert min(seconds) < 3, seconds  # 0.3 s on an idle 2-core machine


def test_untrained_models_get_zeros_not_failures(workers: RewardWorkers) -> None:
    rng = random.Random(1)
    alphabet = [chr(code) for code in range(32, 127)] + list("\n\\{}$^_é中\ufffd\x00")
    pairs = [("".join(rng.choices(alphabet, k=rng.randint(0, 300))), "204") for _ in range(500)]
    rewards, report = workers.grade(pairs)
    assert rewards.count(0.0) >= 498
    assert report.failed == report.timed_out == 0


def test_workers_end_with_their_owner() -> None:
    code = (
        "import os, sys\n"
        "from tic_megatron.config import RewardSettings\n"
        "from tic_megatron.rewards import RewardWorkers\n"
        "workers = RewardWorkers(RewardSettings())\n"
        "workers.grade([('1', '1')])\n"
        "print(*[w.pid for w in workers.workers], 'torch' in sys.modules, 'sympy' in sys.modules, flush=True)\n"
        "os._exit(1)\n"  # no clean-up of any kind
    )
    *pids, torch, sympy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.split()
    assert (torch, sympy) == ("False", "False") and len(pids) == 2
    deadline = time.monotonic() + 20
    while any(_alive(int(pid)) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(int(pid)) for pid in pids)


def test_what_graders_print_stays_in_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs" / "rewards.log"
    with RewardWorkers(RewardSettings(workers=1), log_path=log) as workers:
        assert workers.grade([("1/0", "2"), ("2", "2")])[0] == [0.0, 1.0]
    assert log.exists()
    assert capfd.readouterr() == ("", "")


def _worker_pids() -> list[int]:
    """Grader processes of this one."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                is_grader = b"tic_megatron.rewards.worker_main" in (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if is_grader and int(parent) == os.getpid():
                pids.append(int(entry.name))
    return pids


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
