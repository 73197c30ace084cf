"""Router replay: in the update every token goes to the experts that it went to in the old-log-prob pass.

Rounding, and the updates in between, move a few tokens across the border between two experts. Such a jump is no property of the
policy's move, but all of it enters the trajectory ratio.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

Routing = dict[int, Tensor]
"""The experts that a micro-batch's tokens went to, by this rank's layers: [tokens, experts per token], int16."""


class _LayerReplay:
    """What a Megatron router asks for its choice; takes the place of its own `RouterReplay`, which knows one micro-batch only."""

    def __init__(self, layer: int, recomputes: bool):
        self.layer, self.recomputes = layer, recomputes
        self.record_to: Routing | None = None
        self.replay_from: Routing | None = None
        self.to_recompute: deque[Tensor] = deque()

    def get_replay_topk(self, scores: Tensor, topk: int, num_groups=None, group_topk=None, default_compute_topk=None):
        """(scores, numbers) of the chosen experts, each [tokens, topk]. (The name and the arguments are Megatron's.)"""
        experts = self._replayed()
        if experts is not None:
            experts = experts.long()
            return scores.gather(1, experts), experts
        chosen, experts = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.record_to is not None:
            self.record_to[self.layer] = experts.to(torch.int16)
        return chosen, experts

    def _replayed(self) -> Tensor | None:
        # With full recomputation the first pass runs without gradients, and the backward passes ask again, in the same order.
        if self.recomputes and torch.is_grad_enabled() and self.to_recompute:
            return self.to_recompute.popleft()
        experts = None if self.replay_from is None else self.replay_from.get(self.layer)
        if experts is not None and self.recomputes:
            self.to_recompute.append(experts)
        return experts


class RouterReplay:
    """All routers of this rank's model parts; without experts nothing."""

    def __init__(self, parts: Iterable[nn.Module], *, recomputes: bool):
        routers = [module for part in parts for module in part.modules() if isinstance(module, TopKRouter)]
        self._layers = [_LayerReplay(i, recomputes) for i in range(len(routers))]
        for router, replay in zip(routers, self._layers, strict=True):
            router.router_replay = replay

    def record(self, routing: Routing) -> None:
        """Note the choices of the forward passes that follow."""
        self._set(routing, None)

    def replay(self, routing: Routing) -> None:
        """Make the forward passes that follow repeat what was recorded; where nothing was, they choose."""
        self._set(None, routing)

    def _set(self, record_to: Routing | None, replay_from: Routing | None) -> None:
        for layer in self._layers:
            layer.record_to, layer.replay_from = record_to, replay_from
