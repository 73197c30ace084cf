"""The sandbox: hostile programs at every level that this host can run, right and wrong solutions, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import tic_megatron
from tests.hostile_programs import HOSTILE, HOSTILE_CALLS
from tic_megatron.config import RewardSettings, SettingsError
from tic_megatron.rewards import RewardWorkers, code, grade_code, read_terms, sandbox, sandbox_level
from tic_megatron.rewards.code import (
    check_code_answer,
    check_sandbox,
    grade_code_response,
    level_lines,
    prelude_of,
    program_of,
)
from tic_megatron.rewards.code_tests import BadTestsError
from tic_megatron.rewards.sandbox import SandboxError
from tic_megatron.rewards.workers import check_rewards

# Level and whether the program changes its user (where the tests are run by root) or is in a user namespace.
WAYS = {"bubblewrap": 0, "namespaces": 0, "limits": 0, "bubblewrap, user namespace": 1, "namespaces, user namespace": 1}
SLOW = [name for name in WAYS if "," in name]
SECRET_OUTPUT = "4711 apples"
SECRET_RESULT = '["4711", true]'
MEMORY_MIB = 256
OTHER_REASONS = {
    # Without namespaces nothing can be opened, so what would be too large does not come to be.
    ("limits", "files without number"): "crash",
    ("limits", "directories without end"): "crash",
}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in WAYS])
def way(request, monkeypatch):
    """A way to isolate programs, which `grade_code` takes in the test; skips where this host does not have it."""
    ways = [way for way in sandbox._ways() if way.level == request.param.partition(",")[0]]
    number = WAYS[request.param]
    if number >= len(ways):
        pytest.skip(f"this host has no other way to {request.param}")
    monkeypatch.setattr(sandbox, "_ways", lambda: iter([ways[number]]))
    sandbox.find_way.cache_clear()
    try:
        found = sandbox.find_way("auto")
    except SandboxError as error:
        pytest.skip(str(error))
    finally:
        sandbox.find_way.cache_clear()
    monkeypatch.setattr(sandbox, "find_way", lambda level: found)
    return found


class Host:
    """What programs may aim at, and afterwards what has become of it."""

    def __init__(self, folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = folder
        for path in self._left_behind():  # by a sandbox that was broken on purpose
            path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        (folder / "secret").write_text("secret")
        (folder / "secret").chmod(0o600)
        self.canary = subprocess.Popen(["sleep", "600"])
        self.listeners = [
            socket.create_server(("127.0.0.1", 0)),
            socket.socket(socket.AF_UNIX),
            socket.socket(type=socket.SOCK_DGRAM),
        ]
        tcp, abstract, udp = self.listeners
        abstract.bind(f"\0{self.mark}")
        abstract.listen()
        self.port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", self.port))
        self.shared_memory = self._shared_memory()

    def targets(self) -> str:
        """The start of a program, by which it knows them."""
        package = Path(tic_megatron.__file__).parent
        values = {
            "HERE": __file__,
            "PACKAGE": str(package),
            "RUN": str(self.folder),
            "PID": os.getpid(),
            "CANARY": self.canary.pid,
        }
        values |= {"PORT": self.port, "ABSTRACT": self.mark, "SECRET": f"secret-{self.mark}"}
        return "".join(f"{name} = {value!r}\n" for name, value in values.items())

    def damage(self) -> list[str]:
        """What is left behind or was reached."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TIC_TEST_MARK") == self.mark:
                    found.append(f"process {process.pid}: {process.status()}")
        found += map(str, self._left_behind())
        for listener in self.listeners:
            listener.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()
                found.append(f"a connection by {listener}")
        if self.canary.poll() is not None:
            found.append("the canary is dead")
        if self._shared_memory() != self.shared_memory:
            found.append("shared memory")
        return found

    def _left_behind(self) -> list[Path]:
        places: tuple[str | Path, ...] = (
            "/",
            "/tmp",
            "/dev/shm",
            "/var/tmp",
            "/dev",
            "/run",
            Path.cwd(),
            self.folder,
            Path(__file__).parent,
        )
        return [path for place in map(Path, places) if place.is_dir() for path in place.glob("tic-hostile*")]

    @staticmethod
    def _shared_memory() -> list[str]:
        paths = [Path(f"/proc/sysvipc/{kind}") for kind in ("shm", "sem", "msg")]
        return [line for path in paths if path.exists() for line in path.read_text().splitlines() if str(0x71C05) in line]

    def close(self) -> None:
        self.canary.kill()
        self.canary.wait()
        for listener in self.listeners:
            listener.close()


@pytest.fixture
def host(tmp_path, monkeypatch):
    host = Host(tmp_path)
    monkeypatch.setenv("MY_SECRET", f"secret-{host.mark}")
    monkeypatch.setitem(sandbox.PROGRAM_ENVIRONMENT, "TIC_TEST_MARK", host.mark)
    yield host
    host.close()


def attack(host: Host, monkeypatch) -> tuple[dict[str, code.CodeResult], dict[str, bytes]]:
    """Grade all hostile programs: results and whole outputs."""
    outputs = {}
    run = sandbox.run_program

    def watched(program, *args, **kwargs):
        outcome = run(program, *args, **kwargs)
        outputs[program] = outcome.output
        return outcome

    monkeypatch.setattr(code, "run_program", watched)
    stdin = [{"testtype": "stdin", "input": "3\n", "output": SECRET_OUTPUT}]
    calls = [{"testtype": "functional", "func_name": "f", "input": "[3]", "output": SECRET_RESULT}]
    jobs = {name: (host.targets() + text, stdin) for name, (_, text) in HOSTILE.items()}
    jobs |= {name: (text, calls) for name, (_, text) in HOSTILE_CALLS.items()}
    with ThreadPoolExecutor(6) as pool:
        under_way = {
            name: pool.submit(grade_code, program, tests, timeout_s=1, memory_mib=MEMORY_MIB)
            for name, (program, tests) in jobs.items()
        }
        results = {name: future.result() for name, future in under_way.items()}
    return results, {name: outputs[program] for name, (program, _) in jobs.items()}


def test_there_are_at_least_40_hostile_programs():
    assert len(HOSTILE) + len(HOSTILE_CALLS) >= 40


def test_hostile_programs_are_contained(way, host, monkeypatch):
    before = psutil.Process().memory_info().rss
    results, outputs = attack(host, monkeypatch)
    reasons = {name: OTHER_REASONS.get((way.level, name), reason) for name, (reason, _) in (HOSTILE | HOSTILE_CALLS).items()}
    assert {name: result for name, result in results.items() if result.passed} == {}
    assert {name: output for name, output in outputs.items() if b"BREACH" in output} == {}
    ended = {name: (result.reason, result.detail) for name, result in results.items()}
    # On a busy machine the time may be up first.
    assert {name: end for name, end in ended.items() if reasons[name] and end[0] not in (reasons[name], "time limit")} == {}
    assert host.damage() == []
    assert psutil.Process().memory_info().rss < before + (256 << 20)


@pytest.mark.slow
def test_hostile_programs_end_alike_every_time(host, monkeypatch):
    first, second = (attack(host, monkeypatch)[0] for _ in range(2))
    assert {name: result.reason for name, result in first.items()} == {name: result.reason for name, result in second.items()}


def stdin_tests(*pairs: tuple[str, str]) -> list[dict]:
    return [{"testtype": "stdin", "input": given, "output": expected} for given, expected in pairs]


def call_tests(name: str, *pairs: tuple[str, str]) -> list[dict]:
    return [{"testtype": "functional", "func_name": name, "input": given, "output": expected} for given, expected in pairs]


SUM = stdin_tests(("1 2\n", "3\n"), ("10 -4\n", "6"), ("0 0", "0"))
RIGHT = {
    "a script": ("a, b = map(int, input().split())\nprint(a + b)", SUM),
    "under the main guard": (
        ("def main():\n    print(sum(map(int, input().split())))\n\nif __name__ == '__main__':\n    main()"),
        SUM,
    ),
    "read at once": ("import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))", SUM),
    "by descriptor": ("import os\nprint(sum(map(int, open(0).read().split())))", SUM),
    "by bytes": (("import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.read().split())))"), SUM),
    "ended by exit": ("print(sum(map(int, input().split())))\nexit(1)", SUM),
    "printed at the end": (("import atexit\ns = sum(map(int, input().split()))\natexit.register(lambda: print(s))"), SUM),
    "in a thread": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
        "def f(n): return 0 if n == 0 else f(n - 1)\n"
        "def main():\n    f(20000)\n    print(sum(map(int, input().split())))\n"
        "t = threading.Thread(target=main)\nt.start()\nt.join()",
        SUM,
    ),
    "a module that imports another when it is used": ("print(Counter(input()).most_common(1)[0][1])", stdin_tests(("abcb", "2"))),
    "names that are there": (
        ("a = Counter(map(int, input().split()))\nprint(sum(chain([k * v for k, v in a.items()])), sep=digits)"),
        SUM,
    ),
    "many modules": (
        "import collections.abc, concurrent.futures, dataclasses, decimal, fractions, json, queue, re, zlib, hashlib\n"
        "from concurrent.futures import ThreadPoolExecutor\n@dataclasses.dataclass\nclass A:\n    x: int\n"
        "with ThreadPoolExecutor(2) as pool: x = list(pool.map(int, input().split()))\nprint(decimal.Decimal(sum(x)))",
        SUM,
    ),
    "many lines": (
        "n = int(input())\nprint(sum(int(input()) for _ in range(n)))",
        stdin_tests(("50000\n" + "1\n" * 50000, "50000")),
    ),
    "a large output": ("print('ab\\n' * 500_000)", stdin_tests(("", "ab\n" * 500_000))),
    "letters": ("print(input()[::-1])", stdin_tests(("äöü €", "€ üöä"))),
    "a long number": ("print(int(input()) + 1)", stdin_tests(("7" * 9_000, "7" * 8_999 + "8"))),
    "a function of a long number": ("def f(x): return [x]", call_tests("f", ("7" * 9_000, f"[{'7' * 9_000}]"))),
    "numbers": ("print(f'{1 / 4:.6f}')", stdin_tests(("", "0.25"))),
    "a function": (
        "def add(a, b):\n    print('beside')\n    return a + b",
        call_tests("add", ("1\n2", "3"), ('"a"\n"b"', '"ab"')),
    ),
    "a method": (
        (
            "class Solution:\n    def f(self, xs: List[int], k: Optional[int] = None) -> List[int]:\n"
            "        return tuple(sorted(xs))"
        ),
        call_tests("f", ("[3, 1, 2]\nnull", "[1, 2, 3]"), ("[]\n0", "[]")),
    ),
    "a function of nothing": ("def f(): return {'a': [1.5, None]}", call_tests("f", ("", '{"a": [1.5, null]}'))),
}
WRONG = {
    "wrong in the second test": ("a, b = map(int, input().split())\nprint(3)", SUM, (1, 2, "wrong answer")),
    "an error in the third": (
        ("a, b = map(int, input().split())\nprint(a + b + 0 // max(abs(a), abs(b)))"),
        SUM,
        (2, 3, "crash"),
    ),
    "too slow": ("while input(): pass", stdin_tests(("1\n", "1")), (0, 1, "crash")),
    "another result": ("def f(x): return x", call_tests("f", ("1", "1"), ("2", "3")), (1, 2, "wrong answer")),
    "a module that is not there": ("import numpy", SUM, (0, 1, "crash")),
}


def test_right_programs_pass(way):
    with ThreadPoolExecutor(4) as pool:
        results = dict(
            zip(RIGHT, pool.map(lambda case: grade_code(*case, timeout_s=5, memory_mib=512), RIGHT.values()), strict=True)
        )
    assert {name: result for name, result in results.items() if not result.passed} == {}
    assert all(result.tests_passed == result.tests == len(RIGHT[name][1]) for name, result in results.items())


def test_wrong_programs_do_not(way):
    for name, (program, tests, (passed, failed, reason)) in WRONG.items():
        result = grade_code(program, tests, timeout_s=5)
        assert (result.passed, result.tests_passed, result.failed_test, result.reason) == (False, passed, failed, reason), name
        assert result.detail


def test_hashes_are_the_same_in_every_run(way):
    program = "print(hash('x'), *{'b', 'a', 'c'})"
    outcomes = {sandbox.run_program(program, sandbox.Limits(5, 20.0, 256, 1 << 16)) for _ in range(4)}
    assert len(outcomes) == 1 and not outcomes.pop().problem


def test_only_the_temporary_directory_is_writable(way):
    program = "open('x', 'w').write('y')\nprint(open('x').read(), __import__('os').getcwd())"
    outcome = sandbox.run_program(program, sandbox.Limits(5, 20.0, 256, 1 << 16))
    assert outcome.output == (b"" if way.level == "limits" else b"y /tmp\n")


def test_the_level_in_force():
    assert sandbox_level() in sandbox.LEVELS
    assert sandbox.find_way(sandbox_level()).level == sandbox_level()


def test_a_level_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    sandbox.find_way.cache_clear()
    try:
        with pytest.raises(SettingsError, match=r"^reward\.sandbox is bubblewrap: .*`bwrap` is not installed.*docs/sandbox\.md"):
            check_sandbox(RewardSettings(function="code", sandbox="bubblewrap"))
        with pytest.raises(SandboxError, match="`unshare` is not installed"):
            grade_code("print(1)", stdin_tests(("", "1")), timeout_s=1, sandbox="namespaces")
        monkeypatch.setattr(sandbox, "call_filter", missing)
        with pytest.raises(SandboxError, match="libseccomp"):
            grade_code("print(1)", stdin_tests(("", "1")), timeout_s=1)
    finally:
        sandbox.find_way.cache_clear()


def missing(**_):
    raise ImportError("libseccomp.so.2 is missing")


def test_a_failing_sandbox_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sandbox, "find_way", lambda level: sandbox._Way("limits", ("/bin/false",)))
    with pytest.raises(SandboxError, match="did not start"):
        grade_code("print(1)", stdin_tests(("", "1")), timeout_s=1)


@pytest.mark.parametrize("tests", [[], [{"input": "1"}], "no tests", [{"testtype": "functional", "input": "", "output": "1"}]])
def test_tests_of_another_form_are_refused(tests, monkeypatch):
    monkeypatch.setattr(code, "run_program", None)
    with pytest.raises(BadTestsError):
        grade_code("print(1)", tests, timeout_s=1)
    with pytest.raises(SettingsError, match=r"^train\.jsonl:3: field 'tests' holds no tests"):
        check_code_answer(json.dumps(tests), "train.jsonl:3", "tests")


PROGRAMS = {
    "one": ("Text\n```python\nprint(1)\n```\nmore", "print(1)\n"),
    "the last of two": ("```python\na\n```\nbetter:\n```python\nb\n```", "b\n"),
    "not the output after it": ("```python\na\n```\ngives\n```\n3\n```", "a\n"),
    "without a language": ("```\na\n```", "a\n"),
    "py and Python3": ("```py\na\n```\n```Python3\nb\n```", "b\n"),
    "cut off": ("```python\na\nb", "a\nb"),
    "after the reasoning": ("<think>```python\na\n```</think>\n```python\nb\n```", "b\n"),
    "none": ("print(1)", ""),
    "another language": ("```python\na\n```\n```bash\nb\n```", "a\n"),
    "indented": ("1.\n   ```python\na\n   ```", "a\n"),
    "fences in one line": ("use ```x``` or\n```python\na\n```", "a\n"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_of_a_response(name):
    response, program = PROGRAMS[name]
    assert program_of(response) == program


def test_the_prelude_has_what_is_used():
    assert prelude_of("print(1)") == ""
    assert prelude_of("x: List[int] = [inf]; heapq.heappush(x, 1)").split("\n") == [
        *("from heapq import heappush", "from math import inf", "from typing import List", "import heapq"),
    ]
    assert prelude_of("datetime, pow, open, sum") == "import datetime"  # the module, and built-in functions


SOLUTION = "Adding them up:\n```python\nprint(sum(map(int, input().split())))\n```"


def test_the_reward():
    answer = json.dumps(SUM)
    assert grade_code_response(SOLUTION, answer) == 1.0
    assert grade_code_response("```python\nprint(3)\n```", answer) == 0.0
    assert grade_code_response("no program", answer) == 0.0


def test_workers_grade_programs(tmp_path):
    """In their processes, with the settings' limits; one that takes too long for all of its tests is given up."""
    settings = RewardSettings(function="code", workers=2, code_timeout_s=1, code_total_s=5, code_memory_mib=256)
    slow = "```python\nimport time\ntime.sleep(2.9)\nprint(sum(map(int, input().split())))\n```"
    hungry = "```python\nx = bytearray(400 << 20)\nprint(sum(map(int, input().split())))\n```"
    pairs = [(SOLUTION, json.dumps(SUM)), (slow, json.dumps(SUM)), (hungry, json.dumps(SUM)), (SOLUTION, json.dumps(SUM))]
    with RewardWorkers(settings, tmp_path / "rewards.log") as workers:
        rewards, report = workers.grade(pairs)
    assert rewards == [1.0, 0.0, 0.0, 1.0]
    assert (report.timed_out, report.failed, report.invalid) == (1, 0, 0)
    assert "grading took longer than reward.code_total_s 5" in report.faults[0]
    check_rewards(settings)
    bigger = replace(settings, code_memory_mib=1024, code_timeout_s=9, code_total_s=60)
    with RewardWorkers(bigger) as workers:
        assert workers.grade([(hungry, json.dumps(SUM))])[0] == [1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code_total_s": 10}, r"^reward\.code_total_s is 10: .* = 14 s"),
        ({"code_memory_mib": 5000}, r"^reward\.code_memory_mib is 5000: .*reward\.memory_gib 4"),
    ],
)
def test_contradictory_limits_are_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        read_terms(RewardSettings(function="0.5*code + exact", **changes))


def test_the_level_is_said_where_programs_run():
    settings = RewardSettings()
    assert level_lines(settings, ["math", "exact"]) == []
    assert sandbox_level() in level_lines(settings, ["math", "0.5*code + exact"])[0]


def test_importing_it_loads_nothing_heavy():
    script = "import sys, tic_megatron.rewards; print(sorted({'torch', 'ray', 'numpy', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
