"""Make the quickstart's task: a small Qwen3 that half knows two-digit addition, and the problems to learn the rest from.

    python examples/quickstart/make_task.py --out DIR --seed 0

writes `DIR/model/` (Hugging Face format: model, tokenizer, chat template; `--experts 4` makes a mixture-of-experts model),
`DIR/train.jsonl` (9,500 problems) and
`DIR/eval.jsonl` (500 others). A model that never answers right gets no reward to learn from, so it is first taught on 2,500
of the training problems, up to a sampled accuracy of 0.30 on problems that it was not taught. The same seed gives the same
bytes on the same machine. Nothing but torch, tokenizers and transformers is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

PAD, EOS = "<|endoftext|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 320
# The merges come from here. Addition needs none; other problems (English, LaTeX) become a little shorter.
CORPUS = (
    "Find the number of positive integers less than 1000 that are divisible by the sum of the digits.",
    "Let $x$ and $y$ be real numbers such that $x^2 + y^2 = 1$. What is the value of $\\frac{x}{y}$?",
    "The area of the triangle in the plane can be written in the form $\\frac{m}{n}$, where $m$ and $n$ are integers.",
)

N_EVAL, N_TAUGHT, N_CHECKED = 500, 2500, 1000
TARGET_ACCURACY, TOLERANCE = 0.30, 0.005
MAX_WARM_START_STEPS = 2000
BATCH_SIZE, LEARNING_RATE, LR_WARMUP_STEPS = 64, 2e-3, 20
# Checks cost as much as five steps: they begin when the batches' own accuracy, averaged over about ten steps, is this high.
CHECK_FROM_ACCURACY, CHECK_EVERY = 0.15, 5


class Problem(NamedTuple):
    """A user message, such as `12+34=`, and the response that answers it, `46`."""

    text: str
    answer: str


class Encoded(NamedTuple):
    """Problems with their answers as tokens, padded on the right.

    tokens: [N, L] prompt, answer, end token; targets: [N, L] bool, True where a token belongs to the answer or ends it.
    """

    tokens: Tensor
    targets: Tensor


def make_problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """All 10,000 sums of two numbers from 0 to 99 in random order, split into those for training and 500 held-out ones."""
    problems = [Problem(f"{a}+{b}=", str(a + b)) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(problems)
    return problems[N_EVAL:], problems[:N_EVAL]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens: special tokens, 256 bytes, merges; each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, chat_template=CHAT_TEMPLATE, model_max_length=4096
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, experts: int = 0) -> PreTrainedModel:
    """A random Qwen3 whose heads, layers and vocabulary divide by 2 (key-value heads) or 4 (all else).

    With `experts`, a mixture-of-experts one, of which each token uses two that are together as large as the dense MLP.
    """
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.08,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    if experts:
        config = Qwen3MoeConfig(
            **sizes, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=224, norm_topk_prob=True
        )
        model: PreTrainedModel = Qwen3MoeForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> Encoded:
    """Apply the chat template to the problems and append the answers."""
    prompts, rows = [], []
    for problem in problems:
        message = {"role": "user", "content": problem.text}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
        prompts.append(len(prompt))
        rows.append([*prompt, *tokenizer.encode(problem.answer, add_special_tokens=False), tokenizer.eos_token_id])
    length = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    position = torch.arange(length)
    start, end = torch.tensor(prompts)[:, None], torch.tensor([len(row) for row in rows])[:, None]
    return Encoded(tokens, (position >= start) & (position < end))


def answer_logprobs(model: PreTrainedModel, batch: Encoded) -> tuple[Tensor, Tensor]:
    """Log-probs of the answers' tokens and whether each is the likeliest one.

    Returns [N, L-1] float, 0 outside of the answers, and [N, L-1] bool, True outside. The padding is on the right, where a
    causal model's answers don't see it, so no attention mask is needed.
    """
    logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
    targets, inside = batch.tokens[:, 1:], batch.targets[:, 1:]
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return torch.where(inside, logprobs, 0.0), (logits.argmax(-1) == targets) | ~inside


@torch.no_grad()
def accuracy(model: PreTrainedModel, batch: Encoded) -> tuple[float, float]:
    """Sampled accuracy at temperature 1 (in expectation: the mean probability of the answers) and greedy accuracy."""
    sampled, greedy = [], []
    for tokens, targets in zip(batch.tokens.split(250), batch.targets.split(250), strict=True):
        logprobs, likeliest = answer_logprobs(model, Encoded(tokens, targets))
        sampled.append(logprobs.sum(-1).exp())
        greedy.append(likeliest.all(-1).float())
    return torch.cat(sampled).mean().item(), torch.cat(greedy).mean().item()


def teach(model: PreTrainedModel, taught: Encoded, *, max_steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Supervised training. Yields after each step its number and the batches' sampled accuracy, averaged over about ten."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    running_accuracy = 0.0
    for step in range(1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / LR_WARMUP_STEPS)
        rows = torch.randint(len(taught.tokens), (BATCH_SIZE,), generator=generator)
        batch = Encoded(taught.tokens[rows], taught.targets[rows])
        logprobs, _ = answer_logprobs(model, batch)
        optimizer.zero_grad()
        (-logprobs.sum() / batch.targets.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running_accuracy += 0.1 * (logprobs.detach().sum(-1).exp().mean().item() - running_accuracy)
        yield step, running_accuracy


def step_back(model: PreTrainedModel, before: dict[str, Tensor], checked: Encoded) -> None:
    """Set the weights to the point between `before` and the present ones that has the target accuracy.

    Near the target a few steps change the accuracy by 0.05. Accuracy is continuous along the line and crosses the target, so
    bisection finds the crossing.
    """
    after = copy.deepcopy(model.state_dict())
    low, high, sampled = 0.0, 1.0, 1.0
    while abs(sampled - TARGET_ACCURACY) > TOLERANCE and high - low > 1e-3:
        middle = (low + high) / 2
        model.load_state_dict({name: before[name].lerp(after[name], middle) for name in before})
        sampled, _ = accuracy(model, checked)
        low, high = (middle, high) if sampled < TARGET_ACCURACY else (low, middle)


def warm_start(model: PreTrainedModel, taught: Encoded, checked: Encoded, *, max_steps: int, seed: int) -> bool:
    """Teach up to the target accuracy on the checked problems, which are not taught; returns False if `max_steps` come first."""
    before, start, reached = copy.deepcopy(model.state_dict()), time.monotonic(), False
    for step, running_accuracy in teach(model, taught, max_steps=max_steps, seed=seed):
        show(f"warm start: step {step}, accuracy on the taught {running_accuracy:.2f}, {time.monotonic() - start:.0f} s")
        if step % CHECK_EVERY or running_accuracy < CHECK_FROM_ACCURACY:
            continue
        reached = accuracy(model, checked)[0] >= TARGET_ACCURACY
        if reached:
            step_back(model, before, checked)
            break
        before = copy.deepcopy(model.state_dict())
    sampled, greedy = accuracy(model, checked)
    seconds = time.monotonic() - start
    show(f"warm start: {step} steps in {seconds:.0f} s, sampled accuracy {sampled:.3f}, greedy {greedy:.3f}", last=True)
    return reached


def show(line: str, *, last: bool = False) -> None:
    """Print a progress line over the previous one; where the output is not a terminal, only the last one."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
    elif last:
        print(line, flush=True)


def write_problems(path: Path, problems: list[Problem], split: str) -> None:
    """Write one JSON object per line: id, problem, answer."""
    rows = ({"id": f"{split}-{i}", "problem": problem.text, "answer": problem.answer} for i, problem in enumerate(problems))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_task(out: Path, *, seed: int, experts: int = 0, max_warm_start_steps: int | None = None) -> bool:
    """Make the task in the folder `out`, which must not exist yet. Returns whether the warm start reached its accuracy."""
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    train, held_out = make_problems(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed, experts)
    taught = encode(tokenizer, train[:N_TAUGHT])
    checked = encode(tokenizer, train[N_TAUGHT : N_TAUGHT + N_CHECKED])
    reached = warm_start(model, taught, checked, max_steps=max_warm_start_steps or MAX_WARM_START_STEPS, seed=seed)
    # Written beside and then renamed: the folder, once it is there, is complete.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    write_problems(partial / "train.jsonl", train, "train")
    write_problems(partial / "eval.jsonl", held_out, "eval")
    partial.rename(out)
    return reached


def main() -> int:
    """Parse the command line, make the task; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the quickstart's model and problems (two-digit addition).")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="fixes the problems' split, the weights and the warm start")
    parser.add_argument("--experts", type=int, default=0, help="make a mixture-of-experts model with so many experts per layer")
    parser.add_argument("--max-warm-start-steps", type=int, help="end the warm start after so many steps, whatever the accuracy")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out: {args.out} exists already; remove it or name another folder")
    if args.experts == 1 or args.experts < 0:
        parser.error(f"--experts: {args.experts} is not a number of experts of which each token uses two; 0 is a dense model")
    if args.max_warm_start_steps is not None and args.max_warm_start_steps < 1:
        parser.error(f"--max-warm-start-steps: {args.max_warm_start_steps} is not a positive number")
    reached = make_task(args.out, seed=args.seed, experts=args.experts, max_warm_start_steps=args.max_warm_start_steps)
    if reached or args.max_warm_start_steps:
        return 0
    print(f"make_task.py: the warm start did not reach {TARGET_ACCURACY} sampled accuracy; try another --seed", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
