"""Ray actors of one kind that are asked together: the first failure ends the wait, and is told in one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import ray
from ray.actor import ActorHandle

from tic_megatron.config import ClusterSettings
from tic_megatron.observability.stacks import last_stack

STOP_TIMEOUT_S = 20.0
"""Seconds that a worker has to end itself before it is killed."""
DEATH_NOTICE_S = 5.0
"""Seconds within which Ray tells that a process has died: the others' collectives fail at once, and are not to be blamed."""
MOST_NAMED = 8
"""Workers that the message about a hang names."""
NO_STACKS = "an unknown place (it wrote no stacks: it may have been stopped)"
"""Where a worker hangs whose log does not tell."""
FROM_OUTSIDE = {"OSError", "DistError", "AcceleratorError"}
"""Names, since torch is not imported here, of the exceptions for what breaks outside of the program."""
PHASES = {
    "start_": {"place", "open_store", "setup", "load_checkpoint", "ready"},
    "weight_sync_": {
        *("begin_export", "connect", "export_bucket", "deliver_bucket", "weight_digests"),
        *("start_weight_update", "update_weights", "finish_weight_update", "received_digests", "checksums"),
    },
}
"""Methods of actors and engines, by the part of a run that they belong to, where it has a deadline of its own."""


class WorkerError(RuntimeError):
    """A worker failed, died or hangs: which one, in what, and where its log lies.

    `may_pass`: whether a fresh start may help, since something broke from outside: a process died or hangs, or a connection, a
    disk or a device failed.
    """

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Deadline:
    """Seconds that a call may take, and the setting that says so."""

    seconds: float
    setting: str

    @classmethod
    def of(cls, cluster: ClusterSettings, method: str) -> Deadline:
        """That of the phase which a method of actors or engines belongs to."""
        phase = next((phase for phase, methods in PHASES.items() if method in methods), "")
        return cls(getattr(cluster, f"{phase}timeout_s"), f"cluster.{phase}timeout_s")

    def __str__(self) -> str:
        return f"no answer in {self.seconds:g} s ({self.setting})"


class WorkerPool:
    """Handles of `Worker`s, named `<kind> <index>` in errors, with their log files and a deadline for every call."""

    def __init__(
        self, kind: str, workers: list[ActorHandle], log_files: list[str], *, deadline: Callable[[str], Deadline]
    ) -> None:
        """`deadline(method)`: when a call that is not answered counts as hung."""
        self.kind = kind
        self.workers = workers
        self.log_files = log_files
        self._deadline = deadline

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all workers; their results in order. Raises WorkerError."""
        return self.start(method, *arguments)()

    def start(self, method: str, *arguments: Any) -> Callable[[], list[Any]]:
        """Call a method of all workers without waiting; the function returned waits for their results, like `call`."""
        deadline = self._deadline(method)
        calls = [_call(worker, method, deadline.seconds, arguments) for worker in self._running()]
        return lambda: self._wait(method, calls, deadline)

    def call_each(self, method: str, arguments: Sequence[tuple]) -> list[Any]:
        """Call a method of the first workers, each with its own arguments. Raises WorkerError."""
        deadline = self._deadline(method)
        calls = [_call(worker, method, deadline.seconds, a) for worker, a in zip(self._running(), arguments, strict=False)]
        return self._wait(method, calls, deadline)

    def ask(self, method: str, *arguments: Any, timeout_s: float) -> list[Any | None]:
        """Results of the workers that answer in time; None for those that do not, or fail. For what a run can do without."""
        calls = [_call(worker, method, timeout_s, arguments) for worker in self.workers]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        return [result_or_none(call) if call in done else None for call in calls]

    def _running(self) -> list[Any]:
        """The workers. When they have been ended, nothing has been done by all of them: a thread that asks whether a checkpoint
        is written must not take that for yes."""
        if not self.workers:
            raise WorkerError(f"the {self.kind}s have been ended")
        return self.workers

    def stop(self) -> None:
        """End all workers, also those that hang or have died."""
        endings = [worker.shutdown.remote() for worker in self.workers]
        ray.wait(endings, num_returns=len(endings), timeout=STOP_TIMEOUT_S)
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []

    def _wait(self, method: str, calls: list[ray.ObjectRef], deadline: Deadline) -> list[Any]:
        """Results of all calls. The first failure ends the wait: the others may hang in a collective because of it."""
        pending = {call: index for index, call in enumerate(calls)}
        results: list[Any] = [None] * len(calls)
        end = time.monotonic() + deadline.seconds
        while pending:
            waiting = list(pending)
            # All that have ended: one at a time, hundreds of calls would be looked through hundreds of times.
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            if not done:
                done, _ = ray.wait(waiting, num_returns=1, timeout=max(0.0, end - time.monotonic()))
            if not done:
                self._hang(sorted(pending.values()), method, deadline)
            for call in done:
                index = pending.pop(call)
                try:
                    results[index] = ray.get(call)
                except ray.exceptions.RayError as error:
                    self._fail(index, method, error, pending)
        return results

    def _fail(self, index: int, method: str, error: ray.exceptions.RayError, pending: dict[ray.ObjectRef, int]) -> NoReturn:
        """Raise what has happened: of a worker that raised because another one died, the death."""
        end = time.monotonic() + DEATH_NOTICE_S
        while isinstance(error, ray.exceptions.RayTaskError) and pending and time.monotonic() < end:
            for call in ray.wait(list(pending), num_returns=1, timeout=0.5)[0]:
                other = pending.pop(call)
                try:
                    ray.get(call)
                except ray.exceptions.RayError as second:
                    if not isinstance(second, ray.exceptions.RayTaskError):
                        index, error = other, second
        reason = failure_reason(error)
        if not isinstance(error, ray.exceptions.RayTaskError):
            # NCCL ends a process whose collective hangs, and the driver does not get to see the hang.
            stuck = {other: where for other in (index, *pending.values()) if (where := last_stack(self.log_files[other]))}
            reason += f"; stuck in {_places(stuck)}" if stuck else ""
        message = f"{self.kind} {index} failed in {method}: {reason} (its log: {self.log_files[index]})"
        raise WorkerError(message, may_pass=may_pass(error)) from error

    def _hang(self, indices: list[int], method: str, deadline: Deadline) -> NoReturn:
        """Raise which workers have not answered, and in which call each of them is stuck, as its log says."""
        stuck = {index: last_stack(self.log_files[index]) or NO_STACKS for index in indices}
        raise WorkerError(
            f"{self.kind} {indices[0]} failed in {method}: {deadline}, from {len(indices)} of {len(self.workers)}; stuck in "
            f"{_places(stuck)} (its log: {self.log_files[indices[0]]})",
            may_pass=True,
        )


def _places(stuck: dict[int, str]) -> str:
    """Where workers are stuck, by their index."""
    where = "; ".join(f"{index}: {place}" for index, place in list(stuck.items())[:MOST_NAMED])
    return where + (f" and {len(stuck) - MOST_NAMED} more" if len(stuck) > MOST_NAMED else "")


def _call(worker: ActorHandle, method: str, timeout_s: float, arguments: tuple) -> ray.ObjectRef:
    return worker.perform.remote(method, timeout_s, *arguments)


def may_pass(error: BaseException) -> bool:
    """Whether the cause of an error may be gone at the next try: a process died or hung, or raised what connections, disks and
    devices raise. Not when memory was too small, nor for a fault in the program."""
    if isinstance(error, WorkerError):
        return error.may_pass
    if isinstance(error, ray.exceptions.RayTaskError):
        kinds = {kind.__name__ for kind in type(error.cause).__mro__}
        untold = type(error.cause) is Exception  # vLLM's, when a process of a tensor-parallel engine does not start
        return bool(kinds & FROM_OUTSIDE) or untold or ("RuntimeError" in kinds and "/gloo/" in str(error.cause))
    return isinstance(error, ray.exceptions.RayError)


def result_or_none(call: ray.ObjectRef) -> Any | None:
    """The result of a call that has ended; None if it failed."""
    try:
        return ray.get(call)
    except ray.exceptions.RayError:
        return None


def failure_reason(error: ray.exceptions.RayError) -> str:
    """What a worker raised, without the traceback: the last line that is not indented, and what follows it."""
    lines = str(error).strip().splitlines()
    start = max(index for index, line in enumerate(lines) if not line.startswith((" ", "\t")))
    text = " ".join(line.strip() for line in lines[start:])
    return text.partition(" Worker exit type:")[0]  # Ray's guesses at why a process died, which take ten lines
