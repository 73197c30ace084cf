"""Tests of programs, as in LiveCodeBench: their form, and whether an output is right. Plain data; nothing is run here.

A test is a JSON object. `input` and `output` are texts; of a `stdin` test what the program reads and what it has to print:

    {"testtype": "stdin", "input": "3 4\\n", "output": "7\\n"}

of a `functional` one the arguments of a call, one JSON value per line, and the JSON value that it has to return:

    {"testtype": "functional", "func_name": "add", "input": "3\\n4", "output": "7"}
"""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from typing import Any

Test = dict[str, Any]
KINDS = ("stdin", "functional")


class BadTestsError(ValueError):
    """What is given as tests is none; the message says which test and field."""


def read_tests(text: str) -> list[Test]:
    """The tests of a JSON text, checked. BadTestsError when there are none, or one cannot be used."""
    try:
        tests = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadTestsError("it is no JSON list of tests") from error
    check_tests(tests)
    return tests


def check_tests(tests: Any) -> None:
    """BadTestsError for what is no list of tests as above. Further fields of a test are left alone."""
    if not isinstance(tests, list) or not tests:
        raise BadTestsError("it is no JSON list of tests, or an empty one")
    for number, test in enumerate(tests, 1):
        if not isinstance(test, dict):
            raise BadTestsError(f"test {number} is no JSON object")
        for name in ("input", "output"):
            if not isinstance(test.get(name), str):
                raise BadTestsError(f"test {number} has no text `{name}`")
        if test.get("testtype") not in KINDS:
            raise BadTestsError(f"test {number} has no `testtype`, which is one of: {', '.join(KINDS)}")
        if test["testtype"] == "functional":
            _check_functional(number, test)


def _check_functional(number: int, test: Test) -> None:
    name = test.get("func_name")
    if not isinstance(name, str) or not name.isidentifier():
        raise BadTestsError(f"test {number} calls a function, and has no `func_name` that names one")
    for field, values in (("input", test["input"].split("\n") if test["input"] else []), ("output", [test["output"]])):
        for value in values:
            try:
                _json(value)
            except (ValueError, RecursionError) as error:
                raise BadTestsError(f"`{field}` of test {number} is no JSON value, or not one per line") from error


def right_output(printed: str, expected: str) -> bool:
    """Whether what a program has printed is what a `stdin` test expects: the same lines without the white space around each and
    around all, or where a line differs, the same numbers (`1.50` for `1.5`; no tolerance)."""
    ours, theirs = _lines(printed), _lines(expected)
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def right_result(returned: str, expected: str) -> bool:
    """Whether a JSON text is the value that a `functional` test expects; a tuple is a list in JSON."""
    try:
        return bool(_json(returned) == _json(expected))
    except (ValueError, RecursionError):
        return False


def _json(text: str) -> Any:
    # An int may have 4,300 digits only; a Decimal is equal to the same numbers.
    return json.loads(text, parse_int=Decimal)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_numbers(ours: str, theirs: str) -> bool:
    a, b = ours.split(), theirs.split()
    try:
        return [Decimal(x) for x in a] == [Decimal(y) for y in b]
    except InvalidOperation:  # a word, or a signalling NaN
        return False
