"""How fast short correct programs are graded in the sandbox, beside the same programs run by a plain interpreter.

    python -m benchmarks.sandbox --json [--solutions 1000] [--workers 2] [--level auto]

Grades the solutions with the reward `code` in grader processes, as training does: all with one test each, a third with
three. Then runs a third of the programs by `python -c` without any isolation, as many at a time. With --json the result replaces
that of its level in benchmarks/sandbox.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tic_megatron.config import RewardSettings
from tic_megatron.rewards import RewardWorkers
from tic_megatron.rewards.sandbox import LEVELS, find_way

RESULTS = Path(__file__).with_suffix(".json")
PROGRAMS = (
    ("n = int(input())\nprint(n * (n + 1) // 2)", lambda n: f"{n}\n", lambda n: str(n * (n + 1) // 2)),
    ("print(sum(map(int, input().split())))", lambda n: f"{n} {n + 1} {n + 2}\n", lambda n: str(3 * n + 3)),
    (
        "import sys\nxs = sys.stdin.read().split()\nprint(*sorted(map(int, xs)))",
        lambda n: "\n".join(str(i * n % 101) for i in range(50)),
        lambda n: " ".join(map(str, sorted(i * n % 101 for i in range(50)))),
    ),
    (
        "from collections import Counter\nprint(Counter(input()).most_common(1)[0][1])",
        lambda n: "ab" * (n % 7 + 1) + "b",
        lambda n: str(n % 7 + 2),
    ),
    (
        "import heapq\nh = []\nfor x in input().split():\n    heapq.heappush(h, int(x))\nprint(heapq.heappop(h))",
        lambda n: f"{n + 5} {n} {n + 9}",
        str,
    ),
    (
        "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\nprint(fib(int(input())))",
        lambda n: str(n % 3),
        lambda n: str((0, 1, 1)[n % 3]),
    ),
)
"""Program, its input and its output for a number."""


def solution(number: int, tests: int) -> tuple[str, str]:
    """A response with a right program, and its tests."""
    program, given, expected = PROGRAMS[number % len(PROGRAMS)]
    cases = [{"testtype": "stdin", "input": given(n), "output": expected(n)} for n in range(number, number + tests)]
    return f"```python\n{program}\n```", json.dumps(cases)


def graded_per_second(workers: RewardWorkers, solutions: int, tests: int) -> float:
    """SystemExit when one is not graded as right."""
    pairs = [solution(number, tests) for number in range(solutions)]
    begun = time.perf_counter()
    rewards, report = workers.grade(pairs)
    seconds = time.perf_counter() - begun
    right = rewards.count(1.0)
    if right != solutions:
        sys.exit(f"only {right} of {solutions} were graded as right: {report.faults[:3]}")
    return solutions / seconds


def plain_per_second(runs: int, at_a_time: int) -> float:
    """The same programs without isolation (they are ours)."""

    def run(number: int) -> None:
        program, given, expected = PROGRAMS[number % len(PROGRAMS)]
        done = subprocess.run([sys.executable, "-c", program], input=given(number), capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected(number)

    begun = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(run, range(runs)))
    return runs / (time.perf_counter() - begun)


def measure(solutions: int, workers: int, level: Any) -> dict[str, object]:
    """Figures of one level."""
    settings = RewardSettings(function="code", workers=workers, sandbox=level)
    load = os.getloadavg()[0]
    with RewardWorkers(settings) as graders:
        graded_per_second(graders, 10 * workers, 1)  # starts, and files that are read for the first time
        one = graded_per_second(graders, solutions, 1)
        three = graded_per_second(graders, solutions // 3, 3)
    plain = plain_per_second(max(1, solutions // 3), workers)
    return {
        "solutions": solutions,
        "workers": workers,
        "solutions_per_s": round(one, 1),
        "solutions_per_s_with_3_tests": round(three, 1),
        "plain_runs_per_s": round(plain, 1),
        "ratio_to_plain": round(one / plain, 2),
        "load_before": round(load, 1),
        "user": "root" if os.geteuid() == 0 else "not root",
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Linux {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help=f"write the result to {RESULTS.name}")
    parser.add_argument("--solutions", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--level", choices=["auto", *LEVELS], default="auto")
    args = parser.parse_args()
    level = find_way(args.level).level
    result = measure(args.solutions, args.workers, level)
    print(level, json.dumps(result, indent=1))
    if args.json:
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**results, level: result}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
