"""Typed settings of `tic-megatron evaluate`. Those that training has too have the same names, and mean the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tic_megatron.config import (
    GRADING_ONLY,
    ClusterSettings,
    DataSettings,
    EvalSettings,
    ModelSettings,
    RewardSettings,
    RolloutSettings,
    Sections,
    Settings,
    SettingsError,
    resolve_benchmark,
    resolve_folder,
    resolve_model,
    resolve_reward,
    resolve_template,
)
from tic_megatron.config_checks import (
    LARGEST,
    RANGES,
    check_address,
    check_characters,
    check_graders,
    check_ranges,
    check_sampling,
    check_template,
    check_thinking,
)


@dataclass
class FolderSettings:
    """Where the results are kept."""

    dir: str | None = None
    """Folder of the results (`--out`); `evaluations/<the model's name>` when not given."""
    max_restarts: int = 3
    """Restarts, in a row without getting any further, after the driver or all engines died or hung."""
    deterministic: bool = False
    """Give the same files bit by bit, on CPUs, whatever fails meanwhile: with static dispatch, a batch that loses an engine is
    generated again as a whole."""


@dataclass
class BenchmarkSettings:
    """What is evaluated: k sampled responses per problem (Avg@k), and a greedy one (Avg@1)."""

    benchmarks: list[str] = field(default_factory=list)
    """`aime24`, `aime25`, `math500`, `livecodebench` (`--benchmarks`), from the hub; NAME=SOURCE, a file, folder or hub dataset,
    for one of them from elsewhere, or for a set of your own under a name of your own."""
    samples: int | None = None
    """Sampled responses per problem (k) of all benchmarks; 0 is none; each benchmark's own, as in the paper, when not given."""
    greedy: bool = True
    """Also give every problem one greedy response."""
    temperature: float = 1.0
    """Of the sampled responses."""
    top_p: float = 1.0
    """Nucleus sampling of the sampled responses."""
    top_k: int | None = None
    """Sample among the so many likeliest tokens only; among all when not given."""
    max_response_tokens: int = 8192
    """Longest response; one that is cut there is graded as it stands, and counted as truncated."""
    template: str | None = None
    """The prompt in place of the benchmarks' own: `dapo`, `boxed`, `none`, or a text with `{problem}`."""
    limit: int | None = None
    """Only the first so many problems of each benchmark, to try things out."""
    seed: int = 0
    """Fixes the samples, together with the weights."""
    save_every: int = 512
    """Responses that are generated together, then graded and saved, whole problems always: what an interruption costs at most.
    The engines run empty at the end of each batch, so more is faster."""


@dataclass
class ProblemSettings:
    """How problems are read: of sets of your own, and of a benchmark's rows that have not its fields (problem, answer)."""

    prompt_field: str = "problem"
    """Row field that holds the problem's text."""
    answer_field: str = "answer"
    """Row field that holds the reference answer."""
    system_prompt: str | None = None
    """Text of a system message put before every problem, of the benchmarks too."""


@dataclass
class EngineSettings:
    """The vLLM engines."""

    engines: int = 1
    """Number of vLLM engines; each has tensor_parallel_size GPUs of its own."""
    tensor_parallel_size: int = 1
    """Tensor-parallel size of each engine."""
    expert_parallel: bool = False
    """Spread each layer's experts over an engine's tensor-parallel ranks instead of cutting every expert (mixture-of-experts
    models)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic and weights; `auto` is fp32 on CPUs, on GPUs fp16 for a model saved in fp16 and bf16 for all others."""
    stop_tokens: list[str] = field(default_factory=list)
    """More tokens that end a response, besides the model's own, by their texts, such as `<|im_end|>`."""
    max_concurrent_responses: int = 256
    """Responses that an engine works on at the same time (vLLM's `max_num_seqs`)."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that an engine may use."""
    cpu_kv_cache_gib: int = 1
    """Size of an engine's KV cache on a CPU, in GiB."""
    threads: int = 1
    """CPU threads per engine process."""
    dispatch: Literal["streaming", "static"] = "streaming"
    """Problems go to an engine when it has room, or are dealt out before the start, which makes batches independent of timing."""
    heartbeat_s: float = 300.0
    """Seconds without a report after which a generating engine counts as hung; one step of an engine must be shorter."""


@dataclass
class EvaluateClusterSettings:
    """Machines."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the engines run; `auto` is CUDA where there is a GPU."""
    address: str | None = None
    """Address of a running Ray cluster; a local one is started when not given."""
    timeout_s: float = 1800.0
    """Seconds after which a call to an engine counts as hung."""
    start_timeout_s: float = 1800.0
    """The same for starting and loading the model."""


@dataclass
class EvaluateSettings(Sections):
    """All settings of an evaluation."""

    run: FolderSettings = field(default_factory=FolderSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    eval: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    data: ProblemSettings = field(default_factory=ProblemSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    rollout: EngineSettings = field(default_factory=EngineSettings)
    cluster: EvaluateClusterSettings = field(default_factory=EvaluateClusterSettings)

    def resolve(self) -> EvaluateSettings:
        """A copy with derived defaults filled in and paths made absolute. SettingsError for a path that cannot be one."""
        settings = copy.deepcopy(self)
        settings.model.path = resolve_model(settings.model.path)
        settings.model.chat_template = resolve_template(settings.model.chat_template)
        settings.reward.function = resolve_reward(settings.reward)
        settings.eval.benchmarks = [resolve_benchmark(given) for given in settings.eval.benchmarks]
        name = "_".join(part for part in Path(settings.model.path).parts[-2:] if part.strip("/"))
        settings.run.dir = resolve_folder("run.dir", settings.run.dir or f"evaluations/{name}")
        if settings.run.deterministic:
            settings.rollout.dispatch = "static"
        return settings

    @property
    def problems(self) -> DataSettings:
        """How a problem set of one's own is read."""
        return DataSettings(**vars(self.data))

    def for_engines(self, longest_prompt: int) -> Settings:
        """What the engines take: settings of a training run without actors, and so without anything that shares their devices.

        Args:
            longest_prompt: in tokens.
        """
        settings = Settings(
            model=self.model,
            reward=self.reward,
            rollout=replace(
                RolloutSettings(**vars(self.rollout)),
                max_prompt_tokens=longest_prompt,
                max_response_tokens=self.eval.max_response_tokens,
            ),
            eval=EvalSettings(seed=self.eval.seed),
            cluster=ClusterSettings(**vars(self.cluster), colocate=False),
        )
        settings.run.dir, settings.run.deterministic = self.run.dir, self.run.deterministic
        return settings


def check_evaluate_settings(settings: EvaluateSettings) -> None:
    """Raise SettingsError for the first setting that is out of its range or contradicts another."""
    values = settings.flatten()
    check_ranges(values, EVALUATE_RANGES)
    if not settings.model.path:
        raise SettingsError("model.path is not given: set it with --model, or in the config file")
    if not settings.eval.benchmarks:
        raise SettingsError("eval.benchmarks is not given: give some with --benchmarks, such as --benchmarks aime24,math500")
    check_characters(values)
    check_thinking(settings.model)
    check_address(settings.cluster.address)
    options = settings.eval
    check_template("eval.template", options.template)
    if options.temperature == 0:
        raise SettingsError(
            "eval.temperature is 0.0: sampled responses need one above 0; for greedy ones alone, give eval.samples 0 instead"
        )
    check_sampling("eval", options.temperature, options.top_p, options.top_k)
    if options.samples == 0 and not options.greedy:
        raise SettingsError("eval.samples is 0 and eval.greedy false: nothing would be generated; change one of them")
    check_graders(settings.reward)
    if settings.reward.overlong_buffer_tokens:
        raise SettingsError(
            f"reward.overlong_buffer_tokens is {settings.reward.overlong_buffer_tokens}: an evaluation punishes no length; "
            "leave it out"
        )
    if settings.data.prompt_field == settings.data.answer_field:
        raise SettingsError(
            f"data.answer_field is {settings.data.answer_field}: that is data.prompt_field too, so the problems would hold their "
            "answers; give another field"
        )
    if settings.rollout.expert_parallel and settings.rollout.tensor_parallel_size == 1:
        raise SettingsError(
            "rollout.expert_parallel is true: it spreads experts over an engine's ranks, and rollout.tensor_parallel_size is 1; "
            "raise that, or leave it out"
        )


EVALUATE_RANGES = {
    **RANGES,
    "eval.samples": (0, LARGEST, "[)"),
    "eval.limit": (1, LARGEST, "[)"),
    "eval.save_every": (1, LARGEST, "[)"),
}

# Settings that change neither what is asked nor, but for rounding, what is answered: an evaluation may go on with others.
HARMLESS = {
    *("run.dir", "run.max_restarts", "run.deterministic", "model.path", "model.trust_remote_code", "eval.benchmarks"),
    *GRADING_ONLY,
    *("eval.save_every", "rollout.engines", "rollout.tensor_parallel_size", "rollout.expert_parallel"),
    *("rollout.max_concurrent_responses", "rollout.gpu_memory_utilization", "rollout.cpu_kv_cache_gib", "rollout.threads"),
    *("rollout.dispatch", "rollout.heartbeat_s", "cluster.address", "cluster.timeout_s", "cluster.start_timeout_s"),
}


def changed(there: dict[str, Any], settings: EvaluateSettings) -> dict[str, tuple[Any, Any]]:
    """The settings that matter and differ from those of the evaluation in a folder: name -> (value there, value now)."""
    here, defaults = settings.flatten(), EvaluateSettings().flatten()
    return {
        key: (there.get(key, defaults[key]), value)
        for key, value in here.items()
        if key not in HARMLESS and there.get(key, defaults[key]) != value
    }
