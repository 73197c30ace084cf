"""The reference of the gradient proof: transformers and autograd, in one process, in float64, one trajectory after another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.layouts.cases import CLIP, MAX_RESPONSE, N_UPDATES, TEMPERATURE
from tic_megatron.trajectory import Group, Trajectory


@dataclass
class Reference:
    """One update at theta with samples of theta_old: value, gradient by Hugging Face name, its norm, L_i, mean entropy."""

    value: float
    gradient: dict[str, Tensor]
    norm: float
    log_ratio: list[float]
    entropy: float


def second_update(paths: dict[str, str], groups: list[Group], objective: str, *, replay: bool = False) -> Reference:
    """The second of the rollout's updates; the parameters are those of the model `new`.

    With `replay` its tokens go to the experts that the model `old` sends them to.
    """
    old_model = load_float64(paths["old"])
    model = load_float64(paths["new"])
    if replay:
        _replay_routing(old_model, model)
    part = groups[len(groups) // N_UPDATES :]
    n = sum(len(group.trajectories) for group in part)
    trained = [t for group in part if len({t.reward for t in group.trajectories}) > 1 for t in group.trajectories]
    value, log_ratio, entropies = torch.zeros((), dtype=torch.float64), [], []
    for trajectory in trained:
        with torch.no_grad():
            before, _ = _logprobs(old_model, trajectory)
        after, entropy = _logprobs(model, trajectory)
        delta = after - before
        value = value + _term(objective, delta, trajectory.advantage) / n
        log_ratio.append(delta.sum().item())
        entropies += entropy.tolist()
    (-value).backward()
    gradient = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient |= _as_in_checkpoints(name, grad)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
    return Reference(value.item(), gradient, norm, sorted(log_ratio), math.fsum(entropies) / len(entropies))


def load_float64(path: str):
    """A model by transformers, in float64, its routers too (transformers takes their softmax in fp32, whatever the model)."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    model.config._experts_implementation = "eager"
    for router in _routers(model):
        router.forward = partial(_route, router)
    return model


def _routers(model) -> list:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def _route(router, hidden: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers' router returns: logits, the chosen experts' weights, and their numbers, which may be given."""
    logits = torch.nn.functional.linear(hidden, router.weight)
    probabilities = logits.softmax(-1)
    if experts is None:
        experts = probabilities.topk(router.top_k, dim=-1).indices
    scores = probabilities.gather(-1, experts)
    if router.norm_topk_prob:
        scores = scores / scores.sum(-1, keepdim=True)
    return logits, scores, experts


def _replay_routing(old_model, model) -> None:
    """Have the routers of `model` choose what those of `old_model` chose for the sequence before."""
    for old_router, router in zip(_routers(old_model), _routers(model), strict=True):
        chosen: dict[str, Tensor] = {}
        old_router.register_forward_hook(lambda module, args, output, chosen=chosen: chosen.update(experts=output[2]))
        router.forward = lambda hidden, router=router, chosen=chosen: _route(router, hidden, chosen["experts"])


def _term(objective: str, delta: Tensor, advantage: float) -> Tensor:
    low, high = CLIP
    if objective == "tic_grpo":
        return torch.minimum(delta.sum().exp(), torch.tensor(1 + high)) * advantage / MAX_RESPONSE
    ratio = delta.exp() if objective == "grpo" else delta.mean().exp()[None]
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage).mean()


def _logprobs(model, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Log-probs of the response's tokens, and the entropies."""
    ids = torch.tensor([trajectory.tokens])
    start = len(trajectory.prompt.token_ids)
    log_p = (model(ids).logits[0, start - 1 : -1] / TEMPERATURE).log_softmax(-1)
    return log_p.gather(-1, ids[0, start:, None])[:, 0], -(log_p.exp() * log_p).sum(-1).detach()


def _as_in_checkpoints(name: str, grad: Tensor) -> dict[str, Tensor]:
    """transformers keeps a layer's experts in one tensor; checkpoints have them one by one."""
    prefix, _, kind = name.rpartition(".")
    if kind == "down_proj" and grad.dim() == 3:
        return {f"{prefix}.{e}.down_proj.weight": g for e, g in enumerate(grad)}
    if kind == "gate_up_proj":
        return {
            f"{prefix}.{e}.{part}_proj.weight": half
            for e, both in enumerate(grad)
            for part, half in zip(("gate", "up"), both.chunk(2), strict=True)
        }
    return {name: grad}
