"""Compares what the ranks of a layout computed with the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.layouts.cases import OBJECTIVES, Layout, make_model, rollout
from tests.layouts.reference import Reference, second_update
from tests.ranks import RankPool

BUDGETS = (300, 120)
"""Tokens of a micro-batch: two ways to split a mini-batch."""


@dataclass
class Finding:
    """One layout, model and objective: the worst errors, each relative, and max |L| between the two passes at theta_old.

    `worst_error`: over all tensors of the gradient, norm of the difference over norm; `wrong_zeros`: elements that are 0 in the
    reference's gradient and not here.
    """

    layout: Layout
    model: str
    objective: str
    rollout: str
    max_tokens: int
    worst_error: float
    worst_tensor: str
    wrong_zeros: int
    norm_error: float
    value_error: float
    log_ratio_error: float
    entropy_error: float
    noise: float

    def as_json(self) -> dict:
        keys = ("model", "objective", "rollout", "max_tokens", "worst_error", "wrong_zeros", "norm_error", "noise")
        return {"layout": self.layout.sizes | self.layout.options} | {key: getattr(self, key) for key in keys}


class Prover:
    """Models and references, made when they are first needed."""

    def __init__(self, pool: RankPool, folder):
        self.pool, self.folder = pool, folder
        self._paths: dict[str, dict[str, str]] = {}
        self._references: dict[tuple[str, str, str], Reference] = {}

    def paths(self, model: str) -> dict[str, str]:
        if model not in self._paths:
            self._paths[model] = make_model(self.folder / model.replace(" ", "_"), model)
        return self._paths[model]

    def reference(self, model: str, kind: str, objective: str) -> Reference:
        key = (model, kind, objective)
        if key not in self._references:
            self._references[key] = second_update(self.paths(model), rollout(kind), objective)
        return self._references[key]

    def prove(self, layout: Layout, model: str, *, objectives=OBJECTIVES, mistake: str | None = None) -> list[Finding]:
        """All objectives, several splits into micro-batches, and fewer trajectories than ranks. (`mistake`: one to be found.)"""
        plans = [("many", budget, objectives) for budget in BUDGETS] + [("few", BUDGETS[0], objectives[:1])]
        cases = [self._case(model, names, kind, budget, mistake=mistake) for kind, budget, names in plans]
        views = self._second_updates(layout, cases)
        keys = [(kind, budget, name) for kind, budget, names in plans for name in names]
        return [
            compare([view[i] for view in views], self.reference(model, kind, name), layout, model, name, kind, budget)
            for i, (kind, budget, name) in enumerate(keys)
        ]

    def prove_replayed(self, layout: Layout) -> Finding:
        """With the routing of the old-log-prob pass replayed in the update."""
        model, kind, budget, objective = "experts", "many", BUDGETS[1], "tic_grpo"
        views = self._second_updates(layout, [self._case(model, [objective], kind, budget, actor={"router_replay": "on"})])
        reference = second_update(self.paths(model), rollout(kind), objective, replay=True)
        return compare([view[0] for view in views], reference, layout, model, objective, kind, budget)

    def _case(self, model: str, objectives, kind: str, budget: int, **others) -> dict:
        return {"paths": self.paths(model), "objectives": objectives, "rollout_kind": kind, "max_tokens": budget, **others}

    def _second_updates(self, layout: Layout, cases: list[dict]) -> list[list[dict]]:
        function = "tests.layouts.ranks:second_updates"
        return self.pool.run(function, world_size=layout.world_size, timeout_s=240, layout=layout, cases=cases)


def compare(
    views: list[dict], reference: Reference, layout: Layout, model: str, objective: str, kind: str, budget: int
) -> Finding:
    gradient = merge(view["gradient"] for view in views)
    assert gradient.keys() == reference.gradient.keys(), gradient.keys() ^ reference.gradient.keys()
    errors = {name: relative_error(gradient[name], expected) for name, expected in reference.gradient.items()}
    worst = max(errors, key=errors.get)
    stats = [view["stats"] for view in views if view["stats"] is not None]
    log_ratio = sorted(x for s in stats for x in s.log_ratio)
    assert len(log_ratio) == len(reference.log_ratio)
    entropy = sum(s.entropy_sum for s in stats) / sum(s.n_tokens for s in stats)
    return Finding(
        layout,
        model,
        objective,
        kind,
        budget,
        worst_error=errors[worst],
        worst_tensor=worst,
        wrong_zeros=sum(int((gradient[name][expected == 0] != 0).sum()) for name, expected in reference.gradient.items()),
        norm_error=abs(stats[0].result.grad_norm / reference.norm - 1),
        # The terms, of about 1e-2 each, cancel in the value.
        value_error=abs(sum(s.value for s in stats) - reference.value) / 1e-2,
        log_ratio_error=max(abs(a - b) for a, b in zip(log_ratio, reference.log_ratio, strict=True)),
        entropy_error=abs(entropy / reference.entropy - 1),
        noise=max(view["noise"] for view in views if view["noise"] is not None),
    )


def merge(views) -> dict[str, Tensor]:
    """Full tensors from the slices of all ranks."""
    shards: dict[str, dict[int, Tensor]] = {}
    dims = {}
    for view in views:
        for name, (dim, shard, _, piece) in view.items():
            shards.setdefault(name, {})[shard] = piece
            dims[name] = dim
    return {
        name: torch.cat([parts[r] for r in sorted(parts)], dim=dims[name]) if dims[name] is not None else parts[min(parts)]
        for name, parts in shards.items()
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm; 0 / 0 is 0."""
    difference = (got.double() - expected).norm().item()
    return difference / expected.norm().item() if difference else 0.0
