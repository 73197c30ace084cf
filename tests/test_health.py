"""Health checks: each sign is found, a healthy run is left in peace."""

from __future__ import annotations

import math
import random

import pytest

from tic_megatron.config import LoggingSettings
from tic_megatron.observability.health import CHECKS, REPEAT_AFTER, SPIKE_WARM_UP, WINDOW, HealthMonitor, SpikeDetector
from tic_megatron.observability.metrics import MetricsLogger

HEALTHY = {
    "policy/ess": 0.95,
    "policy/grad_norm": 0.3,
    "policy/entropy": 0.5,
    "policy/kl": 0.01,
    "policy/skipped_updates": 0.0,
    "policy/ratio_capped_fraction": 0.05,
    "policy/ratio_underflow_fraction": 0.0,
    "policy/log_ratio_abs_max_first": 0.0,
    "reward/mean": 0.4,
    "reward/zero_advantage_fraction": 0.2,
    "response/truncated_fraction": 0.0,
    "response/length_mean": 100.0,
    "mismatch/trajectory_log_ratio_std": 1e-5,
}
SIGNS = {
    "stale gradients": {"policy/ess": 0.3, "policy/grad_norm": 0.9},
    "skipped updates": {"policy/skipped_updates": 1.0},
    "ratio capped": {"policy/ratio_capped_fraction": 0.7},
    "ratio underflow": {"policy/ratio_underflow_fraction": 0.05},
    "advantage collapse": {"reward/zero_advantage_fraction": 0.97},
    "KL explosion": {"policy/kl": 2.0},
    "truncation": {"response/truncated_fraction": 0.4},
    "entropy collapse": {"policy/entropy": 0.01},
    "generator-trainer mismatch": {"mismatch/trajectory_log_ratio_std": 0.5},
    "noise of L": {"policy/log_ratio_abs_max_first": 2e-5},
}


def warnings_of(steps: list[dict]) -> list[tuple[int, str]]:
    monitor = HealthMonitor()
    return [(i, line) for i, metrics in enumerate(steps, 1) for line in monitor.check(i, metrics)]


def test_a_healthy_run_has_no_warnings():
    assert warnings_of([HEALTHY] * 200) == []
    sparse = {k: v for k, v in HEALTHY.items() if k not in ("policy/kl", "policy/log_ratio_abs_max_first")}
    assert warnings_of([sparse] * 50) == []


@pytest.mark.parametrize("name", [c.name for c in CHECKS])
def test_each_sign_is_found_once_and_again_later(name):
    found = warnings_of([HEALTHY] * WINDOW + [HEALTHY | SIGNS[name]] * (REPEAT_AFTER + WINDOW))
    assert [line.split(":")[0] for _, line in found] == [name, name]
    (first, line), (second, _) = found
    assert WINDOW < first <= 2 * WINDOW and second - first == REPEAT_AFTER
    assert (
        "nan" not in line
        and "\n" not in line
        and ("lower" in line or "raise" in line or "choose" in line or "use" in line or "error" in line)
    )


def test_a_policy_that_has_moved_since_it_sampled_is_no_mismatch():
    ahead = HEALTHY | SIGNS["generator-trainer mismatch"] | {"rollout/staleness_max": 1.0}
    assert warnings_of([ahead] * 60) == []


def test_a_sure_policy_that_is_right_is_no_collapse():
    assert warnings_of([HEALTHY] * WINDOW + [HEALTHY | {"policy/entropy": 0.01, "reward/mean": 0.97}] * 30) == []


def test_a_run_that_continues_gives_the_warnings_that_it_would_have_given(tmp_path):
    """The windows, the first of them, the usual norms and what was told come from the rows that it has logged."""
    rng = random.Random(3)
    noise = [{"policy/grad_norm_update_0": 0.3 * math.exp(rng.gauss(0, 0.1)), "policy/kl": math.nan} for _ in range(120)]
    steps = [HEALTHY | row for row in noise]
    for at in range(35, 60):
        steps[at] |= SIGNS["truncation"] | SIGNS["entropy collapse"]
    for at in (45, 80):
        steps[at]["policy/grad_norm_update_0"] = 30.0
    whole = warnings_of(steps)
    assert {line.split(":")[0] for _, line in whole} == {"truncation", "entropy collapse", "gradient spike"}
    for cut in (5, 40, 47, 79):
        logger = MetricsLogger(tmp_path / str(cut), LoggingSettings(tensorboard=False), "run", {})
        for step, metrics in enumerate(steps[: cut + 2], 1):
            logger.log(step, metrics)
        monitor = HealthMonitor()
        before = [(step, line) for step, row in logger.truncate_after(cut) for line in monitor.check(step, row)]
        after = [(step, line) for step, row in enumerate(steps[cut:], cut + 1) for line in monitor.check(step, row)]
        assert before + after == whole


def norms(seed: int, n: int, *, spread: float, drift: float = 0.0, tail: bool = False) -> list[float]:
    """Noise by factors around 0.3; heavy-tailed (Student's t with 5 degrees of freedom) or normal."""
    rng = random.Random(seed)
    draws = [rng.gauss(0, 1) for _ in range(n)]
    if tail:
        draws = [x / math.sqrt(sum(rng.gauss(0, 1) ** 2 for _ in range(5)) / 5) for x in draws]
    return [0.3 * math.exp(spread * x + drift * i) for i, x in enumerate(draws)]


def steps_of(series: list[float], updates: int = 4) -> list[dict]:
    """Norms as metrics of steps of so many updates."""
    starts = range(0, len(series), updates)
    return [{f"policy/grad_norm_update_{k}": norm for k, norm in enumerate(series[i : i + updates])} for i in starts]


@pytest.mark.parametrize("spread", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("drift", [0.0, -0.01, 0.005])
def test_noisy_but_stationary_norms_are_no_spikes(spread, drift):
    for seed in range(5):
        assert warnings_of(steps_of(norms(seed, 400, spread=spread, drift=drift))) == []


def test_heavy_tails_are_hardly_ever_spikes():
    found = [SpikeDetector() for _ in range(10)]
    spikes = sum(d.add(x) is not None for seed, d in enumerate(found) for x in norms(seed, 500, spread=0.3, tail=True))
    assert spikes <= 0.005 * 10 * 500


@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_a_spike_is_named_once(spread):
    series = norms(1, 200, spread=spread)
    series[118] = 30.0  # step 30, update 3
    ((step, line),) = warnings_of(steps_of(series))
    assert step == 30 and line.startswith("gradient spike: the gradient norm of update 3 of step 30 is 30, ")
    usual = float(line.split("times the usual ")[1].partition(":")[0])
    assert usual == pytest.approx(0.3, rel=0.2)


def test_spikes_do_not_hide_each_other_and_a_new_level_becomes_usual():
    series = norms(2, 400, spread=0.2)
    for i in range(100, 160, 8):
        series[i] = 30.0 * (1 + i / 1000)  # each larger than the one before
    assert len(warnings_of(steps_of(series))) == len(range(100, 160, 8))
    shifted = norms(3, 100, spread=0.2) + [20 * x for x in norms(4, 300, spread=0.2)]
    found = [step for step, _ in warnings_of(steps_of(shifted))]
    assert found and found[0] == 26 and found[-1] <= 26 + 10


def test_no_spikes_during_warm_up_or_from_what_is_no_norm():
    detector = SpikeDetector()
    assert [detector.add(x) for x in [0.3, 40.0] * (SPIKE_WARM_UP // 2)] == [None] * SPIKE_WARM_UP
    detector = SpikeDetector()
    assert all(detector.add(x) is None for x in [0.0, math.nan, math.inf] * 40)
    assert all(detector.add(0.3) is None for _ in range(SPIKE_WARM_UP))  # what came before does not count
    assert detector.add(0.3 * 2.9) is None and detector.add(0.3 * 3.1) == pytest.approx(0.3)
