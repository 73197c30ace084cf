"""What a training run holds open, from the cluster to the log files; and how it starts, goes through its steps, and ends."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tic_megatron.actors.group import ActorGroup
from tic_megatron.checkpoints import RunState, find_pending
from tic_megatron.cluster import Cluster, start_cluster
from tic_megatron.commands.preflight import TrainInputs
from tic_megatron.commands.run_folder import begin_state, changed_settings
from tic_megatron.config import Settings
from tic_megatron.data.packing import has_equal_rewards
from tic_megatron.data.prompts import PromptCursor
from tic_megatron.data.quality import SkippedInARow, SkippedUpdate, drop_bad_trajectories, report_skipped_updates
from tic_megatron.evaluation import eval_name, grader_settings
from tic_megatron.evaluation.during_training import Evaluations
from tic_megatron.observability.files import disk_problem
from tic_megatron.observability.health import HealthMonitor
from tic_megatron.observability.memory import MemoryLog
from tic_megatron.observability.metrics import MetricsLogger
from tic_megatron.observability.plots import plot_curves
from tic_megatron.observability.progress import ProgressDisplay
from tic_megatron.observability.rollouts import rollout_path, write_rollout
from tic_megatron.observability.summary import write_summary
from tic_megatron.observability.timers import PhaseTimers
from tic_megatron.preemption import Preemption, mark, unmark
from tic_megatron.rewards import GradeReport, RewardWorkers
from tic_megatron.rewards.overlong import overlong_metrics, punish_overlong
from tic_megatron.rollout.engines import EngineGroup
from tic_megatron.rollout.pending import PendingRollout
from tic_megatron.rollout.source import ReplayedRollouts, RolloutSource, SampledRollouts
from tic_megatron.rollout.stop_tokens import stop_token_ids
from tic_megatron.saving import Saving
from tic_megatron.trajectory import Group

MEMORY_TIMEOUT_S = 10.0
"""Seconds after which a process's line in the memory log stays empty."""


class Run:
    """A context: everything is started on entering (continuing from a checkpoint if there is one) and stopped on leaving."""

    def __init__(self, settings: Settings, inputs: TrainInputs):
        self.settings = settings
        self.inputs = inputs
        self.dir = Path(settings.run.dir)
        self.state = RunState()
        self.timers = PhaseTimers()
        self.health = HealthMonitor()
        self.memory = MemoryLog(self.dir / "logs") if settings.logging.memory else None
        self.preemption = Preemption()
        self.evaluations: Evaluations | None = None
        """None with saved rollouts: there are no engines."""
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        self._started = time.monotonic()
        try:
            self._open()
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *exc_info) -> None:
        self._stack.__exit__(*exc_info)

    def _open(self) -> None:
        settings, log_dir = self.settings, self.dir / "logs"
        checkpoint = self.inputs.checkpoint
        self.state = begin_state(checkpoint, settings)
        self.skipped_in_a_row = SkippedInARow(settings.algorithm.max_skipped_updates, self.state.skipped_in_a_row)
        self.cursor = PromptCursor(self.inputs.train_prompts, seed=settings.run.seed)
        if self.state.cursor:
            self.cursor.load_state_dict(self.state.cursor, allow_other_prompts="data.train" in settings.run.allow_change)
        self._begun = self.state.step  # the last step whose rollout was begun
        self.logger = MetricsLogger(self.dir, settings.logging, settings.run.name, asdict(settings))
        self._stack.callback(self.logger.close)
        self.progress = self._stack.enter_context(
            ProgressDisplay(settings.trainer.steps, start_step=self.state.step, title=settings.run.name)
        )
        self.saving = Saving(settings, self.inputs, flush=self.logger.flush, note=self.progress.note)
        self.saving.continue_from(checkpoint)  # before the rows of later checkpoints are dropped
        begun_again = self.logger.set_aside() if checkpoint is None else None
        if begun_again:
            self.progress.note(f"warning: without a checkpoint, the run begins again; its metrics so far are in {begun_again}")
        for step, row in self.logger.truncate_after(self.state.step - (self.state.unrecorded is not None)):
            self.health.check(step, row)
        unmark(self.dir)
        for problem in self.inputs.damaged:
            self.progress.note(f"warning: {problem}; an older checkpoint is used")
        if checkpoint:
            self.progress.note(f"continuing from {checkpoint}")
            for accuracy in list(self._accuracies_before().values())[:1]:
                self.progress.accuracy(accuracy)
        self.progress.phase("starting Ray, actors and engines")
        cluster = self._stack.enter_context(start_cluster(settings, restart=self.inputs.restart))
        # Ray has taken it. In the start there is nothing to save: a signal ends the process, and the launcher leaves the marker.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.actors = ActorGroup.start(settings, cluster, log_dir=log_dir)
        self._stack.callback(self.actors.stop)
        self._stack.push(self.saving.end)
        self.rollouts = self._start_rollouts(cluster)
        for remark in self.actors.setup(str(self.inputs.model_dir)):
            self.progress.note(f"warning: {remark}")
        if checkpoint:
            self.actors.load_checkpoint(checkpoint / "actors")
            self._restore_pending(checkpoint)
        # When only the export is left, the actors keep their GPUs.
        if self.state.step < settings.trainer.steps or self.state.unrecorded is not None:
            self.rollouts.use_weights(self.actors, version=self.state.step)
        self.log_memory(self.state.step, "start")
        self.preemption.listen()

    def _restore_pending(self, checkpoint: Path) -> None:
        folder, problem = find_pending(checkpoint)
        if problem:
            self.progress.note(f"warning: {problem}; the rollout that was made ahead is made again")
        pending = PendingRollout.read(folder) if folder else None
        if pending is None:
            return
        # What is allowed may be a file of another content; what differs may have been allowed to a command before this one.
        may_have_changed = {*self.settings.run.allow_change, *changed_settings(checkpoint, self.settings)}
        changed = sorted(name for name in may_have_changed if name.startswith(("data.", "model.", "reward.", "rollout.")))
        if changed:
            self.progress.note(f"the rollout that was made ahead is made again, since {', '.join(changed)} may have changed")
        else:
            self.rollouts.restore(pending)
            self.saving.has_pending = True

    def _start_rollouts(self, cluster: Cluster) -> RolloutSource:
        """Engines start before the actors load their model: vLLM measures the free memory when it starts, and then sleeps."""
        if self.settings.rollout.replay:
            return ReplayedRollouts(self.settings)
        self._stop_ids = stop_token_ids(self.inputs.tokenizer, self.settings.rollout.stop_tokens)
        rewards = RewardWorkers(self.settings.reward, self.dir / "logs" / "rewards.log", self._token_text)
        self._stack.callback(rewards.close)
        graders = {self.settings.reward.function: rewards}
        if rewards.program_digest:  # of what it runs, should the file have been changed since the checks
            self.state.programs["reward.function"] = rewards.program_digest
        for benchmark in (chosen.benchmark for chosen in self.inputs.benchmarks):
            if benchmark.reward not in graders:
                grader = RewardWorkers(grader_settings(benchmark, self.settings.reward), self.dir / "logs" / "rewards.log")
                self._stack.callback(grader.close)
                graders[benchmark.reward] = grader
        engines = EngineGroup.start(
            self.settings,
            model_path=str(self.inputs.model_dir),
            device=cluster.device,
            log_dir=self.dir / "logs",
            places=cluster.engine_places() or self.actors.shared_places(),
            note=self.progress.note,
        )
        self._stack.callback(engines.stop)
        engines.ready()
        self.evaluations = Evaluations(self.settings, self.inputs.eval_prompts, self.inputs.benchmarks, engines, graders)
        rollouts = SampledRollouts(self.settings, engines, rewards, note=self.progress.note)
        if self.state.step == 0:
            rollouts.remember_model()
        rollouts.make_room()
        return rollouts

    def _token_text(self, token_id: int) -> str:
        if token_id in self._stop_ids:
            return ""  # as for special tokens
        return self.inputs.tokenizer.decode([token_id], skip_special_tokens=True)

    def rollout(self, step: int) -> list[Group]:
        """The groups to train on in this step. Their prompts count as used from here on."""
        if self._begun < step:
            self._begin(step)
        self._cursor_state = self.cursor.state_dict()
        return self.rollouts.collect()

    def refill(self, step: int, groups: list[Group], report: GradeReport) -> tuple[list[Group], list[Group], dict[str, float]]:
        """With `rollout.dynamic_sampling`: `prompts_per_step` groups with unequal rewards, or as many as `max_refills` more
        rollouts give; the groups that are left out; metrics. Adds to the report."""
        rollout, wanted = self.settings.rollout, self.settings.trainer.prompts_per_step
        if not rollout.dynamic_sampling or rollout.replay:  # what was saved had been refilled
            return groups, [], {}
        sampled, refills = list(groups), 0
        useful = [group for group in sampled if not has_equal_rewards(group)]
        while len(useful) < wanted and refills < rollout.max_refills:
            refills += 1
            # As many prompts as it takes at the share of useful ones so far.
            n = min(wanted, math.ceil((wanted - len(useful)) * len(sampled) / max(1, len(useful))))
            self.rollouts.begin(self.cursor.next(n), step, refills)
            more = self.rollouts.collect()
            report.add(self.rollouts.grade(more))
            sampled += more
            useful += [group for group in more if not has_equal_rewards(group)]
        self._cursor_state = self.cursor.state_dict()
        if len(useful) < wanted:
            self.progress.note(
                f"warning: after {refills} refills (rollout.max_refills) only {len(useful)} of {wanted} groups of step {step} "
                "have unequal rewards; it goes on with these"
            )
        kept = useful[:wanted] or groups  # of equal rewards all: an update without a gradient
        chosen = {id(group) for group in kept}
        return kept, [group for group in sampled if id(group) not in chosen], {"rollout/refills": float(refills)}

    def punish_overlong(self, groups: list[Group]) -> dict[str, float]:
        """Add the overlong punishment to the rewards, which saved rollouts have in them; its metrics, if it is on."""
        if not self.settings.rollout.replay:
            return punish_overlong(groups, self.settings.reward, self.settings.rollout.max_response_tokens)
        return overlong_metrics(groups) if any(t.overlong for group in groups for t in group.trajectories) else {}

    def look_ahead(self, step: int) -> None:
        """With `rollout.steps_ahead`, begin the next step's rollout, with the weights that the engines have."""
        if self.settings.rollout.steps_ahead and step < self.settings.trainer.steps:
            self._begin(step + 1)

    def _begin(self, step: int) -> None:
        self.rollouts.begin(self.cursor.next(self.settings.trainer.prompts_per_step), step)
        self._begun = step

    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy on the held-out problems and the benchmarks, if there are any and this step is due."""
        if self.evaluations is None or not self.evaluations.is_due(step):
            return {}
        self.progress.phase("evaluate")
        with self.preemption.breakable():
            held_out, benchmarks = self.evaluations.held_out(), self.evaluations.benchmarks()
        results = [*([held_out] if held_out else []), *benchmarks]
        for result in results:
            for fault in result.faults:
                self.progress.note(f"warning: evaluation {result.name}, {fault}")
        self.state.benchmarks = accuracies = {result.name: result.accuracy for result in benchmarks}
        if held_out is not None:
            self.state.accuracy = held_out.accuracy
        if step == 0:
            self.state.accuracy_before, self.state.benchmarks_before = self.state.accuracy, accuracies
            for result in results[:1]:
                self.progress.accuracy(result.accuracy)
        return {name: value for result in results for name, value in result.metrics().items()}

    def drop_bad(self, groups: list[Group]) -> dict[str, float]:
        """Leave out trajectories with a non-finite reward or log-prob, and say which; metrics of it."""
        dropped = drop_bad_trajectories(groups, max_fraction=self.settings.algorithm.max_bad_fraction)
        for line in dropped:
            self.progress.note(f"warning: left out {line}")
        return {"rollout/dropped_trajectories": float(len(dropped))}

    def finish_profile(self) -> None:
        """Have the actors write their profiles, if the step is to be profiled; say which the disk does not take."""
        problem = self.actors.finish_profile()
        if problem:
            self.progress.note(f"warning: {problem}")

    def report_skipped(self, skipped: list[SkippedUpdate], groups: list[Group]) -> None:
        """Say which updates were skipped for a log-prob or gradient that is not finite; ends the run when it is too bad."""
        n_updates, max_fraction = self.settings.trainer.updates_per_step, self.settings.algorithm.max_bad_fraction
        for line in report_skipped_updates(skipped, groups, n_updates, max_fraction=max_fraction):
            self.progress.note(f"warning: {line}")
        self.skipped_in_a_row.add(skipped, n_updates)

    def log_memory(self, step: int, phase: str) -> None:
        """Note what every process holds at the end of a phase (`logging.memory`)."""
        if self.memory is None:
            return
        self.memory.log(
            step,
            phase,
            actors=self.actors.pool.ask("memory", timeout_s=MEMORY_TIMEOUT_S),
            engines=self.rollouts.memory(timeout_s=MEMORY_TIMEOUT_S),
        )

    def trained(self, step: int, groups: list[Group], metrics: dict[str, float]) -> None:
        """The weights are those of this step now, which is to be evaluated and recorded: here, or where the run goes on."""
        saves = {"checkpoint/failed": float(self.saving.failed)}
        every = self.settings.rollout.save_every
        if every and step % every == 0:
            with self._despite_the_disk(f"the rollout of step {step} is not kept"):
                write_rollout(rollout_path(self.dir, step), step, groups)
        row = metrics | saves | (self.memory.metrics() if self.memory else {})
        self.state.unrecorded = {name: float(value) for name, value in row.items()}
        self.state.step, self.state.cursor = step, self._cursor_state  # not yet beyond the prompts that were only sampled
        self.state.skipped_in_a_row = self.skipped_in_a_row.count

    def record(self) -> None:
        """Evaluate the trained step if that is due, log it, and save what is due."""
        trainer, step = self.settings.trainer, self.state.step
        metrics = self.state.unrecorded | self.evaluate(step)
        self.saving.tell_failed()
        with self._despite_the_disk(f"the metrics of step {step} wait in memory, without which no checkpoint is written"):
            self.logger.log(step, metrics)
        self.state.unrecorded = None
        self.progress.update(step, metrics)
        for warning in self.health.check(step, metrics):
            self.progress.note(f"warning: {warning}")
        due = step == trainer.steps or (trainer.save_every > 0 and step % trainer.save_every == 0)
        if due and self.saving.step != step:  # it is when the run continues from there
            self.to_training()
            self._save()
            self.log_memory(step, "save")
            self.preemption.check()
            if step < trainer.steps and self.settings.cluster.colocate:  # engines elsewhere still have these weights
                self.rollouts.use_weights(self.actors, version=step)

    def leave(self, signal_name: str) -> None:
        """Save the last trained step, unless it is saved, and leave a marker for whoever queues the run again. Only then wait for
        a rollout that is being made ahead, and save it too: it may take longer than the grace that there is."""
        ahead = self.settings.rollout.steps_ahead
        if self.state.step > 0 and not self.saving.has(self.state.step):
            if not ahead:
                self.rollouts.stop()  # engines may be at work, on the actors' GPUs
            self.actors.restore()
            self._save()
        self.saving.check()
        mark(self.dir, signal_name, self.state.step)
        if ahead and self.state.step > 0 and not self.saving.has_pending:
            self._add_pending()

    def _add_pending(self) -> None:
        """Save the rollout that is being made ahead, too. When that fails, it is made again where the run goes on."""
        self.progress.phase("generate")
        try:
            self.rollouts.wait(self.actors, version=self.state.step)
        except Exception as error:
            self.progress.note(f"warning: the rollout that was being made ahead is lost: {error}")
            return
        pending = self.rollouts.pending(self.state.step)
        if pending is not None:
            self.saving.add_pending(pending)

    def _save(self) -> None:
        self.progress.phase("save")
        self.state.wall_s += self._lap()
        self.saving.save(self.state, self.actors, self.rollouts.pending(self.state.step))

    @contextmanager
    def _despite_the_disk(self, what: str) -> Iterator[None]:
        """Around writing what the run can go on without; a line when the disk does not take it."""
        try:
            yield
        except OSError as error:
            self.progress.note(f"warning: {what}: {disk_problem(error, self.dir)}")

    def to_training(self) -> None:
        """Colocated engines sleep, and the actors come back to their GPUs; `rollouts.use_weights` is the way back."""
        self.rollouts.make_room()
        self.actors.restore()

    def finish(self) -> dict[str, Any]:
        """Export the model, draw the curves, write and return the summary."""
        self.progress.phase("save")
        self.saving.finish()  # first: the disk may have room for one of the two, and the export can be made again
        self.progress.phase("export")
        self.to_training()  # where a run continues after its last step, the engines may have the GPUs
        self.saving.export(self.actors)
        plot_curves(self.dir, {f"eval/{name}/accuracy": value for name, value in self._accuracies_before().items()})
        summary = {
            "accuracy_before": self.state.accuracy_before,
            "accuracy_after": self.state.accuracy,
            "steps": self.state.step,
            "wall_s": round(self.state.wall_s + self._lap(), 1),
            "run_dir": str(self.dir),
        }
        if self.inputs.benchmarks:
            before, after = self.state.benchmarks_before, self.state.benchmarks
            summary["benchmarks"] = {name: {"before": before.get(name), "after": value} for name, value in after.items()}
        write_summary(self.dir, summary)
        self.saving.check()
        return summary

    def _accuracies_before(self) -> dict[str, float]:
        """Before the first step, by the set's name."""
        path, accuracy = self.settings.data.eval, self.state.accuracy_before
        held_out = {eval_name(path): accuracy} if path and accuracy is not None else {}
        return held_out | self.state.benchmarks_before

    def _lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        elapsed, self._started = now - self._started, now
        return elapsed
