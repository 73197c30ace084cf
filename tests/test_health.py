"""Health checks: each sign is found, a healthy run is left in peace."""

from __future__ import annotations

import pytest

from tic_megatron.observability.health import CHECKS, REPEAT_AFTER, WINDOW, HealthMonitor

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


def test_a_sure_policy_that_is_right_is_no_collapse():
    assert warnings_of([HEALTHY] * WINDOW + [HEALTHY | {"policy/entropy": 0.01, "reward/mean": 0.97}] * 30) == []
