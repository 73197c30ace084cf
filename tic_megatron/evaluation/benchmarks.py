"""The benchmarks by name: where their problems come from, how these are asked, who grades, and how many responses there are.

A new one is an entry of `BENCHMARKS`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tic_megatron.config import DataSettings, RewardSettings, SettingsError
from tic_megatron.data.problem_text import TEMPLATES, apply_template, strip_template
from tic_megatron.data.prompts import Problem, read_problems
from tic_megatron.data.rows import Row, read_rows
from tic_megatron.rewards import is_dense, livecodebench
from tic_megatron.rewards.aime import grade_aime
from tic_megatron.trajectory import Prompt

SETTING = "eval.benchmarks"
PLAIN_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Benchmark:
    """A set of problems and how it is evaluated.

    - `source`: file, folder or hub name (`data.rows`), empty where one must be given;
    - `reward`: what grades it (as `reward.function`); only full reward is right;
    - `samples`: k of Avg@k as the paper reports it (temperature 1, top-p 1), 0 where it reports the greedy Avg@1;
    - `template`: the prompt, one of `data.problem_text` or a text with `{problem}`;
    - `prompt_field`, `answer_field`: of its rows; `programs`: whether these are LiveCodeBench's.
    """

    name: str
    source: str
    reward: str
    samples: int
    template: str = "none"
    prompt_field: str = "problem"
    answer_field: str = "answer"
    programs: bool = False


@dataclass(frozen=True)
class EvalSet:
    """A benchmark with its problems, tokenized."""

    benchmark: Benchmark
    prompts: list[Prompt]


TRAINED = "dapo"
"""The instruction of DAPO-Math-17K: models are asked as they were in the paper's training."""
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "HuggingFaceH4/aime_2024", "aime", 32, TRAINED),
        Benchmark("aime25", "math-ai/aime25", "aime", 32, TRAINED),
        Benchmark("math500", "HuggingFaceH4/MATH-500", "math", 0, TRAINED),
        Benchmark("livecodebench", "", "code", 0, programs=True),
    )
}


def choose_benchmarks(given: Sequence[str], data: DataSettings, reward: RewardSettings, template: str | None) -> list[Benchmark]:
    """The benchmarks of `eval.benchmarks`: names; NAME=SOURCE, for one of them from elsewhere; or a set of your own under a name
    of your own, whose rows have the fields of `data` and which `reward` grades, greedily unless k is set.

    `template`: the prompt in place of the benchmarks' own. SettingsError, naming the nearest, for a name that there is not, and
    for a grader that there is not.
    """
    chosen: dict[str, Benchmark] = {}
    for text in given:
        benchmark = _choose(text, data, reward.function)
        if benchmark.name in chosen:
            raise SettingsError(f"{SETTING}: {benchmark.name} is there twice; leave one out, or give it another name")
        if benchmark.programs and template:
            raise SettingsError(f"{SETTING}: {benchmark.name} asks in words of its own; leave the template out, or the benchmark")
        _check_grader(benchmark, reward)
        chosen[benchmark.name] = replace(benchmark, template=template or benchmark.template)
    return list(chosen.values())


def _choose(text: str, data: DataSettings, reward: str) -> Benchmark:
    name, equals, source = (part.strip() for part in text.partition("="))
    if equals and not source:
        raise SettingsError(f"{SETTING}: {text!r} names no file; give NAME=SOURCE, or the name alone")
    if name in BENCHMARKS:
        known = BENCHMARKS[name]
        if not source and not known.source:
            raise SettingsError(
                f"{SETTING}: {name} needs its problems from here, since its hub dataset is a program, which is never run: "
                f"download the files of a release, and give {name}=FOLDER"
            )
        return replace(known, source=source or known.source)
    if not equals:
        raise SettingsError(f"{SETTING}: there is no benchmark {name!r}; {_hint(name)}")
    if not PLAIN_NAME.fullmatch(name):
        raise SettingsError(f"{SETTING}: {name!r} is no plain name, which metrics and folders need; give NAME=SOURCE")
    return Benchmark(name, source, reward, 0, "none", data.prompt_field, data.answer_field)


def grader_settings(benchmark: Benchmark, reward: RewardSettings) -> RewardSettings:
    """Those of the benchmark's own grader."""
    return replace(reward, function=benchmark.reward)


def _check_grader(benchmark: Benchmark, reward: RewardSettings) -> None:
    if is_dense(grader_settings(benchmark, reward)):
        raise SettingsError(
            f"reward.function: {benchmark.reward} gives a reward per token, and {benchmark.name} needs one per response; give "
            "another"
        )


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.5)
    known = f"did you mean {near[0]}?" if near else f"use one of: {', '.join(BENCHMARKS)}"
    return f"{known} (a set of your own is NAME=SOURCE)"


def read_benchmark(benchmark: Benchmark, data: DataSettings) -> list[Problem]:
    """Its problems, put into the template. SettingsError as `read_problems` raises it, naming file, line and field, also for an
    answer that its grader cannot compare with, and for an id that two problems have."""
    setting = f"{SETTING}: {benchmark.name}"
    if benchmark.programs:
        programs = [_program(row, data) for row in read_rows(benchmark.source, setting)]
        _check_ids(programs)
        return programs
    problems = read_problems(benchmark.source, _fields(benchmark, data, setting), setting)
    _check_ids(problems)
    if benchmark.reward == "aime":
        for problem in problems:
            _check_integer(problem)
    return [_ask(problem, TEMPLATES.get(benchmark.template, benchmark.template)) for problem in problems]


def _fields(benchmark: Benchmark, data: DataSettings, setting: str) -> DataSettings:
    """The benchmark's own fields, or those of `data` where its first row, of a copy from elsewhere, has none of that name."""
    first = next(iter(read_rows(benchmark.source, setting)), None)
    there = first.fields if first else {}
    return replace(
        data,
        prompt_field=benchmark.prompt_field if benchmark.prompt_field in there else data.prompt_field,
        answer_field=benchmark.answer_field if benchmark.answer_field in there else data.answer_field,
    )


def _check_ids(problems: Sequence[Problem]) -> None:
    """Reports pair the runs' results by id, and responses that could not be graded are told by it."""
    seen: dict[str, str] = {}
    for problem in problems:
        if problem.id in seen:
            raise SettingsError(
                f"{problem.where}: has the id {problem.id!r} of {seen[problem.id]}; give it another, or remove it"
            )
        seen[problem.id] = problem.where


def _check_integer(problem: Problem) -> None:
    try:
        grade_aime("", problem.answer)
    except ValueError as error:
        raise SettingsError(f"{problem.where}: {error}; correct the row") from error


def _ask(problem: Problem, template: str) -> Problem:
    *before, last = problem.messages
    content = apply_template(strip_template(last["content"]), template) if template != TEMPLATES["none"] else last["content"]
    return replace(problem, messages=(*before, {**last, "content": content}))


def _program(row: Row, data: DataSettings) -> Problem:
    """A LiveCodeBench problem; its answer are the tests, as JSON. The prompt says how to answer."""
    problem = livecodebench.read_row(row.fields, row.where)
    name = row.fields.get("question_id") or f"{Path(row.file).stem}:{row.number}"
    before = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    messages = (*before, {"role": "user", "content": problem.prompt})
    return Problem(str(name), messages, json.dumps(problem.tests), row.where)
