"""The recipes of the paper's experiment: what they set, and that each of them trains."""

from __future__ import annotations

import itertools
import os
import subprocess

import pytest
import yaml

from tests.runs import ROOT, TIMEOUT_S
from tic_megatron.actors.objective import choose_objective
from tic_megatron.algorithms import clips, normalisers, ratios
from tic_megatron.algorithms.objectives import OBJECTIVES
from tic_megatron.commands import COMMANDS, arguments
from tic_megatron.config import Settings
from tic_megatron.config_checks import check_settings
from tic_megatron.config_evaluate import check_evaluate_settings
from tic_megatron.evaluation.paper import (
    GRPO,
    GSPO,
    METHODS,
    MODELS,
    NO_IS,
    OWN_NORMALISER,
    TIC_GRPO,
    TRAJ_IS,
    UB_CLIP,
    method_of,
)
from tic_megatron.observability.metrics import read_metrics

FOLDER = ROOT / "examples" / "paper"
RECIPES = {"grpo": GRPO, "gspo": GSPO, "tic_grpo": TIC_GRPO, "traj_is": TRAJ_IS, "ub_clip": UB_CLIP, "no_is": NO_IS}
NORMALISER_NAMES = {function: name for name, function in normalisers.NORMALISERS.items()}
CELLS = list(itertools.product(["qwen3-1.7b", "qwen3-8b"], RECIPES))


def settings_of(model: str, method: str, *flags: str) -> Settings:
    files = [FOLDER / "common.yaml", FOLDER / f"{model}.yaml", FOLDER / "methods" / f"{method}.yaml"]
    parser = arguments.build_parser("train", COMMANDS["train"])
    given = [word for file in files for word in ("--config", str(file))]
    return arguments.read_settings(parser, Settings, [*given, *flags])[0]


def composition(method: str) -> tuple:
    algorithm = settings_of("qwen3-1.7b", method).algorithm
    chosen = choose_objective(algorithm, dense=False)
    bounds = chosen.clip_range
    objective = chosen.objective
    return objective.ratio, objective.clip, objective.normaliser, bounds.eps_low, bounds.eps_high, objective.at_old_policy


def test_every_file_is_of_a_recipe():
    assert {path.stem for path in (FOLDER / "methods").iterdir()} == set(RECIPES) and set(RECIPES.values()) == set(METHODS)
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"common", "evaluate", *(model for model, _ in CELLS)}


def test_models_are_evaluated_as_they_were_trained():
    training = settings_of("qwen3-8b", "tic_grpo")
    command = COMMANDS["evaluate"]
    parser = arguments.build_parser("evaluate", command)
    words = ["--config", str(FOLDER / "evaluate.yaml"), "--model", "hf", "--benchmarks", "aime24,aime25,math500"]
    settings = arguments.read_settings(parser, command.settings, words, command.short)[0]
    check_evaluate_settings(settings)
    assert settings.model.enable_thinking is training.model.enable_thinking is False
    assert settings.rollout.precision == training.resolve().rollout.precision == "fp16"
    assert settings.eval.max_response_tokens == training.rollout.max_response_tokens
    assert (settings.eval.temperature, settings.eval.top_p, settings.eval.greedy) == (1.0, 1.0, True)


@pytest.mark.parametrize(("model", "method"), CELLS)
def test_a_recipe_sets_what_the_paper_says(model, method):
    settings = settings_of(model, method)
    check_settings(settings)
    trainer, rollout, algorithm = settings.trainer, settings.rollout, settings.algorithm
    assert (trainer.prompts_per_step, trainer.prompts_per_step // trainer.updates_per_step, trainer.epochs) == (128, 32, 1)
    assert not rollout.dynamic_sampling and settings.reward.overlong_buffer_tokens == 0
    assert algorithm.kl_coefficient == algorithm.entropy_coefficient == 0.0 and not algorithm.normalize_std
    assert (rollout.temperature, rollout.top_p) == (1.0, 1.0)
    gpus = {"qwen3-1.7b": (1, 1), "qwen3-8b": (2, 8)}[model]
    assert (settings.cluster.nodes, settings.cluster.gpus_per_node) == gpus
    assert method_of(settings.algorithm.objective, settings.algorithm.normaliser) is RECIPES[method]
    assert settings.model.path.rpartition("/")[2] in MODELS


def test_recipes_of_a_model_differ_in_their_objective_only():
    allowed = {"run.name", "algorithm.objective", "algorithm.normaliser", "algorithm.eps_low", "algorithm.eps_high"}
    for model, method in CELLS:
        here, base = settings_of(model, method).flatten(), settings_of(model, "grpo").flatten()
        assert {key for key in here if here[key] != base[key]} <= allowed


def test_a_method_is_known_by_its_normaliser_however_it_was_given():
    for method in METHODS:
        own = NORMALISER_NAMES[OBJECTIVES[method.objective].normaliser]
        assert OWN_NORMALISER.get(method.objective, method.normaliser) == own
        assert method_of(method.objective, method.normaliser) is method
        assert method_of(method.objective, None) is (method if own == method.normaliser else None)
    assert method_of("grpo", None) is None and method_of("tic_grpo", "token_mean") is None


def test_ablations_change_one_thing():
    grpo = composition("grpo")
    assert grpo == (ratios.TOKEN, clips.two_sided, normalisers.token_mean, 0.2, 0.28, False)
    assert composition("traj_is") == (ratios.TRAJECTORY, *grpo[1:])
    # The paper's UB_Clip is two: the clip, and a constant in place of the length.
    ratio, clip, normaliser, _, eps_high, _ = composition("ub_clip")
    assert (ratio, clip, normaliser, eps_high) == (ratios.TOKEN, clips.up_only, normalisers.constant_length, 0.28)
    ratio, clip, normaliser, _, eps_high, _ = composition("tic_grpo")
    assert (ratio, clip, normaliser, eps_high) == (ratios.TRAJECTORY, clips.up_only, normalisers.constant_length, 0.28)
    ratio, clip, normaliser, *_, at_old_policy = composition("no_is")
    assert (ratio, clip, normaliser, at_old_policy) == (ratios.NONE, clips.unclipped, grpo[2], True)


@pytest.fixture(scope="module")
def sixteen_problems(task, tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "train.jsonl"
    path.write_text("".join((task / "train.jsonl").read_text().splitlines(keepends=True)[:16]))
    return path


@pytest.mark.slow  # the whole stack, twelve times
@pytest.mark.parametrize(("model", "method"), CELLS)
def test_a_recipe_trains(model, method, task, sixteen_problems, tmp_path):
    overrides = {
        "model.path": task / "model",
        "model.enable_thinking": "null",  # which the tiny model's template does not know
        "data.train": sixteen_problems,
        "trainer.prompts_per_step": 8,  # so that the epoch has two steps
        "rollout.group_size": 4,
        "rollout.max_prompt_tokens": 64,
        "rollout.max_response_tokens": 8,
        "rollout.engines": 1,
        "actor.max_tokens_per_microbatch": 1024,
        "actor.precision": "fp32",
        "actor.learning_rate": 1e-3,
        "eval.benchmarks": "[]",
        "cluster.device": "cpu",
        "cluster.nodes": 1,
        "cluster.gpus_per_node": 2,
        "run.dir": tmp_path / "run",
    }
    words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    result = subprocess.run(
        [str(FOLDER / "train.sh"), model, method, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["policy/grad_norm"] > 0 and row["policy/skipped_updates"] == 0 for row in rows)
    algorithm = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["algorithm"]
    assert method_of(algorithm["objective"], algorithm["normaliser"]) is RECIPES[method]


def test_an_untrained_cell_is_not_evaluated(tmp_path):
    command = [str(FOLDER / "evaluate.sh"), "qwen3-8b", "grpo"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2 and "runs/paper/qwen3-8b/grpo has no finished model" in result.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "MODEL or METHOD is missing"),
        (["qwen3-1.7b"], "MODEL or METHOD is missing"),
        (["qwen3-2b", "grpo"], "there is no model qwen3-2b"),
        (["common", "grpo"], "there is no model common"),
        (["qwen3-8b", "ppo"], "there is no method ppo; give"),
    ],
)
def test_a_wrong_cell_is_refused(words, named):
    result = subprocess.run([str(FOLDER / "train.sh"), *words], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2 and named.partition(";")[0] in result.stderr and "tic_grpo" in result.stderr


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Calls of a stand-in for `tic-megatron`: what words it was given, a list per call."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "tic-megatron"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    return lambda: [line.split() for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize("folder", ["runs/paper/qwen3-1.7b/grpo", "elsewhere"])
def test_a_cell_is_evaluated_where_it_was_trained(folder, recorded, tmp_path, monkeypatch):
    (tmp_path / folder / "hf").mkdir(parents=True)
    if folder == "elsewhere":
        monkeypatch.setenv("RUN", folder)
    command = [str(FOLDER / "cell.sh"), "qwen3-1.7b", "grpo", "--run.seed", "1", "--", "--rollout.engines", "8"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    train, evaluate = recorded()
    assert train[0] == "train" and train[-4:] == ["--run.dir", folder, "--run.seed", "1"]
    assert evaluate[0] == "evaluate" and {f"{folder}/hf", f"{folder}/evaluation"} <= set(evaluate)
    assert evaluate[-2:] == ["--rollout.engines", "8"] and "--run.seed" not in evaluate


@pytest.mark.parametrize("words", [["--run.dir", "elsewhere"], ["--run.dir=elsewhere"]])
def test_a_cell_whose_training_alone_would_be_elsewhere_is_refused(words, recorded, tmp_path):
    command = [str(FOLDER / "cell.sh"), "qwen3-1.7b", "grpo", "--run.seed", "1", *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2 and "RUN=FOLDER" in result.stderr and not (tmp_path / "calls").exists()
