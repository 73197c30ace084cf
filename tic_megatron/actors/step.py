"""What a training rank does with a rollout, whatever the backend: packed inputs, old log-probs, loss closure, statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tic_megatron.actors.context_parallel import ALONE, TokenLayout, aligned
from tic_megatron.actors.flops import UPDATE_PASSES, ModelFlops
from tic_megatron.actors.objective import choose_objective
from tic_megatron.actors.stats import MismatchStats, UpdateResult, UpdateStats
from tic_megatron.algorithms.corrections import generator_correction
from tic_megatron.algorithms.normalisers import Totals
from tic_megatron.algorithms.objectives import ObjectiveTerms, objective_terms, token_weights
from tic_megatron.algorithms.penalties import KL_LOSSES, k1, weighted_sum
from tic_megatron.algorithms.ratios import Segments, sum_over_group
from tic_megatron.config import Settings
from tic_megatron.rewards import is_dense
from tic_megatron.trajectory import MicroBatch, MiniBatch


@dataclass(frozen=True)
class PackedInputs:
    """This rank's part of a micro-batch as tensors: sequences one after another, plus alignment tokens as last sequences.

    `input_ids`, `position_ids` [tokens / CP] of the tokens held here; `lengths`: tokens of each whole sequence; `positions` [n]:
    index into `input_ids` of the token before each response token, where it is held here; `targets` [n]: the response tokens;
    `trajectory` [n]: which trajectory each belongs to; `response_lengths`, `advantages` [n_trajectories], of whole
    trajectories (with a dense reward, advantages [n]);
    `inference_logprobs` [n]: the generator's; `group`: the ranks that hold the rest of the sequences; `routing`: which experts
    the tokens went to in the old-log-prob pass, for the backend's use.
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
    group: dist.ProcessGroup | None = None
    routing: dict[int, Tensor] = field(default_factory=dict)

    @property
    def segments(self) -> Segments:
        """The trajectories of the response tokens."""
        return Segments(self.trajectory, self.response_lengths, self.group)


PADDING_PIECE = 256
"""Longest sequence of padding: attention costs grow with the square of a sequence."""


def pack_inputs(
    micro_batch: MicroBatch, *, layout: TokenLayout = ALONE, device: torch.device, n_tokens: int | None = None
) -> PackedInputs:
    """Tensors of this rank's part of a micro-batch.

    Args:
        micro_batch: whole trajectories.
        layout: which of the tokens are this rank's, and their alignment; an empty micro-batch has a dummy sequence.
        device: of the tensors.
        n_tokens: length to pad to; the next multiple of the alignment when not given.
    """
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
        length = aligned(len(trajectory.tokens), layout.sequence_alignment)
        tokens += trajectory.tokens + [0] * (length - len(trajectory.tokens))
        lengths.append(length)
    padding = (n_tokens or aligned(max(len(tokens), 1), layout.alignment)) - len(tokens)
    piece = aligned(PADDING_PIECE, layout.alignment)
    lengths += [min(piece, padding - start) for start in range(0, padding, piece)]
    tokens += [0] * padding

    def tensor(values, dtype=torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    local = layout.local_tokens(lengths)  # packed positions of the tokens held here
    place = torch.full((len(tokens),), -1).index_copy(0, local, torch.arange(local.numel()))
    here = place[torch.tensor(positions, dtype=torch.long)] >= 0  # [response tokens]
    return PackedInputs(
        input_ids=torch.tensor(tokens)[local].to(device),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[local].to(device),
        lengths=lengths,
        positions=place[torch.tensor(positions, dtype=torch.long)][here].to(device),
        targets=tensor(targets)[here],
        trajectory=tensor(owner)[here],
        response_lengths=tensor([t.response_length for t in micro_batch.trajectories]),
        advantages=tensor([a for t in micro_batch.trajectories for a in t.unit_advantages], torch.float64),
        inference_logprobs=tensor(inference, torch.float32)[here],
        group=layout.group,
    )


LossClosure = Callable[[int, Tensor, Tensor], Tensor]
"""(micro-batch index, log-probs [n], entropy [n]) -> loss to minimise, a scalar that is summed over micro-batches and ranks.

It is not finite when a log-prob is not: nothing can be saved of such an update, since the NaN of one sequence reaches every
weight's gradient.
"""


class Backend(Protocol):
    """What `PolicyStep` needs of a training backend."""

    device: torch.device
    layout: TokenLayout
    uniform_lengths: bool
    """Whether all micro-batches of an update must be padded to one length."""
    data_parallel_rank: int
    has_logprobs: bool
    """Whether this rank computes log-probs (the last pipeline stage)."""
    reports: bool
    """Whether this rank reports statistics: one rank for each token, among those with log-probs."""

    def forward(self, inputs: list[PackedInputs], *, reference: bool = False) -> list[Tensor]:
        """Log-probs of each micro-batch without gradient, of the policy or of the reference; empty where there are none."""
        ...

    def hold_parameters(self) -> None:
        """From now on evaluate every update's gradient at the present parameters, while the steps are applied."""
        ...

    def update(self, inputs: list[PackedInputs], loss: LossClosure) -> UpdateResult:
        """Forward and backward of every micro-batch and one optimizer step; skipped on all ranks when a loss or a gradient
        is not finite on any."""
        ...


class PolicyStep:
    """One rollout on one rank: `load`, then `old_logprobs`, then `update(0)` ... `update(K - 1)`, in this order."""

    def __init__(self, backend: Backend, settings: Settings):
        self.backend = backend
        self.settings = settings
        self.dense = is_dense(settings.reward)
        chosen = choose_objective(settings.algorithm, dense=self.dense)
        self.objective, self.clip_range = chosen.objective, chosen.clip_range

    def load(self, mini_batches: list[MiniBatch]) -> None:
        """Take this rank's share of a rollout; the packing is kept for all its passes."""
        self.mini_batches = mini_batches
        self.inputs = [self._pack(batch) for batch in mini_batches]
        self.old: dict[int, list[Tensor]] = {}
        self.reference: dict[int, list[Tensor]] = {}
        self.mismatch = MismatchStats()
        self.passes = [0] * len(mini_batches)  # over each, in forward passes
        self._gaps: list[Tensor] = []

    def _pack(self, batch: MiniBatch) -> list[PackedInputs]:
        layout, device = self.backend.layout, self.backend.device
        packed = [pack_inputs(m, layout=layout, device=device) for m in batch.micro_batches]
        if not self.backend.uniform_lengths:
            return packed
        longest = max(sum(inputs.lengths) for inputs in packed)
        return [pack_inputs(m, layout=layout, device=device, n_tokens=longest) for m in batch.micro_batches]

    def old_logprobs(self, *, check_noise: bool) -> None:
        """Log-probs at theta_old of all mini-batches but the first, by forward-only passes; and the reference's of all.

        The first mini-batch is updated at theta_old itself, so its own log-probs, detached, are the old ones, and the pass
        is saved (so are the others' for an objective whose gradients are all taken there). With `check_noise` it is made
        all the same, to be compared with the training forward.
        """
        own = len(self.inputs) if self.objective.at_old_policy else 1
        for k in ([0] if check_noise else []) + list(range(own, len(self.inputs))):
            self._compute_old(k)
        if self.settings.algorithm.kl_coefficient > 0:
            for k in range(len(self.inputs)):
                self._compute_reference(k)

    def kl_to_reference(self) -> list[list[float]] | None:
        """k1 of each trajectory of this rank, in the order of its micro-batches, for the reward: [its sum], or with a dense
        reward that of each sampled token; None on ranks that report nothing."""
        kl: list[list[float]] = []
        for k, packed in enumerate(self.inputs):
            self._compute_old(k)
            self._compute_reference(k)
            for inputs, old, reference in zip(packed, self.old[k], self.reference[k], strict=False):
                per_token = k1(old, reference)
                if self.dense:
                    kl += [part.tolist() for part in per_token.split(inputs.response_lengths.tolist())]
                else:
                    kl += inputs.segments.sum(per_token)[:, None].tolist()
        return kl if self.backend.reports else None

    def set_advantages(self, advantages: list[float]) -> None:
        """Replace the advantages of this rank's trajectories (of their sampled tokens, with a dense reward), in the order of
        its micro-batches."""
        remaining = torch.tensor(advantages, dtype=torch.float64, device=self.backend.device)
        for packed in self.inputs:
            for inputs in packed:
                n = inputs.advantages.shape[0]
                inputs.advantages.copy_(remaining[:n])
                remaining = remaining[n:]

    def update(self, k: int) -> UpdateStats | None:
        """One optimizer update on mini-batch k; None on ranks that report nothing."""
        stats = UpdateStats()
        if k == 0 and self.objective.at_old_policy:
            self.backend.hold_parameters()

        def loss(index: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
            inputs = self.inputs[k][index]
            old = self._old_for_update(k, index, logprobs.detach())
            terms, penalty = self._objective(k, index, logprobs, old, entropy)
            bad = self._bad_trajectories(k, index, terms)
            if bad:
                stats.bad_prompts += bad if self._first_of_sequence else []
                return logprobs.sum() * math.nan
            self._add_mismatch(inputs, old)
            self._add_noise(k, index, logprobs.detach(), stats)
            stats.entropy_sum += entropy.detach().double().sum().item()
            stats.n_tokens += logprobs.numel()
            stats.value -= penalty.item()
            if self._first_of_sequence or self.objective.ratio.per_token:
                stats.value += terms.value.item()  # of a trajectory ratio, the ranks of a sequence have the same value
            if self._first_of_sequence:
                stats.log_ratio += terms.log_ratio.tolist()
                stats.capped += terms.capped.tolist()
                advantages = inputs.segments.sum(inputs.advantages) if self.dense else inputs.advantages
                stats.advantages += advantages.tolist()
            if self.reference:
                stats.kl_sum = (stats.kl_sum or 0.0) + k1(logprobs.detach(), self.reference[k][index]).double().sum().item()
            return penalty - terms.value

        stats.result = self.backend.update(self.inputs[k], loss)
        self.passes[k] += UPDATE_PASSES
        return stats if self.backend.reports else None

    @property
    def _first_of_sequence(self) -> bool:
        """Whether this is the rank that reports what is the same on all ranks that share its sequences."""
        return self.backend.layout.rank == 0

    def finish_mismatch(self) -> MismatchStats | None:
        """Trainer against generator, on the rollout; None on ranks that report nothing. One collective per rollout."""
        if not self.backend.has_logprobs:
            return None
        gaps = torch.cat(self._gaps) if self._gaps else torch.zeros(0, dtype=torch.float64)
        gaps = sum_over_group(gaps, self.backend.layout.group)
        self.mismatch.trajectory_log_ratio = gaps.tolist() if self._first_of_sequence else []
        return self.mismatch if self.backend.reports else None

    def model_flops(self, model: ModelFlops) -> float:
        """Of all passes over this rank's share of the rollout, however many ranks share it."""
        return sum(
            passes * sum(model.forward(len(t.tokens), t.response_length) for m in batch.micro_batches for t in m.trajectories)
            for passes, batch in zip(self.passes, self.mini_batches, strict=True)
        )

    def _bad_trajectories(self, k: int, index: int, terms: ObjectiveTerms) -> list[str]:
        """Prompt ids of the trajectories of a micro-batch with a log-prob that is not finite, by any of the policies used: what
        all ranks of a sequence know from the sums that they share."""
        finite = torch.isfinite(terms.log_ratio)
        if k in self.reference:
            reference = self.reference[k][index]
            finite = finite & (self.inputs[k][index].segments.sum((~torch.isfinite(reference)).double()) == 0)
        trajectories = self.mini_batches[k].micro_batches[index].trajectories
        return [t.prompt.id for t, ok in zip(trajectories, finite.tolist(), strict=True) if not ok]

    def _objective(self, k: int, index: int, logprobs: Tensor, old: Tensor, entropy: Tensor) -> tuple[ObjectiveTerms, Tensor]:
        """The policy term with its details, and this rank's part of what is subtracted: KL penalty, less the entropy bonus."""
        inputs, options = self.inputs[k][index], self.settings.algorithm
        batch = self.mini_batches[k]
        totals = Totals(batch.n_trajectories, batch.n_tokens, self.settings.rollout.max_response_tokens)
        terms = objective_terms(
            self.objective,
            logprobs,
            old,
            inputs.segments,
            inputs.advantages,
            totals,
            self.clip_range,
            self._correction(inputs, old),
        )
        penalty = torch.zeros((), dtype=torch.float64, device=logprobs.device)
        if options.entropy_coefficient or self.reference:
            weights = token_weights(self.objective, inputs.segments, totals)
            if options.entropy_coefficient:
                penalty = penalty - options.entropy_coefficient * weighted_sum(entropy, weights)
            if options.kl_estimator in KL_LOSSES and self.reference:
                kl = KL_LOSSES[options.kl_estimator](logprobs, self.reference[k][index])
                penalty = penalty + options.kl_coefficient * weighted_sum(kl, weights)
        return terms, penalty

    def _correction(self, inputs: PackedInputs, old: Tensor) -> Tensor | None:
        options = self.settings.algorithm
        if options.correction == "none":
            return None
        return generator_correction(
            self.objective.ratio,
            old,
            inputs.inference_logprobs,
            inputs.segments,
            level=options.correction_level,
            form=options.correction,
            bound=options.correction_bound,
        )

    def _compute_old(self, k: int) -> None:
        if k not in self.old:
            self.old[k] = self.backend.forward(self.inputs[k])
            self.passes[k] += 1

    def _compute_reference(self, k: int) -> None:
        if k not in self.reference:
            self.reference[k] = self.backend.forward(self.inputs[k], reference=True)
            self.passes[k] += 1

    def _old_for_update(self, k: int, index: int, own: Tensor) -> Tensor:
        """Old log-probs of a micro-batch; where the update's forward is at theta_old itself, its own."""
        return own if k == 0 or self.objective.at_old_policy else self.old[k][index]

    def _add_noise(self, k: int, index: int, own: Tensor, stats: UpdateStats) -> None:
        """Compare the first update's forward, at theta_old itself, with the forward-only pass, if there was one."""
        if k == 0 and 0 in self.old:
            noise = self.inputs[k][index].segments.sum(own - self.old[0][index]).abs()
            if noise.numel():  # otherwise nothing has been measured
                worst = noise.max().item()
                stats.noise = max(stats.noise or 0.0, math.inf if math.isnan(worst) else worst)

    def _add_mismatch(self, inputs: PackedInputs, trainer_logprobs: Tensor) -> None:
        difference = trainer_logprobs - inputs.inference_logprobs
        self._gaps.append(replace(inputs.segments, group=None).sum(difference))
        if difference.numel() == 0:
            return
        self.mismatch.abs_sum += difference.abs().double().sum().item()
        self.mismatch.abs_max = max(self.mismatch.abs_max, difference.abs().max().item())
        self.mismatch.n_tokens += difference.numel()
