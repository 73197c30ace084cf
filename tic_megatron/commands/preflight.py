"""Checks before a run that need files: everything that can be refused is refused here, before any worker starts.

The quick checks come first; torch and transformers, which take seconds to import, are loaded only when those have passed.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tic_megatron.checkpoints import MODEL_FOLDER
from tic_megatron.commands.engine_layout import (
    check_cache_memory,
    check_engine_devices,
    check_engine_layout,
    check_engine_memory,
    core_warnings,
)
from tic_megatron.commands.model_files import (
    check_layout,
    check_tensors,
    check_token_ids,
    check_weights,
    count_parameters,
    locate_model,
    read_config,
    read_json,
)
from tic_megatron.commands.remote_code import check_remote_code
from tic_megatron.commands.run_folder import check_run_folder, find_checkpoint
from tic_megatron.config import CHAT_TEMPLATES, ModelSettings, Settings, SettingsError
from tic_megatron.config_checks import check_profile, shorten
from tic_megatron.data.chat_template import set_chat_template
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

OF_THE_FILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
"""Entries of a configuration that say nothing about the model."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


@dataclass(frozen=True)
class TrainInputs:
    """What preflight has loaded, so that nothing is loaded twice.

    `model_dir`: the model's local directory, of a hub model too; `warnings`: lines for the user, who may go on; `checkpoint`:
    what the run continues from, None when it starts afresh, and `step` of it; `damaged`: why newer ones were passed over.
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
    _set_steps(settings, len(train_problems))
    directory = locate_model(settings.model.path)
    config = read_config(directory)
    check_remote_code(directory, trusted=settings.model.trust_remote_code)
    check_layout(config, directory, settings)
    check_engine_layout(config, directory, settings)
    check_weights(directory)
    _check_objective(settings)
    checkpoint, state, damaged = find_checkpoint(settings)
    _check_replay(settings, first_step=state.step + 1, vocabulary=config["vocab_size"])
    _choose_device(settings)
    tokenizer, hf_config = load_tokenizer_and_config(directory, settings.model)
    _check_same_model(checkpoint, hf_config, directory, trusted=settings.model.trust_remote_code)
    check_cluster(settings.cluster.address)
    check_engines(settings, hf_config, directory)
    check_tensors(hf_config, directory)
    _check_reference(settings, hf_config)
    stop_token_ids(tokenizer, settings.rollout.stop_tokens)
    if settings.rollout.replay is None:
        for grader in (settings.reward, *(grader_settings(benchmark, settings.reward) for benchmark, _ in benchmarks)):
            check_rewards(grader)
    held_out = {"data.eval": eval_problems} | {f"eval.benchmarks: {b.name}": problems for b, problems in benchmarks}
    warnings = [*_core_warnings(settings), *_schedule_warnings(settings), *_overlap_warnings(train_problems, held_out)]
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
    _set_steps(settings, len(inputs.train_prompts))
    check_profile(settings)
    if state.cursor is not None:  # refuses other problems than the checkpoint's
        allowed = "data.train" in settings.run.allow_change
        PromptCursor(inputs.train_prompts, settings.run.seed).load_state_dict(state.cursor, allow_other_prompts=allowed)
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


def _check_same_model(checkpoint: Path | None, hf_config: PretrainedConfig, directory: Path, *, trusted: bool) -> None:
    """Refuse to continue a checkpoint with a model of another configuration; its path may be another one."""
    if checkpoint is None or not (checkpoint / MODEL_FOLDER / "config.json").exists():
        return
    there = hf_config.__class__.from_pretrained(checkpoint / MODEL_FOLDER).to_dict()
    here = hf_config.to_dict()
    changed = [key for key in sorted({*there, *here} - OF_THE_FILE) if there.get(key) != here.get(key)]
    if changed:
        shown = ", ".join(f"{key} ({there.get(key)} there, {here.get(key)} here)" for key in changed[:3])
        raise SettingsError(
            f"model.path: the configuration is not that of the model of {checkpoint}: it differs in {shown}; give the model that "
            "the run began with, or another --run.dir"
        )
    ends = {place: _end_tokens(place, trusted=trusted) for place in (checkpoint / MODEL_FOLDER, directory)}
    if len({*ends.values()}) > 1:
        listed = ", ".join(f"{end} in {place}" for place, end in ends.items())
        raise SettingsError(
            f"model.path: responses would end elsewhere than those of {checkpoint}: the end tokens are {listed} "
            "(generation_config.json and the tokenizer); give the model that the run began with, or another --run.dir"
        )


def _end_tokens(directory: Path, *, trusted: bool) -> tuple[int | None, ...]:
    """What vLLM ends a response at: the tokenizer's token, and those of the generation's configuration."""
    from transformers import AutoTokenizer

    path = directory / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.exists() else None
    try:
        own = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted).eos_token_id
    except Exception as error:  # transformers lets all kinds through
        raise SettingsError(
            f"run.resume: the tokenizer in {directory} cannot be loaded ({_reason(error)}), so that nobody knows where responses "
            "ended; give another checkpoint"
        ) from error
    return (own, *sorted({*(ids if isinstance(ids, list) else [] if ids is None else [ids])} - {own}))


def _set_steps(settings: Settings, n_problems: int) -> None:
    """`trainer.steps` of the `trainer.epochs`, if they are given: the problems that are left over make no step."""
    trainer = settings.trainer
    if trainer.epochs is not None:
        trainer.steps = n_problems * trainer.epochs // trainer.prompts_per_step


def _choose_device(settings: Settings) -> None:
    import torch

    cluster = settings.cluster
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cluster.device == "auto":
        cluster.device = "cuda" if gpus else "cpu"
    if cluster.device == "cpu":
        return
    if settings.rollout.steps_ahead and cluster.colocate:
        raise SettingsError(
            "rollout.steps_ahead is 1, but cluster.colocate has the engines share the actors' GPUs, where they sleep while the "
            "actors train; give 0, or engines with GPUs of their own"
        )
    if cluster.address is None and not gpus:  # a running cluster's nodes may differ from this machine
        raise SettingsError("cluster.device is cuda, but this machine has no GPU that torch can use; give cpu or auto")
    if cluster.address is None and cluster.nodes > 1:
        raise SettingsError(
            f"cluster.nodes is {cluster.nodes}, but without cluster.address the run has this machine only; start Ray on the "
            "nodes and give its address, or give 1"
        )
    if cluster.address is None and gpus < cluster.gpus_per_node:
        raise SettingsError(f"cluster.gpus_per_node is {cluster.gpus_per_node}, but this machine has {gpus} GPUs; lower it")
    if settings.rollout.replay is None:
        check_engine_devices(settings, gpus)


def check_cluster(address: str | None) -> None:
    """Refuse an address where nothing answers; joining it would hang, and then fail."""
    if address is None:
        return
    if address == "auto":
        address = _running_cluster()
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last of a name that cannot be one of a machine
        reason = getattr(error, "strerror", None) or "no answer"
        raise SettingsError(
            f"cluster.address: there is no Ray cluster at {address} ({reason}); start one with `ray start --head`, or correct it"
        ) from error


def _running_cluster() -> str:
    """What Ray takes `auto` for."""
    from ray._private.services import canonicalize_bootstrap_address

    with suppress(ConnectionError, ValueError):  # the second of a RAY_ADDRESS that is none
        address = canonicalize_bootstrap_address("auto")
        if address is not None:
            return address
    raise SettingsError(
        "cluster.address is auto, but no Ray cluster runs on this machine (and RAY_ADDRESS names none); start one with "
        "`ray start --head`, or leave it out"
    )


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


def _core_warnings(settings: Settings) -> list[str]:
    if settings.cluster.device != "cpu" or settings.cluster.address is not None:
        return []
    return core_warnings(settings, len(os.sched_getaffinity(0)))


def check_engines(settings: Settings, hf_config: PretrainedConfig, directory: Path) -> None:
    """Memory, which vLLM would find too small when it has started, and kernels, which it would miss in the first rollout."""
    if settings.rollout.replay is not None:
        return
    check_engine_memory(hf_config, count_parameters(directory), settings, _gpu_bytes(settings))
    if settings.cluster.device == "cpu" and settings.cluster.address is None:
        check_cache_memory(settings, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if settings.cluster.device == "cpu" and hf_config.head_dim % 32:
        raise SettingsError(
            f"model.path: {settings.model.path} has head_dim {hf_config.head_dim}, but vLLM's attention on CPUs needs a multiple "
            "of 32; use a GPU, another model, or rollout.replay"
        )


def _gpu_bytes(settings: Settings) -> int | None:
    import torch

    known = settings.cluster.device == "cuda" and settings.cluster.address is None
    return torch.cuda.get_device_properties(0).total_memory if known else None


def load_tokenizer_and_config(directory: Path, model: ModelSettings) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Those of a model directory, the tokenizer with the chat template of the settings. SettingsError when they are of no use."""
    trusted = model.trust_remote_code
    if not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise SettingsError(f"model.path: {directory} has no tokenizer (tokenizer.json); copy the model's tokenizer files there")
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (directory / name).exists():
            content = read_json(directory / name)
            if name == "generation_config.json":
                check_token_ids(content, directory / name, read_config(directory)["vocab_size"])
    for path in directory.glob("*.jinja"):
        try:
            path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"model.path: {path} is not UTF-8 text; download it again") from error
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # transformers lets all kinds through
        place = directory / "config.json"
        raise SettingsError(f"model.path: transformers cannot use {place}: {_reason(error)}; download it again") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trusted)
    except BaseException as error:  # the tokenizers' library panics, with exceptions that are not of the common kind
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise SettingsError(
            f"model.path: the tokenizer of {directory} cannot be loaded: {_reason(error)}; download tokenizer.json and "
            "tokenizer_config.json again"
        ) from error
    set_chat_template(tokenizer, model)
    _check_tokenizer(tokenizer, directory, config.vocab_size)
    _check_template(tokenizer, directory, model)
    return tokenizer, config


def _reason(error: BaseException) -> str:
    """The first line of a library's message, or what it may mean when it is in the library's own terms."""
    reason = str(error).strip().partition("\n")[0]
    return (
        shorten(reason)
        if reason and not re.search(r"Error|Exception|NoneType|object|'str'|class", reason)
        else "a value is wrong"
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, vocabulary: int) -> None:
    if not tokenizer.chat_template:
        raise SettingsError(
            f"model.path: the tokenizer of {directory} has no chat template; add chat_template.jinja, or give "
            "model.chat_template (base for a base model)"
        )
    if tokenizer.eos_token_id is None:
        raise SettingsError(f"model.path: the tokenizer of {directory} has no end token; set eos_token in tokenizer_config.json")
    if len(tokenizer) > vocabulary:
        raise SettingsError(
            f"model.path: the tokenizer of {directory} has {len(tokenizer)} tokens, more than the model's vocab_size "
            f"{vocabulary}; give the model its own tokenizer"
        )


def _check_template(tokenizer: PreTrainedTokenizerBase, directory: Path, model: ModelSettings) -> None:
    what, advice = f"model.path: the chat template of {directory}", "correct chat_template.jinja"
    if model.chat_template not in CHAT_TEMPLATES:
        what, advice = f"model.chat_template: {model.chat_template}", "correct it"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "1"}], add_generation_prompt=True, tokenize=False)
    except Exception as error:
        raise SettingsError(f"{what} fails ({_reason(error)}); {advice}") from error
    if not text or not tokenizer(text, add_special_tokens=False)["input_ids"]:
        raise SettingsError(f"{what} makes no text of a message; {advice}")


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
