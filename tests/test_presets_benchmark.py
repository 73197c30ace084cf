"""The benchmark that trains every preset: its settings, and that the page shows its results."""

import json
from pathlib import Path

import pytest

from benchmarks.presets import CONFIGURATIONS, flags, table
from tests.workspace import settings_of
from tic_megatron.algorithms import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]


def test_every_preset_is_trained():
    assert set(OBJECTIVES) <= {name for name, c in CONFIGURATIONS.items() if name == c.objective}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_flags_are_settings(name, tmp_path):
    configuration = CONFIGURATIONS[name]
    settings = settings_of(*flags(configuration, tmp_path, tmp_path / "run", 3))
    assert settings.algorithm.objective == configuration.objective
    assert settings.trainer.steps == 3
    changed = {n for n, value in settings.flatten().items() if n.startswith("algorithm.eps") and value is not None}
    assert changed == {n for n in configuration.changes if n.startswith("algorithm.eps")}


def test_page_shows_the_results():
    results = json.loads((ROOT / "benchmarks" / "presets.json").read_text())
    assert set(OBJECTIVES) <= set(results)
    assert table(results) in (ROOT / "docs" / "objectives.md").read_text()
