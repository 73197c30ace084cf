"""The engines' processes: started, called, found to have failed, ended, and replaced."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from tic_megatron.remote import STOP_TIMEOUT_S, Deadline, WorkerError, failure_reason, may_pass, result_or_none

MOST_FAILED_STARTS = 3
"""So many starts of one engine in a row that fail end the run."""

logger = logging.getLogger(__name__)


@dataclass
class Engine:
    """One place for an engine, and the process that is in it now.

    `actor` is None when there is none (yet); `loading` is the call that it has to answer before it is of use; `version` is
    that of the weights in use, None where they are not known to be anybody's; `asleep` is whether its memory is free; `started`
    is the monotonic time of the process's start.
    """

    index: int
    log_file: str
    actor: ActorHandle | None = None
    loading: ray.ObjectRef | None = None
    pid: int = 0
    version: int | None = None
    asleep: bool = False
    failed_starts: int = 0
    started: float = 0.0

    @property
    def loaded(self) -> bool:
        """Whether there is a process that has loaded the model."""
        return self.actor is not None and self.loading is None


class EnginePool:
    """All engines. One that fails is ended and replaced at once, in the background, and named in a line to the user.

    Events are counted in `failures` and `restarts`. Not for several threads at once, but for `stop`.
    """

    def __init__(
        self,
        make: Callable[[int], ActorHandle],
        log_files: Sequence[str],
        *,
        deadline: Callable[[str], Deadline],
        note: Callable[[str], None],
    ) -> None:
        """Start them all. `make` starts the process of one engine; `deadline(method)` is when a call that is not answered counts
        as hung; `note` takes lines for the user."""
        self._make = make
        self._note = note
        self._deadline = deadline
        self._to_start = deadline("ready")
        self._first_version: int | None = 0  # of an engine that has just loaded the model directory
        self._have_started = False
        self._held = False
        self._stopped = False
        self.failures = 0
        self.restarts = 0
        self.engines = [Engine(index, log_file) for index, log_file in enumerate(log_files)]
        for engine in self.engines:
            self._start(engine)

    # ---- who there is ----

    @property
    def loaded(self) -> list[Engine]:
        """The engines that answer calls. Waits for the first start, and looks for replacements that have become ready."""
        if not self._have_started:
            self.ready()
        self.poll()
        return [engine for engine in self.engines if engine.loaded]

    @property
    def loading(self) -> bool:
        """Whether an engine is missing or not ready yet."""
        return any(not engine.loaded for engine in self.engines)

    def ready(self) -> list[int]:
        """Wait for the first start of all engines; their process ids. WorkerError for the first that fails."""
        for engine in self.engines:
            try:
                engine.pid = ray.get(engine.loading, timeout=self._to_start.seconds) if engine.loading else engine.pid
            except ray.exceptions.GetTimeoutError as error:
                raise self._error(engine, "ready", str(self._to_start)) from error
            except ray.exceptions.RayError as error:
                raise self._error(engine, "ready", failure_reason(error), error) from error
            engine.loading = None
        self._have_started = True
        return [engine.pid for engine in self.engines]

    def poll(self) -> None:
        """Look after the engines that are loading. WorkerError when one fails to start again and again."""
        for engine in self.engines:
            if engine.loading is None:
                continue
            if ray.wait([engine.loading], timeout=0)[0]:
                try:
                    engine.pid = ray.get(engine.loading)
                except ray.exceptions.RayError as error:
                    self._start_failed(engine, failure_reason(error), error)
                else:
                    engine.loading, engine.failed_starts = None, 0
                    logger.info("engine %d is ready, process %d", engine.index, engine.pid)
            elif self._have_started and time.monotonic() - engine.started > self._to_start.seconds:
                self._start_failed(engine, str(self._to_start))

    def wait_for_any(self, *, all_engines: bool = False) -> None:
        """Wait until one engine, or all, can be called. WorkerError when none starts."""
        end = time.monotonic() + self._to_start.seconds
        while not (not self.loading if all_engines else self.loaded):
            self.check()
            loading = [engine.loading for engine in self.engines if engine.loading is not None]
            if time.monotonic() > end:
                engine = next(engine for engine in self.engines if not engine.loaded)
                raise self._error(engine, "its start", str(self._to_start))
            ray.wait(loading, num_returns=1, timeout=0.2) if loading else time.sleep(0.2)
            self.poll()

    # ---- calls ----

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all engines that answer calls; their results, in order. See `call_each`."""
        return self.call_each(method, {engine.index: arguments for engine in self.loaded})

    def call_each(self, method: str, arguments: dict[int, tuple]) -> list[Any]:
        """`call_map`; the results in the engines' order."""
        return list(self.call_map(method, arguments).values())

    def call_map(self, method: str, arguments: dict[int, tuple]) -> dict[int, Any]:
        """Call a method of some engines, each with its own arguments; the results of those that gave one, by index.

        An engine that has died, or gives no answer in time, is replaced, and so is one that raises where
        others do not. WorkerError when none gives a result and one raises: then it is not the engine's doing.
        """
        self.check()
        calls = {index: getattr(self.engines[index].actor, method).remote(*a) for index, a in arguments.items()}
        deadline = self._deadline(method)
        end = time.monotonic() + deadline.seconds
        results: dict[int, Any] = {}
        raised: dict[int, ray.exceptions.RayTaskError] = {}
        for index, call in calls.items():
            engine = self.engines[index]
            try:
                results[index] = ray.get(call, timeout=max(0.0, end - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                self.fail(engine, method, str(deadline))
            except ray.exceptions.RayTaskError as error:
                raised[index] = error
            except ray.exceptions.RayError as error:
                self.fail(engine, method, failure_reason(error))
        for index, cause in raised.items():
            if not results:
                raise self._error(self.engines[index], method, failure_reason(cause), cause) from cause
            self.fail(self.engines[index], method, failure_reason(cause))
        return {index: results[index] for index in sorted(results)}

    def ask(self, method: str, *, timeout_s: float) -> list[Any | None]:
        """Results of the engines that answer in time; None of those that do not, or fail. For what a run can do without."""
        calls = {engine.index: getattr(engine.actor, method).remote() for engine in self.engines if engine.loaded}
        answered, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
        return [result_or_none(calls[e.index]) if calls.get(e.index) in answered else None for e in self.engines]

    def updated(self, engines: Sequence[Engine], version: int) -> None:
        """These have the weights of that version now; a replacement has not."""
        self._first_version = None
        for engine in engines:
            engine.version = version

    # ---- failures ----

    def fail(self, engine: Engine, during: str, reason: str, remark: str = "") -> None:
        """An engine is of no use any more: end it, start another in its place, and say so."""
        self.check()
        self.failures += 1
        self._note(
            f"warning: engine {engine.index} failed in {during}: {reason} (its log: {engine.log_file}); {remark}it is replaced"
        )
        self._end(engine)
        if not self._held:
            self._restart(engine)

    @contextlib.contextmanager
    def no_starts(self):
        """Start no replacement within: there is no room on the GPU for what vLLM does when it starts."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            for engine in self.engines:
                if engine.actor is None and not self._stopped:
                    self._restart(engine)

    def check(self) -> None:
        """WorkerError when the engines have been stopped, for a thread that still works with them."""
        if self._stopped:
            raise WorkerError("the engines have been stopped")

    def stop(self) -> None:
        """End all engines and their processes, also those that hang or have died."""
        self._stopped = True
        actors = [engine.actor for engine in self.engines if engine.actor is not None]
        endings = [engine.actor.shutdown.remote() for engine in self.engines if engine.loaded]
        ray.wait(endings, num_returns=len(endings), timeout=STOP_TIMEOUT_S) if endings else None
        for actor in actors:
            ray.kill(actor)
        for engine in self.engines:
            engine.actor, engine.loading = None, None

    def _start(self, engine: Engine) -> None:
        engine.actor = self._make(engine.index)
        engine.version, engine.asleep, engine.pid = self._first_version, False, 0
        engine.loading = engine.actor.ready.remote()
        engine.started = time.monotonic()

    def _restart(self, engine: Engine) -> None:
        with Path(engine.log_file).open("a", encoding="utf-8") as log:
            log.write("\n---- another process in the place of the one that failed ----\n")
        self.restarts += 1
        self._start(engine)

    def _start_failed(self, engine: Engine, reason: str, error: ray.exceptions.RayError | None = None) -> None:
        engine.failed_starts += 1
        if engine.failed_starts >= MOST_FAILED_STARTS:
            message = f"{reason}; {engine.failed_starts} starts in a row have failed"
            raise self._error(engine, "its start", message, error) from error
        self.fail(engine, "its start", reason)

    def _end(self, engine: Engine) -> None:
        ray.kill(engine.actor)  # also a process that is stopped
        engine.actor, engine.loading, engine.version = None, None, None

    def _error(self, engine: Engine, during: str, reason: str, error: ray.exceptions.RayError | None = None) -> WorkerError:
        message = f"engine {engine.index} failed in {during}: {reason} (its log: {engine.log_file})"
        return WorkerError(message, may_pass=error is None or may_pass(error))
