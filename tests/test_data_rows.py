"""Every format gives the same problems from the same rows, reads them one by one, and names the row that is of no use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pytest

from tests.data_files import FLAT, WRITERS, dapo_jsonl_row, dapo_row, write_csv, write_jsonl, write_parquet, write_shards
from tic_megatron.config import DataSettings, Settings, SettingsError
from tic_megatron.data.prompts import read_problems
from tic_megatron.data.rows import open_source, read_rows, sha256

ROWS = [
    {"id": "a", "problem": "What is 1+1?", "answer": "2"},
    {"id": "b", "problem": 'Quotes ", commas, tabs\tand\nlines; é 漢 \u2028 {}', "answer": "\\frac{1}{2}"},
    {"id": "c", "problem": " spaces ", "answer": "034"},
    {"id": "d", "problem": "x" * 5000, "answer": "-1"},
    {"id": "e", "problem": "NaN", "answer": "null"},
]
NESTED = DataSettings(prompt_field="prompt", answer_field="reward_model.ground_truth")


@pytest.mark.parametrize("form", WRITERS)
def test_all_formats_give_the_same_problems(tmp_path, form):
    name, write = WRITERS[form]
    problems = read_problems(write(tmp_path / name, ROWS), DataSettings(system_prompt="s"))
    assert [(p.id, p.messages[1]["content"], p.answer) for p in problems] == [(r["id"], r["problem"], r["answer"]) for r in ROWS]
    assert len({p.where for p in problems}) == len(ROWS)


@pytest.mark.parametrize("form", [form for form in WRITERS if form not in FLAT])
def test_nested_fields_messages_and_numbers_in_all_formats(tmp_path, form):
    name, write = WRITERS[form]
    rows = [{**dapo_row(f"{n}+1=", "x", str(n)), "number": n + 0.5} for n in range(4)]
    problems = read_problems(write(tmp_path / name, rows), NESTED)
    assert [p.messages for p in problems] == [tuple({k: m[k] for k in ("role", "content")} for m in r["prompt"]) for r in rows]
    data = DataSettings(prompt_field="prompt", answer_field="number")
    assert [p.answer for p in read_problems(write(tmp_path / f"again_{name}", rows), data)] == ["0.5", "1.5", "2.5", "3.5"]


def test_the_two_published_forms_of_dapo_give_the_same_problems(tmp_path):
    problems = [("Find $x$.", "34"), ("Find $y$ in\n\n\\[y^2=4\\]", "2")]
    first = read_problems(write_parquet(tmp_path / "a.parquet", [dapo_row(*p) for p in problems]), NESTED)
    data = DataSettings(prompt_field="prompt", answer_field="label")
    second = read_problems(write_jsonl(tmp_path / "a.jsonl", [dapo_jsonl_row(*p) for p in problems]), data)
    assert [(p.messages, p.answer) for p in first] == [(p.messages, p.answer) for p in second]


def test_a_long_field_is_one_in_every_format(tmp_path):
    """The tests of a program, which Python's CSV refuses by default."""
    rows = [{"problem": "x", "answer": "7" * 200_000}]
    for path in (
        write_csv(tmp_path / "r.csv", rows),
        write_csv(tmp_path / "r.tsv", rows),
        write_jsonl(tmp_path / "r.jsonl", rows),
    ):
        assert [problem.answer for problem in read_problems(path, DataSettings())] == ["7" * 200_000]


def test_places_and_default_ids(tmp_path):
    rows = [{"problem": "two\nlines", "answer": 1}, {"problem": "x", "answer": 2}]
    assert [r.where for r in read_rows(write_csv(tmp_path / "r.csv", rows))] == [f"{tmp_path}/r.csv:2", f"{tmp_path}/r.csv:4"]
    snapshot = write_shards(tmp_path / "s", rows)
    problems = read_problems(snapshot, DataSettings())
    assert [p.id for p in problems] == ["train-00000-of-00002:1", "train-00001-of-00002:1"]
    assert problems[1].where == f"{snapshot}/data/train-00001-of-00002.parquet: row 1"


BAD_VALUES = {
    "null answer": ({"problem": "x", "answer": None}, "field 'answer' is null"),
    "empty problem": ({"problem": " ", "answer": "2"}, "field 'problem' is empty"),
    "list answer": ({"problem": "x", "answer": ["2"]}, "expected text or a number"),
    "boolean answer": ({"problem": "x", "answer": True}, "expected text or a number"),
    "NaN answer": ({"problem": "x", "answer": float("nan")}, "NaN"),
    "infinite answer": ({"problem": "x", "answer": float("inf")}, "Infinity"),
    "bytes": ({"problem": b"x", "answer": "2"}, "field 'problem' is"),
    "no messages": ({"problem": [], "answer": "2"}, "field 'problem' is []"),
    "message without content": ({"problem": [{"role": "user"}], "answer": "2"}, "chat messages"),
}


@pytest.mark.parametrize(("row", "expected"), BAD_VALUES.values(), ids=BAD_VALUES)
@pytest.mark.parametrize("form", ["Parquet", "Arrow stream", "saved"])
def test_bad_values_of_typed_formats_name_the_row(tmp_path, form, row, expected):
    name, write = WRITERS[form]
    good = {"problem": "y", "answer": "2"}
    same_types = isinstance(row["problem"], str) and isinstance(row["answer"], str | None)
    place = write(tmp_path / name, [good, good, row] if same_types else [row])
    with pytest.raises(SettingsError) as caught:
        read_problems(place, DataSettings())
    message = str(caught.value)
    assert message.startswith(f"{place}: row {3 if same_types else 1}: ") and expected in message


def test_text_that_is_no_utf8_names_the_row_in_parquet(tmp_path):
    values = pyarrow.array([b"x", b"y", b"\xff\xed\xa0\x80", b"z"]).view(pyarrow.string())
    table = pyarrow.table({"problem": values, "answer": ["1", "2", "3", "4"]})
    from pyarrow import parquet

    parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(SettingsError, match=r"p\.parquet: row 3: field 'problem'"):
        read_problems(tmp_path / "p.parquet", DataSettings())


@pytest.mark.parametrize("form", ["JSONL", "CSV", "Parquet", "Arrow stream", "saved"])
def test_rows_are_read_one_by_one(tmp_path, form):
    """The memory that reading takes does not grow with the rows: 40,000 rows of 2 KB are 80 MB."""
    name, write = WRITERS[form]
    rows = [{"problem": f"{n} " + "x" * 2000, "answer": str(n)} for n in range(40_000)]
    place = write(tmp_path / name, rows)
    expected = sum(len(row["problem"]) for row in rows)
    del rows
    tracemalloc.start()
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    seen = most = 0
    for row in read_rows(place):
        seen += len(row.fields["problem"])
        most = max(most, pool.bytes_allocated() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == expected
    assert peak < 16e6 and most < 24e6, (peak, most)


def test_a_split_is_chosen_where_there_are_several(tmp_path):
    rows = [{"problem": "x", "answer": "1"}]
    write_parquet(tmp_path / "set" / "train.parquet", rows * 2)
    write_parquet(tmp_path / "set" / "test-00000-of-00001.parquet", rows)
    assert len(list(read_rows(f"{tmp_path}/set:train"))) == 2
    assert len(list(read_rows(f"{tmp_path}/set:test"))) == 1
    for source, expected in (
        ("set", "the splits test, train"),
        ("set:dev", "no split 'dev'"),
        ("set/train.parquet:train", "file"),
    ):
        with pytest.raises(SettingsError, match=expected):
            open_source(f"{tmp_path}/{source}", "data.train")


def test_a_local_path_comes_before_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "org" / "name" / "train.parquet", [{"problem": "here", "answer": "1"}])
    assert [row.fields["problem"] for row in read_rows("org/name")] == ["here"]
    settings = Settings()
    settings.data.train, settings.data.eval = "org/name:train", "other/name:test"
    resolved = settings.resolve().data
    assert (resolved.train, resolved.eval) == (str(tmp_path / "org/name:train"), "other/name:test")
    settings.data.train = "data/missing.jsonl"
    assert settings.resolve().data.train == str(tmp_path / "data/missing.jsonl")


def test_a_hub_dataset_out_of_the_libraries_cache(tmp_path):
    """The hub is not asked: the `datasets` library, offline, finds what it has downloaded before."""
    import datasets

    revision = "0123456789abcdef0123456789abcdef01234567"
    built = datasets.load_dataset(
        "parquet", data_files={"test": str(write_parquet(tmp_path / "x.parquet", ROWS))}, cache_dir=str(tmp_path / "made")
    )
    (made,) = (Path(entry["filename"]).parent for entry in built["test"].cache_files)
    stored = tmp_path / "cache" / "some-org___some-set" / "default" / "0.0.0" / revision
    shutil.copytree(made, stored)
    (stored / "parquet-test.arrow").rename(stored / "some-set-test.arrow")
    code = (
        "import json; from tic_megatron.data.rows import open_source; s = open_source('some-org/some-set', 'data.train');"
        "print(json.dumps([[row.fields, row.where] for row in s.read()] + [s.revision, s.checksums()]))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120)
    *rows, found, (checksum,) = json.loads(done.stdout.splitlines()[-1])
    assert rows == [[row, f"some-org/some-set: row {n}"] for n, row in enumerate(ROWS, 1)]
    assert (found, checksum["sha256"]) == (revision, sha256(stored / "some-set-test.arrow"))


@pytest.mark.parametrize(
    ("source", "asked"),
    {
        "o/n": ("o/n", None, None),
        "o/n:test": ("o/n", None, "test"),
        "o/n:main:test": ("o/n", "main", "test"),
    }.items(),
)
def test_what_the_hub_is_asked_for(source, asked, monkeypatch):
    import datasets

    calls = []
    data = datasets.Dataset.from_list(ROWS)

    def load(name, config, split):
        calls.append((name, config, split))
        return data if split else datasets.DatasetDict(train=data)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.fields for row in read_rows(source)] == ROWS
    assert calls == [asked]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=data, test=data))
    with pytest.raises(SettingsError, match="the splits test, train; give one of them, such as o/n:train"):
        open_source("o/n", "data.train")


def test_what_is_no_source_is_refused_without_asking_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    for name in ("missing", "data/missing.jsonl", "a/b/c", "a/b.parquet", "a/b:c:d:e", "~nobody/x/y"):
        with pytest.raises(SettingsError, match=f"data.train: {name} cannot be read"):
            open_source(name, "data.train")
