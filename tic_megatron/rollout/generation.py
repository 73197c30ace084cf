"""One rollout: prompts are handed to the engines as they have room, answers are checked, and what failing engines leave
behind is given to others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import ray

from tic_megatron.remote import WorkerError, failure_reason
from tic_megatron.rollout.dispatch import Ledger
from tic_megatron.rollout.pool import Engine, EnginePool
from tic_megatron.rollout.requests import Advance, Progress, SampleRequest, SampleResponse, problem_of

CALLS_AHEAD = 2
"""Calls that an engine has been given: one that it works on, and one so that it need not wait for the driver."""

MOST_FAILURES = 8
"""So many failures per engine in a row, without one answered prompt in between, end the run: it is not the prompts' doing."""


@dataclass(frozen=True)
class Dispatch:
    """How prompts get to engines.

    `concurrent`: responses that an engine works on at the same time; `static`: all prompts are dealt out before the start,
    instead of when an engine has room; `cut_tail_fraction`: share of the responses after whose end the others are cut;
    `heartbeat_s`: an engine that reports nothing for so long hangs; `vocabulary`: number of token ids; `as_a_whole`: a rollout
    that loses an engine is broken off with EngineLostError, instead of being finished by the others.
    """

    concurrent: int
    static: bool
    cut_tail_fraction: float | None
    heartbeat_s: float
    vocabulary: int
    as_a_whole: bool = False


class EngineLostError(Exception):
    """An engine has failed, and the rollout is to be made again as a whole."""


@dataclass
class Outcome:
    """What a rollout came to, beside the answers: `set_aside` prompts by number, with the reason; `reissued`: how often a
    prompt was given to an engine again; `cut`: responses ended early; `seconds`: how long it took; `busy`: per engine, its share
    of these with work."""

    set_aside: dict[int, str] = field(default_factory=dict)
    reissued: int = 0
    cut: int = 0
    seconds: float = 0.0
    busy: dict[int, float] = field(default_factory=dict)


@dataclass
class _Line:
    """To one engine: its unanswered calls, each with the number of responses that it brought; how many responses it had left
    when it last reported, and when that was."""

    calls: deque[tuple[ray.ObjectRef, int]] = field(default_factory=deque)
    left: int = 0
    heard: float = 0.0
    fresh: bool = True
    told_to_cut: bool = False

    @property
    def load(self) -> int:
        """Responses that it has to do, as far as the driver knows."""
        return self.left + sum(brought for _, brought in self.calls)


class Generation:
    """The loop over one rollout's reports. `answered(number, response)` is called as prompts are done, in any order."""

    def __init__(
        self,
        pool: EnginePool,
        requests: list[SampleRequest],
        dispatch: Dispatch,
        *,
        order: list[int],
        answered: Callable[[int, SampleResponse], None],
        serving: Callable[[], list[Engine]],
        revive: Callable[[], None],
    ) -> None:
        """`order`: prompts, first in line first; `serving`: the engines that may be used now; `revive` is called when there
        is none, and returns when there is one."""
        self._pool = pool
        self._requests = requests
        self._dispatch = dispatch
        self._answered = answered
        self._serving = serving
        self._revive = revive
        self._lines: dict[int, _Line] = {}
        self._responses = sum(request.n for request in requests)
        self._outcome = Outcome()
        self._failures = 0  # in a row
        self._busy_s: dict[int, float] = {engine.index: 0.0 for engine in pool.engines}
        dealt = None
        # One engine is given everything at once, in order: its batches, and so its rounding, do not depend on timing.
        self._at_once = dispatch.static or len(pool.engines) == 1
        if dispatch.static:
            engines = [engine.index for engine in serving()] or [0]
            dealt = {engine: order[start :: len(engines)] for start, engine in enumerate(engines)}
        self._ledger = Ledger([] if dealt else order, dealt)

    def run(self) -> Outcome:
        """Until every prompt is answered or set aside. Raises WorkerError when engines cannot be replaced,
        and EngineLostError."""
        begun = time.monotonic()
        while self._ledger.open:
            serving = self._serving()
            if not serving:
                self._revive()
                continue
            cut, dealt = self._cut_is_due(), self._deal(serving)
            for engine in serving:
                self._feed(engine, dealt[engine.index], cut=cut)
            self._listen(serving)
        self._outcome.seconds = seconds = max(time.monotonic() - begun, 1e-9)
        self._outcome.busy = {index: min(1.0, busy / seconds) for index, busy in self._busy_s.items()}
        self._outcome.set_aside = self._ledger.set_aside
        return self._outcome

    def _deal(self, engines: list[Engine]) -> dict[int, list[int]]:
        """New prompts, by engine, for those that can be told of them: one at a time to the engine with the least to do, so that
        few prompts keep all engines busy."""
        lines = {engine.index: self._lines.setdefault(engine.index, _Line()) for engine in engines}
        loads = {index: line.load for index, line in lines.items() if len(line.calls) < CALLS_AHEAD}
        dealt: dict[int, list[int]] = {index: [] for index in lines}
        if self._at_once:
            return dealt | {index: self._ledger.take(index, None) for index in loads}
        while loads:
            index = min(loads, key=loads.__getitem__)
            # One prompt more than it has room for, so that places do not stay empty.
            has_room = loads[index] < self._dispatch.concurrent + self._requests[0].n
            taken = self._ledger.take(index, 1) if has_room else []
            dealt[index] += taken
            loads[index] += sum(self._requests[number].n for number in taken)
            if not taken:
                del loads[index]
        return dealt

    def _feed(self, engine: Engine, taken: list[int], *, cut: bool) -> None:
        """Keep the engine's line full while it has work: a call with the new prompts, and further ones to go on."""
        line = self._lines[engine.index]
        while len(line.calls) < CALLS_AHEAD and self._ledger.in_flight(engine.index):
            line.told_to_cut &= not taken
            tell = cut and not line.told_to_cut
            order = Advance(
                [(number, self._requests[number]) for number in taken],
                low_water=self._dispatch.concurrent if self._ledger.waiting and not self._at_once else 0,
                fresh=line.fresh,
                cut=tell,
            )
            if not line.calls:
                line.heard = time.monotonic()
            line.calls.append((engine.actor.advance.remote(order), sum(self._requests[number].n for number in taken)))
            line.fresh, line.told_to_cut, taken = False, line.told_to_cut or tell, []

    def _listen(self, serving: list[Engine]) -> None:
        """Wait for the next report of any engine, and look for engines that have stopped reporting."""
        heads = {self._lines[e.index].calls[0][0]: e for e in serving if self._lines[e.index].calls}
        if not heads:
            return
        done, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0)
        if not done:
            earliest = min(self._lines[engine.index].heard for engine in heads.values()) + self._dispatch.heartbeat_s
            done, _ = ray.wait(list(heads), num_returns=1, timeout=max(0.0, min(1.0, earliest - time.monotonic())))
        for call in done:
            self._hear(heads.pop(call), call)
        for engine in heads.values():
            if time.monotonic() - self._lines[engine.index].heard >= self._dispatch.heartbeat_s:
                self._lose(engine, f"no sign of life for {self._dispatch.heartbeat_s:g} s (rollout.heartbeat_s)")

    def _hear(self, engine: Engine, call: ray.ObjectRef) -> None:
        line = self._lines[engine.index]
        line.calls.popleft()
        try:
            progress: Progress = ray.get(call)
        except ray.exceptions.RayError as error:
            self._lose(engine, failure_reason(error))
            return
        problem = self._problem(engine, progress)
        if problem:
            self._lose(engine, f"it returns rubbish: {problem}")
            return
        line.left, line.heard = progress.unfinished, time.monotonic()
        self._busy_s[engine.index] += progress.busy_s
        for number, reason in progress.refused:
            self._ledger.refuse(engine.index, number, reason)
            self._outcome.reissued += number not in self._ledger.set_aside
        self._failures = 0 if progress.finished else self._failures
        for number, response in progress.finished:
            self._ledger.finish(engine.index, number)
            self._outcome.cut += sum(sample.cut for sample in response.samples)
            self._answered(number, response)

    def _problem(self, engine: Engine, progress: Progress) -> str | None:
        numbers = [number for number, _ in (*progress.finished, *progress.refused)]
        if len(set(numbers)) < len(numbers) or not all(self._ledger.has(engine.index, number) for number in numbers):
            return "it answers what it was not asked"
        checks = (
            problem_of(response, self._requests[number], vocabulary=self._dispatch.vocabulary, weight_version=engine.version or 0)
            for number, response in progress.finished
        )
        return next(filter(None, checks), None)

    def _lose(self, engine: Engine, reason: str) -> None:
        """The engine has failed: others get its prompts, and what it may still say is not heard."""
        del self._lines[engine.index]
        self._failures += 1
        if self._failures >= MOST_FAILURES * len(self._pool.engines):
            message = f"engine {engine.index} failed in generation: {reason} (its log: {engine.log_file}); "
            message += f"{self._failures} failures of engines in a row, and no prompt answered in between"
            raise WorkerError(message, may_pass=True)
        before = set(self._ledger.set_aside)
        again = self._ledger.lose(engine.index, f"engines failed on it ({reason})")
        self._outcome.reissued += len(again)
        remark = f"{len(again)} unfinished prompts are issued again, and "
        if set(self._ledger.set_aside) - before:
            remark = "the prompt that it worked on alone is set aside, and "
        if self._dispatch.as_a_whole:
            remark = "the rollout is generated again as a whole, and "
        self._pool.fail(engine, "generation", reason, remark)
        if self._dispatch.as_a_whole:
            raise EngineLostError(f"engine {engine.index}: {reason}")

    def _cut_is_due(self) -> bool:
        """Whether so many responses have ended that the others are cut. Not before all of them have been begun: of one that
        waits in its engine there is nothing yet; and not after prompts were issued again, of which there would be little."""
        fraction, lines = self._dispatch.cut_tail_fraction, self._lines.values()
        if fraction is None or self._ledger.waiting or self._outcome.reissued:
            return False
        if any(line.load > self._dispatch.concurrent for line in lines):
            return False
        return self._responses - sum(line.load for line in lines) >= fraction * self._responses
