"""The benchmarks that train every preset and several layouts: their settings, and that the pages show their results."""

import json
from pathlib import Path

import pytest

from benchmarks.presets import CONFIGURATIONS, flags, table
from benchmarks.quickstart_layouts import LAYOUTS
from tests.workspace import settings_of
from tic_megatron.algorithms import OBJECTIVES
from tic_megatron.config_checks import check_settings

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


@pytest.mark.parametrize("name", LAYOUTS)
def test_flags_of_layouts_are_settings(name, tmp_path):
    check_settings(settings_of(*flags(LAYOUTS[name], tmp_path, tmp_path / "run", 3)).resolve())


def test_page_shows_the_layouts():
    results = json.loads((ROOT / "benchmarks" / "quickstart_layouts.json").read_text())
    assert set(results) <= set(LAYOUTS)
    assert table(results) in (ROOT / "docs" / "layouts.md").read_text()
