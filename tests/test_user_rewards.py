"""Reward functions in files: what they take, sync or async, batched or not, and what goes wrong in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.rollouts import group_of
from tic_megatron.commands.run_folder import digest_reward
from tic_megatron.config import RewardSettings, SettingsError
from tic_megatron.rewards import RewardWorkers, read_terms
from tic_megatron.rewards.user_functions import read_form
from tic_megatron.rewards.workers import check_rewards

FUNCTIONS = '''
import asyncio, os, time

import beside  # a module in the same folder

def plain(response: str, answer: str) -> float:
    return beside.HALF * (response == answer)

def with_more(response, answer, *, prompt, problem_id, scale=2.0):
    assert prompt == "?"
    return scale * len(problem_id)

under_way = most = 0

async def judge(response, answer):
    """Tells how many were under way together."""
    global under_way, most
    under_way += 1
    most = max(most, under_way)
    await asyncio.sleep(0.2)
    under_way -= 1
    return most

calls = []

def batched(responses, answers):
    calls.append(len(responses))
    return [len(calls) + len(answer) / 8 for answer in answers]

async def batched_judge(responses, answers, problem_ids):
    await asyncio.sleep(0.01)
    return [float(len(p)) for p in problem_ids]

def secret(response):
    return float(os.environ.get(response) is not None)

def faulty_batch(responses):
    if "raise" in responses:
        raise ValueError("one of them is bad")
    if "die" in responses:
        os._exit(3)
    if "stick" in responses:
        time.sleep(60)
    if "short" in responses:
        return [1.0]
    return [None if response == "none" else float(len(response)) for response in responses]

async def faulty(response):
    if response == "raise":
        raise ValueError("bad")
    if response == "exit":
        raise SystemExit(4)
    if response == "die":
        os._exit(3)
    if response == "late":
        await asyncio.sleep(60)
    if response == "stick":
        time.sleep(60)
    await asyncio.sleep(0.05)
    return None if response == "none" else float(len(response))
'''


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


def grade(path: Path, name: str, responses: list[str], **settings) -> tuple[list[float], list[str]]:
    """Rewards, and the lines of the faults."""
    options = {"workers": 1, "timeout_s": 30.0} | settings
    with RewardWorkers(RewardSettings(function=f"{path}:{name}", **options)) as rewards:
        group = group_of(12, "46", responses)
        report = rewards.grade_groups([group])
    return [t.reward for t in group.trajectories], report.faults


def test_what_a_function_is_given(functions: Path) -> None:
    assert grade(functions, "plain", ["46", "45"]) == ([0.5, 0.0], [])
    assert grade(functions, "with_more", ["46"]) == ([2.0 * len("p:12")], [])
    assert grade(functions, "batched_judge", ["46"] * 3) == ([4.0] * 3, [])


def test_an_async_function_has_many_under_way(functions: Path) -> None:
    """As many as `concurrency` says, in one process; never more."""
    most, faults = grade(functions, "judge", ["x"] * 24, concurrency=8)
    assert max(most) == 8 and min(most) >= 1 and faults == []
    assert max(grade(functions, "judge", ["x"] * 3, concurrency=1)[0]) == 1


def test_batches_are_of_the_size_that_was_given(functions: Path) -> None:
    rewards, _ = grade(functions, "batched", ["x"] * 10, batch_size=4)
    assert rewards == [1.25] * 4 + [2.25] * 4 + [3.25] * 2


BAD = {
    "raise": "grading failed: ValueError",
    "die": "the grader died, twice (exit status 3)",
    "stick": "grading took longer than reward.timeout_s 2",
    "none": "the reward is None (NoneType), not a finite number",
}


def test_a_bad_response_costs_none_of_its_batch(functions: Path) -> None:
    """Batches of 4 with one bad response, several, or none."""
    bad = {**BAD, "short": None}  # alone, one number is what it should be
    responses = ["a", "raise", "abc", "ab", "die", "a", "ab", "abc", "stick", "none", "short", "raise", "abcd", "a", "b", "c"]
    rewards, faults = grade(functions, "faulty_batch", responses, batch_size=4, timeout_s=2.0, workers=2)
    expected = [1.0 if r == "short" else 0.0 if r in bad else float(len(r)) for r in responses]
    assert rewards == expected
    found = {line.partition(": ")[0]: line for line in faults}
    assert len(found) == len(faults) == sum(response in BAD for response in responses)
    for number, response in enumerate(responses):
        if response in BAD:
            assert BAD[response] in found[f"prompt p:12, response {number}"]


def test_a_bad_response_costs_none_that_is_under_way_beside_it(functions: Path) -> None:
    bad = {**BAD, "late": BAD["stick"], "exit": "grading failed: SystemExit: 4"}
    responses = ["a", "raise", "abc", "die", "ab", "late", "stick", "a", "none", "exit", *["abcd"] * 10]
    rewards, faults = grade(functions, "faulty", responses, concurrency=8, timeout_s=2.0)
    assert rewards == [0.0 if response in bad else float(len(response)) for response in responses]
    found = {line.partition(": ")[0]: line for line in faults}
    assert len(found) == len(faults) == len(bad)
    for number, response in enumerate(responses):
        if response in bad:
            assert bad[response] in found[f"prompt p:12, response {number}"]


def test_a_blocked_function_does_not_hold_the_driver_up(functions: Path, tmp_path: Path) -> None:
    """More text than a pipe takes, for a process that does not read: the driver is there to kill it when its time is over."""
    responses = ["stick", *["x" * 100_000] * 15]
    log = tmp_path / "rewards.log"
    with RewardWorkers(RewardSettings(function=f"{functions}:faulty", concurrency=16, timeout_s=2.0, workers=1), log) as workers:
        rewards, report = workers.grade([(response, "") for response in responses])
    assert rewards == [0.0] + [100_000.0] * 15 and report.timed_out == len(report.faults) == 1
    # Late, the process would have been ended by its own alarm.
    assert "a grader overran its time limit" in log.read_text() and "a grader died" not in log.read_text()


def test_secrets_are_for_those_that_need_them(functions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sesame")
    monkeypatch.setenv("OTHER_API_KEY", "sesame")
    names = ["JUDGE_API_KEY", "OTHER_API_KEY", "HOME"]
    assert grade(functions, "secret", names)[0] == [0.0, 0.0, 1.0]
    assert grade(functions, "secret", names, keep_env=["JUDGE_API_KEY"])[0] == [1.0, 0.0, 1.0]
    with RewardWorkers(RewardSettings(function="math", keep_env=["JUDGE_API_KEY"], workers=1)) as rewards:
        rewards.grade([("1", "1")])
        assert "sesame" not in Path(f"/proc/{rewards.workers[0].pid}/environ").read_text()


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ("def f(response, answer): ...", ("response", "answer")),
        ("def f(answer, response): ...", ("answer", "response")),
        ("def f(response): ...", ("response",)),
        ("def f(response, answer=None, *rest, strict=True, **more): ...", ("response", "answer")),
        ("async def f(responses, *, prompts, problem_ids): ...", ("responses", "prompts", "problem_ids")),
        ("@decorated\ndef f(tokens, answer): ...", ("tokens", "answer")),
    ],
)
def test_forms(source: str, parameters: tuple[str, ...]) -> None:
    form = read_form("r.py", "f", source.encode())
    assert form.parameters == parameters
    assert form.asynchronous == source.startswith("async")
    assert (form.batched, form.dense) == ("responses" in parameters, "tokens" in parameters)


def test_reading_a_function_does_not_run_its_file(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("raise SystemExit\n\ndef f(response): return 1.0\n")
    assert read_terms(RewardSettings(function=f"{tmp_path}/r.py:f"))[0].name == "f"


def test_a_file_that_cannot_be_run_ends_the_start(tmp_path: Path) -> None:
    """Of the check before a run, and of the workers if it breaks later."""
    (tmp_path / "r.py").write_text("import math\n\ndef f(response): return 1.0\n\nmath.sqrt(-1)\n")
    settings = RewardSettings(function=f"exact + {tmp_path}/r.py:f")
    message = rf"reward.function: {tmp_path}/r.py, line 5: ValueError: .*; correct the file"
    with pytest.raises(SettingsError, match=message):
        check_rewards(settings)
    with (
        pytest.raises(RuntimeError, match=rf"the graders of reward 'f' do not start: {message}"),
        RewardWorkers(settings) as rewards,
    ):
        rewards.grade([("1", "1")])
    (tmp_path / "r.py").write_text("def f(response): return 1.0\n")
    check_rewards(settings)


def test_a_file_that_is_changed_later_is_not_that_of_this_run(tmp_path: Path) -> None:
    """A grader that is started for one that died grades like the others. (The file is longer than a command line may be.)"""
    file = tmp_path / "r.py"
    file.write_bytes(
        b"# coding: latin-1\nPRICE = '\xa3'\n" + b"# long\n" * 40_000 + b"def f(response): return float(PRICE == response)\n"
    )
    with RewardWorkers(RewardSettings(function=f"{file}:f", workers=1)) as rewards:
        assert rewards.grade([("£", "")])[0] == [1.0]
        file.write_text("def f(response): return 7.0\n")
        before = rewards.workers[0].pid
        os.kill(before, signal.SIGKILL)
        assert rewards.grade([("£", ""), ("$", "")])[0] == [1.0, 0.0]
        assert rewards.workers[0].pid != before
    with RewardWorkers(RewardSettings(function=f"{file}:f", workers=1)) as rewards:
        assert rewards.grade([("£", "")])[0] == [7.0]


def test_a_file_is_compiled_by_itself(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def f(response: str): return float(f.__annotations__['response'] is str)\n")
    with RewardWorkers(RewardSettings(function=f"{tmp_path}/r.py:f", workers=1)) as rewards:
        assert rewards.grade([("x", "")])[0] == [1.0]
        assert rewards.program_digest == digest_reward(RewardSettings(function=f"{tmp_path}/r.py:f"))


def test_a_check_of_rewards_leaves_no_process(functions: Path) -> None:
    before = children()
    check_rewards(RewardSettings(function=f"math + {functions}:judge"))
    deadline = time.monotonic() + 10
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() <= before


def test_async_graders_end_with_their_owner(functions: Path) -> None:
    """One with calls under way, and one whose function does not give the others their turn."""
    code = (
        "import os, sys, threading, time\n"
        "from tic_megatron.config import RewardSettings\n"
        "from tic_megatron.rewards import RewardWorkers\n"
        "settings = RewardSettings(function=sys.argv[1], workers=1, timeout_s=1.0, batch_size=1)\n"
        "workers = [RewardWorkers(settings) for _ in range(2)]\n"
        "for one, text in zip(workers, ('late', 'stick')):\n"
        "    assert one.grade([('a', '')])[0] == [1.0]\n"
        "    threading.Thread(target=one.grade, args=([(text, '')],), daemon=True).start()\n"
        "time.sleep(0.5)\n"
        "print(*[one.workers[0].pid for one in workers], flush=True)\n"
        "os._exit(1)\n"
    )
    command = [sys.executable, "-c", code, f"{functions}:faulty"]
    pids = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(runs(pid) for pid in pids)


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children() -> set[str]:
    return set(Path("/proc/self/task").joinpath(str(threading_id()), "children").read_text().split())


def threading_id() -> int:
    import threading

    return threading.main_thread().native_id
