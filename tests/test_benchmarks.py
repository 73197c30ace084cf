"""Benchmarks by name, how they are asked, the responses that are kept, and the numbers from them; no engine is started."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.rollouts import rollout_of
from tests.workspace import write_rows
from tic_megatron.commands.evaluate_preflight import _choose_device
from tic_megatron.config import DataSettings, RewardSettings, SettingsError
from tic_megatron.config_evaluate import EvaluateSettings
from tic_megatron.evaluation import BENCHMARKS, choose_benchmarks, read_benchmark
from tic_megatron.evaluation.results import benchmark_numbers, table, write_problems
from tic_megatron.evaluation.saved import Mode, complete, read_rows
from tic_megatron.remote import WorkerError
from tic_megatron.rewards import RewardWorkers
from tic_megatron.rewards.code_tests import read_tests
from tic_megatron.rollout.engines import _requests
from tic_megatron.rollout.requests import stable_seed
from tic_megatron.trajectory import Group, Prompt, Trajectory

MODE = Mode("sampled", 3, 1.0, 1.0, 0, 9, stable_seed("evaluate", 0, "mine"))


def choose(*given, reward="exact", template=None):
    return choose_benchmarks(given, DataSettings(), RewardSettings(function=reward), template)


def test_the_paper_s_benchmarks():
    """As its Table 1 has them: Avg@32 on AIME, the greedy Avg@1 on the two larger ones."""
    assert {name: benchmark.samples for name, benchmark in BENCHMARKS.items()} == {
        **{"aime24": 32, "aime25": 32},
        **{"math500": 0, "livecodebench": 0},
    }
    assert {name: benchmark.reward for name, benchmark in BENCHMARKS.items()} == {
        **{"aime24": "aime", "aime25": "aime"},
        **{"math500": "math", "livecodebench": "code"},
    }


def test_a_benchmark_from_a_file_and_a_set_of_one_s_own(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"id": "x", "problem": "Find $n$.", "answer": 73}])
    aime, mine = choose(f"aime24={tmp_path}/a.jsonl", f"mine={tmp_path}/a.jsonl")
    assert (aime.reward, aime.samples, mine.reward, mine.samples) == ("aime", 32, "exact", 0)
    (asked,) = read_benchmark(aime, DataSettings(system_prompt="Be brief."))
    assert asked.messages[0] == {"role": "system", "content": "Be brief."}
    text = asked.messages[1]["content"]
    assert "\n\nFind $n$.\n\n" in text and text.startswith("Solve the following") and text.endswith('after "Answer:".')
    assert (asked.id, asked.answer) == ("x", "73")
    assert read_benchmark(mine, DataSettings())[0].messages == ({"role": "user", "content": "Find $n$."},)
    (other,) = choose(f"aime24={tmp_path}/a.jsonl", template="Q: {problem} A:")
    assert read_benchmark(other, DataSettings())[0].messages[0]["content"] == "Q: Find $n$. A:"


def test_a_copy_of_a_benchmark_may_have_other_fields(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"question": "Find $n$.", "answer": 73, "label": 9}])
    (aime,) = choose(f"aime24={tmp_path}/a.jsonl")
    (asked,) = read_benchmark(aime, DataSettings(prompt_field="question", answer_field="label"))
    assert "Find $n$." in asked.messages[0]["content"] and asked.answer == "73"
    with pytest.raises(SettingsError, match=r"a\.jsonl:1: has no field 'problem' .*set data\.prompt_field"):
        read_benchmark(aime, DataSettings())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["amie24"], ["no benchmark 'amie24'", "did you mean aime24?"]),
        (["gsm8k"], ["no benchmark 'gsm8k'", "aime24, aime25, math500, livecodebench"]),
        (["aime24", "aime24=x.jsonl"], ["aime24 is there twice"]),
        (["mine="], ["'mine=' names no file"]),
        (["../mine=x.jsonl"], ["'../mine' is no plain name"]),
    ],
)
def test_bad_names_are_refused(given, words):
    with pytest.raises(SettingsError) as refused:
        choose(*given)
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_set_of_one_s_own_needs_a_reward_per_response():
    with pytest.raises(SettingsError, match=r"reward.function: exact_dense gives a reward per token, and mine"):
        choose("mine=x.jsonl", reward="exact_dense")
    assert choose("math500", reward="exact_dense")  # which does not grade it


def test_answers_that_the_aime_s_rule_cannot_grade_are_refused_with_their_place(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"problem": "?", "answer": "73"}, {"problem": "?", "answer": "7/3"}])
    (aime,) = choose(f"aime25={tmp_path}/a.jsonl")
    with pytest.raises(SettingsError, match=r"a\.jsonl:2: .*'7/3'"):
        read_benchmark(aime, DataSettings())


def test_programs(tmp_path):
    test = {"input": "1\n", "output": "2\n", "testtype": "stdin"}
    row = {"question_content": "Add one.", "public_test_cases": json.dumps([test]), "question_id": "abc_1"}
    write_rows(tmp_path / "l.jsonl", [row])
    benchmark = replace(BENCHMARKS["livecodebench"], source=str(tmp_path / "l.jsonl"))
    (problem,) = read_benchmark(benchmark, DataSettings(system_prompt="Be brief."))
    assert problem.id == "abc_1" and [message["role"] for message in problem.messages] == ["system", "user"]
    assert problem.messages[1]["content"].startswith("Add one.") and "```python" in problem.messages[1]["content"]
    assert read_tests(problem.answer) == [test]
    with pytest.raises(SettingsError, match="livecodebench asks in words of its own"):
        choose("livecodebench=l.jsonl", template="dapo")


# ---- responses that are kept ----


class Answering:
    """The engines' interface: right or wrong as a response's seed says; dies before a batch when told to, and refuses prompts."""

    def __init__(self, dies_at=None, refused=()):
        self.dies_at, self.refused, self.asked = dies_at, refused, []

    def generate(self, prompts, *, group_size, temperature, top_p, top_k, max_tokens, seed, first):
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append((first, [prompt.id for prompt in prompts]))
        requests = _requests(prompts, group_size, temperature, top_p, max_tokens, seed, top_k, first)
        groups = [
            Group(p, [_answered(p, r.seed + sample) for sample in range(group_size)])
            for p, r in zip(prompts, requests, strict=True)
        ]
        aside = {place: (p, "it is too long") for place, p in enumerate(prompts) if p in self.refused}
        return rollout_of([group for place, group in enumerate(groups) if place not in aside], aside)


def _answered(prompt, seed):
    text = prompt.answer if np.random.default_rng(seed).random() < int(prompt.answer) / 12 else f"no \udc80 {seed}"
    return Trajectory(prompt, [5] * (seed % 4 + 1), [-0.5] * (seed % 4 + 1), [1] * (seed % 4 + 1), text, seed % 5 == 0, 0)


PROMPTS = [Prompt(f"h:{index}", f"{index}+1=", str(index + 1), (1, 2)) for index in range(11)]


def completed(path, engines, *, batch=4, mode=MODE, tell=lambda rows, faults: None):
    with RewardWorkers(RewardSettings(function="exact")) as rewards:
        return complete(path, mode, PROMPTS, engines, rewards, batch=batch, tell=tell)


def test_what_is_kept_of_a_response(tmp_path):
    rows = completed(tmp_path / "r.jsonl", Answering())
    assert [(row["problem"], row["index"], row["sample"]) for row in rows] == [
        (f"h:{index}", index, sample) for index in range(11) for sample in range(3)
    ]
    for row in rows:
        assert row["seed"] == stable_seed(stable_seed("evaluate", 0, "mine"), row["index"]) + row["sample"]
        right = row["response"] == str(row["index"] + 1)
        assert (row["score"], row["right"], row["fault"]) == (float(right), right, None)
        assert (row["tokens"], row["truncated"]) == (row["seed"] % 4 + 1, row["seed"] % 5 == 0)
    assert 0 < sum(row["right"] for row in rows) < 33
    assert read_rows(tmp_path / "r.jsonl", MODE, 11) == rows


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_responses_do_not_depend_on_the_batches(tmp_path, batch):
    whole = completed(tmp_path / "whole.jsonl", Answering())
    assert completed(tmp_path / "r.jsonl", Answering(), batch=batch) == whole


def test_a_file_that_was_cut_anywhere_is_completed_to_the_same_bytes(tmp_path):
    """Batches of 4 problems: what is there of whole ones is not generated again, and what is torn is."""
    path = tmp_path / "r.jsonl"
    completed(path, Answering())
    whole = path.read_bytes()
    ends = [0, *(position + 1 for position, byte in enumerate(whole) if byte == 10)]
    for cut in [*range(0, len(whole), 97), *ends, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        engines = Answering()
        completed(path, engines)
        assert path.read_bytes() == whole
        there = sum(end <= cut for end in ends[1:]) // 3  # whole problems
        assert [first for first, _ in engines.asked] == ([] if there == 11 else list(range(there - there % 4, 11, 4)))


def test_an_interruption_keeps_the_batches_that_were_done(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        completed(path, Answering(dies_at=2))
    assert len(read_rows(path, MODE, 11)) == 8 * 3
    engines = Answering()
    completed(path, engines)
    assert engines.asked == [(8, ["h:8", "h:9", "h:10"])]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [lines[0], *lines],
        lambda lines: lines[1:],
        lambda lines: [*lines, lines[0].replace(b'"index": 0', b'"index": 11')],
        lambda lines: [b"{}\n", *lines[1:]],
        lambda lines: [lines[0].replace(b'"tokens": ', b'"tokens": "x'), *lines[1:]],
        lambda lines: [b"\xff\n", *lines[1:]],
    ],
)
def test_files_with_other_rows_are_refused(tmp_path, spoil):
    path = tmp_path / "r.jsonl"
    completed(path, Answering())
    path.write_bytes(b"".join(spoil(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(SettingsError, match=r"r\.jsonl, line \d+, is not the response that belongs there; remove the file"):
        read_rows(path, MODE, 11)


def test_a_grader_that_fails_is_told_where_it_failed(tmp_path):
    prompts = [Prompt("a", "", "73", (1,)), Prompt("b", "", "no integer", (1,))]
    mode, told = Mode("greedy", 1, 0.0, 1.0, 0, 9, None), []
    with RewardWorkers(RewardSettings(function="aime")) as rewards:
        engines = Listed([["\\boxed{73}"], ["5"]])
        rows = complete(tmp_path / "r.jsonl", mode, prompts, engines, rewards, batch=9, tell=lambda r, f: told.extend(f))
    assert [(row["score"], row["right"], row["seed"]) for row in rows] == [(1.0, True, None), (0.0, False, None)]
    assert rows[0]["fault"] is None and rows[1]["fault"] == told[0] and "prompt b, response 0" in told[0]
    assert benchmark_numbers(2, 0, [], rows)["avg_at_1_not_graded"] == 1


@pytest.mark.parametrize("seed", range(10))
def test_a_problem_that_engines_refuse_counts_as_wrong(tmp_path, seed):
    """The others' responses are those of an evaluation without trouble, also when it was interrupted."""
    whole = completed(tmp_path / "whole.jsonl", Answering())
    places = np.random.default_rng(seed).choice(11, 3, replace=False)
    refused, path, told = [PROMPTS[place] for place in places], tmp_path / "r.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        completed(path, Answering(dies_at=1, refused=refused))
    rows = completed(path, Answering(refused=refused), tell=lambda rows, faults: told.extend(faults))
    assert read_rows(path, MODE, 11) == rows
    for row, other in zip(rows, whole, strict=True):
        if row["index"] not in places:
            assert row == other
            continue
        assert {name: row[name] for name in ("problem", "index", "sample", "seed")}.items() <= other.items()
        assert (row["response"], row["tokens"], row["score"], row["right"]) == ("", 0, 0.0, False)
        assert row["fault"] == "not answered: it is too long"
    late = sorted(place for place in places if place >= 4)  # the first batch was told of before
    assert told == [f"prompt h:{place}, not answered: it is too long; it counts as wrong" for place in late]
    numbers, answered = benchmark_numbers(11, 3, rows, []), [row for row in whole if row["index"] not in places]
    assert numbers["not_graded"] == 9 and numbers["avg_at_k"] == pytest.approx(sum(row["right"] for row in answered) / 33)
    assert numbers["length_mean"] == pytest.approx(np.mean([row["tokens"] for row in answered]))
    assert numbers["truncated_fraction"] == pytest.approx(np.mean([row["truncated"] for row in answered]))


def test_batches_of_one_problem_go_on_over_one_that_is_refused(tmp_path):
    """As with `eval.save_every` below the number of samples. Only an evaluation without any response ends with an error."""
    rows = completed(tmp_path / "r.jsonl", Answering(refused=PROMPTS[:2]), batch=1)
    assert [bool(row["tokens"]) for row in rows] == 6 * [False] + 27 * [True]
    for _ in range(2):  # also where nothing is left to generate
        with pytest.raises(
            WorkerError, match="none of the 11 problems of none is answered; the first, h:0, not answered: it is too"
        ):
            completed(tmp_path / "none" / "r.jsonl", Answering(refused=PROMPTS), batch=1)


class Listed:
    def __init__(self, texts):
        self.texts = texts

    def generate(self, prompts, **_):
        return rollout_of(
            [
                Group(p, [Trajectory(p, [5], [-0.5], [1], text, False, 0) for text in texts])
                for p, texts in zip(prompts, self.texts, strict=True)
            ]
        )


# ---- numbers ----


def test_numbers_agree_with_numpy(tmp_path):
    draw = np.random.default_rng(0)
    right, length, cut = draw.random((20, 4)) < 0.3, draw.integers(1, 9, (20, 4)), draw.random((20, 4)) < 0.5
    sampled = [
        {"right": bool(right[i, j]), "score": float(right[i, j]), "tokens": int(length[i, j]), "truncated": bool(cut[i, j])}
        | {"fault": None}
        for i in range(20)
        for j in range(4)
    ]
    greedy = sampled[:20]
    numbers = benchmark_numbers(20, 4, sampled, greedy)
    first = right.reshape(-1)[:20]
    assert numbers == pytest.approx(
        {
            **{"n": 20, "k": 4, "avg_at_k": right.mean(), "pass_at_k": right.any(1).mean()},
            "avg_at_k_standard_error": right.mean(1).std(ddof=1) / 20**0.5,
            **{"length_mean": length.mean(), "truncated_fraction": cut.mean(), "not_graded": 0},
            **{"avg_at_1": first.mean(), "avg_at_1_standard_error": first.std(ddof=1) / 20**0.5, "avg_at_1_not_graded": 0},
            "avg_at_1_length_mean": length.reshape(-1)[:20].mean(),
            "avg_at_1_truncated_fraction": cut.reshape(-1)[:20].mean(),
        }
    )
    head, row = table({"mine": numbers})
    printed = dict(zip(head, row, strict=True))
    assert printed["Avg@k"] == f"{100 * right.mean():.2f} ± {100 * right.mean(1).std(ddof=1) / 20**0.5:.2f}"
    assert (printed["problems"], printed["k"], printed["truncated"]) == ("20", "4", f"{100 * cut.mean():.1f}%")

    prompts = [Prompt(f"p{i}", f"{i}?", "7" if i else "7" * 10_001, (1, 2, 3)) for i in range(20)]
    write_problems(tmp_path / "p.jsonl", prompts, 4, sampled, greedy)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["accuracy"] for row in rows] == right.mean(1).tolist()
    assert [row["scores"] for row in rows] == right.astype(float).tolist()
    assert [row["greedy_right"] for row in rows] == first.tolist()
    assert rows[1] | {"scores": 0, "accuracy": 0, "greedy_score": 0, "greedy_right": 0} == {
        **{"problem": "p1", "prompt": "1?", "answer": "7", "prompt_tokens": 3},
        **{"scores": 0, "accuracy": 0, "greedy_score": 0, "greedy_right": 0},
    }
    assert rows[0]["answer"] is None


def test_a_single_problem_has_no_standard_error():
    row = {"right": True, "score": 1.0, "tokens": 3, "truncated": False, "fault": None}
    numbers = benchmark_numbers(1, 0, [], [row])
    assert numbers["avg_at_1"] == 1.0 and numbers["avg_at_1_standard_error"] is None and "avg_at_k" not in numbers
    assert table({"mine": numbers})[1] == ["mine", "1", "-", "-", "-", "100.00", "3", "0.0%"]


@pytest.mark.parametrize(
    ("device", "config", "used"),
    [
        ("cuda", {"dtype": "float16"}, "fp16"),
        ("cuda", {"torch_dtype": "float16"}, "fp16"),
        ("cuda", {"dtype": "bfloat16"}, "bf16"),
        ("cuda", {"dtype": "float32"}, "bf16"),
        ("cuda", {}, "bf16"),
        ("cpu", {"dtype": "float16"}, "fp32"),
    ],
)
def test_a_model_is_not_rounded_unasked(device, config, used):
    settings = EvaluateSettings()
    settings.cluster.device, settings.cluster.address = device, "10.0.0.1:6379"  # whose GPUs are not looked at from here
    _choose_device(settings, config)
    assert settings.rollout.precision == used
    settings.rollout.precision = "bf16"
    _choose_device(settings, {"dtype": "float16"})
    assert settings.rollout.precision == "bf16"
