"""All MATH-500 solutions and AIME answers are graded right, and wrong ones wrong, by the workers that grade in training.

`pytest -s` shows the counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from tic_megatron.config import RewardSettings
from tic_megatron.rewards import RewardWorkers

PROBLEMS = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not (PROBLEMS / "math500.jsonl").exists(), reason="public problem sets are not beside the project"
)
FORMS = ["{}", "${}$", "\\boxed{{{}}}", "Answer: {}", "**Answer:** {}", "The answer is {}.", "so\n\n{}", "Answer: \\boxed{{{}}}"]
EXPLAINED = {
    *((r"864 \mbox{ inches}^2", rf"864 \mbox{{ inches}}^{power}") for power in (1, 3)),
    *((r"15\mbox{ cm}^2", rf"15\mbox{{ cm}}^{power}") for power in (1, 3)),
}
"""Wrong answers that are accepted: units are not compared, and here the number that is off by one is a unit's power."""


@pytest.fixture(scope="module", params=["math", "aime"])
def aime_workers(request: pytest.FixtureRequest):
    with RewardWorkers(RewardSettings(function=request.param, timeout_s=60.0)) as workers:
        yield workers


@pytest.fixture(scope="module")
def workers():
    with RewardWorkers(RewardSettings(function="math", timeout_s=60.0)) as workers:
        yield workers


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (PROBLEMS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_math500_solutions_are_right(workers: RewardWorkers) -> None:
    problems = rows("math500")
    rewards, report = workers.grade([(row["solution"], row["answer"]) for row in problems])
    print(f"\nMATH-500: {rewards.count(1.0)} of {len(problems)} reference solutions graded right")
    assert len(problems) == 500
    assert [row["answer"] for row, reward in zip(problems, rewards, strict=True) if reward != 1.0] == []
    assert report.faults == []


def with_answer(row: dict, wrong: str) -> str:
    """The reference solution, ending in the wrong answer."""
    boxed = "\\boxed{" + row["answer"] + "}"
    return row["solution"].replace(boxed, "\\boxed{" + wrong + "}") if boxed in row["solution"] else f"\\boxed{{{wrong}}}"


def value(answer: str) -> Fraction | str:
    """What an answer says, read without the grader: a number's value, else its text without spacing and dressing."""
    text = re.sub(r"\\(?:text|mbox|left|right|!|,|;| |\$|%)|\^\{?\\circ\}?|[\s${}]", "", answer.replace("dfrac", "frac"))
    number = re.fullmatch(r"(?:[a-z]=)?(-?[\d,]*\.?\d+)", text)
    if number:
        return Fraction(number[1].replace(",", ""))
    fraction = re.fullmatch(r"(-?)\\frac\{?(\d+)\}?\{(\d+)\}", answer.replace("dfrac", "frac")) or re.fullmatch(
        r"(-?)(\d+)/(\d+)", text
    )
    return Fraction(int(fraction[1] + fraction[2]), int(fraction[3])) if fraction else text


def other_answers(problems: list[dict]) -> Iterator[tuple[dict, str]]:
    """The answers of four other problems, where they say something else."""
    for shift in (1, 7, 123, 251):
        for index, row in enumerate(problems):
            other = problems[(index + shift) % len(problems)]["answer"]
            if value(other) != value(row["answer"]):
                yield row, other


def off_by_one(problems: list[dict]) -> Iterator[tuple[dict, str]]:
    """The first and the last number of the answer, one more and one less."""
    for row in problems:
        answer = row["answer"]
        found = list(re.finditer(r"\d+", answer))
        for number in {found[0].start(): found[0], found[-1].start(): found[-1]}.values() if found else ():
            for change in (-1, 1):
                yield row, answer[: number.start()] + str(int(number[0]) + change) + answer[number.end() :]


def swapped_sign(problems: list[dict]) -> Iterator[tuple[dict, str]]:
    for row in problems:
        answer = row["answer"]
        if value(answer) != 0:
            yield row, answer[1:] if answer.startswith("-") else f"-{answer}"


@pytest.mark.parametrize("kind", [other_answers, off_by_one, swapped_sign])
def test_math500_wrong_answers_are_wrong(workers: RewardWorkers, kind) -> None:
    """At least 99% of each kind, and the reason for every exception is known."""
    wrong = list(kind(rows("math500")))
    rewards, report = workers.grade([(with_answer(row, answer), row["answer"]) for row, answer in wrong])
    accepted = [(row["answer"], answer) for (row, answer), reward in zip(wrong, rewards, strict=True) if reward]
    print(f"\n{kind.__name__}: {len(wrong) - len(accepted)} of {len(wrong)} graded wrong; accepted: {accepted}")
    assert len(wrong) >= 480 and len(accepted) <= 0.01 * len(wrong)
    assert set(accepted) <= EXPLAINED
    assert report.faults == []


def test_what_the_wrong_answers_are_told_by() -> None:
    """The reading that decides which answers of other problems are wrong ones."""
    same = [("5", "x=5"), ("10,080", "10080"), (r"\frac{1}{2}", ".5"), (r"\dfrac{3}{4}", "3/4"), (r"90^\circ", "90")]
    assert all(value(a) == value(b) for a, b in same)
    assert len({value(a) for a, _ in same}) == len(same)
    assert value(r"3\sqrt{13}") == value(r"3 \sqrt{13}") != value(r"\sqrt{13}")


def aime_answers() -> list[tuple[str, list[int]]]:
    """Of all years: the reference answer as it is written, and the integers that it accepts."""
    answers = [row["answer"] for name in ("aime_1983_2024", "aime2024", "aime2025") for row in rows(name)]
    return [(answer, [int(number) for number in re.findall(r"\d+", answer)]) for answer in answers]


def test_aime_answers_in_each_form(aime_workers: RewardWorkers) -> None:
    """As integers, with leading zeros as on the answer sheet, and as the file writes them; and one off is wrong."""
    right, wrong = [], []
    for answer, integers in aime_answers():
        assert all(0 <= n <= 999 for n in integers) and integers
        texts = {text for n in integers for text in (str(n), f"{n:03}")} | ({answer} if len(integers) == 1 else set())
        near = {str(m) for n in integers for m in (n - 1, n + 1) if m not in integers} | {f"-{n}" for n in integers if n}
        right += [(form.format(text), answer) for form in FORMS for text in sorted(texts)]
        wrong += [(form.format(text), answer) for form in FORMS for text in sorted(near)]
    rewards, report = aime_workers.grade(right)
    print(f"\nAIME: {rewards.count(1.0)} of {len(right)} right ({len(aime_answers())} problems, {len(FORMS)} forms)", end="; ")
    assert [pair for pair, reward in zip(right, rewards, strict=True) if reward != 1.0] == []
    assert report.faults == []
    rewards, report = aime_workers.grade(wrong)
    print(f"{sum(reward == 0 for reward in rewards)} of {len(wrong)} wrong")
    assert [pair for pair, reward in zip(wrong, rewards, strict=True) if reward] == []
    assert report.faults == []
