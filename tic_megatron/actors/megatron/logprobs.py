"""Log-probabilities of given tokens from hidden states, with the vocabulary sharded over the tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of the same distribution.

    The logits exist for `chunk_tokens` tokens at a time and are computed again in the backward pass. Each rank reduces
    its own columns to four numbers per token (maximum, sum of exponentials, target logit, exponential-weighted sum of
    logits); one all-gather of those is the only communication. Everything from the logits on is fp32.

    Args:
        hidden: [n, hidden_size] final hidden states, the same on every rank of `group`. Its gradient is this rank's part
            of a sum over `group` (the caller's gather adds the parts up).
        weight: [vocab / ranks, hidden_size] this rank's rows of the output matrix, in rank order.
        targets: [n] token ids, of the whole vocabulary.
        temperature: sampling temperature, > 0.
        chunk_tokens: tokens whose logits exist at the same time.
        group: tensor-parallel group, or None for one rank.

    Returns:
        (logprobs [n], entropy [n]), fp32, the same on every rank.
    """
    return _VocabParallelLogProbs.apply(hidden, weight, targets, temperature, chunk_tokens, group)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk_tokens, group):
        vocab_start = weight.shape[0] * (group.rank() if group is not None else 0)
        local = targets - vocab_start  # [n], the target's row on this rank, if it is there
        stats = hidden.new_empty((4, hidden.shape[0]), dtype=torch.float32)
        for rows in _chunks(hidden.shape[0], chunk_tokens):
            logits = _logits(hidden[rows], weight, temperature)  # [chunk, vocab / ranks]
            maximum = logits.amax(dim=-1)
            exps = torch.exp(logits - maximum[:, None])
            stats[0, rows] = maximum
            stats[1, rows] = exps.sum(dim=-1)
            stats[2, rows] = _target_logit(logits, local[rows])
            stats[3, rows] = (exps * logits).sum(dim=-1)
        log_sum_exp, target_logit, mean_logit = _combine(_all_gather(stats, group))
        entropy = log_sum_exp - mean_logit
        ctx.save_for_backward(hidden, weight, local, log_sum_exp, entropy)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return target_logit - log_sum_exp, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, local, log_sum_exp, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(hidden.shape[0], ctx.chunk_tokens):
            log_p = _logits(hidden[rows], weight, ctx.temperature) - log_sum_exp[rows, None]
            p = torch.exp(log_p)
            # d logprob / d logit = 1{target} - p;  d entropy / d logit = -p (log p + entropy)
            grad = -p * (grad_logprobs[rows, None] + grad_entropy[rows, None] * (log_p + entropy[rows, None]))
            _add_at_target(grad, local[rows], grad_logprobs[rows])
            grad = (grad / ctx.temperature).to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += (grad.t() @ hidden[rows]).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (hidden @ weight.t()).float() / temperature


def _on_this_rank(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    here = (local >= 0) & (local < logits.shape[-1])
    return here, local.clamp(0, logits.shape[-1] - 1)[:, None]


def _target_logit(logits: Tensor, local: Tensor) -> Tensor:
    here, column = _on_this_rank(logits, local)
    return torch.where(here, logits.gather(-1, column).squeeze(-1), 0.0)


def _add_at_target(grad: Tensor, local: Tensor, value: Tensor) -> None:
    here, column = _on_this_rank(grad, local)
    grad.scatter_add_(-1, column, torch.where(here, value, 0.0)[:, None])


def _all_gather(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[4, n] of each rank -> [ranks, 4, n]."""
    if group is None or group.size() == 1:
        return stats[None]
    gathered = stats.new_empty((group.size(), *stats.shape))
    dist.all_gather_into_tensor(gathered.flatten(0, 1), stats, group=group)
    return gathered


def _combine(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[ranks, 4, n] -> (log-sum-exp, target logit, mean logit), each [n]."""
    maximum, exp_sum, target_logit, weighted_sum = stats.unbind(dim=1)
    overall = maximum.amax(dim=0)
    scale = torch.exp(maximum - overall)
    total = (exp_sum * scale).sum(dim=0)
    return overall + torch.log(total), target_logit.sum(dim=0), (weighted_sum * scale).sum(dim=0) / total
