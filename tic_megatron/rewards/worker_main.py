"""The process that grades, one response after another: `python -m tic_megatron.rewards.worker_main NAME TIME_LIMIT_S`.

JSON lines in, `{"response": ..., "answer": ...}`; JSON lines out, first `{"ready": true}`, then for each `{"reward": x}` or
`{"error": text}`. For a dense reward `response` is a list of token texts, and the reward a list of numbers. The parent
(`tic_megatron.rewards.workers`) keeps the time limit and kills.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tic_megatron.rewards.registry import Reward

MEMORY_LIMIT_BYTES = 4 << 30
"""Address space of a grader: a huge number in a response must not take the machine's memory."""
ORPHAN_GRACE_S = 5.0


def main() -> None:
    """Serve until the parent closes the pipe."""
    name, time_limit_s = sys.argv[1], float(sys.argv[2])
    replies = _take_stdout()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    from tic_megatron.rewards.registry import get_reward

    reward = get_reward(name)
    if reward.prepare:
        reward.prepare()
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        task = json.loads(line)
        # Ends this process when it overruns and no parent is left to kill it; the default action needs no cooperation.
        signal.setitimer(signal.ITIMER_REAL, time_limit_s + ORPHAN_GRACE_S)
        _reply(replies, _grade(reward, task["response"], task["answer"]))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _take_stdout() -> TextIO:
    """The pipe to the parent; what graders print goes to stderr (the log) instead."""
    sys.stdout.flush()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, message: dict) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _grade(reward: Reward, response: str | list[str], answer: str) -> dict:
    try:
        value = reward(response, answer)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if reward.dense or math.isfinite(value):  # dense ones are looked at token by token (`data.quality`)
        return {"reward": value}
    return {"error": f"the reward is {value}"}


if __name__ == "__main__":
    main()
