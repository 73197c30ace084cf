"""Grading of a rollout: in the caller's process for plain rewards, in worker processes under a time limit for the others.

Workers (`tic_megatron.rewards.worker_process`) are started once and kept between steps, some for each term of the sum. When a
call takes longer than its limit, its worker is killed and replaced, and the other workers go on meanwhile. A response whose
worker dies is graded once more, in case the two had nothing to do with each other; so are those that shared a batch or a worker
with another one that failed: by themselves, so that each answers for itself. Whatever goes wrong in a term costs that response,
which counts 0, and is told in a line that names its prompt.
"""

from __future__ import annotations

import math
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tic_megatron.config import RewardSettings, SettingsError
from tic_megatron.rewards.registry import InvalidRewardError, describe
from tic_megatron.rewards.terms import Term, read_terms
from tic_megatron.rewards.user_functions import digest_files
from tic_megatron.rewards.worker_process import Worker
from tic_megatron.trajectory import Group, Trajectory

MOST_FAULTS_NAMED = 3
"""Responses that could not be graded, of a step or an evaluation, that the user is told of one by one."""
MOST_FAILED_STARTS = 4
"""So many failed starts, without a successful one between them, end the run."""


@dataclass
class GradeReport:
    """What happened while grading. Responses that could not be graded have reward 0 (at every token).

    `failed`: the reward function raised an exception, or its process died, twice; `invalid`: it returned something else than a
    finite number (per token); `faults`: a line for each of these and for those that took too long, naming the prompt.
    `terms`: of a sum, each term's rewards, without its weight: what they add up to must not depend on which were graded together.
    """

    graded: int = 0
    timed_out: int = 0
    failed: int = 0
    invalid: int = 0
    faults: list[str] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)

    def add(self, other: GradeReport) -> None:
        """Count what the other report has, too."""
        for name in ("graded", "timed_out", "failed", "invalid", "faults"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, values in other.terms.items():
            self.terms[name] = [*self.terms.get(name, []), *values]

    def first_faults(self) -> list[str]:
        """Lines for the user: of the first few, and how many more there are."""
        more = len(self.faults) - MOST_FAULTS_NAMED
        rest = [f"{more} more responses could not be graded; all are in logs/rewards.log"] if more > 0 else []
        return [*self.faults[:MOST_FAULTS_NAMED], *rest]

    def metrics(self) -> dict[str, float]:
        """`reward/timed_out`, `reward/failed` and `reward/invalid`, and of a sum `reward/<term>_mean`; nothing where nothing was
        graded."""
        if not self.graded:
            return {}
        means = {f"reward/{name}_mean": math.fsum(values) / self.graded for name, values in self.terms.items()}
        return {f"reward/{kind}": float(getattr(self, kind)) for kind in FAULTS} | means


FAULTS = ("timed_out", "failed", "invalid")


@dataclass
class _Job:
    """What one term has to do, and has done, in a call of `grade`, by the responses' indices."""

    items: Sequence[dict[str, Any]]
    waiting: deque[int]
    alone: deque[int] = field(default_factory=deque)
    """To be graded again, by themselves."""
    crashed: set[int] = field(default_factory=set)
    """Their worker has died."""
    rewards: dict[int, float | list[float]] = field(default_factory=dict)
    faults: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Kind of fault, and what happened."""

    def take_in(self, index: int, result: dict[str, Any], limit: str) -> None:
        """What was found out about a response: `{"reward": x}`, or a fault; `limit`: the setting of its time, with the value."""
        if "reward" in result:
            self.rewards[index] = result["reward"]
        elif "timed_out" in result:
            self.faults[index] = ("timed_out", f"grading took longer than {limit}")
        elif "failed" in result:
            self.faults[index] = ("failed", f"grading failed: {result['failed']}")
        else:
            self.faults[index] = ("invalid", result["invalid"])


class RewardWorkers:
    """Grades responses with the configured reward. Starts its processes at once, so that their imports overlap with other work.

    Example:

        with RewardWorkers(settings.reward, log_path=run_dir / "logs" / "rewards.log") as rewards:
            report = rewards.grade_groups(groups)       # sets trajectory.reward everywhere
    """

    def __init__(
        self, settings: RewardSettings, log_path: Path | None = None, token_text: Callable[[int], str] | None = None
    ) -> None:
        """SettingsError for an unknown reward. What graders print goes to `log_path`, or nowhere.

        `token_text`: text of a token id, empty for special ones; dense rewards need it.
        """
        self._terms = read_terms(settings)
        self._dense = self._terms[0].reward.dense
        assert token_text or not self._dense, "dense rewards need the tokens' texts"
        self._token_text = token_text
        self._log_path = log_path
        self._pools = {term.name: _Pool(term, settings, log_path) for term in self._terms if term.reward.isolated}
        self._closed = False

    @property
    def program_digest(self) -> str:
        """Of the files whose functions are terms, as they were read (`digest_files`)."""
        return digest_files(term.program for term in self._terms if term.program is not None)

    def grade_groups(self, groups: Sequence[Group]) -> GradeReport:
        """Set `reward` of every trajectory of the groups, and `token_rewards` when the reward is dense."""
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        names = [f"prompt {group.prompt.id}, response {i}" for group in groups for i in range(len(group.trajectories))]
        rewards, report = self._grade([self._item(trajectory) for trajectory in trajectories], names)
        for trajectory, reward in zip(trajectories, rewards, strict=True):
            trajectory.reward = sum(reward) if isinstance(reward, list) else reward
            if self._dense:  # a plain 0 is that of a response which could not be graded
                trajectory.token_rewards = reward if isinstance(reward, list) else [0.0] * len(trajectory.response_ids)
        return report

    def _item(self, trajectory: Trajectory) -> dict[str, Any]:
        """What reward functions may ask for (`CallForm`)."""
        prompt = trajectory.prompt
        tokens = [self._token_text(i) for i in trajectory.response_ids] if self._dense else None
        fields = {"answer": prompt.answer, "prompt": prompt.text, "problem_id": prompt.id}
        return {"response": trajectory.text, "tokens": tokens, **fields}

    def grade(
        self, pairs: Sequence[tuple[str | list[str], str]], names: Sequence[str] | None = None
    ) -> tuple[list[float | list[float]], GradeReport]:
        """Rewards of (response, answer) pairs, in order; a dense reward wants token texts, and gives a list, or 0.0 where
        grading failed. `names` are theirs in the report's lines. RuntimeError when workers cannot be started."""
        names = names or [f"response {index}" for index in range(len(pairs))]
        rest = {"prompt": "", "problem_id": ""}
        return self._grade([{"response": text, "tokens": text, "answer": answer, **rest} for text, answer in pairs], names)

    def _grade(self, items: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[list[float | list[float]], GradeReport]:
        assert not self._closed, "the workers are closed"
        jobs = {term.name: _Job(items, deque(range(len(items)))) for term in self._terms}
        self._grade_in_workers(jobs)
        for term in self._terms:
            if not term.reward.isolated:
                _grade_here(term, jobs[term.name])
        rewards, report = self._sum(jobs, names)
        append_lines(self._log_path, report.faults)
        return rewards, report

    def _sum(self, jobs: dict[str, _Job], names: Sequence[str]) -> tuple[list[float | list[float]], GradeReport]:
        """The weighted sums; 0 where a term could not be graded."""
        rewards: list[float | list[float]] = []
        report = GradeReport(graded=len(names))
        several = len(self._terms) > 1
        for index, name in enumerate(names):
            reward: float | list[float] = 0.0
            total = 0.0
            for term in self._terms:
                job = jobs[term.name]
                if index in job.faults:
                    kind, what = job.faults[index]
                    setattr(report, kind, getattr(report, kind) + 1)
                    report.faults.append(f"{name}: {f'{term.name}: ' if several else ''}{what}; it counts 0")
                    reward = 0.0
                    break
                value = job.rewards[index]
                if isinstance(value, list):  # dense, and the only term
                    reward = [term.weight * x for x in value]
                else:
                    reward = total = total + term.weight * value
            rewards.append(reward)
        if several:
            report.terms = {name: list(job.rewards.values()) for name, job in jobs.items()}  # type: ignore[arg-type]
        return rewards, report

    def _grade_in_workers(self, jobs: dict[str, _Job]) -> None:
        for name, pool in self._pools.items():
            pool.job = jobs[name]
        try:
            while any(pool.busy for pool in self._pools.values()):
                for pool in self._pools.values():
                    pool.hand_out()
                wait(list(self._pools.values()))
        except BaseException:
            self.close()  # replies under way would be taken for those of the next call
            raise

    @property
    def workers(self) -> list[Worker]:
        """The processes."""
        return [worker for pool in self._pools.values() for worker in pool.workers]

    def close(self) -> None:
        """End the workers."""
        self._closed = True
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> RewardWorkers:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class _Pool:
    """The workers of one term."""

    def __init__(self, term: Term, settings: RewardSettings, log_path: Path | None) -> None:
        limit_s = getattr(settings, term.reward.limit)
        self._limit = f"reward.{term.reward.limit} {limit_s:g}"
        self.term, self._settings, self._log_path = term, replace(settings, timeout_s=limit_s), log_path
        self.job: _Job | None = None
        self._failed_starts = 0
        form = term.reward.form
        self._batch_size = settings.batch_size if form.batched else 1
        self._capacity = settings.concurrency if form.asynchronous else 1
        n = 1 if term.source.is_endpoint else settings.workers  # one keeps many requests under way
        self.workers = [self._start() for _ in range(n)]

    def _start(self) -> Worker:
        return Worker(self.term, self._settings, self._log_path, asynchronous=self.term.reward.form.asynchronous)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.job.waiting or self.job.alone or any(worker.calls for worker in self.workers))

    def hand_out(self) -> None:
        """Give every worker as much as it takes. A response that is to be graded by itself waits for a worker without work."""
        for worker in self.workers:
            while worker.ready and len(worker.calls) < self._capacity and not worker.has_suspect:
                if self.job.alone and not worker.calls:
                    self._send(worker, [self.job.alone.popleft()], suspect=True)
                elif self.job.waiting:
                    n = min(self._batch_size, len(self.job.waiting))
                    self._send(worker, [self.job.waiting.popleft() for _ in range(n)])
                else:
                    break

    def _send(self, worker: Worker, indices: list[int], *, suspect: bool = False) -> None:
        form = self.term.reward.form
        worker.send(indices, [form.needs(self.job.items[index]) for index in indices], suspect=suspect)

    def take_in(self, worker: Worker) -> None:
        """Record what a worker has replied."""
        for message in worker.receive():
            if worker.starting and message == {"ready": True}:
                worker.started()
                self._failed_starts = 0
            elif worker.starting and isinstance(message, dict) and "broken" in message:
                worker.broken = message["broken"]
            else:
                indices = worker.finish(message)
                if indices is not None:
                    self._settle(indices, message)

    def _settle(self, indices: list[int], message: dict[str, Any]) -> None:
        """A call has come to an end. What a batch as a whole is blamed for, each of its responses may answer for itself."""
        fault = message.get("fault")
        if fault is not None and len(indices) > 1 and self.term.reward.splits:
            self.job.alone.extend(indices)
            return
        for index, result in zip(indices, [fault] * len(indices) if fault else message["results"], strict=True):
            self.job.take_in(index, result, self._limit)

    def replace_bad(self) -> None:
        """Replace workers that are dead or late. RuntimeError when starts keep failing."""
        for position, worker in enumerate(self.workers):
            if not worker.alive or time.monotonic() >= worker.deadline:
                self._blame(worker)
                self._failed_starts += worker.starting
                happened = "overran its time limit" if worker.alive else f"died ({worker.ending()})"
                append_lines(self._log_path, [f"a grader {happened} and is replaced"])
                worker.kill()
                self.workers[position] = self._start()
                if self._failed_starts >= MOST_FAILED_STARTS:
                    reason = f": {worker.broken}" if worker.broken else ""
                    output = self._log_path or "not kept"
                    raise RuntimeError(f"the graders of reward {self.term.name!r} do not start{reason}; their output: {output}")

    def _blame(self, worker: Worker) -> None:
        """Settle the responses that a worker had when it died or overran."""
        indices = [index for call in worker.calls.values() for index in call.indices]
        for index in indices:
            if worker.alive and len(indices) == 1:
                self.job.take_in(index, {"timed_out": ""}, self._limit)
            elif not worker.alive and index in self.job.crashed:
                self.job.faults[index] = ("failed", f"the grader died, twice ({worker.ending()})")
            else:
                self.job.alone.append(index)
                if not worker.alive:
                    self.job.crashed.add(index)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers = []


def wait(pools: Sequence[_Pool]) -> None:
    """Send and take in what can be, until a worker is free or overruns its limit; replace the dead."""
    with selectors.DefaultSelector() as selector:
        for pool in pools:
            for worker in pool.workers:
                selector.register(worker.output, selectors.EVENT_READ, (pool, worker))
                if worker.unsent:
                    selector.register(worker.input, selectors.EVENT_WRITE, (pool, worker))
        first = min((worker.deadline for pool in pools for worker in pool.workers), default=math.inf)
        patience = None if math.isinf(first) else max(0.0, first - time.monotonic())
        for key, event in selector.select(patience):
            pool, worker = key.data
            if event & selectors.EVENT_WRITE:
                worker.flush()
            else:
                pool.take_in(worker)
    for pool in pools:
        pool.replace_bad()


def check_rewards(settings: RewardSettings) -> None:
    """See that functions of files can be run, that endpoints answer, and that the sandbox works, in processes like those that
    will grade. SettingsError for the first that cannot."""
    for term in read_terms(settings):
        if term.source.function is None and not term.source.is_endpoint and term.reward.check is None:
            continue
        worker = Worker(term, settings, None, asynchronous=False, check=True)
        try:
            message = worker.first_message()
        finally:
            worker.kill()
        if message != {"ready": True}:
            reason = message.get("broken") if isinstance(message, dict) else None
            how = "it does not finish its start" if worker.alive else f"its process ended ({worker.ending()})"
            raise SettingsError(reason or f"reward.function: {term.source.source} cannot be run: {how}; correct it")


def _grade_here(term: Term, job: _Job) -> None:
    reward = term.reward
    for index, item in enumerate(job.items):
        try:
            result = reward.results([item], reward.function(**reward.form.arguments([item])))[0]
        except InvalidRewardError as error:
            result = {"invalid": str(error)}
        except (Exception, SystemExit) as error:
            result = {"failed": describe(error)}
        job.take_in(index, result, limit="")  # it has none here


def append_lines(path: Path | None, lines: Sequence[str]) -> None:
    """Add to the log. What the disk does not take is left out: the metrics count it."""
    if path is not None and lines:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.writelines(f"{line}\n" for line in lines)
