"""The export plan: which parts of which Hugging Face tensors travel together, and which ranks have them.

Every rank computes the same plan from the model's configuration and the layout, so sending it needs no negotiation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from tic_megatron.config import Settings
from tic_megatron.weights.names import HFTensor, Weight, qwen3_weights
from tic_megatron.weights.stages import layers_of_stages
from tic_megatron.weights.wire import ALIGNMENT, Block, BucketLayout, aligned

VLLM_VOCABULARY_PADDING = 64
"""vLLM pads the vocabulary to a multiple of this before it cuts it into shards."""


@dataclass(frozen=True)
class ExportLayout:
    """What of the training layout decides who has which part of a weight.

    `stage_of_layer` [layers]: pipeline stage; `tensor_parallel`, `expert_tensor_parallel`: ranks that a matrix is cut over;
    `expert_parallel`: ranks that share a layer's experts, each a block of them; `straight`: an engine has the same shards on
    the same number of ranks, so every rank sends its own to its engine rank, and nothing is gathered.
    """

    stage_of_layer: tuple[int, ...]
    n_stages: int
    tensor_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    straight: bool = False

    @classmethod
    def of(cls, settings: Settings, hf) -> ExportLayout:
        """The layout of the settings for a model with this Hugging Face configuration."""
        actor, n_layers = settings.actor, hf.num_hidden_layers
        n_stages = actor.pipeline_parallel_size
        stages = layers_of_stages(
            n_layers,
            n_stages,
            n_virtual=actor.virtual_pipeline_parallel_size,
            first=actor.layers_in_first_stage,
            last=actor.layers_in_last_stage,
        )
        stage_of = {layer: stage for stage, parts in enumerate(stages) for part in parts for layer in part}
        return cls(
            tuple(stage_of[layer] for layer in range(n_layers)),
            n_stages,
            actor.tensor_parallel_size,
            actor.expert_parallel_size,
            actor.experts_tensor_parallel,
            shards_line_up(settings, hf),
        )

    def stage(self, weight: Weight) -> int:
        """The pipeline stage of a weight."""
        if weight.layer is None:
            return 0 if weight.names[0].startswith("embedding") else self.n_stages - 1
        return self.stage_of_layer[weight.layer]


def shards_line_up(settings: Settings, hf) -> bool:
    """Whether rank r of an engine has exactly the shards of tensor-parallel rank r of the actors, on the same machine."""
    actor, size = settings.actor, settings.rollout.tensor_parallel_size
    if not settings.cluster.colocate or size == 1 or size != actor.tensor_parallel_size or actor.pipeline_parallel_size > 1:
        return False
    if hf.vocab_size % VLLM_VOCABULARY_PADDING or hf.num_key_value_heads % size:
        return False
    alike = not settings.rollout.expert_parallel and actor.expert_parallel_size == 1 and actor.experts_tensor_parallel == size
    return alike or not getattr(hf, "num_experts", None)


@dataclass(frozen=True)
class Piece:
    """What every rank of a bucket's group puts at the same place of its region: rows of its shard of a Hugging Face tensor.

    `weights`: one Megatron parameter; of experts, one for every expert-parallel rank. `part`: which of the parameter's tensors;
    `rows`: first and last + 1, of a shard; `offset`: in a region, in bytes.
    """

    weights: tuple[Weight, ...]
    part: int
    rows: tuple[int, int]
    offset: int = 0

    def tensor(self, owner: int) -> HFTensor:
        """The tensor of an expert-parallel rank, or the only one."""
        return self.weights[owner].parts[self.part]


@dataclass(frozen=True)
class ExportBucket:
    """Pieces of one pipeline stage. A bucket has a region for every rank of the group that shares the weights: tensor-parallel
    ranks, and of experts those of every expert-parallel rank, of which the former count faster. Where shards go straight to
    the engine a rank's bucket is its region only.
    """

    stage: int
    is_expert: bool
    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    region_nbytes: int
    cuts: int
    n_owners: int
    straight: bool

    @property
    def nbytes(self) -> int:
        """Size of the bucket on the rank that assembles it."""
        return self.region_nbytes * (1 if self.straight else self.cuts * self.n_owners)

    def blocks(self, rank: int) -> list[tuple[Weight, int, Block]]:
        """(parameter, index of its tensor, the rows' block) of a rank's region, placed in the bucket. Of what all
        tensor-parallel ranks have the first sends it; where shards go straight to the engine, all do."""
        owner, shard = divmod(rank, self.cuts)
        base = 0 if self.straight else rank * self.region_nbytes
        found = []
        for piece in self.pieces:
            tensor = piece.tensor(owner)
            if tensor.shard_dim is None and shard > 0 and not self.straight:
                continue
            corner = [s.start for s in tensor.shard_slice(shard, self.cuts)]
            size = list(tensor.shard_shape(self.cuts))
            corner[0], size[0] = corner[0] + piece.rows[0], piece.rows[1] - piece.rows[0]
            expected = math.prod(tensor.shard_shape(self.cuts) if self.straight else tensor.shape)
            dtype = str(self.dtype).removeprefix("torch.")
            block = Block(tensor.name, dtype, tensor.shape, tuple(corner), tuple(size), expected, base + piece.offset)
            found.append((piece.weights[owner], piece.part, block))
        return found

    def layout(self, rank: int | None = None) -> BucketLayout:
        """All blocks of the assembled bucket; those of one rank where shards go straight to the engine."""
        ranks = [rank or 0] if self.straight else range(self.cuts * self.n_owners)
        return BucketLayout(tuple(block for r in ranks for _, _, block in self.blocks(r)), self.nbytes)


def plan_export(hf, layout: ExportLayout, dtype: torch.dtype, max_bytes: int) -> list[ExportBucket]:
    """Buckets of at most `max_bytes`, in the order of the forward pass.

    Whole Megatron parameters are kept together while they fit, so that what vLLM fuses, q/k/v or gate/up, comes together; what
    does not fit is cut into rows. (An embedding is the largest: 1.6 GB in bf16 for Qwen3-32B.) Only where a single row of every
    rank's shard is larger is the limit exceeded.
    """
    buckets: list[ExportBucket] = []
    for (stage, is_expert), group in groupby(qwen3_weights(hf), key=lambda w: (layout.stage(w), w.expert is not None)):
        run = list(group)
        cuts = layout.expert_tensor_parallel if is_expert else layout.tensor_parallel
        units: list[tuple[Weight, ...]] = _expert_sets(run, layout, hf) if is_expert else [(weight,) for weight in run]
        n_owners = layout.expert_parallel if is_expert else 1
        room = max_bytes // (1 if layout.straight else cuts * n_owners)
        for pieces, nbytes in _fill(units, cuts, dtype, room):
            buckets.append(ExportBucket(stage, is_expert, pieces, dtype, nbytes, cuts, n_owners, layout.straight))
    return buckets


def _expert_sets(weights: list[Weight], layout: ExportLayout, hf) -> list[tuple[Weight, ...]]:
    """One layer's experts in sets of one per expert-parallel rank; of an expert, its two parameters one after the other."""
    per_rank = hf.num_experts // layout.expert_parallel
    by_place: dict[tuple[int, int], list[Weight]] = {}
    seen: dict[int, int] = {}
    for weight in weights:
        nth = seen[weight.expert] = seen.get(weight.expert, -1) + 1
        by_place.setdefault((weight.expert % per_rank, nth), []).append(weight)
    return [tuple(by_place[place]) for place in sorted(by_place)]


def _fill(units: list[tuple[Weight, ...]], cuts: int, dtype: torch.dtype, room: int) -> Iterator[tuple[tuple[Piece, ...], int]]:
    """Regions of at most `room` bytes: their pieces, placed, and their size."""
    current: list[Piece] = []
    end = 0
    for unit in units:
        whole = [Piece(unit, i, (0, t.shard_shape(cuts)[0])) for i, t in enumerate(unit[0].parts)]
        needed = sum(aligned(_nbytes(piece, cuts, dtype)) for piece in whole)
        pieces = whole if needed <= room else [part for piece in whole for part in _cut(piece, cuts, dtype, room)]
        together = needed if needed <= room else 0
        for piece in pieces:
            nbytes = aligned(_nbytes(piece, cuts, dtype))
            if current and end + (together or nbytes) > room:
                yield tuple(current), end
                current, end = [], 0
            together = 0  # the unit's other pieces fit where its first does
            current.append(Piece(piece.weights, piece.part, piece.rows, end))
            end += nbytes
    if current:
        yield tuple(current), end


def _cut(piece: Piece, cuts: int, dtype: torch.dtype, room: int) -> list[Piece]:
    """Runs of as many rows as fit into a region."""
    n_rows = piece.rows[1]
    per_row = math.prod(piece.tensor(0).shard_shape(cuts)[1:]) * dtype.itemsize
    step = max(1, (room - room % ALIGNMENT) // per_row)
    return [Piece(piece.weights, piece.part, (row, min(row + step, n_rows))) for row in range(0, n_rows, step)]


def _nbytes(piece: Piece, cuts: int, dtype: torch.dtype) -> int:
    rows = piece.rows[1] - piece.rows[0]
    return rows * math.prod(piece.tensor(0).shard_shape(cuts)[1:]) * dtype.itemsize
