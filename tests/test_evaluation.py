"""Evaluation on the engines: Avg@k and its error against other computations, and training's samples left alone."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import ray

from tests.models import make_tiny_qwen3
from tests.rollouts import rollout_of
from tic_megatron.commands.evaluate_preflight import IDENTITY_FILE, _check_same_evaluation, _identity
from tic_megatron.config import EvalSettings, RewardSettings, Settings, SettingsError
from tic_megatron.config_evaluate import EvaluateSettings
from tic_megatron.evaluation import EvalSet, choose_benchmarks, eval_name, evaluate
from tic_megatron.evaluation.during_training import Evaluations
from tic_megatron.remote import WorkerError
from tic_megatron.rewards import RewardWorkers
from tic_megatron.rewards.workers import MOST_FAULTS_NAMED
from tic_megatron.rollout.engines import EngineGroup
from tic_megatron.rollout.requests import stable_seed
from tic_megatron.run import Run
from tic_megatron.trajectory import Group, Prompt, Trajectory


class Listed:
    """The interface of the engines, answering from a list per problem; where it is empty, they refuse the problem."""

    def __init__(self, texts):
        self.texts = texts
        self.asked = []

    def generate(self, prompts, **arguments):
        self.asked.append(arguments | {"n": len(prompts)})
        pairs = list(zip(prompts, self.texts, strict=True))
        groups = [
            Group(p, [Trajectory(p, [5, 6], [-0.5, -0.25], [1, 1], text, text == "7", weight_version=0) for text in texts])
            for p, texts in pairs
            if texts
        ]
        return rollout_of(groups, {place: (p, "it is too long") for place, (p, texts) in enumerate(pairs) if not texts})


def problems(count):
    return [Prompt(f"h:{index}", f"{index}+1=", str(index + 1), (1, 2)) for index in range(count)]


@pytest.fixture(scope="module")
def rewards():
    with RewardWorkers(RewardSettings(function="exact")) as workers:
        yield workers


def test_greedy_evaluation_asks_and_counts(rewards):
    engines = Listed([["1"], ["2"], ["7"], ["4 "]])
    result = evaluate(engines, problems(4), rewards, EvalSettings(seed=3), name=eval_name("some/heldout.jsonl"), max_tokens=5)
    with pytest.raises(ValueError, match="heldout"):
        evaluate(engines, [], rewards, EvalSettings(), name="heldout", max_tokens=5)
    with pytest.raises(
        WorkerError, match="none of the 2 problems of x is answered; the first, h:0, not answered: it is too long"
    ):
        evaluate(Listed([[], []]), problems(2), rewards, EvalSettings(), name="x", max_tokens=5)
    seed = stable_seed("eval", 3)
    greedy = {"group_size": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_tokens": 5, "seed": seed, "n": 4}
    assert engines.asked == [greedy]
    assert result.metrics() == pytest.approx(
        {
            "eval/heldout/accuracy": 0.75,
            "eval/heldout/standard_error": (0.75 * 0.25 / 3) ** 0.5,
            "eval/heldout/length_mean": 2.0,
            "eval/heldout/truncated_fraction": 0.25,
            "eval/heldout/not_graded": 0.0,
        }
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_run_goes_on_when_problems_are_not_answered_or_graded(seed, tmp_path):
    """Both count as wrong, are counted, and named: every problem, and the first few responses."""
    draw, k = random.Random(seed), 3
    # "none" is an answer that the AIME's grader cannot compare with.
    prompts = [Prompt(f"h:{index}", "", draw.choice(["7", "8", "none"]), (1, 2)) for index in range(12)]
    texts = [[draw.choice(["7", "8"]) for _ in range(k)] if draw.random() < 0.7 else [] for _ in prompts]
    prompts[0], texts[0] = Prompt("h:0", "", "7", (1, 2)), ["7", "7", "8"]
    settings = Settings()
    settings.run.dir, settings.data.eval = str(tmp_path), "heldout.jsonl"
    settings.eval.samples, settings.trainer.eval_every = k, 2
    notes: list[str] = []
    with RewardWorkers(RewardSettings(function="aime"), tmp_path / "rewards.log") as rewards:
        run = Run(settings, cast(Any, None))
        run.evaluations = Evaluations(settings, prompts, [], cast(Any, Listed(texts)), {settings.reward.function: rewards})
        run.progress = cast(Any, SimpleNamespace(phase=lambda phase: None, note=notes.append))
        metrics = run.evaluate(2)
    refused = [prompt.id for prompt, given in zip(prompts, texts, strict=True) if not given]
    ungraded = [p.id for p, given in zip(prompts, texts, strict=True) for _ in given if p.answer == "none"]
    right = sum(text == p.answer for p, given in zip(prompts, texts, strict=True) for text in given)
    assert metrics["eval/heldout/accuracy"] == pytest.approx(right / 36) == run.state.accuracy
    assert metrics["eval/heldout/not_graded"] == k * len(refused) + len(ungraded)
    assert metrics["eval/heldout/length_mean"] == 2.0
    more = len(ungraded) - MOST_FAULTS_NAMED
    expected = [f"prompt {name}, not answered: it is too long; it counts as wrong" for name in refused]
    expected += [f"prompt {name}, response " for name in ungraded[:MOST_FAULTS_NAMED]]
    expected += [f"{more} more responses could not be graded; all are in logs/rewards.log"] if more > 0 else []
    for note, line in zip(notes, expected, strict=True):
        assert note.startswith(f"warning: evaluation heldout, {line}")


def test_average_of_k_and_its_error_clustered_by_problem(rewards):
    """Against numpy; and the error against the spread over many drawn sets of problems."""
    draw = np.random.default_rng(0)

    def sample(n, k):
        chance = draw.beta(0.6, 0.4, n)
        right = draw.random((n, k)) < chance[:, None]
        engines = Listed([[str(i + 1) if r else "no" for r in row] for i, row in enumerate(right)])
        options = EvalSettings(samples=k, temperature=0.7, top_p=0.9, top_k=20)
        return right, evaluate(engines, problems(n), rewards, options, name="x", max_tokens=5)

    right, result = sample(50, 8)
    assert result.accuracy == pytest.approx(right.mean())
    assert result.standard_error == pytest.approx(right.mean(1).std(ddof=1) / 50**0.5)
    assert result.pass_at_k == right.any(1).mean() and result.metrics()["eval/x/pass_at_k"] == result.pass_at_k
    assert result.n == 50 and len(result.groups[0].trajectories) == 8

    results = [sample(30, 4)[1] for _ in range(300)]
    spread = np.std([r.accuracy for r in results], ddof=1)  # has a relative error of 4% itself
    assert np.mean([r.standard_error for r in results]) == pytest.approx(spread, rel=0.15)
    # As if all 120 responses were independent:
    assert np.mean([(r.accuracy * (1 - r.accuracy) / 120) ** 0.5 for r in results]) < 0.75 * spread


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    model = make_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=1, tie_word_embeddings=True, initializer_range=0.1)
    settings = Settings()
    settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens = 100, 24
    group = EngineGroup.start(settings, model_path=str(model), device="cpu", log_dir=tmp_path_factory.mktemp("logs"))
    group.ready()
    yield group
    group.stop()
    ray.shutdown()


def sampled(groups):
    return [(t.response_ids, t.inference_logprobs) for group in groups for t in group.trajectories]


def test_evaluation_does_not_disturb_trainings_samples(engines, rewards):
    """The rollouts of three steps are the same, bit by bit, with evaluations between them; and so are the evaluations."""
    draw = random.Random(0)
    prompts = [Prompt(f"p{i}", "", "", tuple(draw.randrange(3, 300) for _ in range(draw.randint(5, 100)))) for i in range(6)]

    def step(number):
        arguments = {"group_size": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 24}
        return sampled(engines.generate(prompts, **arguments, seed=stable_seed(0, number)).groups)

    def accuracy(**options):
        result = evaluate(engines, prompts, rewards, EvalSettings(**options), name="x", max_tokens=16)
        return sampled(result.groups)

    alone = [step(number) for number in range(3)]
    greedy, warm = {}, {"samples": 3, "temperature": 0.8, "top_p": 0.9, "top_k": 50}
    assert [(accuracy(**greedy), accuracy(**warm), step(number))[-1] for number in range(3)] == alone
    evaluations = [(step(number), accuracy(**warm))[-1] for number in range(2)]
    assert evaluations[0] == evaluations[1] != accuracy(**warm, seed=1)
    assert len(evaluations[0]) == 18 and max(len(ids) for ids, _ in evaluations[0]) <= 16


def test_top_k_of_one_is_greedy(engines, rewards):
    prompts = [Prompt("p", "", "", tuple(range(5, 40)))]
    one = evaluate(engines, prompts, rewards, EvalSettings(temperature=1.0, top_k=1), name="x", max_tokens=16)
    greedy = evaluate(engines, prompts, rewards, EvalSettings(), name="x", max_tokens=16)
    assert [ids for ids, _ in sampled(one.groups)] == [ids for ids, _ in sampled(greedy.groups)]


def test_responses_that_another_program_has_graded_are_not_added_to(tmp_path):
    program = tmp_path / "g.py"
    program.write_text("def f(response): return 1.0\n")
    settings = EvaluateSettings()
    settings.run.dir, settings.reward.function = str(tmp_path), f"{program}:f"
    chosen = choose_benchmarks(["mine=x.jsonl"], settings.problems, settings.reward, None)
    sets = [EvalSet(benchmark, []) for benchmark in chosen]
    model = tmp_path / "model"
    before = _identity(model, sets, settings.reward)
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(before))
    _check_same_evaluation(settings, before)
    program.write_text("def f(response): return 0.5\n")
    with pytest.raises(SettingsError, match=r"graded by .*g\.py:f with another content of its file; give another --out"):
        _check_same_evaluation(settings, _identity(model, sets, settings.reward))
