"""What is kept of a run: its checkpoints, and at its end the trained model."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

from tic_megatron.actors.group import ActorGroup
from tic_megatron.checkpoints import MODEL_FOLDER, SETTINGS_FILE, CheckpointError, Checkpoints, RunState
from tic_megatron.commands.preflight import TrainInputs
from tic_megatron.config import Settings
from tic_megatron.remote import WorkerError
from tic_megatron.rollout.engines import DTYPES
from tic_megatron.rollout.pending import PendingRollout
from tic_megatron.weights.names import write_index

SAVE_PATIENCE_S = 20.0
"""Seconds that a checkpoint which is under way has left when the run has failed."""


class Saving:
    """Writes checkpoints from which the run goes on, and which can be exported without its inputs; and the model.

    A checkpoint that cannot be written costs no more than a line for the user, unless it is the last (`check`).
    """

    def __init__(
        self, settings: Settings, inputs: TrainInputs, *, flush: Callable[[], None], note: Callable[[str], None]
    ) -> None:
        """`flush`: puts the rows of the metrics on the disk, without which no checkpoint is published; `note`: takes lines for
        the user."""
        self.step: int | None = None
        """Of the last checkpoint, as long as there is one in this run's folder."""
        self.has_pending = False
        """Whether it has a rollout that was made ahead."""
        self._settings = settings
        self._inputs = inputs
        self._dir = Path(settings.run.dir)
        self._checkpoints = Checkpoints(self._dir, settings.trainer.keep_checkpoints)
        self._flush = flush
        self._note = note

    @property
    def failed(self) -> int:
        """Saves that have failed."""
        return self._checkpoints.failed

    def continue_from(self, checkpoint: Path | None) -> None:
        """Remove what a killed run has left of a save, and move checkpoints of another course aside."""
        self._checkpoints.remove_unfinished()
        self._checkpoints.set_aside_others(checkpoint)
        self.step = self._checkpoints.own_step(checkpoint)

    def save(self, state: RunState, actors: ActorGroup, pending: PendingRollout | None) -> None:
        """Begin to save; unless `trainer.async_save`, also finish. `pending`: the rollout that was made ahead."""
        self._checkpoints.save(state, actors.begin_checkpoint, functools.partial(self._describe, pending=pending))
        self.step, self.has_pending = state.step, pending is not None
        if not self._settings.trainer.async_save:
            self.finish()
            self.tell_failed()

    def has(self, step: int) -> bool:
        """Whether this step is saved; waits for a save that is under way."""
        return self.step == step and self._checkpoints.finish() is None

    def add_pending(self, pending: PendingRollout) -> None:
        """Add a rollout that was ready too late to the last checkpoint, which is there."""
        assert self.step is not None
        self._checkpoints.add_pending(self.step, pending.write)

    def finish(self, *, timeout_s: float | None = None) -> None:
        """Wait for the save that is under way, not longer than given."""
        self._checkpoints.finish(timeout_s=timeout_s)

    def end(self, failure: type[BaseException] | None, *_: object) -> None:
        """On leaving. After a worker's failure the actors may be those that hang, and who interrupts does not want to wait."""
        in_doubt = failure is not None and issubclass(failure, WorkerError | KeyboardInterrupt)
        self.finish(timeout_s=SAVE_PATIENCE_S if in_doubt else None)
        self.tell_failed()

    def tell_failed(self) -> None:
        """Tell of what has failed since the last time."""
        for problem in self._checkpoints.problems():
            self._note(f"warning: {problem}; the run goes on")

    def check(self) -> None:
        """Wait for the last save. Raises CheckpointError if it failed: nothing will be saved after it."""
        problem = self._checkpoints.finish()
        self._checkpoints.problems()  # told by the error
        if problem:
            error = self._checkpoints.error
            raise error if isinstance(error, WorkerError) else CheckpointError(problem)

    def export(self, actors: ActorGroup) -> None:
        """`hf/`, or what it is a link to: safetensors with an index, configuration and tokenizer, loadable with plain
        transformers."""
        target = (self._dir / "hf").resolve()
        unfinished = target.with_name(f".{target.name}.exporting")  # the export command's is .hf.unfinished
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            write_index(unfinished, actors.save_hf(unfinished))
            self._write_model_files(unfinished)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _describe(self, checkpoint: Path, pending: PendingRollout | None) -> None:
        """The rollout that was made ahead, and what a checkpoint needs to be exported without the run's inputs; when the rows of
        the metrics up to here are on the disk."""
        self._flush()
        if pending is not None:
            pending.write(checkpoint)
        self._settings.save(checkpoint / SETTINGS_FILE)
        self._write_model_files(checkpoint / MODEL_FOLDER)

    def _write_model_files(self, directory: Path) -> None:
        """What a Hugging Face directory has beside the weights."""
        config = copy.copy(self._inputs.hf_config)
        config.dtype = DTYPES[self._settings.actor.precision]  # by which they are loaded; the base model's may differ
        config.save_pretrained(directory)
        self._inputs.tokenizer.save_pretrained(directory)
        generation_config = self._inputs.model_dir / "generation_config.json"
        if generation_config.exists():
            shutil.copy(generation_config, directory)
