"""One grader process (`tic_megatron.rewards.worker_main`), as its parent sees it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tic_megatron
from tic_megatron.config import RewardSettings, RewardTerm
from tic_megatron.rewards.secret_names import looks_secret
from tic_megatron.rewards.terms import Term

START_LIMIT_S = 120.0
"""A worker that is not ready by then counts as broken (its imports take about a second)."""
TURN_GRACE_S = 2.0
"""An async function's own limit ends its call; one that does not give the others their turn is killed so much later."""

_numbers = itertools.count()


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what looks like a secret, such as HF_TOKEN or WANDB_API_KEY: graders work on what a model has written."""
    return {name: value for name, value in environment.items() if not looks_secret(name, value)}


def _kept_secrets(source: RewardTerm, settings: RewardSettings) -> dict[str, str]:
    """The secrets that this term's processes get all the same."""
    if source.is_endpoint:
        names = [settings.http_token_env] if settings.http_token_env else []
    else:
        names = settings.keep_env if source.function else []
    return {name: os.environ[name] for name in names if name in os.environ}


@dataclass
class Call:
    """What a worker is at: responses (by index), until when, and whether it is to be alone with them."""

    indices: list[int]
    deadline: float
    suspect: bool


class Worker:
    """A process and its calls under way, by number. `deadline` is when the first of them, or its start, is overdue."""

    def __init__(
        self, term: Term, settings: RewardSettings, log_path: Path | None, *, asynchronous: bool, check: bool = False
    ) -> None:
        self.calls: dict[int, Call] = {}
        self.starting = True
        self.alive = True
        self.broken: str | None = None
        self.unsent = bytearray()
        self._start_deadline = time.monotonic() + START_LIMIT_S
        self._limit_s, self._grace_s = settings.timeout_s, TURN_GRACE_S if asynchronous else 0.0
        self._buffer = b""
        package_parent = str(Path(tic_megatron.__file__).resolve().parent.parent)
        search_path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
        environment = without_secrets(os.environ) | _kept_secrets(term.source, settings)
        order = {"source": term.source.source, "settings": asdict(settings), "check": check}
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path or os.devnull, "ab") as log, tempfile.TemporaryFile() as program:
            program.write(term.program or b"")
            program.seek(0)
            self._process = subprocess.Popen(
                # A plain interpreter, not multiprocessing: that would import the caller's main module, torch and all.
                [sys.executable, "-P", "-m", "tic_megatron.rewards.worker_main", json.dumps(order), str(program.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=[program.fileno()],
                env={**environment, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the driver's to handle; a worker ends when its pipe closes
            )
        self.input, self.output = self._process.stdin, self._process.stdout
        os.set_blocking(self.input.fileno(), False)  # one that is busy does not read, and must not hold the driver up

    @property
    def pid(self) -> int:
        """Of the process, which leads a session of its own."""
        return self._process.pid

    @property
    def ready(self) -> bool:
        """Whether it can be given work."""
        return self.alive and not self.starting

    @property
    def has_suspect(self) -> bool:
        """Whether it is to be left alone with what it has."""
        return any(call.suspect for call in self.calls.values())

    @property
    def deadline(self) -> float:
        """On the monotonic clock; infinite for one that is idle."""
        if self.starting:
            return self._start_deadline
        return min((call.deadline for call in self.calls.values()), default=math.inf)

    def started(self) -> None:
        """It has said that it is ready."""
        self.starting = False

    def send(self, indices: list[int], items: Sequence[dict[str, Any]], *, suspect: bool) -> None:
        """Begin a call."""
        number = next(_numbers)
        deadline = time.monotonic() + self._limit_s * len(indices) + self._grace_s
        self.calls[number] = Call(indices, deadline, suspect)
        self.unsent += json.dumps({"call": number, "items": items}).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write as much as the pipe takes."""
        try:
            while self.unsent:
                del self.unsent[: os.write(self.input.fileno(), self.unsent)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.alive = False
            self.unsent.clear()

    def receive(self) -> list[Any]:
        """Complete messages that have arrived, None for what is none; at the end of the pipe the worker is dead."""
        data = os.read(self.output.fileno(), 1 << 16)
        if not data:
            self.alive = False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [_message(line) for line in lines]

    def finish(self, message: Any) -> list[int] | None:
        """The responses of the call that this message answers. One that answers nothing that was asked, perhaps of a child of
        the grader, discredits the worker; None."""
        number = message.get("call") if isinstance(message, dict) else None
        call = self.calls.get(number) if isinstance(number, int) else None
        results = message.get("results") if call else None
        if call is None or not ("fault" in message or (isinstance(results, list) and len(results) == len(call.indices))):
            self.alive = False
            return None
        del self.calls[number]
        return call.indices

    def first_message(self) -> Any:
        """What it says of its start; None when it dies before, or is not ready in time."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            while self.alive and time.monotonic() < self.deadline:
                if selector.select(max(0.0, self.deadline - time.monotonic())):
                    for message in self.receive():
                        return message
        return None

    def ending(self) -> str:
        """How a dead process ended."""
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it did not answer as it should"
        return f"exit status {status}" if status >= 0 else f"signal {-status}"

    def kill(self) -> None:
        """End the process at once, with what it has started, and collect it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session of its own
        self._process.wait()
        for pipe in (self.input, self.output):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _message(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
