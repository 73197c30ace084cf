"""Where each Megatron parameter of a Qwen3 model, dense or mixture-of-experts, lies in the Hugging Face checkpoint, and how it is
sharded.

One declarative table serves loading, export, weight transfer and checks. A tensor-parallel shard is a contiguous slice of
every Hugging Face tensor that it is made of, so ranks read and send slices only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the Hugging Face checkpoint: its name, full shape, and the dimension that TP shards (None: replicated).

    An expert's tensors are sharded over ETP instead.
    """

    name: str
    shape: Shape
    shard_dim: int | None

    def shard_shape(self, tp_size: int) -> Shape:
        """Shape of one rank's slice."""
        return tuple(n // tp_size if d == self.shard_dim else n for d, n in enumerate(self.shape))

    def shard_slice(self, tp_rank: int, tp_size: int) -> tuple[slice, ...]:
        """Index of one rank's slice."""
        part = [n // tp_size for n in self.shape]
        return tuple(
            slice(tp_rank * part[d], (tp_rank + 1) * part[d]) if d == self.shard_dim else slice(0, n)
            for d, n in enumerate(self.shape)
        )


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter.

    `names` are its possible parameter names (Transformer Engine fuses norms into the linear that follows), with the
    *global* index of layer and expert; `expert` is that index, None outside of experts; `join` makes the local parameter of the
    local slices of `parts`, `split` undoes it.
    """

    names: tuple[str, ...]
    layer: int | None
    parts: tuple[HFTensor, ...]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    expert: int | None = None


def qwen3_weights(hf) -> list[Weight]:
    """All parameters of a Qwen3 model, in the order of the forward pass.

    Args:
        hf: the model's Hugging Face configuration.
    """
    hidden, head_dim = hf.hidden_size, hf.head_dim
    n_q, n_kv = hf.num_attention_heads, hf.num_key_value_heads
    weights = [_single("embedding.word_embeddings.weight", "model.embed_tokens.weight", (hf.vocab_size, hidden), 0)]
    for layer in range(hf.num_hidden_layers):
        to, fro = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention = to + "self_attention."
        input_norm = (to + "input_layernorm.weight", attention + "linear_qkv.layer_norm_weight")
        mlp_norm = (to + "pre_mlp_layernorm.weight", to + "mlp.linear_fc1.layer_norm_weight")
        weights += [
            _single(input_norm, fro + "input_layernorm.weight", (hidden,), None, layer),
            _qkv(attention + "linear_qkv.weight", fro + "self_attn.", hidden, n_q, n_kv, head_dim, layer),
            _single(attention + "q_layernorm.weight", fro + "self_attn.q_norm.weight", (head_dim,), None, layer),
            _single(attention + "k_layernorm.weight", fro + "self_attn.k_norm.weight", (head_dim,), None, layer),
            _single(attention + "linear_proj.weight", fro + "self_attn.o_proj.weight", (hidden, n_q * head_dim), 1, layer),
        ]
        weights.append(_single(mlp_norm, fro + "post_attention_layernorm.weight", (hidden,), None, layer))
        weights += _experts(hf, to, fro, layer) if has_experts(hf, layer) else _mlp(hf, to, fro, layer)
    weights.append(_single("decoder.final_layernorm.weight", "model.norm.weight", (hidden,), None))
    if not hf.tie_word_embeddings:
        weights.append(_single("output_layer.weight", "lm_head.weight", (hf.vocab_size, hidden), 0))
    return weights


def has_experts(hf, layer: int) -> bool:
    """Whether a layer's MLP is a mixture of experts."""
    if not getattr(hf, "num_experts", None):
        return False
    return layer not in (hf.mlp_only_layers or ()) and (layer + 1) % hf.decoder_sparse_step == 0


def _mlp(hf, to: str, fro: str, layer: int) -> list[Weight]:
    shape = (hf.intermediate_size, hf.hidden_size)
    return [
        _gate_up(to + "mlp.linear_fc1.weight", fro + "mlp.", shape, layer),
        _single(to + "mlp.linear_fc2.weight", fro + "mlp.down_proj.weight", shape[::-1], 1, layer),
    ]


def _experts(hf, to: str, fro: str, layer: int) -> list[Weight]:
    """The router and every expert, which are modules of their own or numbered parameters of one grouped multiplication."""
    shape = (hf.moe_intermediate_size, hf.hidden_size)
    weights = [_single(to + "mlp.router.weight", fro + "mlp.gate.weight", (hf.num_experts, hf.hidden_size), None, layer)]
    for e in range(hf.num_experts):
        fc1, fc2 = (
            (f"{to}mlp.experts.local_experts.{e}.{part}.weight", f"{to}mlp.experts.{part}.weight{e}")
            for part in ("linear_fc1", "linear_fc2")
        )
        hf_prefix = f"{fro}mlp.experts.{e}."
        weights += [
            _gate_up(fc1, hf_prefix, shape, layer, e),
            _single(fc2, hf_prefix + "down_proj.weight", shape[::-1], 1, layer, e),
        ]
    return weights


Names = str | tuple[str, ...]


def _single(
    names: Names, hf_name: str, shape: Shape, shard_dim: int | None, layer: int | None = None, expert: int | None = None
) -> Weight:
    part = HFTensor(hf_name, shape, shard_dim)
    return Weight(_tuple(names), layer, (part,), join=lambda parts: parts[0], split=lambda local: [local], expert=expert)


def _gate_up(names: Names, hf_prefix: str, shape: Shape, layer: int, expert: int | None = None) -> Weight:
    """Megatron's fused first MLP matrix: each rank holds its gate rows above its up rows."""
    parts = tuple(HFTensor(f"{hf_prefix}{part}_proj.weight", shape, 0) for part in ("gate", "up"))
    return Weight(_tuple(names), layer, parts, join=torch.cat, split=lambda local: list(local.chunk(2)), expert=expert)


def _tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _qkv(name: str, hf_prefix: str, hidden: int, n_q: int, n_kv: int, head_dim: int, layer: int) -> Weight:
    """Megatron's fused attention input: per KV group its query heads, then its key, then its value."""
    heads = {"q": n_q, "k": n_kv, "v": n_kv}
    parts = tuple(HFTensor(f"{hf_prefix}{p}_proj.weight", (n * head_dim, hidden), 0) for p, n in heads.items())
    per_group = [n_q // n_kv * head_dim, head_dim, head_dim]

    def join(parts: list[Tensor]) -> Tensor:
        grouped = [part.reshape(-1, rows, hidden) for part, rows in zip(parts, per_group, strict=True)]
        return torch.cat(grouped, dim=1).reshape(-1, hidden)

    def split(local: Tensor) -> list[Tensor]:
        groups = local.reshape(-1, sum(per_group), hidden)
        return [part.reshape(-1, hidden) for part in groups.split(per_group, dim=1)]

    return Weight((name,), layer, parts, join, split)


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    """The index of a Hugging Face directory: which of its files a tensor is in."""
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
