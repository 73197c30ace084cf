"""Where a process is stuck: it writes its stacks to its log in time, and the driver reads them there."""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import time
from typing import Any

from tic_megatron.observability.logs import MARK, write_mark

LOG_TAIL_BYTES = 2**16
DUMP_AT = 0.9
"""Share of a call's time after which a worker that still works on it writes its stacks to its log."""


def almost_over(timeout_s: float) -> float:
    """Seconds, of so many that the driver waits for a call, after which it counts as stuck: `DUMP_AT` of them, in whole minutes
    where it is more than one, since those are what Megatron sets its collectives' time-outs in (`runtime.initialize`): one that
    fails then must find the stacks written."""
    seconds = DUMP_AT * timeout_s
    return seconds // 60 * 60 if seconds > 60 else seconds


class Worker:
    """Base of the classes whose objects a WorkerPool asks. Output must go to the log file (`redirect_output`)."""

    def perform(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        """Call a method of this worker. If that takes almost as long as the driver will wait, all threads' stacks are written to
        the log, by a thread that needs no lock of the interpreter, so a hang in native code shows too."""
        begun, due = time.monotonic(), almost_over(timeout_s)
        faulthandler.dump_traceback_later(due, file=sys.stderr)
        try:
            return getattr(self, method)(*arguments)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if time.monotonic() - begun >= due:
                write_mark(f"{method} has ended after all")


def last_stack(log_file: str) -> str | None:
    """Where the worker of a log file is stuck in its call, by the stacks that it has written: the collective, or else the
    innermost function, and the line of ours that called it. None if it has written none since the last mark: those before it
    are of a call that has ended, or of an earlier process."""
    try:
        with open(log_file, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            log = file.read().decode(errors="replace")
    except OSError:
        return None
    _, found, dump = log.rpartition(MARK)[2].rpartition("Timeout (")
    threads = [re.findall(r'File "([^"]*)", line (\d+) in (\S+)', thread) for thread in dump.split("Thread 0x")]
    frames = next((thread for thread in threads if any(name == "perform" for _, _, name in thread)), None)
    if not found or frames is None:
        return None
    collectives = [name for path, _, name in frames if path.endswith("distributed_c10d.py")]
    ours = next(((path, line) for path, line, _ in frames if f"{os.sep}tic_megatron{os.sep}" in path), None)
    what = collectives[-1] if collectives else frames[0][2]
    return f"{what} ({os.path.basename(ours[0])}, line {ours[1]})" if ours else what
