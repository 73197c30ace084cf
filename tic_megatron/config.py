"""Typed settings of a run: one dataclass per YAML section, one docstring per field.

`tic-megatron train --config FILE.yaml --section.field value` fills a `Settings`. This module knows nothing of the other
packages; checks that need only the settings live in `tic_megatron.config_checks`, checks that need files in
`tic_megatron.commands.preflight`.
"""

from __future__ import annotations

import copy
import math
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

CHAT_TEMPLATES = ("auto", "base")
"""What `model.chat_template` may name besides files."""


class SettingsError(ValueError):
    """Bad input: what is wrong, where, what to do. The command prints it as one line and exits with code 2."""


def one_line(error: SettingsError) -> str:
    """The message alone; one that was raised in a Ray worker ends a whole traceback."""
    return " ".join(str(error).rpartition("SettingsError: ")[2].split())


@dataclass
class RunSettings:
    """Where a run keeps its files, and how it starts."""

    name: str = "run"
    """Name of the run, used for the default folder and for loggers."""
    dir: str | None = None
    """Run folder; `runs/<name>` when not given."""
    seed: int = 0
    """Fixes prompts, sampling, packing and updates."""
    resume: str = "auto"
    """`auto` continues from the run folder's last checkpoint; `never` refuses a folder that holds a run; or a checkpoint path."""
    allow_change: list[str] = field(default_factory=list)
    """Settings (dotted names) that may differ from those of the run that is resumed."""
    max_restarts: int = 3
    """Restarts from the last checkpoint, in a row without getting any further, when an actor died or hung, or the driver died."""
    deterministic: bool = False
    """Give the same weights and metrics bit by bit, on CPUs, whatever fails meanwhile: with static dispatch, a rollout that loses
    an engine is generated again as a whole."""


@dataclass
class ModelSettings:
    """The model that is trained."""

    path: str = ""
    """Hugging Face directory, or hub name, of a Qwen3 model (dense or mixture-of-experts) with its tokenizer."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's configuration or tokenizer (`auto_map`); without it such a model is refused."""
    chat_template: str = "auto"
    """How messages become a prompt: `auto` by the tokenizer's own template; `base` as plain text, for base models; or a Jinja
    file."""
    enable_thinking: bool | None = None
    """What the chat template is told as `enable_thinking` (Qwen3's thinking mode); as the template has it when not given."""


@dataclass
class DataSettings:
    """Prompt sets: rows with a problem and its answer (docs/data.md)."""

    train: str = ""
    """Training problems: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a folder of such or of the `datasets` library, or
    a hub dataset (`ORG/NAME`); `:SPLIT` may follow all but files."""
    eval: str | None = None
    """Held-out problems, given likewise, evaluated as the section `eval` says; no evaluation when not given."""
    prompt_field: str = "problem"
    """Row field that holds the problem: text, or chat messages. Dots lead into nested fields."""
    answer_field: str = "answer"
    """Row field that holds the reference answer."""
    system_prompt: str | None = None
    """Text of a system message put before every problem."""
    eval_limit: int | None = None
    """Evaluate only the first so many held-out problems."""


@dataclass(frozen=True)
class RewardTerm:
    """A term of `reward.function`. `source`: the name of a registered reward, `FILE.py:function`, or an endpoint's address."""

    weight: float
    source: str

    @property
    def function(self) -> tuple[str, str] | None:
        """File and name of a function of the user's."""
        match = re.fullmatch(r"(.+\.py):(.*)", self.source)
        return None if match is None or self.is_endpoint else (match[1], match[2])

    @property
    def is_endpoint(self) -> bool:
        """Whether it is asked for over HTTP."""
        return self.source.startswith(("http://", "https://"))

    @classmethod
    def parse(cls, text: str) -> RewardTerm:
        """`math`, `0.9*math`. SettingsError for a weight that is not a finite number."""
        before, star, after = (part.strip() for part in text.partition("*"))
        if not star or "/" in before or ".py" in before:
            weight, source = 1.0, text.strip()
        else:
            source = after
            try:
                weight = float(before)
            except ValueError:
                weight = math.nan
            if not math.isfinite(weight):
                raise SettingsError(f"reward.function: the weight {before!r} is not a finite number; give WEIGHT*REWARD")
        if not source:
            raise SettingsError("reward.function has an empty term; give a sum such as math + 0.1*rewards.py:concise")
        return cls(weight, source)

    def __str__(self) -> str:
        return self.source if self.weight == 1.0 else f"{self.weight!r}*{self.source}"


@dataclass
class RewardSettings:
    """How a response is graded."""

    function: str = "math"
    """A registered reward (`math`, `aime`, `code`, `exact`, `exact_dense`), `FILE.py:function`, or an endpoint
    `https://HOST/PATH`; or a weighted sum of them, such as `math + 0.1*rewards.py:concise`."""
    timeout_s: float = 10.0
    """Seconds per response after which grading is given up, and it counts 0; those of a batch have them together."""
    workers: int = 2
    """Grader processes of each term that needs a time limit."""
    memory_gib: int = 4
    """Address space of a grader process, in GiB."""
    batch_size: int = 16
    """Responses per call of a batched function, and per request to an endpoint."""
    concurrency: int = 16
    """Calls of an async function, and requests to an endpoint, that a grader process has under way at the same time."""
    retries: int = 4
    """Further attempts of a request that an endpoint does not answer, or with status 429 or 5xx."""
    http_token_env: str | None = None
    """Name of the environment variable with the token that endpoints want."""
    keep_env: list[str] = field(default_factory=list)
    """Environment variables with secrets that functions of files get; graders see none otherwise."""
    code_timeout_s: float = 6.0
    """Of the reward `code`: CPU time of a program for one test, in seconds; by the clock it may take twice that and two more."""
    code_total_s: float = 120.0
    """Of the reward `code`, in place of `timeout_s`: seconds for all tests of a program."""
    code_memory_mib: int = 1024
    """Of the reward `code`: address space of a program, in MiB."""
    sandbox: Literal["auto", "bubblewrap", "namespaces", "limits"] = "auto"
    """How programs are isolated (docs/sandbox.md); `auto` is the first of the others that the machine allows."""
    overlong_buffer_tokens: int = 0
    """Length before `rollout.max_response_tokens` over which the overlong punishment rises (L_cache of DAPO); 0 is none."""
    overlong_penalty: float = 1.0
    """The overlong punishment of a response of full length."""

    @property
    def terms(self) -> list[RewardTerm]:
        """The terms of `function`. SettingsError for what cannot be one."""
        return [RewardTerm.parse(term) for term in re.split(r"\s\+\s", self.function)]


GRADING_ONLY = {
    *("reward.workers", "reward.batch_size", "reward.concurrency", "reward.retries", "reward.http_token_env", "reward.keep_env"),
}
"""Settings of how rewards are computed that change none of them."""


@dataclass
class TrainerSettings:
    """The loop."""

    steps: int = 100
    """Training steps; one step is one rollout and `updates_per_step` optimizer updates."""
    epochs: int | None = None
    """Passes over the training problems, which set `steps`: as many whole steps as there are problems for."""
    prompts_per_step: int = 128
    """Prompts per rollout (B)."""
    updates_per_step: int = 4
    """Disjoint mini-batches per rollout, one optimizer update each (K)."""
    eval_every: int = 10
    """Evaluate every so many steps, and before the first and after the last; 0 never in between."""
    save_every: int = 20
    """Save a checkpoint every so many steps, and after the last; 0 only after the last."""
    keep_checkpoints: int = 2
    """Checkpoints kept; the newest is never removed."""
    async_save: bool = True
    """Write checkpoints while training goes on; it waits only until the actors have copied their state."""
    noise_check_every: int = 50
    """Steps between measurements of `policy/log_ratio_abs_max_first` (design: the noise rule); 1 is every step."""


@dataclass
class RolloutSettings:
    """Generation with vLLM."""

    engines: int = 1
    """Number of vLLM engines."""
    tensor_parallel_size: int = 1
    """Tensor-parallel size of each engine."""
    group_size: int = 8
    """Responses sampled per prompt (G)."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens, chat template included; longer training problems are left out and counted before the start."""
    max_response_tokens: int = 1024
    """Longest response (T), the constant of the length normalisation."""
    temperature: float = 1.0
    """Sampling temperature; the trainer's log-probs are taken at the same temperature."""
    top_p: float = 1.0
    """Nucleus sampling; must be 1.0, since less breaks the importance ratio (`eval.top_p` may be less)."""
    stop_tokens: list[str] = field(default_factory=list)
    """More tokens that end a response and belong to it, besides the model's own, by their texts, such as `<|im_end|>`."""
    max_model_len: int | None = None
    """Longest prompt plus response that an engine takes, in tokens; that of training and evaluation when not given."""
    expert_parallel: bool = False
    """Spread each layer's experts over an engine's tensor-parallel ranks instead of cutting every expert (mixture-of-experts
    models)."""
    sleep_level: Literal[1, 2] = 2
    """Of engines that share the actors' GPUs, while these train: 2 drops the weights, which the next update replaces anyway; 1
    keeps them in host memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the engines; `auto` is that of the actor."""
    gpu_memory_utilization: float = 0.6
    """Share of a GPU's memory that an engine may use while awake."""
    cpu_kv_cache_gib: int = 1
    """Size of an engine's KV cache on a CPU, in GiB."""
    threads: int = 1
    """CPU threads per engine process."""
    dispatch: Literal["streaming", "static"] = "streaming"
    """Prompts go to an engine when it has room, or are dealt out before the start, which makes batches independent of timing."""
    max_concurrent_responses: int = 256
    """Responses that an engine works on at the same time (vLLM's `max_num_seqs`)."""
    dynamic_sampling: bool = False
    """Sample prompts until `prompts_per_step` groups have unequal rewards, and train on these alone (DAPO)."""
    max_refills: int = 10
    """Rounds of `dynamic_sampling` after the first, after which a step goes on with the groups that it has."""
    cut_tail_fraction: float | None = None
    """Share of a step's responses after whose end the others are cut and graded as they stand; none are when not given."""
    steps_ahead: int = 0
    """1: the next rollout is generated while this one is trained on, with weights one step old; needs `algorithm.correction`."""
    heartbeat_s: float = 300.0
    """Seconds without a report after which a generating engine counts as hung; one step of an engine must be shorter."""
    weight_bucket_mib: int = 256
    """Largest bucket of the weight transfer, in MiB; a sender holds two."""
    verify_weights_every: int = 100
    """Compare all tensors of the actors and the engines by digests in every so manieth weight transfer, and always in the first;
    0 only then."""
    replay: str | None = None
    """Train on the saved rollouts of this run folder's `rollouts/` (or one file) instead of generating."""
    save_every: int = 1
    """Write the sampled trajectories of every so many steps to `rollouts/`; 0 writes none."""


@dataclass
class EvalSettings:
    """Evaluation on the engines (`trainer.eval_every`): Avg@k on the held-out problems of `data.eval`, and on benchmarks."""

    samples: int = 1
    """Responses per problem of `data.eval` (k)."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy, with one response."""
    top_p: float = 1.0
    """Nucleus sampling; unlike training's it may be below 1."""
    top_k: int | None = None
    """Sample among the so many likeliest tokens only; among all when not given."""
    max_response_tokens: int | None = None
    """Longest response; `rollout.max_response_tokens` when not given."""
    seed: int = 0
    """Fixes the samples, together with the weights; training's seeds have nothing to do with it."""
    benchmarks: list[str] = field(default_factory=list)
    """Benchmarks evaluated besides `data.eval`, each with its own k, prompt and grader: `aime24`, `aime25`, `math500`,
    `livecodebench`, from the hub; NAME=SOURCE, given as `data.eval`, from elsewhere; a set of your own likewise."""
    benchmark_samples: int | None = None
    """Responses per problem of the benchmarks, at temperature 1; when not given the benchmark's own, or a greedy one."""
    benchmark_template: str | None = None
    """Prompt of the benchmarks in place of their own: `dapo`, `boxed`, `none`, or a text with `{problem}`."""


@dataclass
class AlgorithmSettings:
    """The objective (see `tic_megatron.algorithms`)."""

    objective: str = "tic_grpo"
    """Name of a registered objective: `tic_grpo`, `grpo`, `dapo`, `grpo2`, `traj_is`, `gspo`, `no_is`, or one of your own."""
    plugin: str | None = None
    """Python file that registers objectives of your own; it is run in the driver and in every training process."""
    normaliser: Literal["response_length", "constant_length", "token_mean", "trajectory_mean"] | None = None
    """Length normaliser in place of the objective's own."""
    eps_low: float | None = None
    """Lower clip range of two-sided clips; the objective's own default when not given."""
    eps_high: float | None = None
    """Upper clip range; the objective's own default when not given."""
    dual_clip: float | None = None
    """Bound (above 1) of the ratio where the advantage is negative, for two-sided clips; off when not given."""
    normalize_std: bool = False
    """Divide a group's advantages by its standard deviation (the paper does not)."""
    leave_one_out: bool = False
    """Baseline of the others' mean instead of the group's: a pure scale of the advantages by 1 / (1 - 1/G)."""
    kl_coefficient: float = 0.0
    """Weight of the KL divergence from the frozen reference policy; 0 is none."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """`k2` and `k3` are losses; `k1` is subtracted from the reward (as a loss it has no gradient)."""
    reference_path: str | None = None
    """Hugging Face directory of the reference policy; `model.path` when not given."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Importance weights for the generator-trainer mismatch: at most `correction_bound`, or 0 outside of it."""
    correction_level: Literal["token", "trajectory"] = "trajectory"
    """Weight every token by its own ratio, or all of a trajectory by the product."""
    correction_bound: float = 2.0
    """Largest importance weight (and 1 / smallest, when masking)."""
    max_bad_fraction: float = 0.1
    """Share of a step's trajectories with a non-finite reward or log-prob above which the run stops; fewer are left out (for
    log-probs of the trainer: their updates are skipped)."""
    max_skipped_updates: int = 10
    """Updates in a row, over steps too, that are skipped for a log-prob or gradient that is not finite, after which the run
    stops."""

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL penalty goes into the reward."""
        return self.kl_coefficient > 0 and self.kl_estimator == "k1"

    @property
    def has_penalty(self) -> bool:
        """Whether trajectories with zero advantage have a gradient too."""
        return self.kl_coefficient > 0 or self.entropy_coefficient > 0


@dataclass
class ActorSettings:
    """The Megatron-core actors."""

    backend: Literal["megatron"] = "megatron"
    """Training backend."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward passes; main weights and optimizer are fp32."""
    tensor_parallel_size: int = 1
    """Ranks that share each layer's matrices (TP)."""
    sequence_parallel: bool = True
    """Shard the norms' activations over the TP ranks too (no effect at TP 1)."""
    pipeline_parallel_size: int = 1
    """Ranks that share the layers (PP)."""
    virtual_pipeline_parallel_size: int = 1
    """Interleaved parts of the model per pipeline stage (VPP); more than 1 shortens the pipeline's idle time."""
    layers_in_first_stage: int | None = None
    """Layers of the first pipeline stage, which has the embedding too; an equal share when not given."""
    layers_in_last_stage: int | None = None
    """Layers of the last pipeline stage, which has the output head too; an equal share when not given."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    expert_parallel_size: int = 1
    """Ranks that share the experts of each layer (EP), taken from those of data and context parallelism."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices (ETP); `tensor_parallel_size` when not given."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those inside attention, or all but each layer's input."""
    router_replay: Literal["auto", "on", "off"] = "auto"
    """Route every token in the update as in the old-log-prob pass (mixture-of-experts models); `auto`: for trajectory ratios."""
    max_tokens_per_microbatch: int = 16384
    """Token budget of a micro-batch, prompts included; its ranks of context parallelism hold equal parts of it."""
    logprob_chunk_tokens: int = 1024
    """Response tokens whose logits exist at the same time."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    lr_warmup_updates: int = 0
    """Updates of linear warm-up."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from the peak to `min_learning_rate` over the whole run."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the decay."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW with Megatron's distributed optimizer, or SGD without it."""
    distributed_optimizer: bool = True
    """Shard AdamW's state over the DP ranks."""
    adam_beta1: float = 0.9
    """AdamW's first beta."""
    adam_beta2: float = 0.999
    """AdamW's second beta."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    threads: int = 1
    """CPU threads per actor process."""
    profile_steps: list[int] = field(default_factory=list)
    """Steps whose training phases every rank records with torch's profiler, to `profiles/step_N_rank_R.json.gz`."""
    peak_tflops: float | None = None
    """Peak of a device in 1e12 FLOP/s, for `throughput/mfu`; that of dense bf16 arithmetic where the device is known."""

    @property
    def sequence_alignment(self) -> int:
        """Every sequence is padded to a multiple of this: context parallelism cuts it into two equal chunks per rank."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def experts_tensor_parallel(self) -> int:
        """ETP, its default filled in."""
        return self.expert_tensor_parallel_size or self.tensor_parallel_size


@dataclass
class ClusterSettings:
    """Machines."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 1
    """Actor ranks per node: one GPU each, or one CPU process each when `device` is `cpu`."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the actors run; `auto` is CUDA where there is a GPU."""
    colocate: bool = True
    """Engines share the actors' GPUs, in turns. Otherwise they have rollout.engines x rollout.tensor_parallel_size more GPUs (or
    CPU processes) of their own, each engine on one node."""
    address: str | None = None
    """Address of a running Ray cluster; a local one is started when not given."""
    timeout_s: float = 1800.0
    """Seconds after which a call to an actor or engine counts as hung: log-probs, an update, saving."""
    start_timeout_s: float = 1800.0
    """The same for starting, loading the model and loading a checkpoint."""
    weight_sync_timeout_s: float = 600.0
    """The same for a part of a weight transfer (`rollout.weight_bucket_mib`)."""


@dataclass
class LoggingSettings:
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard files to `tensorboard/`."""
    memory: bool = True
    """Write what every process holds after each phase of a step to `logs/memory.jsonl`."""
    wandb_project: str | None = None
    """Weights & Biases project; off when not given."""


@dataclass
class Sections:
    """What settings classes have in common: dataclasses whose fields are sections, which are dataclasses too."""

    def flatten(self) -> dict[str, Any]:
        """Every setting under its dotted name, such as `{"trainer.steps": 100, ...}`."""
        return {f"{section}.{name}": value for section, fields in asdict(self).items() for name, value in fields.items()}

    def to_yaml(self) -> str:
        """The settings as YAML, which `--config` reads again."""
        return dump_yaml(asdict(self))

    def save(self, path: str | Path) -> None:
        """Write `to_yaml()` to a file."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")


@dataclass
class Settings(Sections):
    """All settings of a training run."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    actor: ActorSettings = field(default_factory=ActorSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    @property
    def world_size(self) -> int:
        """Number of actor ranks."""
        return self.cluster.nodes * self.cluster.gpus_per_node

    @property
    def data_parallel_size(self) -> int:
        """World size over TP x PP x CP."""
        actor = self.actor
        return self.world_size // (actor.tensor_parallel_size * actor.pipeline_parallel_size * actor.context_parallel_size)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus longest response of training."""
        return self.rollout.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus response that the engines take, of training and evaluation."""
        return self.rollout.max_model_len or self.needed_model_len

    @property
    def needed_model_len(self) -> int:
        """Longest prompt plus longest response, of training and evaluation."""
        return self.rollout.max_prompt_tokens + max(self.rollout.max_response_tokens, self.eval_response_tokens)

    @property
    def eval_response_tokens(self) -> int:
        """Longest response of the evaluation."""
        return self.eval.max_response_tokens or self.rollout.max_response_tokens

    def resolve(self) -> Settings:
        """A copy with derived defaults filled in and paths made absolute (workers may start in other folders).

        `cluster.device` stays `auto`: asking for a GPU means importing torch, which `commands.preflight` does last. SettingsError
        for a path that cannot be one.
        """
        settings = copy.deepcopy(self)
        settings.run.dir = _absolute("run.dir", settings.run.dir or f"runs/{settings.run.name}")
        settings.data.train = _absolute_source("data.train", settings.data.train)
        settings.data.eval = settings.data.eval and _absolute_source("data.eval", settings.data.eval)
        settings.rollout.replay = settings.rollout.replay and _absolute("rollout.replay", settings.rollout.replay)
        settings.algorithm.plugin = settings.algorithm.plugin and _absolute("algorithm.plugin", settings.algorithm.plugin)
        settings.reward.function = resolve_reward(settings.reward)
        for key, section, name in (
            ("model.path", settings.model, "path"),
            ("algorithm.reference_path", settings.algorithm, "reference_path"),
        ):
            path = getattr(section, name)
            if path and os.path.isdir(_absolute(key, path)):  # otherwise it may be a hub name
                setattr(section, name, _absolute(key, path))
        if settings.run.resume not in ("auto", "never"):
            settings.run.resume = _absolute("run.resume", settings.run.resume)
        if settings.rollout.precision == "auto":
            settings.rollout.precision = settings.actor.precision
        settings.model.chat_template = resolve_template(settings.model.chat_template)
        settings.eval.benchmarks = [resolve_benchmark(given) for given in settings.eval.benchmarks]
        return settings


def dump_yaml(sections: dict[str, Any]) -> str:
    """Settings as YAML. Other alphabets stay readable, unless a text holds one of Unicode's own line ends: PyYAML writes these as
    they are, and reads them as blanks."""
    readable = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=130)
    if not set(readable) & set("\x85\u2028\u2029"):
        return readable
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=False, width=130)


def resolve_folder(key: str, path: str) -> str:
    """The absolute path of a folder that will be written. SettingsError for one that cannot be."""
    return _absolute(key, path)


def resolve_model(path: str) -> str:
    """The absolute path of a model's directory; a hub name as it is."""
    return _absolute("model.path", path) if path and os.path.isdir(_absolute("model.path", path)) else path


def resolve_template(given: str) -> str:
    """`model.chat_template` with an absolute path, where it is a path."""
    return given if given in CHAT_TEMPLATES else _absolute("model.chat_template", given)


def resolve_benchmark(given: str) -> str:
    """`NAME=SOURCE` with an absolute path, where it is a path."""
    name, equals, source = given.partition("=")
    return f"{name}={_absolute_source('eval.benchmarks', source.strip())}" if equals and source.strip() else given


def resolve_reward(reward: RewardSettings) -> str:
    """`reward.function` with absolute paths of the files in it."""
    return " + ".join(str(_absolute_term(term)) for term in reward.terms)


def _absolute_term(term: RewardTerm) -> RewardTerm:
    if term.function is None:
        return term
    path, name = term.function
    return RewardTerm(term.weight, f"{_absolute('reward.function', path)}:{name}")


def _absolute(key: str, path: str) -> str:
    try:
        expanded = Path(path).expanduser()
        expanded.exists()  # raises for a name that is too long, and for folders that may not be looked into
        return os.path.abspath(expanded)
    except RuntimeError as error:
        raise SettingsError(
            f"{key}: {path} begins with a user that this machine does not have; give the folder itself"
        ) from error
    except OSError as error:
        raise SettingsError(f"{key}: {path} cannot be looked up ({error.strerror}); give another path") from error


DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+){0,2}")
"""`ORG/NAME`, `ORG/NAME:SPLIT` or `ORG/NAME:CONFIG:SPLIT`."""


def find_local(name: str) -> Path | None:
    """The file or folder of that name; None where there is none, also for names that the file system cannot have."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _absolute_source(key: str, source: str) -> str:
    """What lies here comes first; then names of the hub."""
    is_local = find_local(source) or find_local(source.rpartition(":")[0])
    is_hub_name = HUB_DATASET.fullmatch(source) and not source.endswith(DATA_SUFFIXES)
    return source if is_hub_name and not is_local else _absolute(key, source)
