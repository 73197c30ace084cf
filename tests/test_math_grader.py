"""What counts as the right answer to a mathematical problem."""

from __future__ import annotations

import time

import pytest

from tic_megatron.rewards import grade_math
from tic_megatron.rewards.math_answers import final_answer

RIGHT = [
    # the forms
    (r"\boxed{46}", "46"),
    (r"Adding, $12+34=\boxed{46}$.", "46"),
    ("Answer: 46", "46"),
    ("answer = 46", "46"),
    ("**Answer:** 46", "46"),
    ("**Answer: 46**", "46"),
    ("Answer:\n46", "46"),
    ("### Final Answer\nThe answer is: $46$.", "46"),
    ("The final answer is 46. I hope it is correct.", "46"),
    ("The answer to the question is 46.", "46"),
    (r"Answer: $\boxed{46}$", "46"),
    ("46", "46"),
    (" 46 \n\n", "46"),
    ("12+34=46", "46"),
    ("x = 46", "46"),
    ("First 12, then 34.\nSo there are 46 apples.", "46"),
    ("so in the end we get $n = 46$ as claimed", "46"),
    (r"\[ \boxed{46} \]", "46"),
    # the last box counts; reasoning does not
    (r"\boxed{7} was wrong, so \boxed{46}", "46"),
    (r"<think>maybe \boxed{7}</think> Answer: 46", "46"),
    (r"\boxed{46}. We check that the answer is an integer.", "46"),
    (r"\boxed{46} and again \boxed{", "46"),
    # numbers
    (r"\boxed{046}", "46"),
    (r"\boxed{46}", "046"),
    (r"\boxed{46.0}", "46"),
    (r"\boxed{10,080}", r"10,\!080"),
    (r"\boxed{10080}", "10,080"),
    (r"\boxed{-7}", "-7"),
    (r"\boxed{0.5}", r"\frac{1}{2}"),
    (r"\boxed{\frac12}", "1/2"),
    (r"\boxed{46 \pmod{100}}", "46"),
    (r"\boxed{5}", r"5 \pmod 7"),
    (r"\boxed{\dfrac{2}{4}}", r"\frac{1}{2}"),
    (r"\boxed{.35625}", "0.35625"),
    (r"\boxed{0.0000003}", r"3 \times 10^{-7}"),
    (r"\boxed{k = 0.000000000931323}", r"\frac{1}{2^{30}}"),
    (r"\boxed{\$36}", "36"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{90}", r"90^\circ"),
    (r"\boxed{137.5}", r"137 \frac{1}{2}"),
    ("Answer: 46 apples", "46"),
    ("Answer: 46, because 12+34=46", "46"),
    (r"\boxed{80}", "080 or 081 (both were accepted)"),
    (r"\boxed{081}", "080 or 081 (both were accepted)"),
    # expressions
    (r"\boxed{3\sqrt{13}}", r"\sqrt{117}"),
    (r"Answer: 3\sqrt{13}", r"3\sqrt{13}"),
    (r"\boxed{(b+2)(a+5)}", "(a+5)(b+2)"),
    (r"\boxed{2+2k}", "2k+2"),
    (r"\boxed{9i + 6}", "6+9i"),
    (r"\boxed{x=5}", "5"),
    (r"\boxed{f(x) = 5}", "5"),
    (r"\boxed{5}", "x=5"),
    (r"\boxed{y = 3 + 2x}", "y = 2x + 3"),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"(3,\pi/2)"),
    (r"\boxed{1, -2}", "-2,1"),
    (r"\boxed{1} and \boxed{-2}", "-2,1"),
    (r"\boxed{\{-2, 1\}}", "1,-2"),
    (r"\boxed{(2, 12) \cup (12, 102)}", r"(2,12) \cup (12,102)"),
    (r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}"),
    (r"\boxed{52_8}", "52_{8}"),
    (r"\boxed{52}", "52_8"),
    (r"\boxed{a:b:c = 2:4:6}", "1:2:3"),
    ("The sum is \N{MINUS SIGN}46.", "-46"),
    # words
    (r"\boxed{\text{Evelyn}}", "Evelyn"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}"),
    ("Answer: even", r"\text{even}"),
    (r"\boxed{C}", r"\text{(C)}"),
    ("east", r"\text{east}"),
]

WRONG = [
    ("", "46"),
    ("   \n", "46"),
    (r"\boxed{}", "46"),
    (r"\boxed{47}", "46"),
    (r"\boxed{-46}", "46"),
    (r"\boxed{4 6 7}", "46"),
    ("Answer: 45", "46"),
    ("45", "46"),
    ("12+34=45", "46"),
    ("46=45", "46"),
    ("x=45, y=46", "46"),
    ("45, x=46", "46"),
    ("x<=46", "46"),
    (r"x \neq 46", "46"),
    ("I do not know", "46"),
    # several answers are not one answer
    (r"\boxed{46, 47}", "46"),
    (r"\boxed{46} or \boxed{47}", "46"),
    ("Answer: 46 or 47", "46"),
    ("Answer: 46 or 47", "47"),
    ("Answer: 46, 47", "47"),
    (r"\boxed{45 \pm 1}", "46"),
    (r"\boxed{80 or 81}", "080 or 082"),
    # the last one counts
    (r"\boxed{46} was wrong, so \boxed{47}", "46"),
    (r"<think>\boxed{46}</think>\boxed{47}", "46"),
    (r"\boxed{47}, though 46 looked right", "46"),
    (r"It is 46. \boxed{47}", "46"),
    ("46 is wrong, the answer is 47", "46"),
    # near misses
    (r"\boxed{1.5}", r"\frac{1}{2}"),
    (r"\boxed{\frac{2}{1}}", r"\frac{1}{2}"),
    (r"\boxed{0.33}", r"\frac{1}{3}"),
    (r"\boxed{0.0}", r"\frac{1}{2^{30}}"),
    (r"\boxed{k = 0.0}", r"6.6 \times 10^{-34}"),
    (r"\boxed{0.0000002}", r"3 \times 10^{-7}"),
    (r"\boxed{3\sqrt{13}}", r"-3\sqrt{13}"),
    (r"\boxed{6 - 9i}", "6+9i"),
    (r"\boxed{2k-2}", "2k+2"),
    (r"\boxed{[3,4]}", "(3,4]"),
    (r"\boxed{(1,-2)}", "(-2,1)"),
    (r"\boxed{52_7}", "52_8"),
    (r"\boxed{y = 2x - 3}", "y = 2x + 3"),
    (r"\boxed{1:3:2}", "1:2:3"),
    ("The sum is \N{MINUS SIGN}46.", "46"),
    (r"\boxed{B}", r"\text{(C)}"),
    (r"\boxed{odd}", r"\text{even}"),
    (r"\boxed{x}", "46"),
    (r"\boxed{46x}", "46"),
    (r"\boxed{5 million}", "5"),
    (r"\boxed{146 \pmod{100}}", "46"),
    (r"\boxed{5 \pmod 8}", r"5 \pmod 7"),
    # rubbish
    ("x" * 10_000, "46"),
    ("9" * 10_000, "46"),
    ("$" * 10_000, "46"),
    (r"\boxed{" * 2_000, "46"),
    ("{" * 10_000, "46"),
    ("answer " * 1_500, "46"),
    ("\x00\ud800\ufffd" * 3_000, "46"),
    (r"\boxed{" + "9" * 5_000 + "}", "46"),
    (r"\boxed{\frac{1}{0}}", "46"),
    (r"\boxed{\begin{pmatrix} 46}", "46"),
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right_answers(response: str, answer: str) -> None:
    assert grade_math(response, answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), WRONG, ids=lambda value: repr(value[:40]))
def test_wrong_answers(response: str, answer: str) -> None:
    start = time.perf_counter()
    assert grade_math(response, answer) == 0.0
    assert time.perf_counter() - start < 5


def test_final_answer_forms_in_order() -> None:
    assert final_answer(r"Answer: 3. \boxed{4} 5") == "4"
    assert final_answer("Answer: 3\nthat was it: 5") == "3"
    assert final_answer("it is 3\nor rather 5") == "5"
    assert final_answer("no number here") is None
    assert final_answer(r"\boxed{\text{a \} brace}}") == r"\text{a \} brace}"
