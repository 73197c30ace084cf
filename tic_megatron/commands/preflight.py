"""Checks before a run that need files: everything that can be refused is refused here, before any worker starts.

The quick checks come first; torch and transformers, which take seconds to import, are loaded only when those have passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tic_megatron.commands.engine_layout import (
    check_engine_layout,
)
from tic_megatron.commands.machine import check_cluster, check_engines, choose_device, cpu_warnings
from tic_megatron.commands.model_files import (
    check_layout,
    check_tensors,
    check_weights,
    locate_model,
    read_config,
)
from tic_megatron.commands.remote_code import check_remote_code
from tic_megatron.commands.run_folder import check_run_folder, find_checkpoint
from tic_megatron.commands.tokenizer_files import check_same_model, load_tokenizer_and_config
from tic_megatron.config import Settings, SettingsError
from tic_megatron.config_checks import check_profile
from tic_megatron.data.packing import Packing
from tic_megatron.data.problem_text import exact_key, strip_template
from tic_megatron.data.prompts import Problem, PromptCursor, read_problems, tokenize_problems
from tic_megatron.evaluation import Benchmark, EvalSet, choose_benchmarks, eval_name, grader_settings, read_benchmark
from tic_megatron.observability.metrics import check_logging
from tic_megatron.observability.rollouts import ROLLOUTS_FOLDER, find_rollout, read_replay
from tic_megatron.rewards import is_dense
from tic_megatron.rewards.code import check_code_answer, uses_code
from tic_megatron.rewards.workers import check_rewards
from tic_megatron.rollout.stop_tokens import stop_token_ids
from tic_megatron.trajectory import Group, Prompt

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainInputs:
    """What preflight has loaded, so that nothing is loaded twice.

    `model_dir`: the model's local directory, of a hub model too; `warnings`: lines for the user, who may go on; `checkpoint`:
    what the run continues from, None when it starts afresh, and `step` of it; `damaged`: why newer ones were passed over;
    `restart`: whether a driver has failed before.
    """

    model_dir: Path
    hf_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    benchmarks: list[EvalSet]
    warnings: list[str]
    checkpoint: Path | None
    step: int
    damaged: list[str]
    restart: bool = False


def preflight(settings: Settings) -> TrainInputs:
    """Check resolved, validated settings against the files and the machine; SettingsError for the first thing that is wrong.

    Replaces `cluster.device: auto` by the device that there is.
    """
    _check_reward(settings)  # first: the message about a run folder tells changed addresses
    check_run_folder(settings)
    check_logging(settings.logging)
    train_problems = read_problems(settings.data.train, settings.data)
    eval_problems = read_problems(settings.data.eval, settings.data, "data.eval") if settings.data.eval else []
    eval_problems = eval_problems[: settings.data.eval_limit]
    benchmarks = _read_benchmarks(settings)
    if uses_code(settings.reward):
        for problem in (*train_problems, *eval_problems):
            check_code_answer(problem.answer, problem.where, settings.data.answer_field)
    _check_enough(len(train_problems), settings, "")
    _set_steps(settings, len(train_problems))  # as if none had been done
    directory = locate_model(settings.model.path)
    config = read_config(directory)
    check_remote_code(directory, trusted=settings.model.trust_remote_code)
    check_layout(config, directory, settings)
    check_engine_layout(config, directory, settings)
    check_weights(directory)
    _check_objective(settings)
    checkpoint, state, damaged = find_checkpoint(settings)
    _check_replay(settings, first_step=state.step + 1, vocabulary=config["vocab_size"])
    choose_device(settings)
    tokenizer, hf_config = load_tokenizer_and_config(directory, settings.model)
    check_same_model(checkpoint, hf_config, directory, trusted=settings.model.trust_remote_code)
    check_cluster(settings.cluster.address)
    check_engines(settings, hf_config, directory)
    check_tensors(hf_config, directory)
    _check_reference(settings, hf_config)
    stop_token_ids(tokenizer, settings.rollout.stop_tokens)
    if settings.rollout.replay is None:
        for grader in (settings.reward, *(grader_settings(benchmark, settings.reward) for benchmark, _ in benchmarks)):
            check_rewards(grader)
    held_out = {"data.eval": eval_problems} | {f"eval.benchmarks: {b.name}": problems for b, problems in benchmarks}
    warnings = [*cpu_warnings(settings), *_schedule_warnings(settings), *_overlap_warnings(train_problems, held_out)]
    inputs = TrainInputs(
        model_dir=directory,
        hf_config=hf_config,
        tokenizer=tokenizer,
        train_prompts=_train_prompts(train_problems, tokenizer, settings, warnings),
        eval_prompts=_eval_prompts(eval_problems, tokenizer, settings, "data.eval"),
        benchmarks=[
            EvalSet(benchmark, _eval_prompts(problems, tokenizer, settings, f"eval.benchmarks: {benchmark.name}"))
            for benchmark, problems in benchmarks
        ],
        warnings=warnings,
        checkpoint=checkpoint,
        step=state.step,
        damaged=damaged,
    )
    cursor = PromptCursor(inputs.train_prompts, settings.run.seed)
    if state.cursor is not None:  # refuses other problems than the checkpoint's
        cursor.load_state_dict(state.cursor, allow_other_prompts="data.train" in settings.run.allow_change)
    _set_steps(settings, len(inputs.train_prompts), done=state.step, used=cursor.used)
    if state.step > settings.trainer.steps:
        by = "" if settings.trainer.epochs is None else f" (by trainer.epochs {settings.trainer.epochs})"
        raise SettingsError(
            f"trainer.steps is {settings.trainer.steps}{by}, but {checkpoint} has done {state.step}; give at least that, or "
            "another --run.dir"
        )
    check_profile(settings)
    return inputs


def _read_benchmarks(settings: Settings) -> list[tuple[Benchmark, list[Problem]]]:
    options, data = settings.eval, settings.data
    chosen = choose_benchmarks(options.benchmarks, data, settings.reward, options.benchmark_template)
    if data.eval and eval_name(data.eval) in {benchmark.name for benchmark in chosen}:
        name = eval_name(data.eval)
        raise SettingsError(
            f"eval.benchmarks: {name} is the name of data.eval too, whose metrics are eval/{name}/...; leave one of the two out, "
            "or rename the file"
        )
    return [(benchmark, read_benchmark(benchmark, data)) for benchmark in chosen]


def _check_reward(settings: Settings) -> None:
    """What can be seen without running the functions of files and asking endpoints, which comes last."""
    if is_dense(settings.reward) and settings.reward.overlong_buffer_tokens:
        raise SettingsError(
            "reward.overlong_buffer_tokens: the punishment is one number per response, but reward.function gives a reward per "
            "token; give 0, or a reward per response"
        )


def _check_objective(settings: Settings) -> None:
    from tic_megatron.actors.objective import choose_objective
    from tic_megatron.algorithms.clips import unclipped

    dense = is_dense(settings.reward)
    algorithm = settings.algorithm
    if algorithm.plugin is not None and not Path(algorithm.plugin).is_file():
        raise SettingsError(f"algorithm.plugin: there is no file {algorithm.plugin}; give a Python file")
    try:
        chosen = choose_objective(algorithm, dense=dense)
    except SystemExit as error:
        raise SettingsError(f"algorithm.plugin: {algorithm.plugin} ends the process; remove the call of exit") from error
    except AttributeError as error:  # of what a plugin has registered
        raise SettingsError(
            f"algorithm.objective: {algorithm.objective!r} is not registered as an Objective; correct {algorithm.plugin}"
        ) from error
    if dense and settings.rollout.dynamic_sampling:
        raise SettingsError(
            f"rollout.dynamic_sampling goes by one reward per response, and {settings.reward.function} gives one per token: "
            "leave it out"
        )
    if algorithm.eps_high is not None and chosen.objective.clip is unclipped:
        raise SettingsError(f"algorithm.eps_high bounds a clip, and {algorithm.objective} has none: leave it out")
    if dense and settings.actor.context_parallel_size > 1:  # prefix sums would cross ranks
        raise SettingsError(
            f"actor.context_parallel_size: {settings.reward.function} gives a reward per token, whose prefix ratios need whole "
            "sequences on a rank; give 1"
        )


def _check_replay(settings: Settings, *, first_step: int, vocabulary: int) -> None:
    """Refuse saved rollouts that are not there for every step, or cannot be trained on."""
    if settings.rollout.replay is None:
        return
    path = Path(settings.rollout.replay)
    if not path.is_file() and not [*path.glob("step_*.jsonl"), *path.glob(f"{ROLLOUTS_FOLDER}/step_*.jsonl")]:
        raise SettingsError(
            f"rollout.replay: there are no saved rollouts at {path}; give a run folder, or a file of its rollouts/"
        )
    dense, checked = is_dense(settings.reward), set()
    for step in range(first_step, settings.trainer.steps + 1):
        file = find_rollout(path, step)
        if file not in checked:
            _check_replayed_groups(read_replay(file, dense=dense), file, settings, vocabulary)
            checked.add(file)


def _check_replayed_groups(groups: list[Group], file: Path, settings: Settings, vocabulary: int) -> None:
    packing = Packing.of(settings)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    largest = max(max(trajectory.tokens) for trajectory in trajectories)
    if largest >= vocabulary:
        raise SettingsError(
            f"rollout.replay: {file} has the token {largest}, but vocab_size of the model is {vocabulary}; give its own rollouts"
        )
    longest = max(packing.tokens(trajectory) for trajectory in trajectories)
    if longest > packing.max_tokens:
        raise SettingsError(
            f"rollout.replay: {file} has a sequence of {longest} tokens, more than actor.max_tokens_per_microbatch "
            f"{packing.max_tokens}; raise that"
        )


def _check_enough(count: int, settings: Settings, remark: str) -> None:
    if count < settings.trainer.prompts_per_step and settings.rollout.replay is None:
        raise SettingsError(
            f"data.train: {settings.data.train} has {count} problems{remark}, but a step needs trainer.prompts_per_step "
            f"{settings.trainer.prompts_per_step}; give more problems or a smaller step"
        )


def _set_steps(settings: Settings, n_problems: int, *, done: int = 0, used: int = 0) -> None:
    """`trainer.steps` of the `trainer.epochs`, if they are given, when `done` steps have used so many problems, perhaps with
    another `trainer.prompts_per_step`; those that are left over make no step."""
    trainer = settings.trainer
    if trainer.epochs is not None:
        trainer.steps = done + (n_problems * trainer.epochs - used) // trainer.prompts_per_step


def _check_reference(settings: Settings, hf_config: PretrainedConfig) -> None:
    """Refuse a reference policy whose weights are not those of a model of the same shapes."""
    setting, path = "algorithm.reference_path", settings.algorithm.reference_path
    if path is None:
        return
    if not Path(path).is_dir():
        what = "a file" if Path(path).exists() else "no directory"
        raise SettingsError(f"{setting}: {path} is {what}; give the Hugging Face directory of a model like model.path")
    try:
        check_weights(Path(path))
        check_tensors(hf_config, Path(path))
    except SettingsError as error:
        raise SettingsError(str(error).replace("model.path", setting, 1)) from error


def _train_prompts(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, settings: Settings, warnings: list[str]
) -> list[Prompt]:
    """The training prompts that are short enough; tells in `warnings` how many are not."""
    limit = settings.rollout.max_prompt_tokens
    prompts = tokenize_problems(problems, tokenizer)
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    left_out = len(prompts) - len(kept)
    if left_out:
        longest, where = longest_prompt(problems, prompts)
        remark = f"longer than rollout.max_prompt_tokens {limit} (the longest, {where}, has {longest})"
        _check_enough(len(kept), settings, f" left after leaving out {left_out} {remark}")
        warnings.append(f"data.train: {left_out} of {len(prompts)} problems are left out, being {remark}")
    return kept


def _eval_prompts(problems: list[Problem], tokenizer: PreTrainedTokenizerBase, settings: Settings, what: str) -> list[Prompt]:
    """The held-out prompts. None may be left out: an accuracy over the shorter problems alone would not be the benchmark's."""
    prompts = tokenize_problems(problems, tokenizer) if problems else []
    limit = settings.rollout.max_prompt_tokens
    too_long = sum(len(prompt.token_ids) > limit for prompt in prompts)
    if too_long:
        longest, where = longest_prompt(problems, prompts)
        raise SettingsError(
            f"{what}: {too_long} of {len(prompts)} problems are longer than rollout.max_prompt_tokens {limit} (the longest, "
            f"{where}, has {longest}); raise the limit to {longest}, or take the problems out"
        )
    return prompts


def longest_prompt(problems: list[Problem], prompts: list[Prompt]) -> tuple[int, str]:
    """Tokens of the longest prompt, and the place that its problem came from."""
    return max((len(prompt.token_ids), problem.where) for prompt, problem in zip(prompts, problems, strict=True))


def _schedule_warnings(settings: Settings) -> list[str]:
    updates = settings.trainer.steps * settings.trainer.updates_per_step
    warmup = settings.actor.lr_warmup_updates
    if warmup < updates:
        return []
    return [f"actor.lr_warmup_updates: the warm-up of {warmup} updates takes up all {updates} updates of the run"]


def _overlap_warnings(train: list[Problem], held_out: dict[str, list[Problem]]) -> list[str]:
    """`held_out`: problems by what gave them."""
    known = {_problem_key(problem) for problem in train}
    common = {what: sum(_problem_key(problem) in known for problem in problems) for what, problems in held_out.items()}
    return [
        f"{what}: {number} of {len(held_out[what])} held-out problems are training problems too"
        for what, number in common.items()
        if number
    ]


def _problem_key(problem: Problem) -> bytes:
    return exact_key(strip_template(problem.messages[-1]["content"]))
