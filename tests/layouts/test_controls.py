"""What belongs to layouts besides the gradient: optimizer, loading, export, router replay, messages; and the proof's teeth."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.layouts.cases import DENSE, EXPERTS, FULL, Layout, rollout
from tests.layouts.proof import merge
from tests.layouts.reference import second_update
from tests.layouts.test_layouts import check
from tic_megatron.actors.metrics import skipped_updates, update_metrics
from tic_megatron.weights.sending import WeightTransferError, compare_digests
from tic_megatron.weights.wire import block_digest

BUCKET_BYTES = 24 * 1024


def layouts_of_models():
    for model, layouts in (("tied", DENSE), ("untied", DENSE), ("experts", EXPERTS)):
        for layout in layouts:
            if layout.world_size > 1 and not layout.options.keys() - {"layers_in_first_stage", "layers_in_last_stage"}:
                fast = str(layout) in ("tp2-pp2", "pp2-vpp2", "tp2-ep2-etp2-dp2")
                yield pytest.param(model, layout, id=f"{model}-{layout}", marks=() if fast else FULL)


@pytest.mark.parametrize(("model", "layout"), list(layouts_of_models()))
def test_every_rank_reads_its_part_and_together_they_give_the_model_back(prover, rank_pool, tmp_path, model, layout):
    path = prover.paths(model)["new"]
    job = {"layout": layout, "path": path, "folder": str(tmp_path), "max_bytes": BUCKET_BYTES}
    views = rank_pool.run("tests.layouts.ranks:exports", world_size=layout.world_size, timeout_s=120, **job)
    expected = load_file(f"{path}/model.safetensors")
    for view in views:
        assert view["read"] == view["held"]
    sent = [name for view in views for name in view["sent"]]
    assert sorted(sent) == sorted(expected), "every tensor is sent once"
    for view in views:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in view["sent"].items())
    files = {name: file for view in views for name, file in view["files"].items()}
    assert files.keys() == expected.keys()
    for name, file in files.items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), expected[name])
    assert len(views[0]["bytes"]) > 5, "the weights were sent in several buckets"
    assert max(views[0]["bytes"]) <= BUCKET_BYTES < max(t.numel() * t.element_size() for t in expected.values())
    received = {name: block_digest(tensor, tuple(tensor.shape), (0, 0)[: tensor.dim()]) for name, tensor in expected.items()}
    digests = [view["digests"] for view in views if view["digests"]]
    compare_digests(digests, {0: [received]}, straight=False)
    with pytest.raises(WeightTransferError, match=r"1 of \d+ tensors differ .* model\.norm\.weight"):
        compare_digests(digests, {0: [received | {"model.norm.weight": 1}]}, straight=False)


ADAM = {"untied": Layout(tp=2, pp=2, dp=2), "experts": Layout(ep=2, cp=2, dp=2)}


@pytest.mark.parametrize("model", ADAM)
def test_the_distributed_optimizer_takes_the_step_of_one_process(prover, rank_pool, model):
    layout = ADAM[model]
    job = {"layout": layout, "paths": prover.paths(model), "max_tokens": 120}
    views = rank_pool.run("tests.layouts.ranks:adam_steps", world_size=layout.world_size, timeout_s=120, **job)
    before, after = load_file(f"{prover.paths(model)['new']}/model.safetensors"), merge(views)
    reference = second_update(prover.paths(model), rollout("many"), "tic_grpo")
    for name, gradient in reference.gradient.items():
        moved = after[name].double() - before[name].double()
        expected = -gradient / (gradient.abs() + 1)
        rounding = 1e-7 * before[name].norm().item()  # of the parameters, which are much larger than their steps
        assert (moved - expected).norm().item() < 1e-5 * expected.norm().item() + rounding, name


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(options={"recompute": "full"}), Layout(ep=2, cp=2), Layout(pp=2, vpp=2)], ids=str
)
def test_the_update_replays_the_routing_of_the_old_policy(prover, layout):
    check(prover.prove_replayed(layout))


def test_router_replay_changes_something(prover):
    """The two models do route tokens differently, so the test above can fail."""
    plain, replayed = (second_update(prover.paths("experts"), rollout("many"), "tic_grpo", replay=r) for r in (False, True))
    assert plain.log_ratio != replayed.log_ratio


def test_router_replay_reduces_the_noise_of_the_ratio(prover, rank_pool):
    """The noise of L is what bf16 arithmetic makes of it, against fp32 with the same weights and the same kind of routing."""
    path = prover.paths("experts")["old"]
    found = rank_pool.run("tests.layouts.ranks:replay_noise", world_size=1, timeout_s=120, path=path)[0]
    assert all(case["noise"] == 0.0 for case in found.values())
    L = {key: torch.tensor(case["L"], dtype=torch.float64) for key, case in found.items()}
    plain, replayed = ((L["bf16", replay] - L["fp32", replay]).std().item() for replay in ("off", "on"))
    assert 0 < replayed < 0.8 * plain, (plain, replayed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_given_up_comes_back_with_the_same_values(prover, rank_pool, precision):
    layout = Layout(ep=2, dp=2)
    job = {"layout": layout, "path": prover.paths("experts")["old"], "precision": precision}
    for found in rank_pool.run("tests.layouts.ranks:parked", world_size=layout.world_size, timeout_s=120, **job):
        assert found["bytes", False] == 0 < found["bytes", True]
        assert found["left", True] == 0 < found["left", False]
        plain, parked = found["parameters", False], found["parameters", True]
        assert all(torch.equal(plain[name][-1], parked[name][-1]) for name in plain)


def test_an_overflow_in_an_expert_lowers_every_loss_scale(prover, rank_pool):
    """The loss is multiplied by one of them, and each optimizer divides by its own."""
    job = {"layout": Layout(ep=2, dp=2), "path": prover.paths("experts")["old"]}
    views = rank_pool.run("tests.layouts.ranks:loss_scales", world_size=2, timeout_s=120, **job)
    assert views == [[[4096.0, 4096.0], [2048.0, 2048.0], [1024.0, 1024.0]]] * 2


RESUMED = [
    ("untied", Layout(cp=2), {}, True),
    ("untied", Layout(pp=2, vpp=2), {}, False),
    ("experts", Layout(ep=2, dp=2), {}, True),
    ("experts", Layout(tp=2, ep=2, etp=1, dp=2), {}, False),
    ("experts", Layout(pp=4), {}, False),
    ("experts", Layout(pp=2, vpp=2, ep=2, cp=2), {}, False),
    ("experts", Layout(ep=2, dp=2), {"distributed_optimizer": False}, False),
    ("untied", Layout(dp=2), {"precision": "bf16"}, False),
]


@pytest.mark.parametrize(
    ("model", "layout", "options"),
    [pytest.param(m, x, o, id="-".join([m, str(x), *o]), marks=() if fast else FULL) for m, x, o, fast in RESUMED],
)
def test_a_checkpoint_continues_bit_by_bit(prover, rank_pool, tmp_path, model, layout, options):
    """Also after an update that was skipped, which AdamW has not counted."""
    job = {"layout": layout, "path": prover.paths(model)["old"], "folder": str(tmp_path), "options": options}
    views = rank_pool.run("tests.layouts.ranks:resumed", world_size=layout.world_size, timeout_s=180, **job)
    for view in views:
        assert view["norm", "same"] == view["norm", "fresh"]
        different = [name for name, (*_, piece) in view["same"].items() if not torch.equal(piece, view["fresh"][name][-1])]
        assert not different


OPTIONS = [
    {"objective": "tic_grpo", "kl_coefficient": 0.1, "kl_estimator": "k3", "entropy_coefficient": 0.02, "correction": "truncate"},
    {"objective": "grpo", "kl_coefficient": 0.1, "kl_estimator": "k2", "correction": "mask", "correction_level": "token"},
    {"objective": "no_is", "kl_coefficient": 0.1, "kl_estimator": "k1"},
    {"objective": "gspo", "entropy_coefficient": 0.02, "correction": "mask", "eps_high": 0.2},
]
"""Settings of the algorithm beside those of the gradient proof."""
WITH_OPTIONS = [
    ("untied", Layout(cp=2), OPTIONS[0], True),
    *(("untied", Layout(cp=2), options, False) for options in OPTIONS[1:]),
    *(("experts", Layout(tp=2, cp=2, ep=2), options, False) for options in OPTIONS),
    ("untied", Layout(pp=2, vpp=2, dp=2), OPTIONS[0], False),
]


@pytest.mark.parametrize(
    ("model", "layout", "options"),
    [pytest.param(m, x, o, id=f"{m}-{x}-{o['objective']}", marks=() if fast else FULL) for m, x, o, fast in WITH_OPTIONS],
)
def test_penalties_corrections_and_metrics_are_those_of_one_process(prover, rank_pool, model, layout, options):
    (metrics, gradient, kl), (expected, expected_gradient, expected_kl) = (
        with_options(prover, rank_pool, model, x, options)[:3] for x in (layout, Layout())
    )
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, value in expected_gradient.items():
        assert (gradient[name] - value).norm() <= 1e-5 * value.norm(), name
    assert [prompt for prompt, _ in kl] == [prompt for prompt, _ in expected_kl]
    assert [value for _, value in kl] == pytest.approx([value for _, value in expected_kl], abs=1e-5)


@pytest.mark.parametrize("layout", [Layout(cp=2), pytest.param(Layout(pp=2, vpp=2, cp=2), marks=FULL)], ids=str)
def test_bad_log_probs_are_named_once_in_every_layout(prover, rank_pool, layout):
    """One token's embedding is NaN: every rank skips the update, and no collective of it is left half done."""
    (*_, skipped), (*_, expected) = (
        with_options(prover, rank_pool, "untied", x, OPTIONS[0], bad_token=7) for x in (layout, Layout())
    )
    assert [s.index for s in skipped] == [s.index for s in expected] == [1]
    assert sorted(skipped[0].bad_prompts) == sorted(expected[0].bad_prompts) != []


def with_options(prover, rank_pool, model, layout, options, **others):
    """Metrics of two updates, the second's gradient, (prompt, k1) of each trajectory, and the updates that were skipped."""
    job = {"layout": layout, "paths": prover.paths(model), "options": options, **others}
    views = rank_pool.run("tests.layouts.ranks:with_options", world_size=layout.world_size, timeout_s=180, **job)
    updates = [[view["updates"][k] for view in views] for k in range(2)]
    metrics = update_metrics(updates, [view["mismatch"] for view in views])
    assert layout.dp == 1 or options["objective"] != "no_is", "the ranks' KL would have to be put together"
    kl = [view["kl"] for view in views if view["kl"]] or [[]]
    assert all([prompt for prompt, _ in own] == [prompt for prompt, _ in kl[0]] for own in kl)
    return metrics, merge(view["gradient"] for view in views), kl[0], skipped_updates(updates)


MISTAKES = [
    (Layout(cp=2), "loss times CP", ("tic_grpo", "grpo")),
    (Layout(cp=2), "no all-reduce of trajectories", ("tic_grpo", "gspo")),
    (Layout(), "loss over micro-batches", ("tic_grpo", "grpo")),
]


@pytest.mark.parametrize(("layout", "mistake", "objectives"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_mistakes_are_found(prover, layout, mistake, objectives):
    findings = prover.prove(layout, "untied", objectives=objectives, mistake=mistake)
    split = [f for f in findings if f.max_tokens == 120 and f.rollout == "many"]
    assert len(split) == len(objectives)
    assert all(f.worst_error > 1e-3 for f in split)


def test_out_of_memory_names_the_micro_batch_and_the_setting(prover, rank_pool):
    path = prover.paths("untied")["old"]
    message = rank_pool.run("tests.layouts.ranks:out_of_memory", world_size=1, timeout_s=60, path=path)[0]
    n_micro_batches, n_tokens = re.search(r"\[(\d+) micro-batches, the second of (\d+) tokens\]", message).groups()
    assert f"out of memory in micro-batch 2 of {n_micro_batches}" in message
    assert f"{n_tokens} tokens" in message
    assert "lower actor.max_tokens_per_microbatch (now 120; at least the longest sequence, 80)" in message
    assert "actor.recompute full" in message


def test_the_report_is_json(prover):
    finding = prover.prove(Layout(), "untied", objectives=("tic_grpo",))[0]
    entry = json.loads(json.dumps(finding.as_json()))
    assert entry["layout"] == {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1}
    assert entry["objective"] == "tic_grpo" and entry["worst_error"] < 1e-5
