"""Problems in other formats than JSONL that cannot be used, and bad command lines of `data prepare`."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

from tests.bad_input.cases import Case, Spoil, folder, write
from tests.data_files import write_arrow_stream, write_csv, write_json, write_jsonl, write_parquet
from tic_megatron.cli import main

GOOD = {"problem": "1+1=", "answer": "2"}
TYPED = {"parquet": write_parquet, "arrow": write_arrow_stream, "json": write_json}


def _rows(name: str, rows: list[dict]) -> Spoil:
    """Write rows there in the format of the name's ending."""
    form = name.rpartition(".")[2]
    writers = {**TYPED, "csv": write_csv, "tsv": write_csv, "jsonl": write_jsonl}
    return lambda workspace: writers[form](workspace.root / name, rows)


def good_rows(name: str) -> Spoil:
    """Forty that a run can use."""
    return _rows(name, [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(40)])


def prepared(workspace) -> None:
    """Prepare the training problems into a folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["data", "prepare", f"--sources={workspace.root / 'train.jsonl'}", f"--out={workspace.root / 'set'}"]) == 0


def _cut(name: str, rows: list[dict], keep: float) -> Spoil:
    def spoil(workspace) -> None:
        _rows(name, rows)(workspace)
        content = (workspace.root / name).read_bytes()
        (workspace.root / name).write_bytes(content[: int(len(content) * keep)])

    return spoil


# Third rows of four, of values that all of these formats can have.
BAD_ROWS = {
    "no answer": ({"problem": "x", "answer": None}, ["'answer' is null"]),
    "an empty answer": ({"problem": "x", "answer": ""}, ["'answer' is empty"]),
    "a blank problem": ({"problem": " \n", "answer": "2"}, ["'problem' is empty"]),
    "no problem": ({"problem": None, "answer": "2"}, ["'problem' is null"]),
}
# Whole columns.
BAD_COLUMNS = {
    "answers that are lists": ({"problem": "x", "answer": ["2"]}, ["'answer' is", "text or a number"]),
    "answers that are truth values": ({"problem": "x", "answer": True}, ["'answer' is true"]),
    "answers that are objects": ({"problem": "x", "answer": {"value": "2"}}, ["'answer' is"]),
    "problems that are numbers": ({"problem": 11, "answer": "2"}, ["'problem' is 11"]),
    "messages without content": ({"problem": [{"role": "user"}], "answer": "2"}, ["chat messages"]),
    "an answered problem": ({"problem": [{"role": "assistant", "content": "x"}], "answer": "2"}, ["assistant"]),
    "other fields": ({"question": "x", "label": "2"}, ["no field 'problem'", "'question'", "data.prompt_field"]),
    "no answers": ({"problem": "x", "solution": "2"}, ["no field 'answer'", "'solution'", "data.answer_field"]),
}
JSON_FILES = {
    "empty": (b"", ["malformed JSON"]),
    "cut off": (b'[{"problem": "x",\n "answer": ', ["malformed JSON", "line 2"]),
    "rows in lines": (b'{"problem": "x", "answer": "2"}\n' * 2, ["malformed JSON", "line 2"]),
    "one row": (json.dumps(GOOD).encode(), ["list of rows", ".jsonl"]),
    "no rows": (b"[]", ["no problems"]),
    "data that is text": (b'{"data": "x"}', ["list of rows"]),
    "a row that is text": (b'[{"problem": "x", "answer": "2"}, "x"]', ["row 2", "JSON object"]),
    "not a number": (b'[{"problem": "x", "answer": NaN}]', ["NaN"]),
    "a field twice": (b'[{"problem": "x", "answer": "2", "answer": "3"}]', ["'answer'", "twice"]),
    "half a character": (b'[{"problem": "x\\ud800", "answer": "2"}]', ["row 1", "surrogate"]),
    "Latin-1": ('[{"problem": "groß", "answer": "2"}]'.encode("latin-1"), ["UTF-8"]),
    "deep nesting": (b"[" * 100_000, ["nest"]),
    "a long number": (b'[{"problem": "x", "answer": ' + b"9" * 5000 + b"}]", ["digits"]),
}
CSV_FILES = {
    "empty": (b"", ["no problems"]),
    "a header only": (b"problem,answer\n", ["no problems"]),
    "no header": (b"1+1=,2\n1+2=,3\n", [".csv:2", "no field 'problem'"]),
    "a name twice": (b"problem,answer,answer\nx,2,3\n", [".csv:1", "'answer'", "twice"]),
    "a value too few": (b"problem,answer\nx,1\ny\n", [".csv:3", "1 values for the 2 fields"]),
    "a value too many": (b"problem,answer\nx,1\nf(1,2),3\n", [".csv:3", "3 values for the 2 fields"]),
    "an open quote": (b'problem,answer\nx,1\n"y,2\nz,3\n', [".csv:3", "malformed CSV"]),
    "text after a quote": (b'problem,answer\n"x"y,1\n', [".csv:2", "malformed CSV"]),
    "an empty answer": (b"problem,answer\nx,1\ny,\n", [".csv:3", "'answer' is empty"]),
    "Latin-1": ("problem,answer\nx,1\ngroß,2\n".encode("latin-1"), [".csv:", "UTF-8"]),
    "UTF-16": ("problem,answer\nx,1\n".encode("utf-16"), [".csv:", "UTF-8"]),
    "semicolons": (b"problem;answer\nx;1\n", [".csv:2", "no field 'problem'"]),
}


def formats() -> list[Case]:
    """Given as training problems, every third as held-out ones."""
    cases = []

    def add(name: str, file: str, spoil: Spoil, words: list[str]) -> None:
        setting = "data.eval" if len(cases) % 3 == 0 else "data.train"
        cases.append(Case(f"{file}: {name}", (re.split("[/:]", file)[0], *words), spoil=spoil, flags=(f"--{setting}={file}",)))

    for form in TYPED:
        for name, (row, words) in BAD_ROWS.items():
            add(name, f"p.{form}", _rows(f"p.{form}", [GOOD, GOOD, row, GOOD]), [f"p.{form}: row 3", *words])
        for name, (row, words) in BAD_COLUMNS.items():
            add(name, f"p.{form}", _rows(f"p.{form}", [row] * 2), [f"p.{form}: row 1", *words])
    for form in ("parquet", "arrow"):
        for name, value in (("not a number", float("nan")), ("infinity", float("inf"))):
            rows = [{"problem": "x", "answer": 1.0}, {"problem": "x", "answer": value}]
            add(name, f"p.{form}", _rows(f"p.{form}", rows), ["row 2", "'answer'"])
        add("bytes", f"p.{form}", _rows(f"p.{form}", [{"problem": b"x", "answer": "1"}]), ["row 1", "'problem'"])
        add("empty", f"p.{form}", write(f"p.{form}", b""), ["Parquet" if form == "parquet" else "Arrow"])
        add("text", f"p.{form}", write(f"p.{form}", json.dumps(GOOD)), ["Parquet" if form == "parquet" else "Arrow"])
        for name, unit in (("a time", "us"), ("a day", "day")):
            add(f"{name} beyond the calendar", f"p.{form}", _time(f"p.{form}", unit), ["row 2", "'when'"])
        add("no rows", f"p.{form}", _no_rows(f"p.{form}"), ["no problems"])
        for keep in (0.3, 0.6, 0.95):
            words = ["intact" if form == "parquet" else "cannot be read"]
            add(f"cut at {keep}", f"p.{form}", _cut(f"p.{form}", [GOOD] * 500, keep), words)
    for file, cases_of in (("p.json", JSON_FILES), ("p.csv", CSV_FILES)):
        for name, (content, words) in cases_of.items():
            add(name, file, write(file, content), words)
    add("an empty folder", "set", folder("set"), ["folder without any"])
    add("a folder of other files", "set", write("set/README.md", "x"), ["folder without any"])
    add("a folder of several formats", "set", _several_formats, ["several formats"])
    add("a folder of several splits", "set", _several_splits, ["the splits test, train", "set:train"])
    add("an unknown split", "set:dev", _several_splits, ["no split 'dev'"])
    add("a folder with a bad shard", "set", _bad_shard, ["train-00001-of-00002.parquet: row 1", "'answer' is null"])
    add("a damaged saved set", "set", write("set/state.json", "{}"), ["saved to disk"])
    add("a saved set without splits", "set", write("set/dataset_dict.json", "{}"), ["no data set"])
    add("a split of a file", "train.jsonl:train", folder("x"), ["no split 'train'"])
    add("a hub name", "nobody/nothing", folder("x"), ["hub does not answer", "nobody/nothing"])
    add("a hub name with a split", "nobody/nothing:train", folder("x"), ["hub does not answer"])
    add("a path that looks like a hub name", "nobody/nothing.jsonl", folder("x"), ["No such file"])
    return cases


def _no_rows(name: str) -> Spoil:
    def spoil(workspace) -> None:
        import pyarrow

        _write_table(workspace.root / name, {name: pyarrow.array([], pyarrow.string()) for name in ("problem", "answer")})

    return spoil


def _time(name: str, unit: str) -> Spoil:
    """The second row has one that Python's dates cannot be."""

    def spoil(workspace) -> None:
        import pyarrow

        kind, value = (pyarrow.date32(), 2**31 - 1) if unit == "day" else (pyarrow.timestamp(unit), 2**62)
        _write_table(
            workspace.root / name, {"problem": ["1+1=", "1+2="], "answer": ["2", "3"], "when": pyarrow.array([0, value], kind)}
        )

    return spoil


def _write_table(path: Path, columns: dict) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)


def _several_formats(workspace) -> None:
    write_parquet(workspace.root / "set" / "a.parquet", [GOOD])
    write_jsonl(workspace.root / "set" / "b.jsonl", [GOOD])


def _several_splits(workspace) -> None:
    for split in ("train", "test"):
        write_parquet(workspace.root / "set" / f"{split}-00000-of-00001.parquet", [GOOD])


def _bad_shard(workspace) -> None:
    write_parquet(workspace.root / "set" / "train-00000-of-00002.parquet", [GOOD])
    write_parquet(workspace.root / "set" / "train-00001-of-00002.parquet", [{"problem": "x", "answer": None}])


PREPARE = {
    "nothing": (["--out=o"], ["sources is not given", "--recipe"]),
    "no folder to make": (["--sources=train.jsonl"], ["out is not given"]),
    "a folder that is there": (["--out=model"], ["model exists already"]),
    "a folder below a file": (["--out=train.jsonl/o"], ["train.jsonl", "is a file"]),
    "a folder of nobody": (["--out=~nobody-of-that-name/o"], ["out", "give another"]),
    "a folder with a long name": ([f"--out={'x' * 300}"], ["out", "give another"]),
    "no such recipe": (["--recipe=papper"], ["recipe is 'papper'", "paper"]),
    "no such setting": (["--source=train.jsonl"], ["unknown setting source", "did you mean sources"]),
    "a section's setting": (["--data.train=train.jsonl"], ["unknown setting data.train"]),
    "no file": (["--sources=missing.jsonl"], ["sources: missing.jsonl cannot be read"]),
    "no held-out file": (["--held_out=missing.jsonl"], ["held_out: missing.jsonl cannot be read"]),
    "the same name twice": (["--sources=train.jsonl,x/train.jsonl"], ["two sources are called 'train'", "first="]),
    "a template without a place": (["--template=Solve it."], ["template is 'Solve it.'", "{problem}"]),
    "a template with two places": (["--template={problem} {problem}"], ["template", "once"]),
    "one year": (["--years=1983"], ["years is [1983]"]),
    "years the wrong way round": (["--years=2022,1983"], ["years is [2022, 1983]"]),
    "years that are text": (["--years=a,b"], ["years", "expected"]),
    "a threshold of 0": (["--near_duplicate=0"], ["near_duplicate is 0"]),
    "a threshold above 1": (["--near_duplicate=1.5"], ["near_duplicate is 1.5"]),
    "no threshold": (["--near_duplicate=nan"], ["near_duplicate is 'nan'"]),
    "no limit": (["--max_prompt_tokens=0", "--model=model"], ["max_prompt_tokens is 0"]),
    "a limit without a tokenizer": (["--max_prompt_tokens=100"], ["max_prompt_tokens needs", "--model"]),
    "no such model": (["--model=missing"], ["missing"]),
    "no such policy": (["--conflicts=vote"], ["conflicts is 'vote'", "drop, first, refuse"]),
    "fields that no row has": (["--prompt_fields=text,body"], ["train.jsonl:1", "none of the fields text, body", "'problem'"]),
    "a hub dataset, offline": (["--sources=nobody/nothing"], ["sources", "hub does not answer"]),
    "the recipe, offline": (["--recipe=paper", "--sources="], ["hub does not answer", "give a file"]),
}
PREPARE_ROWS: dict[str, tuple[list[dict], list[str], list[str]]] = {
    "a bad row in the middle": ([GOOD, {"problem": "x", "answer": None}, GOOD], [], ["p.jsonl:2", "'answer' is null"]),
    "a later row without the field": ([GOOD, {"question": "x", "answer": "2"}], [], ["p.jsonl:2", "no field 'problem'"]),
    "several messages": (
        [{"problem": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}], "answer": "2"}],
        [],
        ["p.jsonl:1", "2 chat messages", "expected text"],
    ),
    "no year in some rows": ([{**GOOD, "year": 1990}, GOOD], ["--years=1983,2022"], ["years", "1 of 2 rows of p.jsonl"]),
    "no row of these years": ([{**GOOD, "year": 1990}], ["--years=2000,2022"], ["years", "no row of 2000 to 2022"]),
    "a year that is text": ([{**GOOD, "year": "MCMXC"}], ["--years=1983,2022"], ["p.jsonl:1", "year is 'MCMXC'"]),
    "answers that conflict": ([GOOD, {**GOOD, "answer": "3"}], ["--conflicts=refuse"], ["conflicts", "row 1", "row 2"]),
    "instructions only": (
        [{"problem": "Solve the following math problem step by step. The last line of your response should be of the form "
          'Answer: $Answer.\n\nRemember to put your answer on its own line after "Answer:".', "answer": "2"}],
        [],
        ["p.jsonl:1", "instructions only"],
    ),
}  # fmt: skip


def prepare() -> list[Case]:
    """Command lines of `data prepare`; what was given first is overruled by the case."""
    base = ("data", "prepare", "--out=o", "--sources=train.jsonl")
    cases = [Case(name, tuple(words), argv=(*_without(base, flags), *flags)) for name, (flags, words) in PREPARE.items()]
    for name, (rows, flags, words) in PREPARE_ROWS.items():
        cases.append(Case(name, tuple(words), spoil=_rows("p.jsonl", rows), argv=(*base, "--sources=p.jsonl", *flags)))
    rows = [GOOD, {"problem": "x", "answer": ""}]
    cases.append(
        Case("a bad held-out row", ("h.parquet: row 2",), spoil=_rows("h.parquet", rows), argv=(*base, "--held_out=h.parquet"))
    )
    return cases


def _without(base: tuple[str, ...], flags: list[str]) -> tuple[str, ...]:
    left_out = {"--out=o": "--sources=train.jsonl", "--sources=train.jsonl": "--out=o"}.get(flags[0]) if len(flags) == 1 else None
    return tuple(word for word in base if word != left_out)


def all_cases() -> dict[str, list[Case]]:
    return {"format": formats(), "data prepare": prepare()}
