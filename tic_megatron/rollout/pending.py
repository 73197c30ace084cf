"""A rollout that was made one step ahead, in a checkpoint: the weights that made it will be gone when the run continues."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tic_megatron.observability.rollouts import read_rollout, rollout_lines
from tic_megatron.rewards import GradeReport
from tic_megatron.rollout.engines import Rollout
from tic_megatron.rollout.generation import Outcome
from tic_megatron.trajectory import Group, Prompt

GROUPS_FILE, REST_FILE = "pending_rollout.jsonl", "pending_rollout.json"


@dataclass
class PendingRollout:
    """The graded groups of a step that is still to come, and what the metrics will tell about them.

    `lines` is the text of the groups as they were when this was made: training changes them while a checkpoint is written.
    """

    step: int
    groups: list[Group]
    lines: list[str]
    set_aside: list[tuple[str, str]]
    """Prompt ids and reasons."""
    outcome: Outcome
    report: GradeReport

    @classmethod
    def of(cls, step: int, rollout: Rollout, report: GradeReport) -> PendingRollout:
        """Of what the engines and the graders have made."""
        lines = list(rollout_lines(step, rollout.groups))
        set_aside = [(prompt.id, reason) for prompt, reason in rollout.set_aside]
        return cls(step, rollout.groups, lines, set_aside, rollout.outcome, report)

    def is_of(self, step: int, prompts: list[Prompt]) -> bool:
        """Whether it is of this step and of just these prompts: other problems, or another number of them, may have been allowed
        since (`run.allow_change`), and then others are due."""
        names = [*(group.prompt.id for group in self.groups), *(name for name, _ in self.set_aside)]
        return step == self.step and sorted(names) == sorted(prompt.id for prompt in prompts)

    def write(self, directory: Path) -> None:
        """Into a checkpoint."""
        with (directory / GROUPS_FILE).open("w", encoding="utf-8", errors="surrogatepass", newline="\n") as stream:
            stream.writelines(self.lines)
        rest = {"step": self.step, "set_aside": self.set_aside, "outcome": asdict(self.outcome), "report": asdict(self.report)}
        (directory / REST_FILE).write_text(json.dumps(rest), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> PendingRollout | None:
        """From a checkpoint; None when it has none."""
        if not (directory / REST_FILE).exists():
            return None
        rest = json.loads((directory / REST_FILE).read_text(encoding="utf-8"))
        text = (directory / GROUPS_FILE).read_text(encoding="utf-8", errors="surrogatepass")
        groups = read_rollout(directory / GROUPS_FILE) if text else []
        outcome = Outcome(**{**rest["outcome"], "busy": {int(engine): busy for engine, busy in rest["outcome"]["busy"].items()}})
        set_aside = [(name, reason) for name, reason in rest["set_aside"]]
        return cls(rest["step"], groups, [text], set_aside, outcome, GradeReport(**rest["report"]))
