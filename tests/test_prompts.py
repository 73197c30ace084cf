"""Prompt sets: rows are checked with file and line, tokenized as transformers does it, and dealt out without repeats."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import make_tokenizer
from tic_megatron.config import DataSettings, SettingsError
from tic_megatron.data.prompts import PromptCursor, load_prompts, read_problems
from tic_megatron.rewards import grade_math
from tic_megatron.trajectory import Prompt

GOOD = b'{"problem": "1+1=", "answer": "2"}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tokens_are_those_of_the_chat_template(tmp_path, tokenizer):
    path = write(
        tmp_path / "p.jsonl", {"problem": "What is 12 + 34? é 漢", "answer": 46, "id": 7}, {"problem": "x", "answer": 3.0}
    )
    prompts = load_prompts(path, tokenizer, DataSettings(system_prompt="Be brief."))
    assert [(p.id, p.text, p.answer) for p in prompts] == [("7", "What is 12 + 34? é 漢", "46"), ("p:2", "x", "3")]
    for prompt in prompts:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt.text}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(prompt.token_ids) == expected
        assert tokenizer.decode(prompt.token_ids).endswith("<|im_start|>assistant\n")


def test_chat_messages_and_nested_answers(tmp_path, tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Solve 2x = 4."}]
    path = write(tmp_path / "dapo.jsonl", {"prompt": messages, "reward_model": {"ground_truth": "2", "style": "rule"}})
    data = DataSettings(
        prompt_field="prompt", answer_field="reward_model.ground_truth", system_prompt="not used: the row has one"
    )
    (prompt,) = load_prompts(path, tokenizer, data)
    assert (prompt.id, prompt.text, prompt.answer) == ("dapo:1", "Solve 2x = 4.", "2")
    assert list(prompt.token_ids) == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_byte_order_mark_blank_lines_and_line_separators_inside_text(tmp_path):
    text = "a\u2028b"  # a line break for str.splitlines, not for JSONL
    row = json.dumps({"problem": text, "answer": "2"}, ensure_ascii=False).encode()
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + row)
    problems = read_problems(tmp_path / "p.jsonl", DataSettings())
    assert [p.id for p in problems] == ["p:1", "p:3"]
    assert problems[1].messages[0]["content"] == text


BAD_ROWS = {
    "not json": (b"{'problem': 'x'}", "malformed JSON"),
    "cut short": (b'{"problem": "x", "answ', "malformed JSON"),
    "two objects": (GOOD + GOOD, "malformed JSON"),
    "not an object": (b'["x", "y"]', "JSON object"),
    "not utf-8": (b'{"problem": "\xff", "answer": "2"}', "UTF-8"),
    "nested too deep": (b"[" * 100_000, "malformed JSON"),
    "NaN answer": (b'{"problem": "x", "answer": NaN}', "NaN is not a JSON value"),
    "no problem": (b'{"question": "x", "answer": "2"}', "no field 'problem' (its fields: 'question', 'answer')"),
    "no answer": (b'{"problem": "x"}', "no field 'answer'"),
    "numeric problem": (b'{"problem": 5, "answer": "2"}', "expected text or a list of chat messages"),
    "empty problem": (b'{"problem": " ", "answer": "2"}', "field 'problem' is empty"),
    "empty answer": (b'{"problem": "x", "answer": ""}', "field 'answer' is empty"),
    "null answer": (b'{"problem": "x", "answer": null}', "field 'answer' is null; expected text or a number"),
    "list answer": (b'{"problem": "x", "answer": ["2"]}', "expected text or a number"),
    "boolean answer": (b'{"problem": "x", "answer": true}', "expected text or a number"),
    "half a surrogate pair": (b'{"problem": "x\\ud800", "answer": "2"}', "surrogate"),
    "no messages": (b'{"problem": [], "answer": "2"}', "expected text or a list of chat messages"),
    "message without role": (b'{"problem": [{"content": "x"}], "answer": "2"}', "chat messages"),
    "assistant speaks last": (b'{"problem": [{"role": "assistant", "content": "x"}], "answer": "2"}', "nothing to answer"),
}


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_names_file_and_line(tmp_path, row, expected):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n\n" + row + b"\n" + GOOD)
    with pytest.raises(SettingsError) as caught:
        read_problems(path, DataSettings())
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and expected in message and "\n" not in message


@pytest.mark.parametrize("name", ["missing.jsonl", "folder.jsonl", "data.txt", "empty.jsonl"])
def test_bad_file_is_named(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "data.txt").write_bytes(GOOD)
    with pytest.raises(SettingsError, match=name):
        read_problems(tmp_path / name, DataSettings())


def test_a_long_integer_is_an_answer(tmp_path, tokenizer):
    """More than a float can be; JSON's own limit is 4300 digits."""
    (tmp_path / "p.jsonl").write_text('{"problem": "x", "answer": ' + "7" * 4000 + "}\n")
    assert load_prompts(tmp_path / "p.jsonl", tokenizer, DataSettings())[0].answer == "7" * 4000


@pytest.mark.parametrize(
    ("given", "answer", "response"),
    [
        ("0.00001", "0.00001", "0.00001"),
        ("1.2e-5", "0.000012", r"1.2 \times 10^{-5}"),
        ("1e22", "10000000000000000000000", "10^{22}"),
        ("204.0", "204", "204"),
        ("-0.5", "-0.5", r"-\frac{1}{2}"),
        ("7", "7", "7"),
        ('"1e-05 or so"', "1e-05 or so", None),
    ],
)
def test_numbers_are_answers_as_graders_read_them(tmp_path, tokenizer, given, answer, response):
    (tmp_path / "p.jsonl").write_text(f'{{"problem": "x", "answer": {given}}}\n')
    (prompt,) = load_prompts(tmp_path / "p.jsonl", tokenizer, DataSettings())
    assert prompt.answer == answer
    assert response is None or grade_math(f"\\boxed{{{response}}}", prompt.answer) == 1.0


def test_chat_template_error_names_the_row(tmp_path, tokenizer):
    strict = make_tokenizer(tmp_path)
    strict.chat_template = "{{ raise_exception('no tools here') }}"
    path = write(tmp_path / "p.jsonl", {"problem": "x", "answer": "1"})
    with pytest.raises(SettingsError, match=r"p\.jsonl:1: .*no tools here"):
        load_prompts(path, strict, DataSettings())


def prompts(n):
    return [Prompt(id=str(i), text="", answer="", token_ids=(i,)) for i in range(n)]


@given(n=st.integers(1, 30), sizes=st.lists(st.integers(0, 40), max_size=20), seed=st.integers(0, 2**31 - 1))
def test_cursor_deals_every_prompt_once_per_epoch(n, sizes, seed):
    cursor = PromptCursor(prompts(n), seed)
    dealt = [p for size in sizes for p in cursor.next(size)]
    assert len(dealt) == sum(sizes)
    for start in range(0, len(dealt), n):
        counts = Counter(p.id for p in dealt[start : start + n])
        assert max(counts.values()) == 1
    assert PromptCursor(prompts(n), seed).next(len(dealt)) == dealt  # the batch sizes don't matter


@given(n=st.integers(1, 30), before=st.integers(0, 70), after=st.integers(0, 70))
def test_cursor_continues_from_its_saved_place(n, before, after):
    cursor = PromptCursor(prompts(n), seed=5)
    cursor.next(before)
    state = json.loads(json.dumps(cursor.state_dict()))
    resumed = PromptCursor(prompts(n), seed=99)
    resumed.load_state_dict(state)
    assert resumed.next(after) == cursor.next(after)


def test_epochs_and_seeds_are_shuffled_differently():
    cursor = PromptCursor(prompts(50), seed=0)
    first, second, other = cursor.next(50), cursor.next(50), PromptCursor(prompts(50), seed=1).next(50)
    assert first not in (second, other, prompts(50)) and second != other


def test_cursor_refuses_other_prompts_unless_allowed():
    cursor = PromptCursor(prompts(10), seed=0)
    cursor.next(15)
    other = PromptCursor(prompts(11), seed=0)
    with pytest.raises(SettingsError, match=r"data\.train"):
        other.load_state_dict(cursor.state_dict())
    other.load_state_dict(cursor.state_dict(), allow_other_prompts=True)
    assert other.used == 11  # the second epoch begins anew
    assert len({p.id for p in other.next(11)}) == 11
