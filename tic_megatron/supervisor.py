"""The driver of a run in a process of its own: watched, told to leave, started again, and cleaned up after.

A run is only ever continued in one way, from its last checkpoint by a fresh driver, whatever has failed: an actor that died or
hangs, Ray, or the driver itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESTART = os.EX_TEMPFAIL
"""Exit code of a driver that failed in a way in which a fresh start may succeed."""

MARK = "TIC_MEGATRON_DRIVER"
"""Environment variable of a driver and of all that it starts."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""To the driver; a terminal that is closed (SIGHUP) as SIGTERM."""
END_PATIENCE_S = 10.0
"""Seconds that the processes of a driver which ended in good order have to end themselves."""
KILL_PATIENCE_S = 30.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def supervise(
    drive: Callable[[int], int],
    *,
    max_restarts: int,
    reached: int,
    last_step: Callable[[], int],
    leave: Callable[[signal.Signals], int],
    note: Callable[[str], None],
) -> int:
    """Call `drive(attempt)` in a forked process, again and again until it ends by itself; its exit code, 1 when it is given up.

    It is started again when it returns RESTART or dies, but not more than `max_restarts` times in a row without the run
    getting any further, and not after a signal that told it to leave. When a driver has ended, no process that it started is
    left on this machine, and when this process is killed, the driver gets SIGTERM.

    Args:
        drive: returns the exit code; `attempt` counts from 0. Nothing that it needs may have started threads in this process.
        reached: the step that the run continues from.
        last_step: the last step that the run has finished.
        leave: called when a driver that a signal told to leave has failed or died instead; the exit code.
        note: takes lines for the user.
    """
    attempt = restarts = 0
    with _Driver.in_charge() as driver:
        while True:
            code, died = driver.run(functools.partial(drive, attempt))
            if not died and code != RESTART:
                return code
            if driver.told:
                return leave(driver.told)
            try:
                step = last_step()
            except (OSError, ValueError):  # the disk that the driver may have failed of
                step = reached
            restarts = 1 if step > reached else restarts + 1
            reached = max(step, reached)
            died = died and f"the driver {died}; "
            if restarts > max_restarts:
                if died or max_restarts:
                    note(f"error: {died}given up after {max_restarts} restarts at step {reached} (run.max_restarts)")
                return 1
            note(f"{died}restart {restarts} of {max_restarts}, step {step} was the last")
            attempt += 1


class _Driver:
    """The process, while there is one."""

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        """The signal that has told it to leave."""
        self._mark = secrets.token_hex(8)
        self._pid: int | None = None
        self._found: set[int] = set()
        self._before: dict[signal.Signals, Any] = {}  # what handled signals before it was in charge

    @classmethod
    @contextlib.contextmanager
    def in_charge(cls) -> Iterator[_Driver]:
        """Within, signals are the driver's, and processes whose parents have died become children of this one."""
        driver = cls()
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        taken = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup ignores
        driver._before = {number: signal.signal(number, driver._tell) for number in taken}
        try:
            yield driver
        finally:
            for number, handler in driver._before.items():
                signal.signal(number, handler)
            _prctl(_PR_SET_CHILD_SUBREAPER, 0)

    def run(self, work: Callable[[], int]) -> tuple[int, str]:
        """Fork, work, and clean up; the exit code, and how the process died if it did not return from `work`, otherwise ""."""
        sys.stdout.flush()
        sys.stderr.flush()
        launcher = os.getpid()
        told, tell = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a signal must find the process's number known
        self._pid = os.fork()
        if self._pid == 0:
            self._become_driver(work, launcher, tell)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        if self.told:  # between two drivers
            os.kill(self._pid, signal.SIGTERM)
        pid = self._pid
        _, status = os.waitpid(pid, 0)
        self._pid = None
        os.close(tell)
        os.set_blocking(told, False)  # a process that it has forked may hold the other end
        with open(told, "rb", buffering=0) as pipe:
            said = int(pipe.read() or -1)
        in_order = said not in (-1, RESTART)
        _end_processes(functools.partial(self._orphans, pid), patience_s=END_PATIENCE_S if in_order else 0.0)
        if said != -1:
            return said, ""
        code = os.waitstatus_to_exitcode(status)
        return (128 - code, f"was killed by {signal.Signals(-code).name}") if code < 0 else (code or 1, f"ended with code {code}")

    def _orphans(self, driver: int) -> set[int]:
        """Children of this process that the driver has left: of its session, or with its mark in their environment. Others may
        come to a process that adopts orphans too, all of a container's if it is the first there."""
        here = set(_children(os.getpid()))
        for pid in here - self._found:
            if _session(pid) == driver or f"{MARK}={self._mark}" in _environment(pid):
                self._found |= {pid, *_descendants(pid)}  # a dead one that nobody has waited for has no environment any more
        return self._found & here

    def _become_driver(self, work: Callable[[], int], launcher: int, tell: int) -> None:
        """In the forked process; never returns. A session of its own: what the terminal sends comes once, by the launcher."""
        code: int | None = 1
        try:
            os.setsid()
            os.environ[MARK] = self._mark
            _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            if os.getppid() == launcher:
                code = work()
        except KeyboardInterrupt:
            code = 130
        except SystemExit:
            code = None  # Ray's, at SIGTERM and when its node is lost
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exc()
        finally:
            try:
                if code is not None:
                    os.write(tell, str(code).encode())
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
                        stream.flush()
            finally:
                os._exit(1 if code is None else code)  # the launcher's exit handlers are not ours to call

    def _tell(self, number: int, frame: object) -> None:
        self.told = signal.Signals(number)
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM if number == signal.SIGHUP else number)


def _end_processes(find: Callable[[], set[int]], *, patience_s: float) -> None:
    """Wait for processes to end, and kill those that do not. What they leave behind becomes a child of this process too, and so
    is found again."""
    begun = time.monotonic()
    while pids := find():
        elapsed = time.monotonic() - begun
        for pid in pids:
            if elapsed >= patience_s:
                for process in [pid, *_descendants(pid)]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if elapsed > patience_s + KILL_PATIENCE_S:
            return  # in the kernel's hands
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    """Process ids; none of a process that is gone."""
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _environment(pid: int) -> list[str]:
    """That it was started with; nothing of a process that is gone, or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _descendants(pid: int) -> list[int]:
    return [found for child in _children(pid) for found in (child, *_descendants(child))]


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")
