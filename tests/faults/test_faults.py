"""A process of each kind is killed at a random moment; `scripts/fault_test.sh` has more trials."""

from __future__ import annotations

import re

import pytest

from tests.faults.trials import KINDS, Trials

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def trials(task, tmp_path_factory):
    return Trials(tmp_path_factory.mktemp("faults"), task)


@pytest.mark.parametrize(("seed", "kind"), list(enumerate(KINDS)))
def test_a_killed_process_changes_nothing(trials, seed, kind):
    trial = trials.trial(1000 + seed, kind)
    assert not trial.problem, trial


@pytest.mark.repeat  # three minutes; `test_remote.py` has hangs of every kind in seconds
def test_an_actor_that_hangs_changes_nothing(trials):
    limits = [f"--cluster.{phase}timeout_s={seconds}" for phase, seconds in (("", 20), ("start_", 90), ("weight_sync_", 20))]
    trial = trials.trial(2000, "actor", *limits, stop=True)
    assert not trial.problem, trial
    # The driver's deadline finds a hang; while the ranks meet at the start, the library's own is the shorter one.
    log = (trials.folder / "trial_2000" / "logs" / "driver.log").read_text()
    assert re.search(r"no answer in |[Tt]imed out", log), log
