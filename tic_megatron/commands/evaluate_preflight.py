"""Checks before an evaluation that need files: everything that can be refused is refused here, before any worker starts."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tic_megatron.commands.engine_layout import check_engine_layout
from tic_megatron.commands.machine import check_cluster, check_engines
from tic_megatron.commands.model_files import check_tensors, check_weights, locate_model, read_config, size
from tic_megatron.commands.preflight import longest_prompt
from tic_megatron.commands.remote_code import check_remote_code
from tic_megatron.commands.run_folder import digest_reward
from tic_megatron.commands.tokenizer_files import load_tokenizer_and_config
from tic_megatron.config import RewardSettings, Settings, SettingsError
from tic_megatron.config_evaluate import EvaluateSettings, changed
from tic_megatron.data.prompts import Problem, tokenize_problems
from tic_megatron.evaluation import Benchmark, EvalSet, choose_benchmarks, grader_settings, read_benchmark
from tic_megatron.evaluation.saved import Mode, read_rows
from tic_megatron.rewards.terms import read_terms
from tic_megatron.rewards.workers import check_rewards
from tic_megatron.rollout.requests import stable_seed
from tic_megatron.rollout.stop_tokens import stop_token_ids
from tic_megatron.trajectory import Prompt

IDENTITY_FILE = "evaluation.json"
FINGERPRINTED = ("*.safetensors", "*.json", "*.jinja", "*.txt")


@dataclass(frozen=True)
class EvaluateInputs:
    """What preflight has loaded. `identity`: of model and problems, `evaluation.json`; `engines`: settings of the engines."""

    model_dir: Path
    sets: list[EvalSet]
    identity: dict[str, Any]
    engines: Settings


def evaluate_preflight(settings: EvaluateSettings) -> EvaluateInputs:
    """Check resolved, validated settings against the files and the machine; SettingsError for the first thing that is wrong.

    Replaces `auto` in `cluster.device` and `rollout.precision` by what is used.
    """
    _check_folder(Path(settings.run.dir))
    read_terms(settings.reward)  # also where every benchmark has a grader of its own: it is written down
    problems = _read_problems(settings)
    directory = locate_model(settings.model.path)
    if Path(settings.run.dir).resolve() == directory.resolve():
        raise SettingsError(f"run.dir: {directory} is the model's directory; give the evaluation another --out")
    config = read_config(directory)
    check_remote_code(directory, trusted=settings.model.trust_remote_code)
    _check_room(config, directory, settings)
    check_engine_layout(config, directory, settings.for_engines(1))
    check_weights(directory)
    _choose_device(settings, config)
    _check_same_settings(settings)
    tokenizer, hf_config = load_tokenizer_and_config(directory, settings.model)
    check_cluster(settings.cluster.address)
    check_tensors(hf_config, directory)
    stop_token_ids(tokenizer, settings.rollout.stop_tokens)
    sets = [EvalSet(benchmark, tokenize_problems(rows, tokenizer)) for benchmark, rows in problems]
    longest = _check_lengths(config, directory, settings, [rows for _, rows in problems], sets)
    engines = settings.for_engines(longest)
    check_engines(engines, hf_config, directory)
    identity = _identity(directory, sets, settings.reward)
    _check_same_evaluation(settings, identity)
    for chosen in sets:
        for mode in modes(settings, chosen.benchmark):
            read_rows(response_file(settings, chosen.benchmark, mode), mode, len(chosen.prompts))
    for chosen in sets:  # what runs code of the user's comes last
        check_rewards(grader_settings(chosen.benchmark, settings.reward))
    return EvaluateInputs(directory, sets, identity, engines)


def modes(settings: EvaluateSettings, benchmark: Benchmark) -> list[Mode]:
    """How responses to a benchmark are generated: sampled, greedy, or both."""
    options = settings.eval
    samples = benchmark.samples if options.samples is None else options.samples
    seed = stable_seed("evaluate", options.seed, benchmark.name)
    limit = options.max_response_tokens
    sampled = Mode("sampled", samples, options.temperature, options.top_p, options.top_k or 0, limit, seed)
    greedy = Mode("greedy", 1, 0.0, 1.0, 0, limit, None)
    return [*([sampled] if samples else []), *([greedy] if options.greedy or not samples else [])]


def response_file(settings: EvaluateSettings, benchmark: Benchmark, mode: Mode) -> Path:
    """Where a benchmark's responses of one mode are kept."""
    return Path(settings.run.dir) / benchmark.name / f"{mode.name}.jsonl"


def _check_folder(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise SettingsError(f"run.dir: {folder} cannot be a folder, since {existing} is a file; give another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(f"run.dir: {folder} cannot be written ({existing} is read-only for you); give another --out")
    if (folder / "config.yaml").exists() and not (folder / IDENTITY_FILE).exists():
        raise SettingsError(f"run.dir: {folder} holds a training run, not an evaluation; give another --out")


def _read_problems(settings: EvaluateSettings) -> list[tuple[Benchmark, list[Problem]]]:
    options, data = settings.eval, settings.problems
    chosen = choose_benchmarks(options.benchmarks, data, settings.reward, options.template)
    return [(benchmark, read_benchmark(benchmark, data)[: options.limit]) for benchmark in chosen]


def _choose_device(settings: EvaluateSettings, model_config: dict[str, Any]) -> None:
    import torch

    cluster, rollout = settings.cluster, settings.rollout
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cluster.device == "auto":
        cluster.device = "cuda" if gpus else "cpu"
    if rollout.precision == "auto":
        own = model_config.get("dtype", model_config.get("torch_dtype"))
        if cluster.device == "cpu":
            rollout.precision = "fp32"
        else:  # bf16 would round what was trained in fp16
            rollout.precision = "fp16" if own == "float16" else "bf16"
    if cluster.device == "cpu" or cluster.address is not None:  # a running cluster's nodes may differ from this machine
        return
    if not gpus:
        raise SettingsError("cluster.device is cuda, but this machine has no GPU that torch can use; give cpu or auto")
    needed = rollout.engines * rollout.tensor_parallel_size
    if needed > gpus:
        raise SettingsError(
            f"rollout.engines {rollout.engines} x rollout.tensor_parallel_size {rollout.tensor_parallel_size} = {needed} GPUs, "
            f"but this machine has {gpus}; lower one of them"
        )


def _check_room(config: dict[str, Any], directory: Path, settings: EvaluateSettings) -> None:
    positions, limit = size(config, "max_position_embeddings", directory), settings.eval.max_response_tokens
    if limit >= positions:
        raise SettingsError(
            f"eval.max_response_tokens {limit} leaves no room for a prompt in max_position_embeddings {positions} of "
            f"{directory}; lower it"
        )


def _check_lengths(
    config: dict[str, Any], directory: Path, settings: EvaluateSettings, problems: list[list[Problem]], sets: list[EvalSet]
) -> int:
    """Tokens of the longest prompt. None may be left out or cut: that would be another benchmark."""
    positions, limit = size(config, "max_position_embeddings", directory), settings.eval.max_response_tokens
    longest, where = max(longest_prompt(rows, chosen.prompts) for rows, chosen in zip(problems, sets, strict=True))
    if longest + limit <= positions:
        return longest
    room = positions - limit
    too_long = sum(len(prompt.token_ids) > room for chosen in sets for prompt in chosen.prompts)
    total = sum(len(chosen.prompts) for chosen in sets)
    way = f"lower that to {positions - longest}" if longest < positions else "take the problem out, or give another model"
    raise SettingsError(
        f"eval.benchmarks: {too_long} of {total} prompts are too long for max_position_embeddings {positions} of {directory} "
        f"with eval.max_response_tokens {limit} (the longest, {where}, has {longest} tokens); {way}"
    )


def _identity(directory: Path, sets: list[EvalSet], reward: RewardSettings) -> dict[str, Any]:
    return {
        "model": fingerprint(directory),
        "benchmarks": {
            chosen.benchmark.name: {
                "source": chosen.benchmark.source,
                "reward": chosen.benchmark.reward,
                "program": digest_reward(grader_settings(chosen.benchmark, reward)),
                "problems": _problems_digest(chosen.prompts),
            }
            for chosen in sets
        },
    }


def fingerprint(directory: Path) -> str:
    """SHA-256 over the names and contents of all files of a model directory that matter, wherever it lies."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FINGERPRINTED for path in directory.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _problems_digest(prompts: list[Prompt]) -> str:
    rows = [(prompt.id, prompt.token_ids, prompt.answer) for prompt in prompts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _check_same_settings(settings: EvaluateSettings) -> None:
    folder = Path(settings.run.dir)
    if not (folder / IDENTITY_FILE).exists():
        return
    path = folder / "config.yaml"
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        there = {f"{section}.{name}": value for section, members in sections.items() for name, value in members.items()}
    except (OSError, yaml.YAMLError, AttributeError, ValueError, RecursionError) as error:
        raise SettingsError(f"run.dir: {path} is not the config.yaml of an evaluation; give another --out") from error
    changes = changed(there, settings)
    if changes:
        listed = ", ".join(f"{key} ({old} there, {new} here)" for key, (old, new) in list(changes.items())[:4])
        more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
        raise SettingsError(
            f"run.dir: {folder} holds an evaluation with other settings: {listed}{more}; give another --out, or the same settings"
        )


def _check_same_evaluation(settings: EvaluateSettings, identity: dict[str, Any]) -> None:
    there = read_identity(Path(settings.run.dir))
    if there is None:
        return
    folder = settings.run.dir
    if there["model"] != identity["model"]:
        raise SettingsError(f"run.dir: {folder} holds an evaluation of another model (its files differ); give another --out")
    for name, benchmark in identity["benchmarks"].items():
        before = there["benchmarks"].get(name, benchmark)
        if before.get("program", benchmark["program"]) != benchmark["program"]:
            raise SettingsError(
                f"run.dir: {folder} holds an evaluation of {name} whose responses were graded by {benchmark['reward']} with "
                "another content of its file; give another --out, or restore the file"
            )
        if (before["problems"], before["reward"]) != (benchmark["problems"], benchmark["reward"]):
            raise SettingsError(
                f"run.dir: {folder} holds an evaluation on other problems, prompts or answers of {name} (from "
                f"{before['source']}); give another --out"
            )


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The `evaluation.json` of a folder, None where there is none. SettingsError when it is not one."""
    path = folder / IDENTITY_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        benchmarks = content["benchmarks"]
        sound = isinstance(content["model"], str) and all({"source", "reward", "problems"} <= set(b) for b in benchmarks.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise SettingsError(f"run.dir: {path} is not that of an evaluation; give another --out")
    return content
