"""Prompt sets: rows -> checked problems -> tokenized prompts, and the cursor that deals them out."""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tic_megatron.config import DataSettings, SettingsError
from tic_megatron.data.rows import Row, read_rows
from tic_megatron.trajectory import Prompt

if TYPE_CHECKING:  # it takes seconds to import, and bad rows are refused without it
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Problem:
    """One checked row: chat messages, the reference answer, and the place it came from (`train.jsonl:17`)."""

    id: str
    messages: tuple[dict[str, str], ...]
    answer: str
    where: str


def load_prompts(path: str | Path, tokenizer: PreTrainedTokenizerBase, data: DataSettings) -> list[Prompt]:
    """Read, check and tokenize a prompt set: `read_problems`, then `tokenize_problems`."""
    return tokenize_problems(read_problems(path, data), tokenizer)


def read_problems(path: str | Path, data: DataSettings, setting: str = "data.train") -> list[Problem]:
    """Read a source of problems (`data.rows` says which there are), without a tokenizer; `setting` is the one to name when it is
    of no use.

    The problem's field holds text, or a list of chat messages `{"role", "content"}`; the answer's field text or a number.
    A field may lie deeper (`reward_model.ground_truth`). A row without `id` is called `<file stem>:<number>`. Raises
    SettingsError naming file and row for a row that cannot be used, and for a source without any.
    """
    problems = [check_row(row, data) for row in read_rows(path, setting)]
    if not problems:
        raise SettingsError(f"{setting}: {path} holds no problems; give rows with a problem and its answer")
    return problems


def tokenize_problems(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Apply the tokenizer's chat template, with the header of the assistant's turn, and tokenize."""
    texts = [_render(problem, tokenizer) for problem in problems]
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template writes the special tokens
    return [
        Prompt(id=problem.id, text=problem.messages[-1]["content"], answer=problem.answer, token_ids=tuple(ids))
        for problem, ids in zip(problems, token_ids, strict=True)
    ]


def _render(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.apply_chat_template(list(problem.messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are programs; some raise on roles that they do not know
        reason = str(error).strip().partition("\n")[0]
        raise SettingsError(
            f"{problem.where}: the tokenizer's chat template refuses this problem ({reason}); change the row or the template"
        ) from error


def check_row(row: Row, data: DataSettings) -> Problem:
    """A row as a problem. SettingsError naming row and field for one that cannot be used."""
    fields, where = row.fields, row.where
    messages = _messages(find_field(fields, data.prompt_field, "data.prompt_field", where), data.prompt_field, where)
    if data.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    answer = _answer(find_field(fields, data.answer_field, "data.answer_field", where), data.answer_field, where)
    row_id = f"{Path(row.file).stem}:{row.number}" if fields.get("id") is None else str(fields["id"])
    _check_characters(row_id, "id", where)
    return Problem(row_id, tuple(messages), answer, where)


def find_field(row: dict[str, Any], field: str, setting: str, where: str) -> Any:
    """The field's value; a name with dots that is no field itself leads through nested objects."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            names = ", ".join(repr(name) for name in list(row)[:8]) or "none"
            raise SettingsError(f"{where}: has no field {field!r} (its fields: {names}); add it, or set {setting}")
        value = value[part]
    return value


def _messages(value: Any, field: str, where: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        _refuse_value(value, field, where, "text or a list of chat messages")
    for message in value:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            _refuse_value(value, field, where, 'a list of chat messages {"role": text, "content": text}')
        if not message["content"].strip():
            raise SettingsError(f"{where}: field {field!r} is empty; correct or remove the row")
        _check_characters(message["role"] + message["content"], field, where)
    if value[-1]["role"] == "assistant":
        raise SettingsError(
            f"{where}: field {field!r} ends in a message of the assistant, so there is nothing to answer; remove that message"
        )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _answer(value: Any, field: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        _refuse_value(value, field, where, "text or a number")
    finite = value.is_finite() if isinstance(value, Decimal) else not isinstance(value, float) or math.isfinite(value)
    if not finite:
        _refuse_value(value, field, where, "text or a number")
    text = _positional(value)
    if not text.strip():
        raise SettingsError(f"{where}: field {field!r} is empty; correct or remove the row")
    _check_characters(text, field, where)
    return text


def _positional(value: str | int | float | Decimal) -> str:
    """As graders read it: a number without an exponent, and a whole one of a column of floats without a point."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return format(Decimal(str(value)), "f") if isinstance(value, float | Decimal) else str(value)


def _refuse_value(value: Any, field: str, where: str, expected: str) -> NoReturn:
    shown = json.dumps(value, ensure_ascii=True, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise SettingsError(f"{where}: field {field!r} is {shown}; expected {expected}")


def _check_characters(text: str, field: str, where: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character; tokenizers raise on it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SettingsError(
            f"{where}: field {field!r} holds half a surrogate pair at character {error.start}; correct or remove the row"
        ) from error


class PromptCursor:
    """Deals out prompts in seeded random order, epoch after epoch; its place can be saved.

    Within an epoch every prompt comes once; a batch that the epoch cannot fill goes on into the next one. The shuffle is what
    assigns prompts to mini-batches at random, before anything is generated, as the unbiasedness of the gradient asks.

    Example: `PromptCursor(prompts, seed=0).next(128)`.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """`prompts`: at least one; `seed` and the prompts' order fix all that `next` will return."""
        if not prompts:
            raise ValueError("a prompt cursor needs at least one prompt")
        self._prompts = list(prompts)
        self._fingerprint = zlib.crc32(repr([(p.id, p.token_ids, p.answer) for p in self._prompts]).encode())
        self._start(seed, epoch=0, position=0)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        batch: list[Prompt] = []
        while len(batch) < n:
            if self._position == len(self._order):
                self._start(self._seed, self._epoch + 1, position=0)
            taken = self._order[self._position : self._position + n - len(batch)]
            self._position += len(taken)
            batch += [self._prompts[index] for index in taken]
        return batch

    @property
    def used(self) -> int:
        """Problems given out so far, of all epochs."""
        return self._epoch * len(self._prompts) + self._position

    def state_dict(self) -> dict[str, int]:
        """The place: plain numbers, for a checkpoint."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, int], *, allow_other_prompts: bool = False) -> None:
        """Continue from a saved place, under the saved seed.

        When the prompts are not those of the saved state this raises SettingsError, or, with `allow_other_prompts`, begins that
        epoch anew on the new ones.
        """
        if state["fingerprint"] == self._fingerprint:
            self._start(state["seed"], state["epoch"], state["position"])
        elif allow_other_prompts:
            self._start(state["seed"], state["epoch"], position=0)
        else:
            raise SettingsError(
                "data.train: the training problems are not those of the checkpoint (rows, ids or, without ids, the file's "
                "name, tokenizer, system prompt or length limit have changed); restore them, give a new --run.dir, or allow it "
                "with --run.allow_change data.train"
            )

    def _start(self, seed: int, epoch: int, position: int) -> None:
        self._seed, self._epoch, self._position = seed, epoch, position
        self._order = list(range(len(self._prompts)))
        random.Random(f"{seed}:{epoch}").shuffle(self._order)
