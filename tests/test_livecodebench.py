"""Rows of LiveCodeBench: what they ask and test, and that what they hold is never run."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib

import pytest

from tic_megatron.config import SettingsError
from tic_megatron.rewards import livecodebench
from tic_megatron.rewards.code_tests import BadTestsError, read_tests, right_output, right_result
from tic_megatron.rewards.livecodebench import read_row

STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}, {"input": "5 5\n", "output": "10\n", "testtype": "stdin"}]
CALLS = [{"input": '[1, 2]\n"a"', "output": "[1]", "testtype": "functional"}]


def packed(value, protocol: int = pickle.DEFAULT_PROTOCOL) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


def row(**changes):
    fields = {"question_content": "Add.", "starter_code": "", "public_test_cases": json.dumps(STDIN[:1]), "metadata": "{}"}
    return {**fields, "private_test_cases": packed(json.dumps(STDIN[1:])), **changes}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_packed_row(protocol):
    tests = [*STDIN[1:], {"input": "ü\n" * 50_000, "output": "\\u00fc\n", "testtype": "stdin"}]
    problem = read_row(row(private_test_cases=packed(json.dumps(tests, ensure_ascii=False), protocol)), "x.jsonl:1")
    assert problem.tests == [STDIN[0], *tests]
    assert "Add." in problem.prompt and "standard input" in problem.prompt and "```python" in problem.prompt


def test_a_row_with_calls():
    starter = "class Solution:\n    def f(self, a, b):\n        "
    changes = {"starter_code": starter, "metadata": '{"func_name": "f"}', "private_test_cases": "[]"}
    prompt, tests = read_row(row(public_test_cases=json.dumps(CALLS), **changes), "x.jsonl:1")
    assert tests == [{**CALLS[0], "func_name": "f"}]
    assert "    def f(self, a, b):\n```" in prompt and "standard input" not in prompt


class Evil:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


BAD: dict[str, tuple[dict[str, str], str]] = {
    "no question": ({"question_content": None}, "question_content"),
    "public tests that are no JSON": ({"public_test_cases": "[{"}, "public_test_cases"),
    "public tests that are no list": ({"public_test_cases": "{}"}, "public_test_cases"),
    "no tests": ({"public_test_cases": "[]", "private_test_cases": ""}, "no tests"),
    "a test without output": ({"public_test_cases": '[{"input": "", "testtype": "stdin"}]'}, "`output`"),
    "a test of another kind": ({"public_test_cases": '[{"input": "", "output": "", "testtype": "x"}]'}, "`testtype`"),
    "calls of nothing": ({"public_test_cases": json.dumps(CALLS)}, "`func_name`"),
    "metadata": ({"metadata": "{"}, "metadata"),
    "no base64": ({"private_test_cases": "no base64!"}, "private_test_cases"),
    "no zlib": ({"private_test_cases": base64.b64encode(b"nothing").decode()}, "private_test_cases"),
    "cut off": ({"private_test_cases": base64.b64encode(zlib.compress(os.urandom(1000))[:500]).decode()}, "end is missing"),
    "no pickle": ({"private_test_cases": base64.b64encode(zlib.compress(b"nothing")).decode()}, "not just a text"),
    "an evil pickle": ({"private_test_cases": packed(Evil())}, "not just a text"),
    "two texts": ({"private_test_cases": packed(["[]", "[]"])}, "not just a text"),
    "a number": ({"private_test_cases": packed(3)}, "not just a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, word = BAD[case]
    with pytest.raises(SettingsError, match=r"^x\.jsonl:7: field ") as refusal:
        read_row(row(**changes), "x.jsonl:7")
    assert word in str(refusal.value)
    assert not (tmp_path / "it_ran").exists()


def test_a_bomb(monkeypatch):
    monkeypatch.setattr(livecodebench, "LARGEST_TESTS_BYTES", 1 << 20)
    bomb = base64.b64encode(zlib.compress(b"\0" * (64 << 20))).decode()
    with pytest.raises(SettingsError, match="more than 1 MiB"):
        read_row(row(private_test_cases=bomb), "x.jsonl:1")


RIGHT = [
    *[("3\n", "3"), ("  3 \n\n", "3\n"), ("a b\nc ", " a b\nc"), ("1.50 2", "1.5 2.0"), ("1e3", "1000"), ("", ""), ("\n", "")],
    *[("50000000000000001", "50000000000000001.0"), ("-0", "0"), ("a\r\nb", "a\nb")],
]
WRONG = [
    *[("", "3"), ("3\n4", "3"), ("3", "3\n4"), ("3 4", "3\n4"), ("50000000000000000", "50000000000000001"), ("yes", "YES")],
    *[("nan", "1"), ("sNaN", "1"), ("0.333", "0.3333"), ("a  b", "a b"), ("1" * 5000, "2"), ("1 x", "1.0 x"), ("\0003", "3")],
]


@pytest.mark.parametrize(("printed", "expected"), RIGHT)
def test_right_outputs(printed, expected):
    assert right_output(printed, expected)


@pytest.mark.parametrize(("printed", "expected"), WRONG)
def test_wrong_outputs(printed, expected):
    assert not right_output(printed, expected)


@pytest.mark.parametrize(
    ("returned", "expected", "right"),
    [
        *[
            ("[1, 2]", "[1,2]", True),
            ("1.0", "1", True),
            ("null", "null", True),
            ('"a"', '"a"', True),
            ('{"a": [1]}', '{"a":[1]}', True),
        ],
        *[
            ("", "null", False),
            ("NaN", "NaN", False),
            ("[1] [1]", "[1]", False),
            ("[" * 99999, "1", False),
            ("1" * 9999, "1", False),
        ],
        *[("[" + "7" * 5000 + "]", "[" + "7" * 5000 + "]", True), ("7" * 5000, "7" * 4999 + "8", False), ("true", "1.0", True)],
        *[("[2, 1]", "[1,2]", False), ('"1"', "1", False), ("0.1", "0.10000000001", False)],
    ],
)
def test_results(returned, expected, right):
    assert right_result(returned, expected) is right


@pytest.mark.parametrize(
    "text",
    ["", "3", "[]", "{}", '["a"]', "[" * 99999, '[{"input": "1", "output": "{", "testtype": "functional", "func_name": "f"}]'],
)
def test_what_is_no_tests(text):
    with pytest.raises(BadTestsError):
        read_tests(text)
