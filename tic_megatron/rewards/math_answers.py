"""Finding the final answer in a response: plain text in, the answer's text out. No library, no evaluation.

A response states its answer in one of four forms; the first that is present decides, so a response cannot state several
answers in several forms and have the best one counted:

    \\boxed{46}        the last box that is closed
    Answer: 46        the last line that begins so (`**Final answer:**`, `### Answer`), or the line after it
    the answer is 46  the last such phrase, also `answer = 46` and `answer: 46` within a line
    46                the last line: whole when it is only an expression, else its last formula or number

A line is read to its end, and a display (`$$`, `\\[`) on it to where it closes, lines later. Prose is passed over while something
better is there: `Answer: Let us count them.`, `the answer is correct`. The answer is what a line opens with (`46, because ...`,
`$46$. Note ...`, `46 (mod 100)`), the end of a chain (`$12+34=46$ so $46$`), or what its sentence ends with (`The sum is 46.`).
Answers joined by commas, `and` or `or` are one list, `3/4 (or 0.75)` too: right only if each of them is.
"""

from __future__ import annotations

import re
from collections import deque

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"(?<!\\)[{}]")
_JOINT = re.compile(r"[\s$.,;*]*(?:\\text\{\s*)?(?:and|or)?(?:\s*\})?[\s$,;*]*")  # what may stand between joined boxes
_LONGEST_JOINT = 40
_LINE_MARKER = re.compile(
    r"^[ \t>*_`-]*(?:#+[ \t*_]*)?(?:(?:so|thus|hence|therefore|the|my|our|final|short|correct)[ \t,]+)*answer[ \t*_]*:[ \t*_]*"
    r"|^[ \t]*(?:#+[ \t*_]*|\*\*)(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t*_]*$",
    re.IGNORECASE | re.MULTILINE,
)
_MARKER = re.compile(r"\banswer\b(?:[ \t*_]*[:=][ \t*_]*|[^.:=\n$]{0,60}?\bis\b[ \t*_]*:?[ \t*_]*)", re.IGNORECASE)
_MOST_MARKERS = 50  # only so many of each kind are tried, from the end
# Each stops at the next delimiter of its kind: the time is linear, on thousands of them that are not closed too.
_DISPLAY = r"\$\$(?:[^$\\]|\\.)+\$\$|\\\[(?:[^\\]|\\[^\[\]])+\\\]"
_FORMULA = re.compile(rf"(?:{_DISPLAY})|(?<!\\)\$(?:[^$\\]|\\.)+\$|\\\((?:[^\\]|\\[^()])+\\\)", re.DOTALL)
_DISPLAYS = re.compile(rf"(?:{_DISPLAY})(?:\s*(?:or|and)\s*(?:{_DISPLAY}))*", re.DOTALL)
_LINE = re.compile(rf"(?:{_DISPLAYS.pattern}|[^\n])*", re.DOTALL)
_BEFORE_DISPLAY = re.compile(
    r"(?:[^\n\d$\\]*|[^\n]*\b(?:is|are|be|equals)[ :*]*)\n\s*(?=\$\$|\\\[)"
)  # "The value is", and the display below it

_NUMBER_PATTERN = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+"
_NUMBER = re.compile(rf"(?<![\w.])(?:{_NUMBER_PATTERN})(?:\s?\\?%)?")
# A number that a sentence goes on after ("46 apples", "46, because"), but not "46 or 47", "46 if ..." and "5 million".
_LEADING_NUMBER = re.compile(
    rf"(?:\\?\$ ?)?((?:[A-Za-z] ?= ?)?(?:{_NUMBER_PATTERN})(?:\s?\\?%)?)[*_]*(?=[,;:]?\s+"
    r"(?!(?:and|or|plus|minus|times|over|pi|squared|cubed|percent|thousand|million|billion"
    r"|to|if|unless|but|not|maybe|perhaps|possibly|alternatively)\b)[A-Za-z]{2})"
)
_OPENING = re.compile(
    r"(?:(?:therefore|thus|then|hence|so|simply|just|exactly|equal to|given by)[ ,:]+)*[*_` ]*(?:[-+]?\.?\d|[$\\([{|])",
    re.IGNORECASE,
)
_AT_THE_END = re.compile(
    rf"(?:\b(?:is|are|be|equals?)\b|[=:≈])[:\s*]*((?:{_NUMBER_PATTERN})|{_FORMULA.pattern})[\s.*_]*$", re.DOTALL
)
_CHAIN = re.compile(r"[\s,;:]*(?:so|thus|hence|therefore|giving|i\.e\.|that is|which is|is|equals|=)[\s,:]*")
_GOES_ON = re.compile(r"[\s,;]*(?:[,;=]|\b(?:or|and)\b)\s*(?:(?:maybe|perhaps|possibly)\s*)?[-+.]?\d")  # `$34$ or 35`, `$x$ = 34`
_SENTENCE_END = re.compile(r"\.\s")
_OR = re.compile(r"(?<!\s)\s*\(\s*or\s+([^()]*)\)")
_REMARK = re.compile(
    r"(?<=\S)\s+\((?:[≈=~]|\\approx|(?!(?:and|or|sin|cos|tan|log|ln|max|min)\b)[A-Za-z]{2,}(?=[\s.,:)]))[^()]*\)"
)
_ALTERNATIVES = re.compile(r"(-?\d+(?:\s+or\s+-?\d+)+)\s*(?:\(.*\))?")
_LATEX_WORDS = re.compile(r"\\(?:begin|end|text\w*|mbox|math\w+|operatorname)\s*\{[^{}]*\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_LONGEST_LINE = 2000
"""Only so much of a line's end is searched: a bound on the work, far beyond any real answer."""


def final_answer(response: str) -> str | None:
    """The text of the final answer that a response states, or None. Reasoning up to `</think>` is left out."""
    text = response.rpartition("</think>")[2].replace("\N{MINUS SIGN}", "-")
    boxed = _boxed(text)
    if boxed is not None:
        return boxed or None
    return _marked(text) or _plain(text) or None


def accepted_answers(answer: str) -> list[str]:
    """The answer, and the integers of `080 or 081 (both were accepted)`."""
    match = _ALTERNATIVES.fullmatch(answer.strip())
    return [answer, *re.split(r"\s+or\s+", match[1])] if match else [answer]


def _boxed(text: str) -> str | None:
    """Content of the last closed box, with the boxes that it is joined to; None when there is no closed box."""
    openings = [match.span() for match in _BOX.finditer(text)]
    if not openings:
        return None
    closing = _closing_braces(text)
    boxes = [
        (start, closing[inside - 1] + 1, text[inside : closing[inside - 1]])
        for start, inside in openings
        if inside - 1 in closing
    ]
    return _lists(boxes, text)[-1][2] if boxes else None


def _lists(parts: list[tuple[int, int, str]], text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of boxes or formulas in `text`, those joined by commas, `and` or `or` made one."""
    lists: list[tuple[int, int, list[str]]] = []
    for start, end, content in parts:
        before = lists[-1][1] if lists else -1
        if 0 <= before <= start <= before + _LONGEST_JOINT and _JOINT.fullmatch(text[before:start]):
            first, _, contents = lists.pop()
            contents += [content.strip()] if content.strip() not in contents else []
            lists.append((first, end, contents))
        else:
            lists.append((start, end, [content.strip()]))
    return [(start, end, ", ".join(contents)) for start, end, contents in lists]


def _closing_braces(text: str) -> dict[int, int]:
    """Index of each opening brace -> index of the brace that closes it; one pass, escaped braces left out."""
    closing: dict[int, int] = {}
    stack: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            stack.append(match.start())
        elif stack:
            closing[stack.pop()] = match.start()
    return closing


def _marked(text: str) -> str | None:
    """The answer that the last `Answer:` line states, or else the last `answer ... is`; prose only if there is nothing better."""
    lines = _claims(_LINE_MARKER, text)
    phrases = _claims(_MARKER, text)
    for claims, reads in ((lines, _reads_as_answer), (phrases, _OPENING.match), (lines, bool), (phrases, bool)):
        for claim in reversed(claims):
            if reads(claim):
                return _stated(claim)
    return None


def _claims(marker: re.Pattern[str], text: str) -> list[str]:
    """What follows each of the last markers: to the end of its line, and of the displays that this line opens."""
    claims = []
    for match in list(marker.finditer(text))[-_MOST_MARKERS:]:
        start = re.compile(r"\s*").match(text, match.end()).end()
        rest = text[start : start + _LONGEST_LINE]
        introduction = _BEFORE_DISPLAY.match(rest)
        end = introduction.end() if introduction else 0
        claims.append(_sentence(_REMARK.sub("", _OR.sub(r" or \1", rest[:end] + _LINE.match(rest, end)[0]))).strip())
    return claims


def _sentence(text: str) -> str:
    """Text to the end of its first sentence; full stops in formulas are no end."""
    formulas = [match.span() for match in _FORMULA.finditer(text)]
    for stop in _SENTENCE_END.finditer(text):
        if not any(start < stop.start() < end for start, end in formulas):
            return text[: stop.start()]
    return text


def _reads_as_answer(claim: str) -> bool:
    """Whether it opens or ends with mathematics, or has at most two words: "even", "I don't know", not "We first count them"."""
    if not claim:
        return False
    few_words = len(re.findall(r"[A-Za-z]{2,}", _LATEX_WORDS.sub("", claim))) <= 2
    return few_words or bool(_OPENING.match(claim) or _AT_THE_END.search(claim))


def _stated(claim: str) -> str:
    """The answer in what follows a marker."""
    number = _LEADING_NUMBER.match(claim.lstrip("* "))
    if number:
        return number[1]
    lists = _lists(_formulas(claim), claim)
    opening = claim[: lists[0][0]].strip("*_ \t\n") if lists else ""
    if not lists:
        at_the_end = _WORD.search(claim) and not _OPENING.match(claim) and _AT_THE_END.search(claim)
        return at_the_end[1] if at_the_end else _bare(claim)
    words = _WORD.search(_LATEX_WORDS.sub("", opening)) and not _OPENING.match(opening)
    if opening and not words and not re.search(r"([=:]|\bis)$", opening):
        return _bare(_undelimited(claim))  # one expression: `-$\frac{3}{4}$`, `34 or $35$`
    chosen = len(lists) - 1 if opening else 0
    while chosen + 1 < len(lists) and _CHAIN.fullmatch(claim[lists[chosen][1] : lists[chosen + 1][0]]):
        chosen += 1
    start, end, content = lists[chosen]
    return _bare(_undelimited(claim[start:])) if _GOES_ON.match(claim, end) else content


def _plain(text: str) -> str | None:
    """The last line, or in a sentence its last formula or number; a display that it closes counts from where it opens."""
    text = text.rstrip()
    line = text.rpartition("\n")[2][-_LONGEST_LINE:].strip()
    if line.rstrip(" .*").endswith(("$$", "\\]")):
        last = deque(_DISPLAYS.finditer(text), maxlen=1)
        if last and len(last[0][0]) <= _LONGEST_LINE and not text[last[0].end() :].strip(" .*"):
            line = last[0][0]
    lists = _lists(_formulas(line), line)
    if lists:
        return lists[-1][2]
    if not _WORD.search(_LATEX_WORDS.sub("", line)):
        return _bare(line)
    numbers = _NUMBER.findall(line)
    # One word alone may be the answer itself ("east"); a sentence is not.
    return numbers[-1] if numbers else (_bare(line) if " " not in line else None)


def _formulas(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each `$...$`, `$$...$$`, `\\(...\\)`, `\\[...\\]`."""
    return [(*match.span(), _undelimited(match[0])) for match in _FORMULA.finditer(text)]


def _undelimited(text: str) -> str:
    """Text without the marks that begin and end its formulas."""
    return _FORMULA.sub(lambda match: match[0].strip("$") if match[0].startswith("$") else match[0][2:-2], text).strip()


def _bare(text: str) -> str:
    """Text without the marks around it: dollar signs, emphasis, the full stop."""
    return text.strip().strip("*_`$ \t").rstrip(".").strip("*_`$ \t")
