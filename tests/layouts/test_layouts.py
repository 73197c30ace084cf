"""Every parallel layout gives the gradient of one process."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.layouts.cases import FAST, FULL, MODELS, rollout
from tests.layouts.proof import Finding
from tests.layouts.reference import load_float64
from tic_megatron.weights.stages import layers_of_stages

SIZES = (None, 1, 2, 4)
"""Layers of the first and of the last stage."""


def cases():
    for model, layouts in MODELS.items():
        for layout in layouts:
            fast = str(layout) in FAST.get(model, ())
            yield pytest.param(model, layout, id=f"{model}-{layout}", marks=() if fast else FULL)


def check(finding: Finding) -> None:
    assert finding.worst_error < 1e-5, finding
    assert finding.wrong_zeros == 0, finding
    assert finding.norm_error < 1e-5, finding
    assert finding.value_error < 1e-5, finding
    assert finding.log_ratio_error < 1e-5, finding
    assert finding.entropy_error < 1e-6, finding
    assert finding.noise == 0.0, finding


@pytest.mark.parametrize(("model", "layout"), list(cases()))
def test_gradient_is_that_of_one_process(prover, model, layout):
    for finding in prover.prove(layout, model):
        check(finding)


@pytest.mark.parametrize("name", ["old", "new"])
def test_the_model_of_one_expert_uses_one_expert(prover, name):
    model, seen = load_float64(prover.paths("one expert")[name]), set()
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.update(output[2].flatten().tolist()))
    with torch.no_grad():
        for trajectory in (t for group in rollout("many") for t in group.trajectories):
            model(torch.tensor([trajectory.tokens]))
    assert seen == {0}


def test_megatron_shares_the_layers_out_as_planned(rank_pool):
    """Every split that `layers_of_stages`, and so preflight, allows is one that Megatron-core computes, with the same layers."""
    allowed = []
    for n_layers, n_stages, n_virtual, first, last in itertools.product((4, 6, 8, 12), (2, 3, 4), (1, 2, 3), SIZES, SIZES):
        try:
            planned = layers_of_stages(n_layers, n_stages, n_virtual=n_virtual, first=first, last=last)
        except ValueError:
            continue
        allowed.append(((n_layers, n_stages, n_virtual, first, last), planned))
    assert len(allowed) > 100
    splits = [split for split, _ in allowed]
    found = rank_pool.run("tests.layouts.ranks:layers_by_megatron", world_size=1, timeout_s=120, splits=splits)[0]
    assert {split: layers for split, layers in zip(splits, found, strict=True)} == dict(allowed)
