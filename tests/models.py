"""Small Qwen3 models in Hugging Face format, made on the spot for the tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = ("What is 12 + 34? It is 46.", "Solve the problem step by step.", "The answer is \\boxed{7}.")


def make_tokenizer(directory: str | Path, *, vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer of at most `vocab_size` (260 or more) tokens with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END_OF_TEXT)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return fast


def make_tiny_qwen3(
    directory: str | Path,
    *,
    seed: int,
    tie_word_embeddings: bool,
    vocab_size: int = 320,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    max_position_embeddings: int = 1024,
    initializer_range: float = 0.2,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a randomly initialized `Qwen3ForCausalLM` and its tokenizer to `directory`, in Hugging Face format.

    The same arguments give the same bytes. The weights are large (`initializer_range`) and the norms' weights random, so that
    log-probs are far from uniform and a missing or swapped tensor shows up in them. vLLM's CPU attention needs a `head_dim`
    that is a multiple of 32. Returns `directory`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(directory, vocab_size=vocab_size)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        initializer_range=initializer_range,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(dtype).save_pretrained(directory)
    return directory


@torch.no_grad()
def response_logprobs(model: Qwen3ForCausalLM, prompt_ids: list[int], response_ids: list[int], temperature: float) -> list[float]:
    """Log-probs that transformers gives the response's tokens, at a sampling temperature: the reference for everything else."""
    logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(response_ids)[:, None])[:, 0].tolist()
