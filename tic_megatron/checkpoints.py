"""The run folder's checkpoints: complete or absent, the newest never removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tic_megatron.config import SettingsError


@dataclass
class RunState:
    """What the driver has to remember beside the actors' weights and optimizer.

    `step`: last finished step; `cursor`: place in the training problems; `accuracy_before`, `accuracy`: measured before
    step 1 and last; `wall_s`: seconds spent so far.
    """

    step: int = 0
    cursor: dict | None = None
    accuracy_before: float | None = None
    accuracy: float | None = None
    wall_s: float = 0.0


class Checkpoints:
    """`checkpoints/step_N/` of a run folder, each with the actors' files in `actors/` and the driver's `state.json`."""

    def __init__(self, run_dir: Path, keep: int):
        self.folder = run_dir / "checkpoints"
        self.keep = max(1, keep)

    def save(self, state: RunState, save_actors: Callable[[Path], None]) -> Path:
        """Write a checkpoint and publish it by a rename; then remove the oldest beyond `keep`."""
        target = self.folder / f"step_{state.step}"
        unfinished = self.folder / f".step_{state.step}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "actors").mkdir(parents=True)
        save_actors(unfinished / "actors")
        (unfinished / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        unfinished.rename(target)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)
        return target

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `run.resume` means; None to start afresh. Raises SettingsError when a named one is not there."""
        if resume == "never":
            return None
        if resume == "auto":
            found = self._all()
            return found[-1] if found else None
        if not (Path(resume) / "state.json").exists():
            raise SettingsError(
                f"run.resume: {resume} is not a checkpoint (no state.json); give auto, never or checkpoints/step_N"
            )
        return Path(resume)

    def _all(self) -> list[Path]:
        found = [p for p in self.folder.glob("step_*") if (p / "state.json").exists()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def load_state(checkpoint: Path) -> RunState:
    """The driver's part of a checkpoint."""
    return RunState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
