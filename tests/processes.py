"""Watching processes end."""

from __future__ import annotations

import time

import psutil


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def wait_until_gone(pids: list[int], timeout_s: float = 20) -> list[int]:
    """Wait for the processes to end; those that are still there after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    return [pid for pid in pids if psutil.pid_exists(pid)]
