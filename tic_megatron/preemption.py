"""Leaving in good order when the machine is wanted for something else: SIGTERM, and SIGUSR1, which Slurm sends ahead of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tic_megatron.observability.files import atomic_writer

MARKER = "requeue"
"""File in the run folder of a run that was told to leave, for whoever decides whether to queue it again."""
NOT_BEGUN = ", before it began"


class Preempted(BaseException):
    """The run is to save and leave. Not an `Exception`, so that nothing takes it for a failure and goes on."""


class Interruption(KeyboardInterrupt):
    """What the handler raises: libraries in C (Ray) let nothing else through, and turn others into errors of their own.
    `breakable` makes Preempted of it, but for one that comes while it is being entered or left."""


class Preemption:
    """Raises Preempted where that does no harm: within `breakable`, at once, and otherwise when `check` is called."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal that has come."""
        self._breakable = False

    def listen(self) -> None:
        """From now on. In the main thread, and again after libraries that take the signals for themselves (Ray)."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._come)

    def check(self) -> None:
        """Raise Preempted if a signal has come."""
        if self.signal:
            raise Preempted(self.signal)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Around waiting for what can be made again."""
        self._breakable = True
        try:
            self.check()
            yield
        except KeyboardInterrupt:
            self.check()
            raise
        finally:
            self._breakable = False

    def _come(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number).name
        if self._breakable:
            self._breakable = False
            raise Interruption


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Around starting what starts processes: they, and what they start, never get SIGUSR1, which srun sends to all processes of a
    job's step. One that came meanwhile comes at the end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


@contextmanager
def taking_signals(leave: Callable[[signal.Signals], int]) -> Iterator[None]:
    """Around the checks before a run, in which there is nothing to save, and which may take minutes: when told to leave, the
    process ends with the code that `leave` returns. In the main thread."""

    def end(number: int, frame: object) -> None:
        code = 1
        try:
            code = leave(signal.Signals(number))
        finally:  # whatever the checks are at would take an exception for its own
            os._exit(code)

    taken = [n for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mark(run_dir: Path, signal_name: str, step: int, *, begun: bool = True) -> None:
    """Leave the marker, a line of text. `begun`: whether the folder is this command's run already, and not an older one's that it
    was about to go back from."""
    with atomic_writer(run_dir / MARKER) as file:
        file.write(f"left at {signal_name} after step {step}{'' if begun else NOT_BEGUN}\n")


def has_left(run_dir: Path) -> bool:
    """Whether the folder's run has been told to leave, and not gone on since."""
    try:
        return not (run_dir / MARKER).read_text(encoding="utf-8").rstrip().endswith(NOT_BEGUN)
    except (OSError, UnicodeDecodeError):
        return False


def unmark(run_dir: Path) -> None:
    """The run goes on."""
    (run_dir / MARKER).unlink(missing_ok=True)
