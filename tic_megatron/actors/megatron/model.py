"""Qwen3 as a Megatron-core model that returns log-probs of the response tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from tic_megatron.actors.megatron.logprobs import vocab_parallel_logprobs
from tic_megatron.actors.megatron.specs import qwen3_block_spec
from tic_megatron.config import ActorSettings

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
    """Megatron's configuration of a dense Qwen3 model in the layout of the settings."""
    dtype = DTYPES[settings.precision]
    tp = settings.tensor_parallel_size
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
        add_qkv_bias=hf.attention_bias,
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
        pipeline_model_parallel_size=settings.pipeline_parallel_size,
        # Micro-batches are packed, so each has its own length; Megatron insists on `alltoall` for that, even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        # The loss closure divides by the mini-batch's totals itself; this makes Megatron only sum (see `train_step`).
        calculate_per_token_loss=True,
    )


def build_model(hf: PretrainedConfig, config: TransformerConfig) -> PolicyModel:
    """This rank's part of the model, weights not yet loaded."""
    return PolicyModel(
        config=config,
        transformer_layer_spec=qwen3_block_spec(config),
        vocab_size=hf.vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_parameters["rope_theta"],
    )
