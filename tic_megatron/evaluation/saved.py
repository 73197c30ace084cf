"""Responses that are kept while they are made, so that an evaluation which was interrupted goes on with what is missing.

All responses of a benchmark in one mode are one JSONL file, a row each, in the order of the problems. They are generated in
batches of whole problems, each graded and then written at once. A response's seed depends only on the evaluation's seed, the
benchmark, the place of its problem and its number; so what a batch holds decides rounding, no more, and a batch is always
generated again as a whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tic_megatron.config import SettingsError
from tic_megatron.evaluation.accuracy import fault_lines, is_right, not_answered, nothing_answered
from tic_megatron.rewards import RewardWorkers
from tic_megatron.rollout.requests import stable_seed
from tic_megatron.trajectory import Group, Prompt

if TYPE_CHECKING:
    from tic_megatron.rollout.engines import Rollout  # and Ray, which bad input is told of without

Row = dict[str, Any]
"""`problem` (its id), `index` (its place, from 0), `sample` (from 0), `seed` (None for a greedy one), `response`, `tokens` (their
number), `truncated`, `score` (the reward), `right`, `fault` (why it could not be graded, None otherwise). Of a problem that
engines failed on or refused `response` is empty and `tokens` 0, which no other response has."""


@dataclass(frozen=True)
class Mode:
    """How the responses of one file are generated: `samples` per problem; `seed` is None for greedy ones."""

    name: str
    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int | None

    def seed_of(self, index: int, sample: int) -> int | None:
        """What a response is drawn with (`EngineGroup.generate`, `SampleRequest`)."""
        return None if self.seed is None else stable_seed(self.seed, index) + sample


class Generator(Protocol):
    """What this needs of the engines (`tic_megatron.rollout.engines.EngineGroup` has it)."""

    def generate(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        temperature: float,
        top_p: float,
        top_k: int,
        max_tokens: int,
        seed: int,
        first: int,
    ) -> Rollout:
        """`group_size` responses per prompt; some prompts may be set aside."""
        ...


def read_rows(path: Path, mode: Mode, n_problems: int) -> list[Row]:
    """The rows of a file, without a last line that a kill has torn. SettingsError for a file that is not this evaluation's."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is torn
    except OSError as error:
        raise SettingsError(f"run.dir: {path} cannot be read ({error.strerror}); give another --out") from error
    rows = []
    for number, line in enumerate(lines):
        row = _row(line)
        if row is None or (row["index"], row["sample"]) != divmod(number, mode.samples) or row["index"] >= n_problems:
            raise SettingsError(
                f"run.dir: {path}, line {number + 1}, is not the response that belongs there; remove the file, and its responses "
                "are generated again, or give another --out"
            )
        rows.append(row)
    return rows


def complete(
    path: Path,
    mode: Mode,
    prompts: Sequence[Prompt],
    engines: Generator,
    rewards: RewardWorkers,
    *,
    batch: int,
    tell: Callable[[list[Row], list[str]], None],
) -> list[Row]:
    """Generate, grade and write what the file lacks; all its rows.

    Args:
        batch: problems that are generated together.
        tell: called after each batch with all rows so far, and lines about what of it could not be graded (`fault_lines`).

    Raises WorkerError when no problem is answered at all.
    """
    rows = read_rows(path, mode, len(prompts))
    done = len(rows) // mode.samples
    if done < len(prompts):
        done -= done % batch
    rows = rows[: done * mode.samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(sum(len(line) + 1 for line in path.read_bytes().split(b"\n")[: len(rows)]))
        for first in range(done, len(prompts), batch):
            asked = list(prompts[first : first + batch])
            rollout = engines.generate(
                asked,
                group_size=mode.samples,
                temperature=mode.temperature,
                top_p=mode.top_p,
                top_k=mode.top_k,
                max_tokens=mode.max_tokens,
                seed=mode.seed or 0,
                first=first,
            )
            report = rewards.grade_groups(rollout.groups)
            fresh, groups = [], iter(rollout.groups)
            for place, prompt in enumerate(asked):
                reason = rollout.outcome.set_aside.get(place)
                if reason is None:
                    fresh += _rows(first + place, next(groups), mode, report.faults)
                else:
                    fresh += _unanswered_rows(first + place, prompt, mode, reason)
            file.write(b"".join(map(_line, fresh)))
            file.flush()
            os.fsync(file.fileno())
            rows += fresh
            tell(rows, fault_lines(rollout, report))
    if not any(row["tokens"] for row in rows):
        raise nothing_answered(path.parent.name, len(prompts), rows[0]["problem"], rows[0]["fault"])
    return rows


def _rows(index: int, group: Group, mode: Mode, faults: Sequence[str]) -> list[Row]:
    return [
        {
            **_place(index, group.prompt, mode, sample),
            "response": trajectory.text,
            "tokens": trajectory.response_length,
            "truncated": trajectory.truncated,
            "score": trajectory.reward,
            "right": is_right(trajectory.reward),
            "fault": next((f for f in faults if f.startswith(f"prompt {group.prompt.id}, response {sample}: ")), None),
        }
        for sample, trajectory in enumerate(group.trajectories)
    ]


def _unanswered_rows(index: int, prompt: Prompt, mode: Mode, reason: str) -> list[Row]:
    nothing = {"response": "", "tokens": 0, "truncated": False, "score": 0.0, "right": False, "fault": not_answered(reason)}
    return [_place(index, prompt, mode, sample) | nothing for sample in range(mode.samples)]


def _place(index: int, prompt: Prompt, mode: Mode, sample: int) -> Row:
    return {"problem": prompt.id, "index": index, "sample": sample, "seed": mode.seed_of(index, sample)}


_FIELDS = {
    **{"problem": str, "index": int, "sample": int, "response": str, "tokens": int, "truncated": bool, "score": float},
    "right": bool,
}


def _line(row: Row) -> bytes:
    # An untrained model's text may hold lone surrogates, which strict UTF-8 refuses; escaped, they are plain JSON.
    return json.dumps(row).encode() + b"\n"


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(type(row.get(name)) is kind for name, kind in _FIELDS.items()):
        return None
    return row
