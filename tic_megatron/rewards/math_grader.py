"""Grading of mathematical answers: text first, then integers, then the math-verify library (SymPy).

Nothing here has a time limit: SymPy can run for ever on hostile input (`9^{9^{9}}`), so in training this runs in the worker
processes of `tic_megatron.rewards.workers`, which kill it. math-verify's own limits use SIGALRM and work in a main thread only;
they are switched off.
"""

from __future__ import annotations

import logging
import math
import re
from functools import lru_cache

from tic_megatron.rewards.math_answers import accepted_answers, final_answer
from tic_megatron.rewards.registry import register_reward

_INTEGER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.0+)?")
_EQUATION = re.compile(r"[^=<>!,;]+=([^=]+)")
_MODULUS = re.compile(r"(?:\\pmod\s*(?:\{\d+\}|\d)|\(\s*\\?mod\s*\d+\s*\))\s*$")
_WITH_BASE = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")
_RATIO = re.compile(r"\d+(?::\d+){2,}")
_TINY = 1e-3
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[!,;:> ]|\\quad|\\qquad|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle|\s|~")


def _load_library() -> None:
    _library_equal("x+1", "1+x")


@register_reward("math", isolated=True, prepare=_load_library)
def grade_math(response: str, answer: str) -> float:
    """1.0 when the response's final answer equals the reference answer mathematically, otherwise 0.0.

    Accepted forms: `\\boxed{...}`, `Answer: ...`, `the answer is ...`, and a plain last line (see `math_answers`). Never raises:
    what cannot be read or compared is wrong. An answer like `080 or 081` accepts each alternative.

    Example: `grade_math("so \\\\boxed{\\\\frac{1}{2}}", "0.5") == 1.0`.
    """
    try:
        prediction = final_answer(response)
        if prediction is None:
            return 0.0
        return float(any(_equal(prediction, accepted) for accepted in accepted_answers(answer)))
    except Exception:  # a grader must not end a run: SymPy raises all kinds of errors on garbage
        logging.getLogger(__name__).debug("grading failed", exc_info=True)
        return 0.0


def _equal(prediction: str, answer: str) -> bool:
    if ("mod" in prediction) != ("mod" in answer):  # `34 (mod 100)` states 34; the moduli of both are compared
        prediction, answer = _MODULUS.sub("", prediction), _MODULUS.sub("", answer)
    predicted, expected = _normalized(prediction), _normalized(answer)
    if predicted == expected:
        return predicted != ""
    # `x = 46` and `12+34=46` state 46. The library reads them so too; this is quicker.
    equation = _EQUATION.fullmatch(predicted)
    stated = equation[1] if equation else predicted
    predicted_integer, expected_integer = _integer(stated), _integer(expected)
    if predicted_integer is not None and expected_integer is not None:
        return predicted_integer == expected_integer
    if len(prediction) > max(200, 4 * len(answer)):
        return False  # no true answer is that much longer; keeps garbage away from SymPy
    predicted_base, expected_base = _WITH_BASE.fullmatch(predicted), _WITH_BASE.fullmatch(expected)
    if predicted_base and expected_base:  # the library drops the base
        return predicted_base.groups() == expected_base.groups()
    if _RATIO.fullmatch(stated) and _RATIO.fullmatch(expected):  # the library divides: `1:2:3` would be `1:3:2`
        return _lowest_terms(stated) == _lowest_terms(expected)
    return _library_equal(prediction, answer)


def _normalized(text: str) -> str:
    """Text without what LaTeX writes for the eye only. Words lose their case, `(C)` its parentheses."""
    text = _TEXT.sub(r"\1", _SPACING.sub("", text.strip().strip("$"))).rstrip(".")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "").replace("{,}", ",")
    text = re.sub(r"\^(?:\\circ|\{\\circ\})|°", "", text)
    if re.fullmatch(r"\([A-Za-z]\)", text):
        text = text[1:-1]
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text


def _integer(text: str) -> int | None:
    """Value of a plain integer (`46`, `-7`, `046`, `10,080`, `46.0`), else None."""
    if not _INTEGER.fullmatch(text) or len(text) > 1000:
        return None
    return int(text.partition(".")[0].replace(",", ""))


def _lowest_terms(ratio: str) -> list[int]:
    parts = [int(part) for part in ratio.split(":")]
    return [part // max(1, math.gcd(*parts)) for part in parts]


def _library_equal(prediction: str, answer: str) -> bool:
    from math_verify import verify

    expected, predicted = _parsed(answer), _parsed(prediction)
    return bool(verify(expected, predicted, timeout_seconds=None)) and not _tiny_and_different(expected, predicted)


def _tiny_and_different(one: list, other: list) -> bool:
    """The library compares six decimals, by which all tiny numbers are 0; of these it is their digits that count."""
    try:
        a, b = (float(getattr(parsed[0], "rhs", parsed[0])) for parsed in (one, other))
    except (TypeError, ValueError, OverflowError):  # no numbers
        return False
    largest = max(abs(a), abs(b))
    return largest < _TINY and abs(a - b) > 1e-5 * largest


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list:
    """math-verify's reading of an expression: [SymPy expression, text]."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off: see above
    # Only as LaTeX: its other reading would pick the last number out of anything that is not mathematics.
    return parse(f"\\boxed{{{text}}}", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
