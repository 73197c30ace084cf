"""Rollouts with real vLLM engines under Ray, against plain transformers."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import make_tiny_qwen3, response_logprobs
from tests.processes import family, wait_until_gone
from tic_megatron.config import Settings
from tic_megatron.rollout.engines import EngineGroup
from tic_megatron.rollout.requests import Advance, SampleRequest, stable_seed
from tic_megatron.trajectory import Prompt

MAX_PROMPT, MAX_RESPONSE = 320, 24


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=1, tie_word_embeddings=True, initializer_range=0.1)


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


def start(model_dir, log_dir, *, engines=1, tp_size=1):
    settings = Settings()
    settings.rollout.engines = engines
    settings.rollout.tensor_parallel_size = tp_size
    settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens = MAX_PROMPT, MAX_RESPONSE
    return EngineGroup.start(settings, model_path=str(model_dir), device="cpu", log_dir=log_dir)


@pytest.fixture(scope="module")
def engines(ray_cluster, model_dir, tmp_path_factory):
    """Two engines."""
    group = start(model_dir, tmp_path_factory.mktemp("logs"), engines=2)
    group.ready()
    yield group
    group.stop()


def make_prompts(count, seed=0):
    """Prompts of 3 to 320 tokens; together far more than one step's prefill budget."""
    draw = random.Random(seed)
    lengths = [3, MAX_PROMPT, *(draw.randint(3, MAX_PROMPT) for _ in range(count - 2))]
    return [Prompt(f"p{i}", "", "", tuple(draw.randrange(3, 300) for _ in range(n))) for i, n in enumerate(lengths)]


def generate(group, prompts, **overrides):
    arguments = {"group_size": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": MAX_RESPONSE, "seed": 7}
    return group.generate(prompts, **(arguments | overrides)).groups


def sampled_ids(groups):
    return [[t.response_ids for t in group.trajectories] for group in groups]


def largest_error(groups, model, temperature):
    errors = []
    for trajectory in (t for group in groups for t in group.trajectories):
        expected = response_logprobs(model, trajectory.prompt.token_ids, trajectory.response_ids, temperature)
        assert len(expected) == len(trajectory.inference_logprobs)
        errors += [abs(a - b) for a, b in zip(expected, trajectory.inference_logprobs, strict=True)]
    return max(errors)


def test_driver_imports_neither_vllm_nor_megatron():
    code = "import sys, tic_megatron.rollout.engines; sys.exit(any(name in sys.modules for name in ('vllm', 'megatron')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_seeds_do_not_depend_on_the_process():
    assert stable_seed(0, 1, "a") == 4077929011503201625
    assert len({stable_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert stable_seed(1, 23) != stable_seed(12, 3)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_equal_transformers(engines, model, temperature):
    """Every sampled token's log-prob, the stop token's included, at the sampling temperature."""
    groups = generate(engines, make_prompts(24), temperature=temperature)
    stop = model.config.eos_token_id
    trajectories = [t for group in groups for t in group.trajectories]
    stopped = [t for t in trajectories if not t.truncated]
    assert stopped, "no response ended by itself: the test needs one"
    assert all(t.response_ids[-1] == stop for t in stopped)
    for t in trajectories:
        assert stop not in t.response_ids[:-1]
        assert t.truncated == (t.response_ids[-1] != stop)
        assert len(t.response_ids) == MAX_RESPONSE or not t.truncated
        assert t.response_mask == [1] * len(t.response_ids)
        assert t.weight_version == 0
    assert largest_error(groups, model, temperature) < 1e-5


def test_text_and_order(engines, model_dir):
    prompts = make_prompts(5)
    groups = generate(engines, prompts)
    assert [group.prompt for group in groups] == prompts
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for group in groups:
        assert len(group.trajectories) == 4
        for t in group.trajectories:
            assert t.prompt is group.prompt
            assert t.text == tokenizer.decode(t.response_ids, skip_special_tokens=True)


def test_samples_depend_on_the_seed_only(engines):
    prompts = make_prompts(9)
    first = sampled_ids(generate(engines, prompts))
    assert sampled_ids(generate(engines, prompts)) == first
    assert sampled_ids(generate(engines, prompts[:3])) == first[:3]
    other = sampled_ids(generate(engines, prompts, seed=8))
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert all(len({tuple(ids) for ids in group}) == 4 for group in first)
    # The same prompt twice in a rollout: different samples.
    twice = sampled_ids(generate(engines, [prompts[1], prompts[1]]))
    assert twice[0] != twice[1]


def test_two_engines_give_what_one_gives(engines):
    other = copy.copy(engines)
    other.serving = lambda: engines.serving()[:1]
    for count in (2, 7):
        prompts = make_prompts(count)
        assert sampled_ids(generate(other, prompts)) == sampled_ids(generate(engines, prompts))
    assert generate(engines, []) == []


def test_greedy_equals_transformers(engines, model):
    prompts = make_prompts(6, seed=3)
    groups = generate(engines, prompts, group_size=1, temperature=0.0)
    for group in groups:
        ids = torch.tensor([group.prompt.token_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_RESPONSE, do_sample=False)
        assert group.trajectories[0].response_ids == expected[0, ids.shape[1] :].tolist()


def test_a_prompt_that_vllm_refuses_is_named(engines):
    """It is the prompt's fault: no engine is lost over it."""
    too_long = Prompt("long", "", "", tuple([5] * (MAX_PROMPT + MAX_RESPONSE + 1)))
    rollout = engines.generate(
        [*make_prompts(2)[:1], too_long], group_size=4, temperature=1.0, top_p=1.0, max_tokens=MAX_RESPONSE, seed=7
    )
    assert [group.prompt.id for group in rollout.groups] == ["p0"]
    ((prompt, reason),) = rollout.set_aside
    assert prompt is too_long and "maximum context length is 344" in reason
    assert generate(engines, [too_long]) == []
    assert engines.pool.failures == 0
    assert generate(engines, make_prompts(2))  # it goes on


def test_the_tail_is_cut(engines, model):
    """Cut responses keep the tokens that they have, each with its log-prob; what ended before is as it was."""
    prompts, longest = [Prompt(f"s{i}", "", "", (i + 5, 9, 11)) for i in range(24)], MAX_PROMPT
    whole = generate(engines, prompts, max_tokens=longest)
    requests = [
        SampleRequest(prompt.token_ids, 4, 1.0, 1.0, longest, stable_seed(7, index)) for index, prompt in enumerate(prompts)
    ]
    engine = engines.serving()[0].actor
    # Room for more than there is: the engine reports at once, and is told to cut.
    begun = ray.get(engine.advance.remote(Advance(list(enumerate(requests)), low_water=10**6, fresh=True)))
    ended = ray.get(engine.advance.remote(Advance([], cut=True)))
    samples = {number: response.samples for progress in (begun, ended) for number, response in progress.finished}
    assert sorted(samples) == list(range(24)) and ended.unfinished == 0
    pairs = [(s, t) for number, group in enumerate(whole) for s, t in zip(samples[number], group.trajectories, strict=True)]
    cut = [s for s, t in pairs if len(s.token_ids) < len(t.response_ids)]
    assert cut and all(s.cut and s.truncated for s in cut)
    assert all(1 <= len(s.token_ids) == len(s.logprobs) for s, _ in pairs)
    assert all(s.token_ids == t.response_ids[: len(s.token_ids)] for s, t in pairs)
    for s, t in pairs:
        assert s.logprobs == pytest.approx(response_logprobs(model, t.prompt.token_ids, s.token_ids, 1.0), abs=1e-5)
    assert sampled_ids(generate(engines, prompts, max_tokens=longest)) == sampled_ids(whole)


def test_libraries_print_to_the_log(engines):
    for log_file in [engine.log_file for engine in engines.pool.engines]:
        assert "vllm" in Path(log_file).read_text().lower()


def test_stop_leaves_no_process(engines):
    pids = engines.ready()
    assert os.getpid() not in pids and len(set(pids)) == 2
    engines.stop()
    assert wait_until_gone(pids) == []


@pytest.mark.slow  # three processes import vLLM, two of them after the first
def test_tensor_parallel_engine(ray_cluster, model_dir, model, tmp_path):
    """TP 2: the same log-probs, and none of its processes stays."""
    group = start(model_dir, tmp_path, tp_size=2)
    try:
        (pid,) = group.ready()
        pids = family(pid)
        assert len(pids) >= 3
        assert largest_error(generate(group, make_prompts(4)), model, 1.0) < 1e-5
    finally:
        group.stop()
    assert wait_until_gone(pids) == []
