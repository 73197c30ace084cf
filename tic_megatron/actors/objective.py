"""From the settings to the objective that a run maximises."""

from __future__ import annotations

import difflib
import runpy
from dataclasses import dataclass, replace
from pathlib import Path

from tic_megatron.algorithms import OBJECTIVES, Objective
from tic_megatron.algorithms.clips import ClipRange, two_sided
from tic_megatron.algorithms.normalisers import NORMALISERS
from tic_megatron.algorithms.objectives import with_dense_rewards
from tic_megatron.algorithms.ratios import TRAJECTORY
from tic_megatron.config import AlgorithmSettings, SettingsError


@dataclass(frozen=True)
class ChosenObjective:
    """An objective with its clip range, options applied."""

    objective: Objective
    clip_range: ClipRange


def choose_objective(settings: AlgorithmSettings, *, dense: bool = False) -> ChosenObjective:
    """The registered objective with the settings' options; `dense`: for a reward that is given at tokens.

    Raises:
        SettingsError: an unknown name (the nearest is named), a plugin that cannot be run, options that contradict it.
    """
    if settings.plugin is not None:
        run_plugin(settings.plugin)
    name = settings.objective
    if name not in OBJECTIVES:
        likely = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.0)[0]
        raise SettingsError(
            f"algorithm.objective: there is no objective {name!r}; did you mean {likely!r}? "
            f"(there are {', '.join(OBJECTIVES)}; algorithm.plugin adds others)"
        )
    objective = OBJECTIVES[name]
    if settings.dual_clip is not None and objective.clip is not two_sided:
        raise SettingsError(f"algorithm.dual_clip bounds two-sided clips, and {name} has none: leave it out")
    if settings.eps_low is not None and objective.clip is not two_sided:
        raise SettingsError(f"algorithm.eps_low is for two-sided clips, and {name} has none: leave it out")
    if settings.correction != "none" and settings.correction_level == "token" and not objective.ratio.per_token:
        raise SettingsError(f"algorithm.correction_level is token, but {name} has one weight per trajectory: give trajectory")
    if settings.normaliser is not None:
        objective = replace(objective, normaliser=NORMALISERS[settings.normaliser])
    if dense:
        if objective.ratio is not TRAJECTORY:
            able = ", ".join(key for key, value in OBJECTIVES.items() if value.ratio is TRAJECTORY)
            raise SettingsError(
                f"algorithm.objective: reward.function gives a reward per token, and {name} does not say what ratio weights one; "
                f"give an objective with the trajectory ratio ({able}), or a reward per response"
            )
        objective = with_dense_rewards(objective)
    return ChosenObjective(objective, objective.clip_range(settings.eps_low, settings.eps_high, settings.dual_clip))


def run_plugin(path: str) -> None:
    """Run a file that calls `register_objective`, once per process. Raises SettingsError when it cannot be run."""
    if path in _plugins_run:
        return
    if not Path(path).is_file():
        raise SettingsError(f"algorithm.plugin: there is no file {path}")
    try:
        runpy.run_path(path)
    except Exception as error:
        raise SettingsError(f"algorithm.plugin: {path} failed: {type(error).__name__}: {error}") from error
    _plugins_run.add(path)


_plugins_run: set[str] = set()
