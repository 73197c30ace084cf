"""An engine without vLLM that fails in the ways that engines fail, when a prompt tells it to: quick to start, for tests of the
driver's side."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tic_megatron.rollout.engine import EngineOptions
from tic_megatron.rollout.requests import Advance, Progress, Sample, SampleRequest, SampleResponse

DIE, HANG, RAISE, REFUSE, SHORT, FOREIGN, STRANGER = range(200, 207)
"""First token of a prompt: what the engine does when it works on it."""
ONCE = 299
"""Second token: only the first time, in any process."""


@dataclass
class Job:
    """A request and how many tokens its responses have."""

    number: int
    request: SampleRequest
    tokens: int = 0


class FakeEngine:
    """Answers prompt by prompt, `SPEED` tokens a call; a response has as many tokens as the prompt's last token says."""

    SPEED = 4

    def __init__(self, options: EngineOptions) -> None:
        self.folder = Path(options.log_file).parent
        self.index = int(Path(options.log_file).stem.rpartition("_")[2])
        self.jobs: list[Job] = []
        self.version = 0

    def ready(self) -> int:
        if (self.folder / f"no_start_{self.index}").exists():
            raise RuntimeError("no room on this GPU")
        return os.getpid()

    def advance(self, order: Advance) -> Progress:
        if order.fresh:
            self.jobs = []
        time.sleep(0.01)
        refused = []
        for number, request in order.requests:
            if self._deed(request, REFUSE):
                refused.append((number, "it is too long"))
            else:
                self.jobs.append(Job(number, request))
        finished = []
        for job in list(self.jobs)[: None if order.cut else 2]:
            self._misbehave(job.request)
            wanted = min(job.request.prompt_ids[-1], job.request.max_tokens)
            job.tokens = min(job.tokens + self.SPEED, wanted)
            if job.tokens == wanted or order.cut:
                self.jobs.remove(job)
                response = self._response(job, cut=job.tokens < wanted)
                finished.append((job.number, response))
        left = sum(job.request.n for job in self.jobs)
        return Progress(finished, refused, left, 0.01 if finished or left else 0.0)

    def _deed(self, request: SampleRequest, *deeds: int) -> int | None:
        """What the prompt asks for, if it is one of these and to be done now."""
        deed = request.prompt_ids[0]
        if deed not in deeds:
            return None
        mark = self.folder / f"done_{deed}_{request.seed}"
        if request.prompt_ids[1] == ONCE and mark.exists():
            return None
        with mark.open("a") as file:
            file.write(f"{self.index}\n")
        return deed

    def _misbehave(self, request: SampleRequest) -> None:
        deed = self._deed(request, DIE, HANG, RAISE)
        if deed == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == HANG:
            os.kill(os.getpid(), signal.SIGSTOP)
        if deed == RAISE:
            raise RuntimeError("an illegal memory access")

    def _response(self, job: Job, *, cut: bool) -> SampleResponse:
        request = job.request
        samples = [
            Sample([(request.seed + i + t) % 100 for t in range(job.tokens)], [-0.5] * job.tokens, cut, cut)
            for i in range(request.n)
        ]
        deed = self._deed(request, SHORT, FOREIGN, STRANGER)
        if deed == SHORT:
            samples[0].logprobs.pop()
        if deed == FOREIGN:
            samples[-1].token_ids[-1] = 100_000
        if deed == STRANGER:
            job.number += 1000
        return SampleResponse(samples, self.version)

    def start_weight_update(self, sources: list, first_rank: int, n_receivers: int, record_digests: bool) -> None:
        self.received = (sources, first_rank, n_receivers)

    def update_weights(self, payload: dict) -> None:
        deed = payload["handle"].get(self.index)
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if deed == "raise":
            raise RuntimeError("an illegal memory access")

    def finish_weight_update(self, version: int) -> None:
        self.version = version

    def received_digests(self) -> list[dict]:
        return [{}]

    def checksums(self) -> dict:
        return {}

    def weight_version(self) -> int:
        return self.version

    def sleep(self, level: int) -> None:
        """Nothing to free."""

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Nothing to take back."""

    def seen(self) -> tuple:
        """Its place among those that took the last update."""
        return self.received

    def shutdown(self) -> None:
        """Nothing to end."""
