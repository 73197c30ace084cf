"""The layouts, models and rollouts of the gradient proof."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.rollouts import random_rollout
from tic_megatron.config import AlgorithmSettings, Settings
from tic_megatron.trajectory import Group

FULL = (pytest.mark.slow, pytest.mark.repeat)
"""Marks of the cases beside the chosen few that have every dimension: run by `scripts/test.sh --full` alone."""
OBJECTIVES = ("tic_grpo", "grpo", "gspo")
"""One of each family: a trajectory, a token, a length-normalised ratio."""
CLIP = (0.2, 0.28)
N_UPDATES = 2
MAX_RESPONSE = 40
TEMPERATURE = 0.8
VOCABULARY = 160


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions, and the settings beside them that change what runs where."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    options: dict = field(default_factory=dict, hash=False)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def sizes(self) -> dict[str, int]:
        return {name: size for name, size in asdict(self).items() if name != "options"}

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{size}" for name, size in self.sizes.items() if size > 1) or "one-process"
        return "-".join([sizes, *(f"{name}={value}" for name, value in self.options.items())])


DENSE = [
    Layout(),
    Layout(options={"recompute": "full"}),
    Layout(options={"recompute": "selective"}),
    Layout(tp=2),
    Layout(tp=2, options={"sequence_parallel": False}),
    Layout(tp=4, etp=4),
    Layout(pp=2),
    Layout(pp=4),
    Layout(pp=2, options={"layers_in_first_stage": 1}),
    Layout(pp=2, options={"layers_in_last_stage": 1}),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
    Layout(cp=4),
    Layout(dp=2),
    Layout(dp=8),
    Layout(tp=2, pp=2),
    Layout(tp=2, cp=2, options={"recompute": "full"}),
    Layout(pp=2, cp=2),
    Layout(cp=2, dp=2),
    Layout(pp=2, vpp=2, dp=2),
    Layout(tp=2, pp=2, cp=2),
    Layout(tp=2, pp=2, dp=2),
    Layout(tp=2, cp=2, dp=2),
    Layout(tp=2, pp=2, vpp=2, cp=2),
]
EXPERTS = [
    Layout(),
    Layout(options={"recompute": "full"}),
    Layout(tp=2, etp=2),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
    Layout(ep=2, dp=2),
    Layout(ep=2, cp=2),
    Layout(ep=4, dp=4),
    Layout(tp=2, ep=2, etp=1, dp=2),
    Layout(tp=2, ep=2, etp=2, dp=2),
    Layout(tp=2, ep=4, etp=1, dp=2),
    Layout(pp=2, ep=2, dp=2),
    Layout(pp=2, vpp=2, ep=2, cp=2),
    Layout(ep=2, dp=4),
    Layout(ep=2, cp=2, dp=2),
    Layout(tp=2, pp=2, ep=2, etp=1, dp=2),
    Layout(tp=2, pp=2, ep=2, etp=2, cp=2),
]
FAST = {"untied": {"one-process", "cp2", "pp2-vpp2", "tp2-pp2", "dp2"}, "experts": {"one-process", "cp2-ep2", "ep2-dp2"}}
"""What the fast tier proves."""
MODELS = {"tied": DENSE, "untied": DENSE, "experts": EXPERTS, "one expert": [Layout(ep=2, dp=2), Layout(ep=2, cp=2)]}
"""The models and the layouts that each is proved for. In `one expert` every token of every layer goes to the same expert."""


def settings_of(layout: Layout, objective: str, *, max_tokens: int, **actor) -> Settings:
    settings = Settings()
    settings.cluster.gpus_per_node = layout.world_size
    low, high = CLIP
    settings.algorithm = AlgorithmSettings(objective=objective, eps_low=None if objective == "tic_grpo" else low, eps_high=high)
    settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens = 40, MAX_RESPONSE
    settings.rollout.temperature = TEMPERATURE
    a = settings.actor
    a.tensor_parallel_size, a.pipeline_parallel_size, a.virtual_pipeline_parallel_size = layout.tp, layout.pp, layout.vpp
    a.context_parallel_size, a.expert_parallel_size, a.expert_tensor_parallel_size = layout.cp, layout.ep, layout.etp
    # SGD at rate 0: the proof looks at gradients, and sets the parameters of the second update itself.
    a.optimizer, a.distributed_optimizer, a.learning_rate, a.grad_clip = "sgd", False, 0.0, 0.0
    a.max_tokens_per_microbatch, a.logprob_chunk_tokens = max_tokens, 37
    for key, value in (layout.options | actor).items():
        setattr(a, key, value)
    return settings


def rollout(kind: str) -> list[Group]:
    """`many` trajectories in both updates; `few`: fewer than ranks, in the second update one group only."""
    n_prompts = {"many": 10, "few": 2}[kind]
    groups = random_rollout(seed=3, n_prompts=n_prompts, group_size=3, vocab=VOCABULARY)
    if kind == "few":
        for group in groups:
            for t, reward in zip(group.trajectories, (1.0, 0.0, 0.0), strict=True):
                t.reward, t.advantage = reward, reward - 1 / 3
    return groups


def make_model(directory: Path, name: str) -> dict[str, str]:
    """The model at theta_old and, a little away from it, at theta: their directories."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.06,
        "tie_word_embeddings": name == "tied",
    }
    torch.manual_seed(5)
    if "expert" in name:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common,
                num_experts=4,
                num_experts_per_tok=1 if name == "one expert" else 2,
                moe_intermediate_size=48,
                norm_topk_prob=name == "experts",
                mlp_only_layers=[1],
                router_aux_loss_coef=0.0,
            )
        )
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
        if name == "one expert":
            _favour_first_expert(model)
        paths = {"old": str(directory / "old"), "new": str(directory / "new")}
        model.save_pretrained(paths["old"])
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02 * parameter.square().mean().sqrt())
        model.save_pretrained(paths["new"])
    return paths


def _favour_first_expert(model) -> None:
    """A direction that all tokens share, and that the first expert's row of each router points to."""
    model.model.embed_tokens.weight[:, 0] = 0.7
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.weight.mul_(0.1)
            layer.mlp.gate.weight[:, 0] = torch.tensor([0.25, -0.25, -0.25, -0.25])
