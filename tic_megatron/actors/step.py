"""What a training rank does with a rollout, whatever the backend: packed inputs, old log-probs, loss closure, statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tic_megatron.actors.stats import MismatchStats, UpdateResult, UpdateStats
from tic_megatron.algorithms import OBJECTIVES
from tic_megatron.algorithms.normalisers import Totals
from tic_megatron.algorithms.objectives import objective_terms
from tic_megatron.algorithms.ratios import Segments
from tic_megatron.config import Settings
from tic_megatron.trajectory import MicroBatch, MiniBatch


@dataclass(frozen=True)
class PackedInputs:
    """A micro-batch as tensors: sequences one after another, plus alignment tokens as a last sequence.

    `input_ids`, `position_ids` [tokens]; `lengths`: tokens of each sequence; `positions` [n]: index of the token before each
    response token; `targets` [n]: the response tokens; `trajectory` [n]: which trajectory each belongs to;
    `response_lengths`, `advantages` [n_trajectories]; `inference_logprobs` [n]: the generator's.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    positions: Tensor
    targets: Tensor
    trajectory: Tensor
    response_lengths: Tensor
    advantages: Tensor
    inference_logprobs: Tensor

    @property
    def segments(self) -> Segments:
        """The trajectories of the response tokens."""
        return Segments(self.trajectory, self.response_lengths)


def pack_inputs(micro_batch: MicroBatch, *, alignment: int, device: torch.device) -> PackedInputs:
    """Tensors of a micro-batch; its length is a positive multiple of `alignment`, so an empty one has a dummy sequence."""
    tokens: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    inference: list[float] = []
    lengths: list[int] = []
    for i, trajectory in enumerate(micro_batch.trajectories):
        start = len(tokens) + len(trajectory.prompt.token_ids)
        for t, sampled in enumerate(trajectory.response_mask):
            if sampled:
                positions.append(start + t - 1)
                targets.append(trajectory.response_ids[t])
                owner.append(i)
                inference.append(trajectory.inference_logprobs[t])
        tokens += trajectory.tokens
        lengths.append(len(trajectory.tokens))
    padding = -len(tokens) % alignment if tokens else alignment
    if padding:
        tokens += [0] * padding
        lengths.append(padding)

    def tensor(values, dtype=torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return PackedInputs(
        input_ids=tensor(tokens),
        position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
        lengths=lengths,
        positions=tensor(positions),
        targets=tensor(targets),
        trajectory=tensor(owner),
        response_lengths=tensor([t.response_length for t in micro_batch.trajectories]),
        advantages=tensor([t.advantage for t in micro_batch.trajectories], torch.float64),
        inference_logprobs=tensor(inference, torch.float32),
    )


LossClosure = Callable[[int, Tensor, Tensor], Tensor]
"""(micro-batch index, log-probs [n], entropy [n]) -> loss to minimise, a scalar that is summed over micro-batches and ranks."""


class Backend(Protocol):
    """What `PolicyStep` needs of a training backend."""

    device: torch.device
    alignment: int
    data_parallel_rank: int
    has_logprobs: bool
    """Whether this rank computes log-probs (the last pipeline stage)."""
    reports: bool
    """Whether this rank reports statistics: one rank per data-parallel shard, among those with log-probs."""

    def forward(self, inputs: list[PackedInputs]) -> list[Tensor]:
        """Log-probs of each micro-batch without gradient; empty list where there are none."""
        ...

    def update(self, inputs: list[PackedInputs], loss: LossClosure) -> UpdateResult:
        """Forward and backward of every micro-batch and one optimizer step."""
        ...


class PolicyStep:
    """One rollout on one rank: `load`, then `old_logprobs`, then `update(0)` ... `update(K - 1)`, in this order."""

    def __init__(self, backend: Backend, settings: Settings):
        self.backend = backend
        self.settings = settings
        self.objective = OBJECTIVES[settings.algorithm.objective]
        self.clip_range = self.objective.clip_range(settings.algorithm.eps_low, settings.algorithm.eps_high)

    def load(self, mini_batches: list[MiniBatch]) -> None:
        """Take this rank's share of a rollout; the packing is kept for all its passes."""
        self.mini_batches = mini_batches
        self.inputs = [
            [pack_inputs(m, alignment=self.backend.alignment, device=self.backend.device) for m in batch.micro_batches]
            for batch in mini_batches
        ]
        self.old: dict[int, list[Tensor]] = {}
        self.mismatch = MismatchStats()

    def old_logprobs(self, *, check_noise: bool) -> None:
        """Log-probs at theta_old of all mini-batches but the first, by forward-only passes.

        The first mini-batch is updated at theta_old itself, so its own log-probs, detached, are the old ones, and the pass
        is saved. With `check_noise` it is made all the same, to be compared with the training forward.
        """
        for k in range(0 if check_noise else 1, len(self.inputs)):
            self.old[k] = self.backend.forward(self.inputs[k])
        for k in range(1, len(self.inputs)):
            for inputs, old in zip(self.inputs[k], self.old[k], strict=False):
                self._add_mismatch(inputs, old)

    def update(self, k: int) -> UpdateStats | None:
        """One optimizer update on mini-batch k; None on ranks that report nothing."""
        stats = UpdateStats()
        totals = Totals(
            self.mini_batches[k].n_trajectories,
            self.mini_batches[k].n_tokens,
            self.settings.rollout.max_response_tokens,
        )

        def loss(index: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
            inputs = self.inputs[k][index]
            old = self._first_old_logprobs(index, logprobs.detach(), stats) if k == 0 else self.old[k][index]
            terms = objective_terms(
                self.objective,
                logprobs,
                old,
                inputs.segments,
                inputs.advantages,
                totals,
                self.clip_range,
            )
            stats.value += terms.value.item()
            stats.entropy_sum += entropy.detach().double().sum().item()
            stats.n_tokens += logprobs.numel()
            stats.log_ratio += terms.log_ratio.tolist()
            stats.capped += terms.capped.tolist()
            return -terms.value

        stats.result = self.backend.update(self.inputs[k], loss)
        return stats if self.backend.reports else None

    def _first_old_logprobs(self, index: int, own: Tensor, stats: UpdateStats) -> Tensor:
        """Old log-probs of the first mini-batch: its own. Compares them with the forward-only pass where there was one."""
        inputs = self.inputs[0][index]
        self._add_mismatch(inputs, own)
        if 0 in self.old:
            noise = inputs.segments.sum(own - self.old[0][index]).abs()
            stats.noise = max(stats.noise or 0.0, noise.max().item() if noise.numel() else 0.0)
        return own

    def _add_mismatch(self, inputs: PackedInputs, trainer_logprobs: Tensor) -> None:
        difference = trainer_logprobs - inputs.inference_logprobs
        if difference.numel() == 0:
            return
        self.mismatch.abs_sum += difference.abs().double().sum().item()
        self.mismatch.abs_max = max(self.mismatch.abs_max, difference.abs().max().item())
        self.mismatch.n_tokens += difference.numel()
        self.mismatch.trajectory_log_ratio += inputs.segments.sum(difference).tolist()
