"""The Megatron backend against transformers + autograd in one process."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import megatron_ranks
from tests.models import make_tiny_qwen3
from tic_megatron.actors.metrics import skipped_updates, update_metrics
from tic_megatron.data.packing import has_equal_rewards

OBJECTIVES = ("tic_grpo", "grpo")
SGD_RATE = 0.2
LAYOUTS_OF_TWO = {
    "tp2": {"tp": 2},
    "tp2 without sequence parallel": {"tp": 2, "sp": False},
    "pp2": {"pp": 2},
    "dp2": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    paths = {}
    for name, tied in {"tied": True, "untied": False}.items():
        paths[name] = str(tmp_path_factory.mktemp(name))
        make_tiny_qwen3(paths[name], seed=1, tie_word_embeddings=tied, layers=2)
    return paths


def response_logprobs(model, trajectory, temperature: float, *, with_entropy: bool = False):
    ids = torch.tensor([trajectory.tokens])
    start = len(trajectory.prompt.token_ids)
    logits = model(ids).logits[0, start - 1 : -1] / temperature
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, ids[0, start:, None])[:, 0]
    return (chosen, -(log_p.exp() * log_p).sum(-1)) if with_entropy else chosen


def objective_value(name: str, trajectories, trainer, old, n: int, max_response: int) -> torch.Tensor:
    """Direct transcription of the two objectives, one trajectory after another."""
    total = 0.0
    for t, new, before in zip(trajectories, trainer, old, strict=True):
        delta = new - before
        if t.token_advantages is not None:
            sampled = torch.tensor(t.response_mask) == 1
            weights = torch.minimum(delta[sampled].cumsum(0).exp(), torch.tensor(1.28))
            total = total + (weights * torch.tensor(t.token_advantages)[sampled]).sum() / max_response
        elif name == "tic_grpo":
            total = total + torch.minimum(delta.sum().exp(), torch.tensor(1.28)) * t.advantage / max_response
        else:
            ratio = delta.exp()
            unclipped, clipped = ratio * t.advantage, ratio.clamp(0.8, 1.2) * t.advantage
            total = total + torch.minimum(unclipped, clipped).mean()
    return total / n


def reference_updates(path: str, objective: str, optimizer: str = "sgd", penalty=None, *, dense: bool = False) -> list[dict]:
    """Two updates of the whole model in float64 by autograd; value, gradient and norm of each, parameters after both.

    `penalty(trajectory, logprobs, entropy)` is subtracted from the value, divided by N T; with it all groups are kept.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    parameters = model.parameters()
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=SGD_RATE)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    groups = megatron_ranks.rollout(model.config.vocab_size, dense=dense)
    old = {id(t): response_logprobs(model, t, 0.8).detach() for g in groups for t in g.trajectories}
    updates = []
    for part in (groups[:5], groups[5:]):
        trajectories = [t for g in part if penalty or not has_equal_rewards(g) for t in g.trajectories]
        new, entropy = zip(*(response_logprobs(model, t, 0.8, with_entropy=True) for t in trajectories), strict=True)
        before = [old[id(t)] for t in trajectories]
        value = objective_value(objective, trajectories, new, before, n=15, max_response=40)
        if penalty:
            value = value - sum(penalty(t, a, e) for t, a, e in zip(trajectories, new, entropy, strict=True)) / (15 * 40)
        optimizer.zero_grad()
        (-value).backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        masks = [torch.tensor(t.response_mask) for t in trajectories]
        log_ratio = [((a - b) * m).sum().item() for a, b, m in zip(new, before, masks, strict=True)]
        updates.append({"value": value.item(), "norm": norm, "gradient": gradient, "log_ratio": sorted(log_ratio)})
    updates[-1]["parameters"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return updates


def merge(ranks: list[dict], key: str) -> dict[str, torch.Tensor]:
    """Full tensors from the slices of all ranks."""
    slices: dict[str, dict[int, torch.Tensor]] = {}
    dims = {}
    for rank in ranks:
        for name, (dim, tp_rank, piece) in rank[key].items():
            slices.setdefault(name, {})[tp_rank] = piece
            dims[name] = dim
    return {
        name: torch.cat([parts[r] for r in sorted(parts)], dim=dims[name]) if dims[name] is not None else parts[0]
        for name, parts in slices.items()
    }


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def check_updates(ranks: list[dict], reference: list[dict], where: tuple) -> None:
    """Both updates' value, norm and ratios; the second's full gradient; the parameters after it."""
    for k in (0, 1):
        stats = [r["stats"][k] for r in ranks if r["stats"][k] is not None]
        # The terms, of about 1e-2 each, cancel in the value.
        assert math.isclose(sum(s.value for s in stats), reference[k]["value"], rel_tol=1e-4, abs_tol=1e-6), (*where, k)
        assert stats[0].result.applied
        assert math.isclose(stats[0].result.grad_norm, reference[k]["norm"], rel_tol=1e-4), (*where, k)
        log_ratio = sorted(x for s in stats for x in s.log_ratio)
        assert k == 0 or max(log_ratio) > 0.1, "the ratio is in use"
        assert torch.allclose(torch.tensor(log_ratio), torch.tensor(reference[k]["log_ratio"]), atol=1e-4), (*where, k)
    assert all(r["stats"][0].noise == 0.0 for r in ranks if r["stats"][0] is not None), where
    gradient = merge(ranks, "gradient")  # as the optimizer left it: clipped
    clip = min(1.0, 1.0 / reference[1]["norm"])
    # The second update starts from parameters that fp32 has rounded, the reference from float64 ones.
    assert gradient.keys() == reference[1]["gradient"].keys()
    for name, expected in reference[1]["gradient"].items():
        assert relative_error(gradient[name], expected * clip) < 5e-5, (*where, name)
    parameters = merge(ranks, "parameters")
    for name, expected in reference[1]["parameters"].items():
        assert relative_error(parameters[name], expected) < 2e-5, (*where, name)


@pytest.fixture(scope="module")
def references(models) -> dict:
    return {(m, o): reference_updates(path, o) for m, path in models.items() for o in OBJECTIVES}


def cases_of(models: dict[str, str], layouts: dict[str, dict]) -> tuple[list[tuple], list[dict]]:
    keys = [(layout, model, objective) for layout in layouts for model in models for objective in OBJECTIVES]
    # SGD: AdamW's first step divides gradients by themselves, which blows the rounding of those near zero up to +-lr.
    sgd = {"optimizer": "sgd", "learning_rate": SGD_RATE}
    return keys, [{"model": models[m], "objective": o, **sgd, **layouts[layout]} for layout, m, o in keys]


@pytest.mark.parametrize(("world_size", "layouts"), [(1, {"one process": {}}), (2, LAYOUTS_OF_TWO)])
def test_layouts_give_the_reference_gradient(rank_pool, models, references, world_size, layouts):
    keys, cases = cases_of(models, layouts)
    ranks = rank_pool.run("tests.megatron_ranks:two_updates", world_size=world_size, timeout_s=200, cases=cases)
    for i, (layout, model, objective) in enumerate(keys):
        check_updates([r[i] for r in ranks], references[model, objective], (layout, model, objective))


def test_distributed_optimizer_takes_the_same_steps(rank_pool, models):
    """DP 2 with the optimizer's state sharded, AdamW; micro-batches of another size. (Gradients are reduce-scattered there.)"""
    case = {"model": models["untied"], "objective": "tic_grpo", "distributed": True, "max_tokens_per_microbatch": 120}
    ranks = [r[0] for r in rank_pool.run("tests.megatron_ranks:two_updates", world_size=2, timeout_s=120, cases=[case])]
    reference = reference_updates(models["untied"], "tic_grpo", optimizer="adamw")
    assert math.isclose(sum(r["stats"][1].value for r in ranks), reference[1]["value"], rel_tol=1e-3, abs_tol=1e-6)
    assert math.isclose(ranks[0]["stats"][1].result.grad_norm, reference[1]["norm"], rel_tol=1e-3)
    parameters = merge(ranks, "parameters")
    for name, expected in reference[1]["parameters"].items():
        assert relative_error(parameters[name], expected) < 1e-4, name


@pytest.mark.parametrize(("world_size", "layouts"), [(1, [{}]), (2, [{"tp": 2}, {"pp": 2}, {}])])
def test_a_rollout_that_teaches_nothing_changes_nothing(rank_pool, models, world_size, layouts):
    ranks = rank_pool.run(
        "tests.megatron_ranks:nothing_to_learn", world_size=world_size, timeout_s=120, model=models["tied"], layouts=layouts
    )
    for rank in ranks:
        for stats, unchanged in rank:
            assert unchanged
            assert all(s.result.applied and s.result.grad_norm == 0.0 and s.log_ratio == [] for s in stats if s is not None)


def test_log_ratio_at_the_old_policy_is_zero_only_with_the_packing_kept(rank_pool, models):
    kept, repacked = rank_pool.run("tests.megatron_ranks:repacked_noise", world_size=1, timeout_s=120, model=models["tied"])[0]
    assert kept == 0.0
    assert 0.0 < repacked < 1e-3


def test_logits_equal_transformers(rank_pool, models):
    token_ids = torch.randint(0, 300, (57,), generator=torch.Generator().manual_seed(0)).tolist()
    outputs = rank_pool.run(
        "tests.megatron_ranks:logits", world_size=1, timeout_s=120, models=list(models.values()), token_ids=token_ids
    )[0]
    for path, got in zip(models.values(), outputs, strict=True):
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(torch.tensor([token_ids])).logits[0]
        assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_and_entropy_terms_have_the_reference_gradient(rank_pool, models, tmp_path, estimator):
    """At TP 2, with another model as the reference policy."""
    make_tiny_qwen3(tmp_path, seed=9, tie_word_embeddings=False, initializer_range=0.05)
    frozen = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)

    def penalty(trajectory, logprobs, entropy):
        with torch.no_grad():
            d = response_logprobs(frozen, trajectory, 0.8)
        d = d - logprobs
        kl = d.square() / 2 if estimator == "k2" else d.exp() - 1 - d
        return 0.1 * kl.sum() - 0.02 * entropy.sum()

    options = {"kl_coefficient": 0.1, "kl_estimator": estimator, "entropy_coefficient": 0.02, "reference_path": str(tmp_path)}
    sgd = {"optimizer": "sgd", "learning_rate": SGD_RATE}
    case = {"model": models["untied"], "objective": "tic_grpo", "tp": 2, "options": options, **sgd}
    ranks = [r[0] for r in rank_pool.run("tests.megatron_ranks:two_updates", world_size=2, timeout_s=120, cases=[case])]
    check_updates(ranks, reference_updates(models["untied"], "tic_grpo", penalty=penalty), (estimator,))


def test_dense_rewards_have_the_reference_gradient(rank_pool, models):
    """Prefix ratios over a packed micro-batch, at TP 2, PP 2 and DP 2; some tokens were not sampled by the policy."""
    sgd = {"optimizer": "sgd", "learning_rate": SGD_RATE}
    layouts = ("tp2", "pp2", "dp2")
    cases = [{"model": models["untied"], "objective": "tic_grpo", "dense": True, **sgd, **LAYOUTS_OF_TWO[n]} for n in layouts]
    ranks = rank_pool.run("tests.megatron_ranks:two_updates", world_size=2, timeout_s=200, cases=cases)
    reference = reference_updates(models["untied"], "tic_grpo", dense=True)
    assert any(abs(x) > math.log(1.28) for x in reference[1]["log_ratio"]), "the clip is in use"
    for i, layout in enumerate(layouts):
        check_updates([r[i] for r in ranks], reference, (layout, "dense"))


LAYOUTS_OF_BAD_UPDATES: list[dict[str, Any]] = [
    {"tp": 2, "value": math.nan},
    {"pp": 2, "value": math.inf, "precision": "bf16"},
    {"distributed": True, "value": math.nan},
    {"tp": 2, "value": math.nan, "gradient": 1e20},  # whose square is not finite, and so is no norm
    {"pp": 2, "value": math.nan, "precision": "fp16"},
    {"pp": 2, "value": math.nan, "precision": "fp16", "loss_scale": 1.0},  # which cannot be lowered
]


def test_updates_with_numbers_that_are_not_finite_are_skipped_by_all_ranks(rank_pool, models):
    """The parameters stay bit for bit, on every rank; the trajectories are named; the next update works."""
    layouts = [dict(layout) for layout in LAYOUTS_OF_BAD_UPDATES]
    ranks = rank_pool.run(
        "tests.megatron_ranks:bad_updates", world_size=2, timeout_s=200, model=models["untied"], layouts=layouts
    )
    for i, layout in enumerate(LAYOUTS_OF_BAD_UPDATES):
        views = [r[i] for r in ranks]
        for view in views:
            assert view["same"] == [True, True, False], layout
            assert view["finite"], layout
        reports = [view for view in views if view["stats"][0] is not None]
        assert len(reports) == (2 if "distributed" in layout else 1)
        updates = bad_logprobs, bad_gradient, good = list(zip(*(view["stats"] for view in reports), strict=True))
        overflow = layout.get("precision") == "fp16" and "loss_scale" not in layout
        assert [s.bad_prompts for s in bad_logprobs] == [view["first"] for view in reports], layout
        assert not any(s.result.applied or s.result.overflow for s in bad_logprobs), layout
        assert not any(s.result.applied for s in bad_gradient), layout
        assert all(s.result.overflow == overflow for s in bad_gradient), layout
        assert all(s.result.applied and s.result.grad_norm > 0 and not s.bad_prompts for s in good), layout
        metrics = update_metrics(updates, [])
        assert metrics["policy/skipped_updates"] == 2
        assert metrics["policy/bad_trajectories"] == sum(len(view["first"]) for view in reports) > 0
        assert math.isfinite(metrics["policy/loss"]) and metrics["policy/grad_norm"] == good[0].result.grad_norm
        # An overflow of fp16's loss scale is no fault to report.
        assert [s.index for s in skipped_updates(updates)] == ([0] if overflow else [0, 1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_importance_sampling_every_gradient_is_taken_at_the_old_policy(rank_pool, models, precision):
    result = rank_pool.run(
        "tests.megatron_ranks:parameters_seen", world_size=1, timeout_s=120, model=models["tied"], precision=precision
    )[0]
    assert len(result["seen"]) == 4
    for seen in result["seen"]:
        assert all(torch.equal(a, b) for a, b in zip(seen, result["before"], strict=True))
    steps = [result["before"], *result["after"]]
    for earlier, later in itertools.pairwise(steps):
        assert any(not torch.equal(a, b) for a, b in zip(earlier, later, strict=True)), "each step was applied"
