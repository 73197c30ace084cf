"""`tic-megatron data prepare`: real AIME and MATH-500 where they are at hand, DAPO-Math-17K's published forms, planted cases."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data_files import DAPO_HEAD, DAPO_TAIL, WRITERS, dapo_jsonl_row, dapo_row, write_jsonl, write_parquet
from tests.models import make_tokenizer
from tests.workspace import refusal
from tic_megatron.cli import main
from tic_megatron.config import DataSettings
from tic_megatron.data.overlap import HeldOutIndex, HeldOutProblem
from tic_megatron.data.problem_text import TEMPLATES, answer_key, answer_kind, exact_key, similarity, strip_template, word_grams
from tic_megatron.data.prompts import read_problems

COMMAND = str(Path(sys.executable).with_name("tic-megatron"))
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not (REAL / "math500.jsonl").exists(), reason="needs the shared problem sets")
PROBLEMS = [
    (f"Find the number of ways to seat {n} guests at a round table with {n + 3} chairs.", str(n * n)) for n in range(1, 9)
]


def prepare(out: Path, *words: object) -> dict:
    """Run it; the manifest."""
    assert main(["data", "prepare", f"--out={out}", *map(str, words)]) == 0
    return json.loads((out / "manifest.json").read_text())


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]


def bare(row: dict) -> str:
    """Without the template, taken off here by its published text."""
    assert row["problem"].startswith(DAPO_HEAD) and row["problem"].endswith(DAPO_TAIL)
    return row["problem"].removeprefix(DAPO_HEAD).removesuffix(DAPO_TAIL)


# Real sets ------------------------------------------------------------------------------------------------------------------


@needs_real
def test_the_paper_recipe_on_the_real_aime_file(tmp_path, capsys):
    """890 problems of 1983-2022; MATH-500 has nine of them, five in the same words, four edited. AIME 2024 and 2025 have none."""
    held_out = ",".join(f"{name}={REAL / file}.jsonl" for name, file in HELD_OUT.items())
    manifest = prepare(
        tmp_path / "out", "--recipe=paper", f"--sources=aime={REAL}/aime_1983_2024.jsonl", f"--held_out={held_out}"
    )
    (source,) = manifest["sources"]
    assert (source["rows"], source["other_years"], source["distinct"], source["kept"]) == (933, 43, 890, 881)
    removed = {each["source_id"]: (each["held_out_set"], each["exact"]) for each in manifest["overlaps"]}
    same = {"1983-2", "2001-II-3", "2010-I-6", "2015-II-6", "2017-II-7"}
    edited = {"2016-I-10", "2002-I-12", "2006-II-5", "1995-9"}
    assert removed == {year: ("math500", year in same) for year in same | edited}
    original = {row["id"]: row for row in map(json.loads, (REAL / "aime_1983_2024.jsonl").read_text().splitlines())}
    rows = rows_of(tmp_path / "out")
    assert {row["source_id"] for row in rows} == {i for i, row in original.items() if row["year"] <= 2022} - same - edited
    for row in rows:
        source = original[row["source_id"]]
        assert (bare(row), row["answer"], row["year"]) == (source["problem"].strip(), source["answer"], source["year"])
    report = capsys.readouterr().out
    assert "`080 or 081 (both were accepted)`" in report and "| 881 |" in report


HELD_OUT = {"aime24": "aime2024", "aime25": "aime2025", "math500": "math500"}


@needs_real
def test_other_editions_of_aime_2024_are_found_and_nothing_else(tmp_path):
    """The years after 2022 hold 14 of AIME 2024's problems, in another edition's LaTeX, and no other held-out problem."""
    manifest = prepare(
        *(tmp_path / "out", "--years=2023,2024", f"--sources=aime={REAL}/aime_1983_2024.jsonl"),
        f"--held_out=aime24={REAL}/aime2024.jsonl,aime25={REAL}/aime2025.jsonl,math500={REAL}/math500.jsonl",
    )
    found = {each["source_id"]: each["held_out_set"] for each in manifest["overlaps"]}
    assert found == {f"2024-II-{n}": "aime24" for n in range(1, 16) if n != 9}  # which that file does not have
    for each in manifest["overlaps"]:
        assert int(each["answer"]) == int(each["held_out_answer"])


@needs_real
def test_the_evaluation_sets_have_no_false_pairs():
    """All pairs between AIME 2025 and MATH-500, and within each, are different problems; three within MATH-500 look alike."""
    sets = {
        name: [json.loads(line) for line in (REAL / f"{name}.jsonl").read_text().splitlines()] for name in ("aime2025", "math500")
    }
    index = HeldOutIndex([HeldOutProblem("m", row["id"], row["problem"], "") for row in sets["math500"]], 0.35)
    assert [row["id"] for row in sets["aime2025"] if index.find(row["problem"])] == []
    grams = [word_grams(row["problem"]) for row in sets["math500"]]
    pairs = [(a, b) for n, a in enumerate(grams) for b in grams[:n] if a & b]
    assert [p for p in pairs if similarity(len(p[0] & p[1]), len(p[0]), len(p[1])) >= 0.35] == []


# Joining --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["Parquet", "JSONL", "shards", "saved", "Arrow stream"])
def test_dapo_is_joined_and_each_problem_comes_once(tmp_path, form):
    """Repeated rows, other white space, an AIME problem that DAPO has too: all in one template, with where they came from."""
    name, write = WRITERS[form]
    make = dapo_jsonl_row if form == "JSONL" else dapo_row
    dapo = [make(*PROBLEMS[n]) for n in (0, 1, 0, 2, 1, 0)] + [make(PROBLEMS[3][0].replace(" ", "  ") + " ", PROBLEMS[3][1])]
    aime = [{"id": f"19{90 + n}-1", "year": 1990 + n, "problem": p, "answer": a} for n, (p, a) in enumerate(PROBLEMS[2:6])]
    manifest = prepare(
        *(tmp_path / "out", "--template=dapo", "--years=1990,1992"),
        f"--sources=dapo={write(tmp_path / name, dapo)},aime={write_jsonl(tmp_path / 'aime.jsonl', aime)}",
    )
    rows = rows_of(tmp_path / "out")
    assert [(bare(row).split(), row["answer"]) for row in rows] == [(p.split(), a) for p, a in PROBLEMS[:5]]
    assert [(row["source"], row["source_row"]) for row in rows[:3] + rows[4:]] == [
        ("dapo", 1), ("dapo", 2), ("dapo", 4 if form != "shards" else 1), ("aime", 3)
    ]  # fmt: skip
    assert (rows[4]["id"], rows[4]["source_id"], rows[4]["year"], rows[4]["source_file"]) == (
        "aime-3",
        "1992-1",
        1992,
        "aime.jsonl",
    )
    first, second = manifest["sources"]
    counted = [(s["rows"], s["other_years"], s["repeated"], s["elsewhere"], s["distinct"], s["kept"]) for s in (first, second)]
    assert counted == [(7, 0, 3, 0, 4, 4), (4, 1, 0, 2, 1, 1)]
    assert first["instructions_taken_off"] == 4


def test_the_output_trains_and_prepares_again(tmp_path):
    """It is a source like any other: as a training set, and as one to join, with the same bytes coming out."""
    prepare(
        tmp_path / "a", "--template=dapo", f"--sources=x={write_jsonl(tmp_path / 'x.jsonl', [problem(*p) for p in PROBLEMS])}"
    )
    problems = read_problems(tmp_path / "a", DataSettings())
    assert [(p.messages[0]["content"], p.answer) for p in problems] == [(f"{DAPO_HEAD}{q}{DAPO_TAIL}", a) for q, a in PROBLEMS]
    prepare(tmp_path / "b", "--template=none", f"--sources=x={tmp_path / 'a'}")
    assert [row["problem"] for row in rows_of(tmp_path / "b")] == [q for q, _ in PROBLEMS]
    prepare(tmp_path / "c", "--template=dapo", f"--sources=x={tmp_path / 'b'}")
    assert [row["problem"] for row in rows_of(tmp_path / "c")] == [row["problem"] for row in rows_of(tmp_path / "a")]


def problem(text: str, answer: str) -> dict:
    return {"problem": text, "answer": answer}


def test_checksums_are_those_of_the_files(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", [dapo_row(*p) for p in PROBLEMS])
    held = write_jsonl(tmp_path / "h.jsonl", [problem("Prove.", "1")])
    manifest = prepare(tmp_path / "out", f"--sources={file}", f"--held_out={held}")
    for recorded, path in (
        (manifest["sources"][0]["files"][0], file),
        (manifest["held_out"][0]["files"][0], held),
        (manifest["output"], tmp_path / "out" / "problems.jsonl"),
    ):
        content = path.read_bytes()
        assert recorded["sha256"] == hashlib.sha256(content).hexdigest() and recorded["bytes"] == len(content)
        assert recorded["name"] == path.name


def test_two_runs_give_the_same_bytes(tmp_path):
    draw = random.Random(0)
    rows = [dapo_row(q, draw.choice((a, a, a, "7"))) for q, a in draw.choices(PROBLEMS, k=60)]
    file, held = write_parquet(tmp_path / "x.parquet", rows), write_jsonl(tmp_path / "h.jsonl", [problem(*PROBLEMS[4])])
    files = []
    for n in range(2):
        words = ["data", "prepare", f"--sources=d={file}", f"--held_out={held}", "--template=dapo", f"--out={tmp_path / str(n)}"]
        environment = {**os.environ, "PYTHONHASHSEED": str(n)}  # sets and dicts of text may come in another order
        subprocess.run(
            [sys.executable, "-m", "tic_megatron", *words], check=True, capture_output=True, env=environment, timeout=120
        )
        files.append({path.name: path.read_bytes() for path in (tmp_path / str(n)).iterdir()})
    assert files[0] == files[1] and set(files[0]) == {"problems.jsonl", "manifest.json", "report.md"}


# Conflicts ------------------------------------------------------------------------------------------------------------------

CONFLICTING = [problem("Find $x$.", "1"), problem("Find y.", "5"), problem("Find $x$.", "2"), problem("Find  $x$", "01")]


def test_conflicting_answers_in_other_spelling_are_found(tmp_path):
    rows = [problem("Find $x$.", "1"), problem("find  \\(x\\)", "2")]
    manifest = prepare(tmp_path / "out", f"--sources={write_jsonl(tmp_path / 'x.jsonl', rows)}")
    assert manifest["output"]["rows"] == 0 and len(manifest["conflicts"]) == 1


@pytest.mark.parametrize(("policy", "answers"), {"drop": ["5"], "first": ["1", "5"]}.items())
def test_conflicting_answers_are_named_and_not_settled_in_silence(tmp_path, capsys, policy, answers):
    file = write_jsonl(tmp_path / "x.jsonl", CONFLICTING)
    manifest = prepare(tmp_path / "out", f"--sources={file}", f"--conflicts={policy}")
    assert [row["answer"] for row in rows_of(tmp_path / "out")] == answers
    (conflict,) = manifest["conflicts"]
    named = [(each["answer"], each["row"]) for each in conflict["answers"]]
    assert named == [("1", "x: x.jsonl, row 1"), ("2", "x: x.jsonl, row 3")]
    assert conflict["kept"] == (policy == "first") and manifest["sources"][0]["conflicting"] == 1
    report = capsys.readouterr().out
    assert "`2` (x: x.jsonl, row 3)" in report and report.count("x.jsonl, row 3") == 1


def test_conflicts_between_sources_can_be_refused(tmp_path, capsys):
    first = write_jsonl(tmp_path / "a.jsonl", CONFLICTING[:2])
    second = write_jsonl(tmp_path / "b.jsonl", CONFLICTING[2:])
    line = refusal(capsys, ["data", "prepare", f"--sources={first},{second}", "--conflicts=refuse", f"--out={tmp_path / 'out'}"])
    assert "a: a.jsonl, row 1" in line and "b: b.jsonl, row 1" in line and "'1'" in line and "'2'" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("034", "34", True), ("34.0", "34", True), ("$34$", " 34", True), ("1,000", "1000", True), ("+5", "5", True),
        ("\\dfrac{1}{2}", "\\frac{1}{2}", True), ("0", "000", True),
        ("-5", "5", False), ("1.5", "15", False), ("1,2", "12", False), ("a", "A", False), ("(1,2)", "(1, 3)", False),
    ],
)  # fmt: skip
def test_which_answers_are_the_same(one, other, equal):
    assert (answer_key(one) == answer_key(other)) == equal


def test_kinds_of_answers():
    kinds = {"34": "integer", "-007": "integer", "2.5": "decimal", "1/2": "fraction", r"\dfrac{1}{2}": "fraction"}
    kinds |= {
        r"\frac 59": "fraction",
        r"2\sqrt{3}": "expression",
        "x^2": "expression",
        "Friday": "text",
        "080 or 081": "expression",
    }
    assert {answer: answer_kind(answer) for answer in kinds} == kinds


# Overlap --------------------------------------------------------------------------------------------------------------------

HELD = (
    "Let $ABC$ be a triangle with $AB=13$, $BC=14$ and $CA=15$. The circle with diameter $\\overline{BC}$ meets line $AC$ again "
    "at $D$. The length of $BD$ can be written as $\\frac{m}{n}$, where $m$ and $n$ are relatively prime. Find $m+n$."
)
NEAR = {
    "the same": HELD,
    "other delimiters and spaces": HELD.replace("$ABC$", "\\( ABC \\)").replace(" ", "  "),
    "other LaTeX": HELD.replace("\\frac", "\\dfrac").replace("\\overline{BC}", "BC"),
    "in the template": f"{DAPO_HEAD}{HELD}{DAPO_TAIL}",
    "capitals": HELD.upper().replace("\\FRAC", "\\frac").replace("\\OVERLINE", "\\overline"),
    "a sentence more": HELD + " Express your answer as an integer between 0 and 999, and explain how you have found it.",
    "another question": HELD.partition("The length")[0] + "The length of $BD$ is what we look for. Find it.",
    "other words here and there": HELD.replace("meets", "intersects").replace("can be written", "may be expressed"),
    "a figure": HELD + " [asy] draw((0,0)--(1,1)); label((0,0), A); draw((0,0)--(1,1)); label((0,0), B); [/asy]",
    "one sentence less": HELD.replace(" Find $m+n$.", ""),
}
DIFFERENT = {
    "the usual ending": "A fair die is rolled until a six comes twice. The probability that this takes an even number of rolls "
    "can be written as $\\frac{m}{n}$, where $m$ and $n$ are relatively prime. Find $m+n$.",
    "the usual beginning": "Let $ABC$ be a triangle with $AB=13$, $BC=14$ and $CA=15$. Find the radius of its circumscribed "
    "circle and the sum of the squares of its medians, and give their product to the nearest integer.",
    "short, other numbers": "Compute $\\sin 60^\\circ$.",
    "of another field": "How many positive divisors does $10!$ have that are perfect squares but no perfect cubes?",
}
SHORT = "Compute $\\sin 45^\\circ$."


@pytest.mark.parametrize("name", NEAR)
def test_planted_overlaps_are_removed_and_named(tmp_path, capsys, name):
    rows = [problem(PROBLEMS[0][0], "1"), problem(NEAR[name], "9"), problem(PROBLEMS[1][0], "4")]
    held = write_jsonl(tmp_path / "h.jsonl", [{"id": "h7", **problem(HELD, "8")}, problem(SHORT, "1")])
    manifest = prepare(tmp_path / "out", f"--sources={write_jsonl(tmp_path / 'x.jsonl', rows)}", f"--held_out=bench={held}")
    assert [row["answer"] for row in rows_of(tmp_path / "out")] == ["1", "4"]
    (overlap,) = manifest["overlaps"]
    assert (overlap["id"], overlap["held_out_set"], overlap["held_out_id"], overlap["held_out_answer"]) == (
        "x-2",
        "bench",
        "h7",
        "8",
    )
    assert overlap["exact"] == (name in ("the same", "other delimiters and spaces", "in the template", "capitals"))
    assert "| `x-2` | bench: h7 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_problems_with_common_phrases_stay(name):
    index = HeldOutIndex([HeldOutProblem("b", "1", HELD, ""), HeldOutProblem("b", "2", SHORT, "")], 0.35)
    assert index.find(DIFFERENT[name]) is None


def test_the_threshold_is_a_setting(tmp_path):
    file, held = (
        write_jsonl(tmp_path / "x.jsonl", [problem(NEAR["another question"], "9"), problem(HELD, "1")]),
        tmp_path / "h.jsonl",
    )
    write_jsonl(held, [problem(HELD, "8")])
    for threshold, kept in ((0.1, 0), (0.35, 0), (0.9, 1), (1, 1)):
        manifest = prepare(tmp_path / str(threshold), f"--sources={file}", f"--held_out={held}", f"--near_duplicate={threshold}")
        assert manifest["output"]["rows"] == kept


def test_the_index_finds_what_comparing_all_pairs_finds():
    """Against a plain double loop, on random texts of few words, so that there are pairs of every similarity."""
    draw = random.Random(3)
    texts = [" ".join(draw.choices("abc", k=draw.randint(1, 40))) for _ in range(120)]
    held, rest = texts[:40], texts[40:] + [f"{text} {text[:20]}" for text in texts[:20]]
    index = HeldOutIndex([HeldOutProblem("h", str(n), text, "") for n, text in enumerate(held)], 0.35)
    hits = 0
    for text in rest:
        mine = word_grams(text)
        scores = []
        for other in map(word_grams, held):
            common, smaller = len(mine & other), min(len(mine), len(other))
            scores.append(max(common / len(mine | other), common / smaller / 2 if smaller >= 12 else 0))
        found = index.find(text)
        hits += found is not None
        if found is None:
            assert max(scores) < 0.35
        elif not found.exact:
            assert found.similarity == pytest.approx(max(scores)) and scores[int(found.held_out.id)] == max(scores)
    assert 10 < hits < len(rest) - 10


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Find $x^2$.", "find \\(x^2\\)", True), ("$\\frac12$", "$\\dfrac 12$", True), ("a\\,b", "ab", True),
        ("$x \\leq y$?", "$x\\le y$", True), ("\\left(x\\right)", "(x)", True),
        ("$x+1$", "$x-1$", False), ("$x^2$", "$x^3$", False), ("x_1", "x_2", False), ("\\leftarrow", "arrow", False),
        ("x²", "x2", False), ("$\\sin x$", "$\\cos x$", False),
    ],
)  # fmt: skip
def test_which_texts_are_the_same_problem(one, other, equal):
    assert (exact_key(one) == exact_key(other)) == equal


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_come_off_again(name):
    for text in ("x", "Find $y$.\n\nAnswer: no.", "{problem}"):
        assert strip_template(TEMPLATES[name].replace("{problem}", text)) == text
    assert strip_template("Q: x A:", "Q: {problem} A:") == "x" and strip_template("Q: x", "Q: {problem} A:") == "Q: x"


# Tokens, settings, faults ---------------------------------------------------------------------------------------------------


def test_long_prompts_are_left_out_by_the_tokens_that_training_counts(tmp_path, capsys):
    from tests.models import make_tiny_qwen3

    model = make_tiny_qwen3(tmp_path / "model", seed=0, tie_word_embeddings=True)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    rows = [problem("x " * n, str(n)) for n in (1, 5, 30, 60)]
    file = write_jsonl(tmp_path / "x.jsonl", rows)

    def tokens(text: str) -> int:
        message = {"role": "user", "content": TEMPLATES["boxed"].replace("{problem}", text.strip())}
        return len(tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False))

    lengths = [tokens(row["problem"]) for row in rows]
    manifest = prepare(
        *(tmp_path / "out", f"--sources={file}", "--template=boxed", f"--model={model}", f"--max_prompt_tokens={lengths[2]}")
    )
    assert [row["answer"] for row in rows_of(tmp_path / "out")] == ["1", "5", "30"]
    assert manifest["too_long"] == [{"id": "x-4", "tokens": lengths[3]}]
    report = capsys.readouterr().out
    assert f"longer than {lengths[2]} tokens: 1 (the longest has {lengths[3]})" in report
    assert f"| tokens of the prompt | {lengths[0]} |" in report and f"| {lengths[2]} |" in report


def test_print_config_fills_the_recipe_in_and_is_read_again(tmp_path, capsys):
    words = ["data", "prepare", "--recipe=paper", "--sources=dapo=d.parquet,aime=a.jsonl", "--print_config"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "- dapo=d.parquet" in printed and "template: dapo" in printed and "- 2022" in printed
    (tmp_path / "c.yaml").write_text(printed)
    assert main(["data", "prepare", f"--config={tmp_path}/c.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == printed


def test_help_lists_the_settings(capsys):
    assert main(["data", "prepare", "--help"]) == 0
    page = capsys.readouterr().out
    assert all(f"--{name} " in page for name in ("out", "recipe", "sources", "held_out", "near_duplicate", "max_prompt_tokens"))
    assert "[--setting VALUE ...]" in page
    assert main(["--help"]) == 0 and "data prepare" in capsys.readouterr().out


def test_the_command_in_a_fresh_process(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", [dapo_row(*p) for p in PROBLEMS])
    words = [COMMAND, "data", "prepare", f"--sources=dapo={file}", "--out=new/set"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith((tmp_path / "new" / "set" / "report.md").read_text()) and "new/set" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "x.parquet"]
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 2 and "exists already" in again.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(tmp_path, how):
    """In the middle of a source, which is a pipe that does not end."""
    (tmp_path / "work").mkdir()
    pipe = tmp_path / "x.jsonl"
    os.mkfifo(pipe)
    words = [COMMAND, "data", "prepare", f"--sources={pipe}", "--out=set"]
    process = subprocess.Popen(
        words,
        cwd=tmp_path / "work",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(how, signal.SIG_DFL) and None,  # noqa: PLW1509 - in the background of a shell it is ignored
    )
    with open(pipe, "wb") as stream:
        stream.write(b"".join(json.dumps(problem(f"{n}?", "1")).encode() + b"\n" for n in range(500)))
        stream.flush()
        wait_for(lambda: any((tmp_path / "work").glob(".set.unfinished/*")))
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "tic-megatron: interrupted\n")
    assert list((tmp_path / "work").iterdir()) == []


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("tic_megatron.data.prepare._manifest", full)
    file = write_jsonl(tmp_path / "x.jsonl", [problem("1+1", "2")])
    assert main(["data", "prepare", f"--sources={file}", f"--out={tmp_path / 'out'}"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_what_a_killed_run_has_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "scratch.jsonl").write_text("{")
    prepare(tmp_path / "out", f"--sources={write_jsonl(tmp_path / 'x.jsonl', [problem('1+1', '2')])}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.jsonl"]


def test_memory_grows_with_the_problems_and_not_with_the_rows(tmp_path):
    """Peak memory of the process, on 200 problems a few and many times. (1.8 million rows: benchmarks/data_prepare.py.)"""
    code = (
        "import sys; from tic_megatron.cli import main; code = main(sys.argv[1:]);"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]); sys.exit(code)"
    )
    peaks = []
    for repetitions in (5, 200):
        rows = [dapo_row(f"Problem {n}: " + "x" * 1500, str(n)) for n in range(200)] * repetitions
        file = write_parquet(tmp_path / f"{repetitions}.parquet", rows)
        words = ["data", "prepare", f"--sources={file}", f"--out={tmp_path / str(repetitions)}"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=200)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        assert len(rows_of(tmp_path / str(repetitions))) == 200
    assert peaks[1] - peaks[0] < 40, peaks  # MiB; the rows are 80
