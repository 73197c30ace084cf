"""The convergence study: its environment against enumeration, its batched gradients against the public function, its script."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch

from benchmarks.convergence import report, study
from benchmarks.convergence.ascent import (
    Advantages,
    Lengths,
    Run,
    ascend,
    draw_batches,
    mean_token_weight,
    objective_gradient,
    to_parameters,
)
from benchmarks.convergence.environment import (
    RESIDUES,
    STEPS,
    STOP,
    VOCABULARY,
    logprob_table,
    make_task,
    return_and_gradient,
    sample,
)
from benchmarks.convergence.length_bias import expected_gradient
from benchmarks.convergence.tables import TABLES
from tic_megatron.algorithms import OBJECTIVES, clips, normalisers, policy_objective, ratios
from tic_megatron.algorithms.objectives import Objective


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_task(positions: int = 4, seeds: int = 3):
    return make_task(seeds, prompts=2, positions=positions, features=4, generator=seeded(0))


def moved(task, seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(task.start().shape, generator=seeded(seed), dtype=torch.float64)


def responses(positions: int):
    """Every response, as letters: those that stop at some position, and those that are cut."""
    letters = range(len(STEPS))
    for length in range(1, positions + 1):
        yield from ((*word, STOP) for word in itertools.product(letters, repeat=length - 1))
    yield from itertools.product(letters, repeat=positions)


def enumerated(task, theta: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(expected reward, total probability) of one seed's task, response by response, in plain Python."""
    table = logprob_table(task, theta)[seed].view(VOCABULARY, task.prompts, task.positions, RESIDUES)
    value, total = 0.0, 0.0
    for prompt, response in itertools.product(range(task.prompts), responses(task.positions)):
        residue, logprob, reward = 0, 0.0, 0.0
        for position, token in enumerate(response):
            logprob = logprob + table[token, prompt, position, residue]
            if token == STOP:
                reward = task.rewards[seed, prompt, position, residue].item()
            else:
                residue = (residue + STEPS[token]) % RESIDUES
        value, total = value + torch.exp(logprob) * reward / task.prompts, total + torch.exp(logprob)
    return value, total


def test_return_and_gradient_are_the_sums_over_all_responses():
    task = small_task()
    theta = moved(task, 1).requires_grad_()
    value, table_gradient = return_and_gradient(task, logprob_table(task, theta))
    exact = to_parameters(task, logprob_table(task, theta.detach()), table_gradient)
    for seed in range(task.seeds):
        expected, total = enumerated(task, theta, seed)
        (gradient,) = torch.autograd.grad(expected, theta)
        assert total.item() == pytest.approx(task.prompts, abs=1e-12)
        assert value[seed].item() == pytest.approx(expected.item(), abs=1e-12)
        assert gradient[seed].norm() > 1e-3
        torch.testing.assert_close(exact[seed], gradient[seed], rtol=0, atol=1e-12)


def test_samples_follow_the_policy():
    task = small_task(positions=5, seeds=2)
    table = logprob_table(task, moved(task, 2))
    n = 40_000
    prompts = torch.arange(task.prompts).repeat(task.seeds, n // task.prompts)
    drawn = sample(task, table, prompts, torch.rand(*prompts.shape, task.positions, generator=seeded(3), dtype=torch.float64))
    value, _ = return_and_gradient(task, table)
    error = drawn.rewards.std(dim=1) / math.sqrt(n)
    assert ((drawn.rewards.mean(dim=1) - value).abs() < 4 * error).all()
    # E[1 / P] over the sampled responses is the number of responses, if and only if token indices and masks are right.
    logprobs = (table.flatten(1).gather(1, drawn.tokens.flatten(1)).view(drawn.mask.shape) * drawn.mask).sum(dim=2)
    inverse = torch.exp(-logprobs)
    count = len(list(responses(task.positions)))
    assert ((inverse.mean(dim=1) - count).abs() < 5 * inverse.std(dim=1) / math.sqrt(n)).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batched_gradient_is_each_seeds_own(name):
    task = small_task(positions=6)
    old = logprob_table(task, moved(task, 4))
    table = logprob_table(task, moved(task, 4) + moved(task, 5, 0.3))
    run = Run(OBJECTIVES[name], 1.0)
    batch = draw_batches(run, task, old, Advantages("group", task), seeded(6))[0]
    gradient = objective_gradient(run, table, old, batch).table
    for seed in range(task.seeds):
        leaf = table[seed].flatten().clone().requires_grad_()
        tokens = batch.samples.tokens[seed]
        value, _ = policy_objective(
            name,
            leaf[tokens],
            old[seed].flatten()[tokens],
            batch.samples.mask[seed],
            batch.advantages[seed],
            max_response_tokens=task.positions,
        )
        value.backward()
        assert leaf.grad.norm() > 0
        torch.testing.assert_close(gradient[seed].flatten(), leaf.grad, rtol=1e-12, atol=1e-15)


def test_uncapped_tic_grpo_points_along_the_gradient_at_the_current_policy():
    task = small_task(positions=4, seeds=2)
    old, theta = logprob_table(task, moved(task, 7, 0.3)), moved(task, 8, 0.5)
    table = logprob_table(task, theta)
    run = Run(OBJECTIVES["tic_grpo"], 1.0, groups=20_000, group_size=4, updates_per_refresh=1, eps_high=math.inf)
    batch = draw_batches(run, task, old, Advantages("group", task), seeded(9))[0]
    found = to_parameters(task, table, objective_gradient(run, table, old, batch).table)
    exact = to_parameters(task, table, return_and_gradient(task, table)[1]) * (1 - 1 / 4) / task.positions
    assert ((found - exact).flatten(1).norm(dim=1) < 0.08 * exact.flatten(1).norm(dim=1)).all()


def test_expected_gradient_of_a_length_normalised_objective():
    task = small_task(positions=4, seeds=2)
    table = logprob_table(task, moved(task, 12, 0.5))
    lengths = torch.tensor([3.0, 4.0, 8.0, 9.0], dtype=torch.float64)
    expected = expected_gradient(task, table, lengths)
    # The same by sampling, through the objective itself with the exact baseline.
    run = Run(OBJECTIVES["no_is"], 1.0, groups=20_000, group_size=4, updates_per_refresh=1)
    batch = draw_batches(run, task, table, Advantages("value", task), seeded(13))[0]
    batch = replace(batch, lengths=lengths.long()[batch.samples.lengths - 1])
    found = objective_gradient(run, table, table, batch).table
    found, expected = to_parameters(task, table, found), to_parameters(task, table, expected)
    plain = to_parameters(task, table, return_and_gradient(task, table)[1] / 5)
    of_equal_lengths = expected_gradient(task, table, torch.full((4,), 5.0, dtype=torch.float64))
    torch.testing.assert_close(to_parameters(task, table, of_equal_lengths), plain, rtol=0, atol=1e-12)
    assert ((found - expected).flatten(1).norm(dim=1) < 0.04 * expected.flatten(1).norm(dim=1)).all()
    assert ((found - plain).flatten(1).norm(dim=1) > 0.06 * expected.flatten(1).norm(dim=1)).all()


def test_group_mean_is_leave_one_out_with_a_smaller_step():
    task = small_task(positions=6)
    run = Run(OBJECTIVES["tic_grpo"], 60.0, updates=12, updates_per_refresh=4, group_size=4)
    group = ascend(run, task, seeded(10))
    others = ascend(replace(run, baseline="leave_one_out", step_size=60.0 * (1 - 1 / 4)), task, seeded(10))
    assert (group.returns[:, -1] - group.returns[:, 0]).abs().min() > 1e-3
    torch.testing.assert_close(group.returns, others.returns, rtol=0, atol=1e-9)


def test_filler_changes_lengths_and_nothing_else():
    task = small_task(positions=6)
    filled = Lengths(centre=30, spread=18, longest=48)
    run = Run(OBJECTIVES["tic_grpo"], 60.0, updates=6)
    plain = ascend(run, task, seeded(11))
    longer = ascend(replace(run, lengths=filled, step_size=60.0 * 48 / 6), task, seeded(11))
    torch.testing.assert_close(plain.returns, longer.returns, rtol=0, atol=1e-12)
    batch = draw_batches(
        replace(run, lengths=filled), task, logprob_table(task, task.start()), Advantages("group", task), seeded(0)
    )[0]
    assert batch.lengths.min() == 12 and batch.lengths.max() == 48
    assert (batch.lengths >= batch.samples.lengths).all()


def test_mean_token_weight():
    task = small_task(positions=6)
    weights = {name: mean_token_weight(Run(OBJECTIVES[name], 0.0, groups=64), task, seeded(0)) for name in OBJECTIVES}
    assert weights["tic_grpo"] == weights["grpo2"] == pytest.approx(1 / 6)
    assert weights["grpo"] == weights["gspo"] == weights["no_is"] > weights["dapo"] > weights["tic_grpo"]
    own = Objective(ratios.TOKEN, clips.two_sided, normalisers.trajectory_mean, 0.2, 0.2)
    assert mean_token_weight(Run(own, 0.0), task, seeded(0)) == pytest.approx(1.0)


def test_script_and_report_run(tmp_path):
    out, page = tmp_path / "results.json", tmp_path / "theory.md"
    page.write_text("before\n<!-- table hierarchy -->\n<!-- end -->\nafter\n")
    study.main(["--quick", "--out", str(out), "--only", "estimators", "length_bias", "hierarchy"])
    results = json.loads(out.read_text())
    assert set(results["hierarchy"]["rows"]) == set(OBJECTIVES)
    report.main(["--results", str(out), "--page", str(page), "--figures", str(tmp_path)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| `tic_grpo` |" in text
    assert (tmp_path / "convergence_hierarchy.png").stat().st_size > 10_000


def test_page_shows_the_results():
    """The tables are those of the committed results, and so is every interval that the text quotes."""
    results = json.loads((report.ROOT / "benchmarks" / "convergence" / "results.json").read_text())
    page = (report.ROOT / "docs" / "theory.md").read_text()
    assert set(re.findall(r"<!-- table (.+?) -->", page)) == set(TABLES)
    assert report.fill(page, results) == page
    tables = " ".join(make(results) for _, make in TABLES.values())
    text = re.sub(r"<!-- table .*?<!-- end -->", "", page[page.index("## Convergence, measured") :], flags=re.DOTALL)
    quoted = re.findall(r"[-+]?\d+\.\d+ ± \d+\.\d+", text)
    assert quoted
    assert [interval for interval in quoted if interval not in tables] == []
