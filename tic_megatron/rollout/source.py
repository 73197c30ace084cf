"""Where a step's trajectories come from: sampled by the engines, or read from an earlier run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from tic_megatron.config import Settings
from tic_megatron.observability.rollouts import find_rollout, read_replay
from tic_megatron.remote import STOP_TIMEOUT_S, WorkerError
from tic_megatron.rewards import GradeReport, RewardWorkers, is_dense
from tic_megatron.rewards.background import BackgroundGrader
from tic_megatron.rollout.engines import EngineGroup, Rollout
from tic_megatron.rollout.pending import PendingRollout
from tic_megatron.rollout.pool import MOST_FAILED_STARTS
from tic_megatron.rollout.requests import stable_seed
from tic_megatron.trajectory import Group, Prompt
from tic_megatron.weights.sending import WeightTransferError, send_weights


class RolloutSource(Protocol):
    """What the trainer needs of it."""

    def begin(self, prompts: list[Prompt], step: int, refill: int = 0) -> None:
        """Start to make the groups of a step, in the background; `refill` counts the times that a step needs more of them."""
        ...

    def wait(self, actors, version: int) -> None:
        """Wait until what was begun is there. The actors, whose weights are of this version, may be used meanwhile."""
        ...

    def collect(self) -> list[Group]:
        """What was begun: G responses per prompt; rewards may still be under way."""
        ...

    def grade(self, groups: list[Group]) -> GradeReport:
        """Every trajectory's reward is set when this returns; what happened meanwhile."""
        ...

    def pending(self, trained: int) -> PendingRollout | None:
        """What was made ahead and graded, of a later step than the one that was `trained` last: for a checkpoint."""
        ...

    def restore(self, pending: PendingRollout) -> None:
        """When the step of this rollout is begun, it is there already."""
        ...

    def make_room(self) -> None:
        """Training comes next: give the GPUs up."""
        ...

    def use_weights(self, actors, version: int) -> None:
        """Sample with the actors' weights from now on."""
        ...

    def metrics(self) -> dict[str, float]:
        """`rollout/*` of what has happened since the last call."""
        ...

    def stop(self) -> None:
        """Nothing will be sampled any more."""
        ...

    def memory(self, *, timeout_s: float) -> list:
        """What every engine holds (`EngineWorker.memory`)."""
        ...


class SampledRollouts:
    """Rollouts from the vLLM engines, graded while they are made.

    One rollout is under way at a time, from `begin` to `collect`, in a thread that the engines belong to until `wait` or
    `collect` returns. When no engine is left it needs the actors' weights: it takes them while the driver waits for it.
    """

    def __init__(self, settings: Settings, engines: EngineGroup, rewards: RewardWorkers, note: Callable[[str], None] = print):
        self.settings = settings
        self.engines = engines
        self.rewards = rewards
        self._note = note
        self._under_way: _UnderWay | _Restored | None = None
        self._collected: _UnderWay | _Restored | None = None  # the last
        self._restored: PendingRollout | None = None
        self._step = self._refill = 0
        self._latest: tuple | None = None
        self._counts = {"reissued_prompts": 0, "prompts_set_aside": 0, "cut_responses": 0}
        self._generated_s = 0.0  # since the last metrics; of it, per engine, with work
        self._busy_s: dict[int, float] = {}
        self._n_transfers = 0
        self._verified: set[tuple[int, int]] = set()  # engines and their process ids
        self._loaded_digests: dict[str, str] | None = None
        engines.revive = self._revive

    def remember_model(self) -> None:
        """Before the first transfer of a new run, with the engines awake: keep digests of the model that they have loaded."""
        rollout, actor = self.settings.rollout, self.settings.actor
        if rollout.precision in ("auto", actor.precision):  # otherwise the actors round first, or the engines do
            self._loaded_digests = next(iter(self.engines.checksums().values()), None)

    def begin(self, prompts: list[Prompt], step: int, refill: int = 0) -> None:
        """At the training temperature; the seed depends on the run's seed, the step and `refill` only."""
        assert self._under_way is None, "one rollout at a time"
        self._step, self._refill = step, refill
        restored, self._restored = self._restored, None
        if restored is not None and restored.is_of(step, prompts):
            self._under_way = _Restored(restored, prompts)
            return
        seed = stable_seed(self.settings.run.seed, step, *([refill] if refill else []))
        self._under_way = _UnderWay(lambda grader: self._sample(prompts, seed, grader), BackgroundGrader(self.rewards))
        self._under_way.start()

    def wait(self, actors, version: int) -> None:
        """Until the responses, and their rewards, are there. Raises what went wrong."""
        self._latest = (actors, version)
        made = self._under_way or self._collected
        if made is not None:
            made.responses()
            made.grader.finish()

    def collect(self) -> list[Group]:
        """The groups, without the prompts that were set aside, which are named. WorkerError when all of a step's were."""
        under_way = self._under_way
        rollout = under_way.responses()
        self._under_way, self._collected = None, under_way
        self._grader = under_way.grader
        return self._account(rollout)

    def grade(self, groups: list[Group]) -> GradeReport:
        """Wait for the rewards. A response that could not be graded counts 0, and is counted; the first few are named."""
        report = self._grader.finish()
        for line in report.first_faults():
            self._note(f"warning: {line}")
        return report

    def pending(self, trained: int) -> PendingRollout | None:
        """One step ahead, what is there between two steps, also if it has just been collected: until a step is trained nothing
        changes its rollout."""
        if self._restored is not None and self._restored.step > trained:
            return self._restored
        made = self._under_way or self._collected
        if not self.settings.rollout.steps_ahead or self._step <= trained or self._refill:
            return None
        if made is None or not made.ready:
            return None  # to wait is for `wait`, when the step that was trained is safe
        return PendingRollout.of(self._step, made.responses(), made.grader.finish())

    def restore(self, pending: PendingRollout) -> None:
        """The weights that made it are gone: it cannot be made again. When the run no longer works ahead, nobody corrects it for
        that, and it is left out."""
        if self.settings.rollout.steps_ahead:
            self._restored = pending

    def make_room(self) -> None:
        """Put colocated engines to sleep; their weights are about to be replaced."""
        if self.settings.cluster.colocate and self._under_way is None:
            self._put_to_sleep()

    def use_weights(self, actors, version: int) -> None:
        """Send the weights to every engine; one that fails meanwhile is replaced, and gets those of the next call, unless too
        few are left: then it gets these."""
        self.wait(actors, version)
        self._send()
        if not self.engines.enough_serve():
            self._revive()

    def metrics(self) -> dict[str, float]:
        """Failures, what they led to, cut responses, and the engines' idle share of the time of generation, refills included."""
        pool = self.engines.pool
        counts = {"engine_failures": pool.failures, "engine_restarts": pool.restarts, **self._counts}
        pool.failures = pool.restarts = 0
        self._counts = dict.fromkeys(self._counts, 0)
        idle = [1.0 - busy_s / self._generated_s for busy_s in self._busy_s.values()]
        self._generated_s, self._busy_s = 0.0, {}
        shares = {"engine_idle_fraction": sum(idle) / len(idle), "engine_idle_fraction_max": max(idle)} if idle else {}
        return {f"rollout/{name}": float(value) for name, value in {**counts, **shares}.items()}

    def stop(self) -> None:
        """End the engines, also in the middle of a rollout, whose thread leaves the actors alone then."""
        self.engines.stop()
        if self._under_way is not None:
            self._under_way.end(timeout_s=STOP_TIMEOUT_S)

    def memory(self, *, timeout_s: float) -> list:
        """Of the engines; nothing while they are at work."""
        at_work = self._under_way is not None and self._under_way.at_work
        return [] if at_work else self.engines.memory(timeout_s=timeout_s)

    def _sample(self, prompts: list[Prompt], seed: int, grader: BackgroundGrader) -> Rollout:
        rollout = self.settings.rollout
        return self.engines.sample(
            prompts,
            group_size=rollout.group_size,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_response_tokens,
            seed=seed,
            finished=grader.add,
        )

    def _account(self, rollout: Rollout) -> list[Group]:
        for prompt, reason in rollout.set_aside:
            self._note(f"warning: prompt {prompt.id} is set aside: {reason}")
        if not rollout.groups and not self._refill:
            prompt, reason = rollout.set_aside[0]
            raise WorkerError(
                f"all {len(rollout.set_aside)} prompts of the step were set aside; the first, {prompt.id}: {reason}"
            )
        self._counts["reissued_prompts"] += rollout.outcome.reissued
        self._counts["prompts_set_aside"] += len(rollout.set_aside)
        self._counts["cut_responses"] += rollout.outcome.cut
        self._generated_s += rollout.outcome.seconds
        for index, busy in rollout.outcome.busy.items():
            self._busy_s[index] = self._busy_s.get(index, 0.0) + busy * rollout.outcome.seconds
        return rollout.groups

    def _put_to_sleep(self) -> None:
        on_gpu = self.settings.cluster.device == "cuda"
        if on_gpu:
            self.engines.settle()
        self.engines.sleep(level=self.settings.rollout.sleep_level)
        if on_gpu and self.engines.pool.loading:
            self._put_to_sleep()  # one failed, and its replacement must sleep too before the actors come

    def _send(self) -> None:
        """Hand colocated GPUs over piece by piece: the actors' optimizer goes, the engines' weights come and are filled, the
        actors' parameters go, the KV cache comes."""
        actors, version = self._latest
        colocated = self.settings.cluster.colocate
        with self.engines.no_starts() if colocated else nullcontext():
            if colocated:
                actors.release_optimizer()
                self.engines.wake_up(["weights"])
            verify = self._verify_due()
            send_weights(actors, self.engines, version=version, verify=verify)
            self._transferred(version, verify)
            if colocated:
                actors.release_parameters()
                self.engines.wake_up(["kv_cache"])

    def _verify_due(self) -> bool:
        """Every so many transfers, and in the first of a process."""
        every = self.settings.rollout.verify_weights_every
        unverified = {(engine.index, engine.pid) for engine in self.engines.pool.loaded} - self._verified
        return bool(unverified) or (every > 0 and self._n_transfers % every == 0)

    def _transferred(self, version: int, verified: bool) -> None:
        """After the first transfer of version 0 the engines must hold, bit by bit, what they had loaded themselves: the names,
        the shards and vLLM's processing of new weights are right."""
        serving = {(engine.index, engine.pid) for engine in self.engines.serving()}
        if not serving:
            return
        self._n_transfers += 1
        self._verified |= serving if verified else set()
        expected, self._loaded_digests = self._loaded_digests, None
        if expected is None or version != 0:
            return
        for index, digests in self.engines.checksums().items():
            wrong = [name for name, digest in digests.items() if expected.get(name) != digest]
            if wrong:
                raise WeightTransferError(
                    f"engine {index}: {len(wrong)} of {len(digests)} tensors are not those of the model directory after the "
                    f"actors have sent just these, the first is {wrong[0]}"
                )

    def _revive(self) -> None:
        """Too few engines are left: wait for replacements, and give them the weights that were sent last."""
        lent_actors = self._under_way.lent_actors if self._under_way is not None else nullcontext
        attempts = 0
        while not self.engines.enough_serve():
            attempts += 1
            if attempts > MOST_FAILED_STARTS:
                logs = ", ".join(engine.log_file for engine in self.engines.pool.engines)
                message = f"too few engines have survived {MOST_FAILED_STARTS} weight transfers in a row (their logs: {logs})"
                raise WorkerError(message, may_pass=True)
            self.engines.pool.wait_for_any(all_engines=self.settings.run.deterministic)
            with lent_actors():
                if self.settings.cluster.colocate:
                    self._put_to_sleep()
                self._latest[0].restore()
                self._send()


class _UnderWay:
    """A rollout in a thread of its own, and the grader of its groups."""

    def __init__(self, sample: Callable[[BackgroundGrader], Rollout], grader: BackgroundGrader) -> None:
        self.grader = grader
        self._sample = sample
        self._rollout: Rollout | None = None
        self._error: BaseException | None = None
        self._somebody_waits = threading.Event()
        self._lent = threading.Lock()  # held by the thread while it uses the actors
        self._ended = threading.Event()  # a `join` that a signal interrupts takes the thread for ended ever after (Python 3.11)

    def start(self) -> None:
        """Begin, when whoever looks for what is under way finds this."""
        threading.Thread(target=self._work, name="rollout", daemon=True).start()

    @property
    def at_work(self) -> bool:
        """Whether the engines are the thread's."""
        return not self._ended.is_set()

    @property
    def ready(self) -> bool:
        """Whether the rollout and its rewards are there."""
        return not self.at_work and self._error is None and self.grader.finished

    def responses(self) -> Rollout:
        """Wait for the responses; the actors are the thread's meanwhile."""
        self._somebody_waits.set()
        try:
            self._ended.wait()
        except BaseException:  # told to leave
            self._somebody_waits.clear()
            with self._lent:
                raise
        if self._error is not None:
            raise self._error
        return self._rollout

    def end(self, *, timeout_s: float) -> None:
        """Wait for the thread, once the engines have been stopped."""
        self._somebody_waits.set()
        self._ended.wait(timeout_s)

    @contextmanager
    def lent_actors(self) -> Iterator[None]:
        """In the thread: begins when the driver does nothing with the actors but wait, and keeps it waiting."""
        while True:
            self._somebody_waits.wait()
            with self._lent:
                if self._somebody_waits.is_set():
                    yield
                    return

    def _work(self) -> None:
        try:
            self._rollout = self._sample(self.grader)
        except BaseException as error:
            self._error = error
            self.grader.abandon()
        finally:
            self._ended.set()


class _Restored:
    """A rollout that was made before the run was interrupted, in the place of one under way; also in that of its grader."""

    at_work, ready = False, True

    def __init__(self, pending: PendingRollout, prompts: list[Prompt]) -> None:
        self.grader = self
        self._pending = pending
        self._prompts = {prompt.id: prompt for prompt in prompts}

    def responses(self) -> Rollout:
        set_aside = [(self._prompts[name], reason) for name, reason in self._pending.set_aside]
        return Rollout(self._pending.groups, set_aside, self._pending.outcome)

    def finish(self) -> GradeReport:
        return self._pending.report

    def lent_actors(self) -> AbstractContextManager[None]:
        """Nobody generates."""
        return nullcontext()

    def end(self, *, timeout_s: float) -> None:
        """Nothing runs."""


class ReplayedRollouts:
    """Rollouts that an earlier run saved (`rollout.replay`), rewards included: for debugging, without engines."""

    def __init__(self, settings: Settings):
        self.path = settings.rollout.replay
        self.dense = is_dense(settings.reward)

    def begin(self, prompts: list[Prompt], step: int, refill: int = 0) -> None:
        """The prompts given are not used."""
        self._step = step

    def wait(self, actors, version: int) -> None:
        """There is nothing to wait for."""

    def collect(self) -> list[Group]:
        """The saved groups of this step."""
        return read_replay(find_rollout(self.path, self._step), dense=self.dense)

    def grade(self, groups: list[Group]) -> GradeReport:
        """They were graded when they were saved."""
        return GradeReport()

    def pending(self, trained: int) -> PendingRollout | None:
        """Nothing is begun ahead."""

    def restore(self, pending: PendingRollout) -> None:
        """Nothing was pending."""

    def make_room(self) -> None:
        """Nothing is in the way."""

    def use_weights(self, actors, version: int) -> None:
        """Nobody samples."""

    def metrics(self) -> dict[str, float]:
        """Nothing happens."""
        return {}

    def stop(self) -> None:
        """Nothing runs."""

    def memory(self, *, timeout_s: float) -> list:
        """There are no engines."""
        return []
