"""Makes one training set out of several sources: bare problems, each once, none of the evaluation sets', in one template.

Two passes. The first reads the sources, a row at a time, and writes each distinct problem to a scratch file; of a row that came
before it keeps nothing but a count. Only then is it known which problems have contradicting answers, so the second pass, over
the scratch file, takes those out, with what the evaluation sets have and what is too long, and writes the rest.
Memory grows with the distinct problems (0.35 KiB each), not with the rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tic_megatron.config import DataSettings, SettingsError
from tic_megatron.config_prepare import PrepareSettings
from tic_megatron.data.overlap import HeldOutIndex, HeldOutProblem
from tic_megatron.data.problem_text import (
    answer_key,
    answer_kind,
    apply_template,
    exact_key,
    strip_template,
)
from tic_megatron.data.prompts import Problem, check_row, find_field
from tic_megatron.data.rows import Row, Source, open_source, sha256

PROBLEMS, MANIFEST, REPORT = "problems.jsonl", "manifest.json", "report.md"
ID_FIELDS = ("id", "ID", "unique_id", "extra_info.index")
YEAR_FIELDS = ("year", "Year")
MOST_LISTED = 20
"""Entries of a list in the report."""
BATCH = 256

TokenCounter = Callable[[Sequence[str]], list[int]]
"""Prompt lengths in tokens, chat template included, of the problems' texts."""


@dataclass
class SourceCounts:
    """What became of a source's rows; `repeated` ones came before in it, `elsewhere` ones in an earlier source."""

    name: str
    source: str
    files: list[dict[str, Any]]
    revision: str | None
    prompt_field: str = ""
    answer_field: str = ""
    rows: int = 0
    other_years: int = 0
    instructions_taken_off: int = 0
    repeated: int = 0
    elsewhere: int = 0
    distinct: int = 0
    conflicting: int = 0
    held_out: int = 0
    too_long: int = 0
    kept: int = 0


@dataclass
class Prepared:
    """All that the report and the manifest tell."""

    settings: dict[str, Any]
    sources: list[SourceCounts]
    held_out: list[dict[str, Any]]
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    overlaps: list[dict[str, Any]] = field(default_factory=list)
    too_long: list[dict[str, Any]] = field(default_factory=list)
    answer_kinds: Counter[str] = field(default_factory=Counter)
    answers: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # kind -> the first ones, with their problems' ids
    years: Counter[int] = field(default_factory=Counter)
    characters: array[int] = field(default_factory=lambda: array("L"))
    tokens: array[int] = field(default_factory=lambda: array("L"))
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Problems of the training set."""
        return sum(source.kept for source in self.sources)


@dataclass(frozen=True)
class NamedSource:
    """A source with the name that its rows get, and the setting that it was given in."""

    name: str
    given: str
    setting: str

    def open(self) -> Source:
        """Find it; a hub dataset is downloaded."""
        return open_source(self.given, self.setting)


def prepare(settings: PrepareSettings, folder: Path, count_tokens: TokenCounter | None) -> Prepared:
    """Write the training set and its manifest into `folder`, which exists and is empty.

    `settings` are resolved. SettingsError for a source or a row that is of no use, or, if `settings.conflicts` says so, for
    contradicting answers.
    """
    held_out = [_read_held_out(each, settings) for each in name_sources(settings.held_out, "held_out")]
    index = HeldOutIndex([problem for _, problems in held_out for problem in problems], settings.near_duplicate)
    distinct = _DistinctProblems(folder / "scratch.jsonl", settings)
    for named in name_sources(settings.sources, "sources"):
        distinct.read(named)
    recorded = {name: value for name, value in asdict(settings).items() if name != "out"}
    result = Prepared(recorded, distinct.sources, [summary for summary, _ in held_out])
    _write(distinct, index, settings, folder / PROBLEMS, count_tokens, result)
    distinct.close()
    output = folder / PROBLEMS
    result.output = {"name": PROBLEMS, "rows": result.kept, "bytes": output.stat().st_size, "sha256": sha256(output)}
    (folder / MANIFEST).write_text(json.dumps(_manifest(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def name_sources(given: Sequence[str], setting: str) -> list[NamedSource]:
    """`NAME=SOURCE`, or the name that the source suggests. SettingsError for two of the same name."""
    named: list[NamedSource] = []
    for text in given:
        match = re.fullmatch(r"([\w.-]+)=(.+)", text, re.DOTALL)
        source = match[2] if match else text
        name = match[1] if match else re.sub(r"[^\w.-]+", "_", Path(source.partition(":")[0]).stem)
        if any(other.name == name for other in named):
            raise SettingsError(f"{setting}: two sources are called {name!r}; give names, as in first={source}")
        named.append(NamedSource(name, source, setting))
    return named


class _DistinctProblems:
    """The first pass, and what it found: a scratch file with a line per distinct problem, in the order of the sources."""

    def __init__(self, scratch: Path, settings: PrepareSettings) -> None:
        self.sources: list[SourceCounts] = []
        self.conflicts: dict[int, list[dict[str, str]]] = {}  # problem -> the rows with other answers
        self._settings = settings
        self._scratch = open(scratch, "w+", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by `close`)
        self._by_row: dict[bytes, int] = {}  # prompt and answer as they stand in the row -> problem
        self._by_problem: dict[bytes, int] = {}
        self._answers: list[str] = []
        self._source_of = array("H")

    def close(self) -> None:
        """Remove the scratch file."""
        self._scratch.close()
        Path(self._scratch.name).unlink()

    def records(self) -> Iterator[dict[str, Any]]:
        """The distinct problems."""
        self._scratch.seek(0)
        return map(json.loads, self._scratch)

    def read(self, named: NamedSource) -> None:
        """Read a source."""
        source = named.open()
        counts = SourceCounts(named.name, named.given, source.checksums(), source.revision)
        self.sources.append(counts)
        years = self._settings.years
        dated = 0
        for row in source.read():
            counts.rows += 1
            if counts.rows == 1:
                counts.prompt_field = _choose_field(row, self._settings.prompt_fields, "prompt_fields")
                counts.answer_field = _choose_field(row, self._settings.answer_fields, "answer_fields")
            year = _year(row)
            dated += year is not None
            if years and year is not None and not years[0] <= year <= years[1]:
                counts.other_years += 1
            else:
                self._add(row, counts, year)
        if not counts.rows:
            raise SettingsError(f"{named.setting}: {named.given} holds no problems; give rows with a problem and its answer")
        if years and 0 < dated < counts.rows:
            raise SettingsError(
                f"years: {counts.rows - dated} of {counts.rows} rows of {named.given} have no year; add it, or leave years out"
            )
        if counts.rows == counts.other_years:
            raise SettingsError(
                f"years: {named.given} has no row of {years[0]} to {years[1]}; give other years, or leave that source out"
            )

    def _add(self, row: Row, counts: SourceCounts, year: int | None) -> None:
        prompt = find_field(row.fields, counts.prompt_field, "prompt_fields", row.where)
        answer = find_field(row.fields, counts.answer_field, "answer_fields", row.where)
        # Uploads repeat rows a hundred times: the same values are checked and compared once.
        raw = hashlib.blake2b(repr((prompt, answer)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        index = self._by_row.get(raw)
        if index is None:
            self._by_row[raw] = self._add_new(row, counts, year)
        else:
            self._count_repetition(index, counts)

    def _add_new(self, row: Row, counts: SourceCounts, year: int | None) -> int:
        problem = check_row(row, DataSettings(prompt_field=counts.prompt_field, answer_field=counts.answer_field))
        text = _text(problem, counts.prompt_field)
        bare = strip_template(text, self._settings.template)
        if not bare:
            raise SettingsError(f"{row.where}: field {counts.prompt_field!r} holds instructions only; correct or remove the row")
        key = exact_key(bare)
        index = self._by_problem.get(key)
        if index is not None:
            self._count_repetition(index, counts)
            if answer_key(problem.answer) != self._answers[index]:
                self.conflicts.setdefault(index, []).append({"answer": problem.answer, "row": _place(counts, row)})
            return index
        index = self._by_problem[key] = len(self._answers)
        self._answers.append(answer_key(problem.answer))
        self._source_of.append(len(self.sources) - 1)
        counts.distinct += 1
        counts.instructions_taken_off += bare != text.strip()
        record: dict[str, Any] = {
            "id": f"{counts.name}-{counts.rows}",
            "problem": bare,
            "answer": problem.answer,
            "source": counts.name,
        }
        record |= {"source_file": row.file, "source_row": row.number}
        row_id = next((value for name in ID_FIELDS if (value := _find(row, name)) is not None), None)
        record |= {} if row_id is None else {"source_id": str(row_id)}
        record |= {} if year is None else {"year": year}
        self._scratch.write(json.dumps(record, ensure_ascii=False) + "\n")
        return index

    def _count_repetition(self, index: int, counts: SourceCounts) -> None:
        if self._source_of[index] == len(self.sources) - 1:
            counts.repeated += 1
        else:
            counts.elsewhere += 1


def _find(row: Row, name: str) -> Any:
    """A field's value; None where there is none."""
    try:
        return find_field(row.fields, name, "", row.where)
    except SettingsError:
        return None


def _choose_field(row: Row, names: Sequence[str], setting: str) -> str:
    chosen = next((name for name in names if _find(row, name) is not None), None)
    if chosen is None:
        there = ", ".join(map(repr, list(row.fields)[:8])) or "none"
        raise SettingsError(f"{row.where}: has none of the fields {', '.join(names)} (its fields: {there}); set {setting}")
    return chosen


def _year(row: Row) -> int | None:
    value = next((row.fields[name] for name in YEAR_FIELDS if row.fields.get(name) is not None), None)
    if value is None:
        return None
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,4}", str(value)):
        raise SettingsError(f"{row.where}: the year is {str(value)[:60]!r}; expected a whole number, such as 2022")
    return int(value)


def _text(problem: Problem, prompt_field: str) -> str:
    if len(problem.messages) != 1 or problem.messages[0]["role"] != "user":
        raise SettingsError(
            f"{problem.where}: field {prompt_field!r} holds {len(problem.messages)} chat messages; expected text, or one message "
            "of the user"
        )
    return problem.messages[0]["content"]


def _place(counts: SourceCounts, row: Row) -> str:
    return f"{counts.name}: {row.file}, row {row.number}"


def _read_held_out(named: NamedSource, settings: PrepareSettings) -> tuple[dict[str, Any], list[HeldOutProblem]]:
    source = named.open()
    problems: list[HeldOutProblem] = []
    data = None
    for row in source.read():
        if data is None:
            prompt_field = _choose_field(row, settings.prompt_fields, "prompt_fields")
            data = DataSettings(
                prompt_field=prompt_field, answer_field=_choose_field(row, settings.answer_fields, "answer_fields")
            )
        problem = check_row(row, data)
        text = strip_template(_text(problem, data.prompt_field), settings.template)
        problems.append(HeldOutProblem(named.name, problem.id, text, problem.answer))
    if not problems:
        raise SettingsError(f"{named.setting}: {named.given} holds no problems; give rows with a problem and its answer")
    summary = {"name": named.name, "source": named.given, "files": source.checksums(), "revision": source.revision}
    return {**summary, "rows": len(problems)}, problems


def _write(
    distinct: _DistinctProblems,
    index: HeldOutIndex,
    settings: PrepareSettings,
    path: Path,
    count_tokens: TokenCounter | None,
    result: Prepared,
) -> None:
    """The second pass."""
    by_name = {source.name: source for source in result.sources}
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        candidates = (
            record
            for n, record in enumerate(distinct.records())
            if _has_one_answer(record, distinct.conflicts.get(n), settings, by_name, result)
            and _is_not_held_out(record, index, by_name, result)
        )
        while batch := list(islice(candidates, BATCH)):
            prompts = [apply_template(record["problem"], settings.template) for record in batch]
            lengths = count_tokens(prompts) if count_tokens else [None] * len(batch)
            for record, prompt, length in zip(batch, prompts, lengths, strict=True):
                if length is not None and settings.max_prompt_tokens and length > settings.max_prompt_tokens:
                    by_name[record["source"]].too_long += 1
                    result.too_long.append({"id": record["id"], "tokens": length})
                    continue
                _note(record, length, by_name, result)
                stream.write(json.dumps({**record, "problem": prompt}, ensure_ascii=False) + "\n")


def _has_one_answer(
    record: dict[str, Any],
    others: list[dict[str, str]] | None,
    settings: PrepareSettings,
    by_name: dict[str, SourceCounts],
    result: Prepared,
) -> bool:
    if not others:
        return True
    first = {"answer": record["answer"], "row": f"{record['source']}: {record['source_file']}, row {record['source_row']}"}
    if settings.conflicts == "refuse":
        raise SettingsError(
            f"conflicts: the answer of {first['row']} is {record['answer']!r}, that of the same problem in {others[0]['row']} "
            f"{others[0]['answer']!r}; correct one, or give conflicts drop or first"
        )
    by_name[record["source"]].conflicting += 1
    kept = settings.conflicts == "first"
    result.conflicts.append({"id": record["id"], "problem": record["problem"], "answers": [first, *others], "kept": kept})
    return kept


def _is_not_held_out(record: dict[str, Any], index: HeldOutIndex, by_name: dict[str, SourceCounts], result: Prepared) -> bool:
    overlap = index.find(record["problem"])
    if overlap is None:
        return True
    by_name[record["source"]].held_out += 1
    held_out = overlap.held_out
    result.overlaps.append(
        {
            **{
                "id": record["id"],
                "source_id": record.get("source_id"),
                "held_out_set": held_out.set,
                "held_out_id": held_out.id,
            },
            **{"exact": overlap.exact, "similarity": round(overlap.similarity, 3)},
            **{"answer": record["answer"], "held_out_answer": held_out.answer},
            **{"problem": record["problem"], "held_out_problem": held_out.problem},
        }
    )
    return False


def _note(record: dict[str, Any], length: int | None, by_name: dict[str, SourceCounts], result: Prepared) -> None:
    by_name[record["source"]].kept += 1
    kind = answer_kind(record["answer"])
    result.answer_kinds[kind] += 1
    if result.answer_kinds[kind] <= MOST_LISTED:
        result.answers.setdefault(kind, []).append((record["id"], record["answer"]))
    result.characters.append(len(record["problem"]))
    if length is not None:
        result.tokens.append(length)
    if "year" in record:
        result.years[record["year"]] += 1
    result.examples.setdefault(record["source"], record)


def _manifest(result: Prepared) -> dict[str, Any]:
    return {
        **{"settings": result.settings, "output": result.output},
        **{"sources": [asdict(source) for source in result.sources], "held_out": result.held_out},
        **{"conflicts": result.conflicts, "overlaps": result.overlaps, "too_long": result.too_long},
    }
