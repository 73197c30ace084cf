"""The process that grades: `python -m tic_megatron.rewards.worker_main JSON FD`.

JSON is `{"source": ..., "settings": {...}}`; FD is the descriptor of a file with the program that the reward is a function of.

JSON lines in, `{"call": n, "items": [...]}`: the fields that the function is given of each response. JSON lines out, first
`{"ready": true}`, or `{"broken": text}` where the function cannot be loaded. Then for each call `{"call": n, "results": [...]}`,
of each response `{"reward": x}` or, for what is no finite number, `{"invalid": text}`; or `{"call": n, "fault": {...}}` with
`failed`, `invalid` or `timed_out`, of all of them. The reward is a list of numbers where it is dense. With `"check": true` the
process ends after its first line. The parent (`tic_megatron.rewards.workers`) keeps the time limit and kills.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tic_megatron.rewards.registry import Reward

ORPHAN_GRACE_S = 5.0
LONGEST_LINE = 1 << 30


def main() -> None:
    """Serve until the parent closes the pipe."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the driver's to handle (`tic_megatron.preemption`)
    tasks, replies = _take_pipes()
    from tic_megatron.config import RewardSettings, RewardTerm, SettingsError
    from tic_megatron.rewards.terms import open_reward

    order = json.loads(sys.argv[1])
    with open(int(sys.argv[2]), "rb") as file:
        program = file.read()
    settings = RewardSettings(**order["settings"])
    limit = settings.memory_gib << 30  # a huge number in a response must not take the machine's memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        reward = open_reward(RewardTerm(1.0, order["source"]), settings, program)
        if reward.prepare:
            reward.prepare()
        if reward.check and order.get("check"):
            reward.check()
    except SettingsError as error:
        _reply(replies, {"broken": str(error)})
        raise
    _reply(replies, {"ready": True})
    if order.get("check"):
        return
    if reward.form.asynchronous:
        asyncio.run(_serve_together(reward, tasks, replies, settings))
    else:
        _serve_one_by_one(reward, tasks, replies, settings)


def _serve_one_by_one(reward: Reward, tasks: TextIO, replies: TextIO, settings) -> None:
    for line in tasks:
        call = json.loads(line)
        # Ends this process when it overruns and no parent is left to kill it; the default action needs no cooperation.
        signal.setitimer(signal.ITIMER_REAL, settings.timeout_s * len(call["items"]) + ORPHAN_GRACE_S)
        _reply(replies, {"call": call["call"], **_grade(reward, call["items"])})
        signal.setitimer(signal.ITIMER_REAL, 0)


async def _serve_together(reward: Reward, tasks: TextIO, replies: TextIO, settings) -> None:
    """As many calls at a time as the parent gives."""
    reader = asyncio.StreamReader(limit=LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), tasks)
    under_way = {asyncio.create_task(_alarm_when_stuck(settings.timeout_s * settings.batch_size + ORPHAN_GRACE_S))}
    while line := await reader.readline():
        task = asyncio.create_task(_answer(reward, json.loads(line), replies, settings.timeout_s))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    os._exit(0)  # nobody wants the answers to what is under way


async def _alarm_when_stuck(limit_s: float) -> None:
    """Ends this process when a call does not give the others their turn for longer than any may take, and no parent is left."""
    while True:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        await asyncio.sleep(min(1.0, limit_s / 2))


async def _answer(reward: Reward, call: dict, replies: TextIO, limit_s: float) -> None:
    items = call["items"]
    try:
        async with asyncio.timeout(limit_s * len(items)) as scope:
            value = await reward.function(**reward.form.arguments(items))
        answer: dict[str, Any] = {"results": reward.results(items, value)}
    except BaseException as error:
        answer = {"fault": {"timed_out": ""} if scope.expired() else _fault(error)}
    _reply(replies, {"call": call["call"], **answer})


def _grade(reward: Reward, items: list[dict]) -> dict:
    try:
        return {"results": reward.results(items, reward.function(**reward.form.arguments(items)))}
    except BaseException as error:  # of sys.exit too
        return {"fault": _fault(error)}


def _fault(error: BaseException) -> dict[str, str]:
    from tic_megatron.rewards.registry import InvalidRewardError, describe

    return {"invalid": str(error)} if isinstance(error, InvalidRewardError) else {"failed": describe(error)}


def _take_pipes() -> tuple[TextIO, TextIO]:
    """The pipes from and to the parent. Graders read nothing, and what they print goes to stderr (the log) instead."""
    sys.stdout.flush()
    tasks, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return tasks, replies


def _reply(replies: TextIO, message: dict) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
