"""Layer specs of Qwen3: Transformer Engine's modules where it is there, our own otherwise."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn

from tic_megatron.actors.megatron.attention import PackedAttention

if not moe_utils.HAVE_TE:
    moe_utils.te_general_gemm = None  # the router looks for it, but only Transformer Engine's import defines it


class RMSNorm(nn.Module):
    """RMS normalisation over the last dimension, computed in fp32 (Qwen3's rounding), weight in the model's dtype.

    Under sequence parallelism every TP rank sees other tokens, so its gradient is a partial sum: the attribute
    `sequence_parallel` of the weight makes Megatron add them up.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)
        return self.weight * normed


def transformer_engine_available() -> bool:
    """Whether Transformer Engine and a CUDA device are there."""
    return torch.cuda.is_available() and transformer_engine_problem() is None


@functools.cache
def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be imported; None where it can."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:  # also one that was built for another torch
        return str(error).strip().partition("\n")[0]
    return None


def qwen3_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Spec of the layers of one part of this pipeline stage.

    fp32 arithmetic keeps our own modules on CUDA too: Transformer Engine has no `thd` attention for it.
    """
    te = transformer_engine_available() and config.params_dtype != torch.float32
    make = _transformer_engine_layer if te else _own_layer
    layers = {with_experts: make(config, with_experts=with_experts) for with_experts in set(experts_by_layer(config))}
    norm = next(iter(layers.values())).submodules.self_attention.submodules.q_layernorm
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    here = experts_by_layer(config)[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(layer_specs=[layers[with_experts] for with_experts in here], layer_norm=norm)


def experts_by_layer(config: TransformerConfig) -> list[bool]:
    """Whether each layer of the model is a mixture of experts."""
    return [bool(flag) for flag in config.moe_layer_freq] if config.num_moe_experts else [False] * config.num_layers


def _transformer_engine_layer(config: TransformerConfig, *, with_experts: bool) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if with_experts else None, moe_grouped_gemm=with_experts, qk_layernorm=True
    )


def _own_layer(config: TransformerConfig, *, with_experts: bool) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    matrices = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if with_experts:
        experts = ModuleSpec(module=SequentialMLP, submodules=matrices)
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    else:
        mlp = ModuleSpec(module=MLP, submodules=matrices)
    # One set of checkpoint names for both kinds of layer: Transformer Engine fuses these norms into the linears.
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not with_experts:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )
