"""Stop tokens, text limits and expert parallelism, in real engines."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import END, START, make_tiny_qwen3, make_tokenizer, response_logprobs
from tests.test_trainer import train
from tests.test_weight_transfer import mixture
from tests.workspace import write_rows
from tic_megatron.config import Settings, SettingsError
from tic_megatron.observability.metrics import read_metrics
from tic_megatron.rollout.engines import EngineGroup
from tic_megatron.rollout.stop_tokens import stop_token_ids
from tic_megatron.trajectory import Prompt
from tic_megatron.weights.vllm_cpu_experts import local_experts


def test_stop_tokens_are_looked_up_or_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    ids = stop_token_ids(tokenizer, [END, "a", "\n"])
    assert tokenizer.convert_ids_to_tokens(list(ids)) == [END, "a", "Ċ"]
    with pytest.raises(
        SettingsError, match=r"rollout\.stop_tokens: '<\|im_ends\|>' is not one token .* nearest .*'<\|im_end\|>'"
    ):
        stop_token_ids(tokenizer, ["a", "<|im_ends|>"])
    with pytest.raises(SettingsError, match="'xq' is not one token of the model's tokenizer but 2"):
        stop_token_ids(tokenizer, ["xq"])


def test_stop_tokens_end_responses_and_longer_texts_fit(ray_cluster, tmp_path):
    """Special and ordinary tokens: in the response and its log-probs, not in its text. And prompts beyond training's limit."""
    path = make_tiny_qwen3(tmp_path / "model", seed=1, tie_word_embeddings=True, initializer_range=0.1)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    settings = Settings()
    settings.rollout.stop_tokens = [START, *"abcdefghijklmnop"]
    settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens, settings.rollout.max_model_len = 32, 24, 224
    stops = set(tokenizer.convert_tokens_to_ids([END, *settings.rollout.stop_tokens]))
    engines = EngineGroup.start(settings, model_path=str(path), device="cpu", log_dir=tmp_path)
    draw = random.Random(0)
    prompts = [Prompt(f"p{i}", "", "", tuple(draw.randrange(3, 300) for _ in range(n))) for i, n in enumerate([5, 200, 30, 17])]
    try:
        groups = engines.generate(prompts, group_size=24, temperature=1.0, top_p=1.0, max_tokens=24, seed=3).groups
    finally:
        engines.stop()
    seen = set()
    for t in (t for group in groups for t in group.trajectories):
        seen.add(t.response_ids[-1])
        assert stops.isdisjoint(t.response_ids[:-1])
        assert t.truncated == (t.response_ids[-1] not in stops)
        assert len(t.response_ids) == 24 or not t.truncated
        said = t.response_ids if t.truncated else t.response_ids[:-1]
        assert t.text == tokenizer.decode(said, skip_special_tokens=True)
        expected = response_logprobs(model, t.prompt.token_ids, t.response_ids, 1.0)
        assert max(abs(a - b) for a, b in zip(expected, t.inference_logprobs, strict=True)) < 1e-5
    assert len(seen & stops) > 5 and any(t.truncated for group in groups for t in group.trajectories)


@pytest.mark.slow  # a run of two steps, with three processes that import vLLM
@pytest.mark.repeat
def test_an_expert_parallel_engine_agrees_with_the_trainer(tmp_path):
    """Four of eight experts per rank: log-probs equal the trainer's, with the first weights and after an update."""
    model = mixture(tmp_path / "model", seed=1)
    write_rows(tmp_path / "train.jsonl", [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(8)])
    train(
        *(f"--model.path={model}", f"--data.train={tmp_path / 'train.jsonl'}", f"--run.dir={tmp_path / 'run'}"),
        *("--rollout.tensor_parallel_size=2", "--rollout.expert_parallel=true", "--reward.function=exact"),
        *("--algorithm.entropy_coefficient=1", "--actor.learning_rate=0.01"),  # nothing is right, so there are no advantages
        *("--trainer.steps=2", "--trainer.prompts_per_step=4", "--trainer.updates_per_step=2", "--rollout.group_size=4"),
        *("--rollout.max_prompt_tokens=64", "--rollout.max_response_tokens=32", "--actor.max_tokens_per_microbatch=512"),
        "--cluster.device=cpu",
    )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["policy/log_ratio_std"] > 0.1
    assert all(0 < row["mismatch/logprob_abs_max"] < 1e-4 for row in rows), rows
    log = (tmp_path / "run" / "logs" / "engine_0.log").read_text()
    assert "Local/global number of experts: 4/8" in log


def test_a_rank_computes_its_own_experts_only():
    """The parts of a routing add up to the whole."""
    torch.manual_seed(0)
    weights, ids = torch.rand(7, 3), torch.stack([torch.randperm(8)[:3] for _ in range(7)]).int()
    outputs = torch.rand(8, 7, 5)  # of every expert for every token

    def combine(weights, ids, experts):
        return sum(weights[:, j, None] * experts[ids[:, j].long(), torch.arange(7)] for j in range(3))

    parts = torch.zeros(7, 5)
    for first in (0, 4):
        places = torch.tensor([e - first if first <= e < first + 4 else -1 for e in range(8)])
        part_weights, part_ids = local_experts(weights, ids, places)
        assert part_ids.dtype == ids.dtype and part_ids.min() >= 0 and part_ids.max() < 4
        parts += combine(part_weights, part_ids, outputs[first : first + 4])
    torch.testing.assert_close(parts, combine(weights, ids, outputs))
