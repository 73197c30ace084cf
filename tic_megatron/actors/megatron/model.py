"""Qwen3 as a Megatron-core model that returns log-probs of the response tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from tic_megatron.actors.megatron.logprobs import vocab_parallel_logprobs
from tic_megatron.actors.megatron.specs import qwen3_block_spec, transformer_engine_available
from tic_megatron.config import ActorSettings
from tic_megatron.weights.names import has_experts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ResponseTokens:
    """Which positions of a packed sequence predict response tokens.

    `positions` [n]: index into the packed sequence of the token *before* each response token; `targets` [n]: the response
    tokens' ids; `temperature`: that of the sampling; `chunk_tokens`: tokens whose logits exist at the same time.
    """

    positions: Tensor
    targets: Tensor
    temperature: float
    chunk_tokens: int


class PolicyModel(GPTModel):
    """GPTModel whose last stage maps hidden states straight to log-probs, so the logits of a micro-batch never exist."""

    def _postprocess(self, hidden_states: Tensor, *args, labels: ResponseTokens | None = None, **kwargs):
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # Every rank's vocabulary shard adds to the gradient of every token: reduce-scatter in the backward pass.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=group
            )
        else:
            hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=group)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return vocab_parallel_logprobs(
            hidden_states[:, 0].index_select(0, labels.positions),
            self.output_layer.weight if weight is None else weight,
            labels.targets,
            temperature=labels.temperature,
            chunk_tokens=labels.chunk_tokens,
            group=group,
        )


def transformer_config(hf: PretrainedConfig, settings: ActorSettings) -> TransformerConfig:
    """Megatron's configuration of a Qwen3 model in the layout of the settings."""
    dtype = DTYPES[settings.precision]
    tp, pp, vpp = settings.tensor_parallel_size, settings.pipeline_parallel_size, settings.virtual_pipeline_parallel_size
    first, last = settings.layers_in_first_stage, settings.layers_in_last_stage
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=tp,
        sequence_parallel=settings.sequence_parallel and tp > 1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        # Of two stages the second has the rest; told both, Megatron's interleaving divides the other layers by no stages.
        num_layers_in_last_pipeline_stage=None if pp == 2 and first is not None else last,
        context_parallel_size=settings.context_parallel_size,
        # Micro-batches are packed, so each has its own length; Megatron insists on `alltoall` for that, even without experts.
        # Its interleaved schedule cannot do it: there all micro-batches of an update are padded to one length.
        variable_seq_lengths=vpp == 1,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        # The loss closure divides by the mini-batch's totals itself; this makes Megatron only sum (see `MegatronBackend.update`).
        calculate_per_token_loss=True,
        **_recompute_options(settings.recompute),
        **(_expert_options(hf, settings) if getattr(hf, "num_experts", None) else {}),
    )


def _recompute_options(recompute: str) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _expert_options(hf: PretrainedConfig, settings: ActorSettings) -> dict[str, Any]:
    return {
        "num_moe_experts": hf.num_experts,
        "moe_layer_freq": [int(has_experts(hf, layer)) for layer in range(hf.num_hidden_layers)],
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_router_topk": hf.num_experts_per_tok,
        # Qwen3 normalises the chosen experts' probabilities: the softmax of the chosen logits. Without, it is of all logits.
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": transformer_engine_available() and settings.precision != "fp32",
        "expert_model_parallel_size": settings.expert_parallel_size,
        "expert_tensor_parallel_size": settings.experts_tensor_parallel,
    }


def build_model(hf: PretrainedConfig, config: TransformerConfig) -> list[PolicyModel]:
    """This rank's parts of the model, weights not yet loaded: one, or several with interleaved pipeline stages."""
    n_parts = config.virtual_pipeline_model_parallel_size
    return [_build_part(hf, config, part) for part in (range(n_parts) if n_parts else [None])]


def _build_part(hf: PretrainedConfig, config: TransformerConfig, vp_stage: int | None) -> PolicyModel:
    return PolicyModel(
        config=config,
        transformer_layer_spec=qwen3_block_spec(config, vp_stage),
        vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_parameters["rope_theta"],
        vp_stage=vp_stage,
    )
