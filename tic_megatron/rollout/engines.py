"""The engines as one thing: the driver's side, which asks and never imports vLLM."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from tic_megatron.config import Settings
from tic_megatron.remote import Deadline, WorkerError
from tic_megatron.rollout.engine import EngineOptions, EngineWorker
from tic_megatron.rollout.generation import Dispatch, EngineLostError, Generation, Outcome
from tic_megatron.rollout.pool import Engine, EnginePool
from tic_megatron.rollout.requests import SampleRequest, SampleResponse, stable_seed
from tic_megatron.rollout.stop_tokens import stop_token_ids
from tic_megatron.trajectory import Group, Prompt, Trajectory

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

MOST_ATTEMPTS = 4
"""To generate a rollout as a whole (`run.deterministic`): a prompt may be what engines die of."""


@dataclass
class Rollout:
    """`groups` in the order of the prompts, without those that were set aside; `set_aside`: these, each with the reason."""

    groups: list[Group]
    set_aside: list[tuple[Prompt, str]]
    outcome: Outcome


class EngineGroup:
    """All engines of a run, each a Ray actor that holds the whole model. Those that fail are replaced.

    engines = EngineGroup.start(settings, model_path=..., device="cpu", log_dir=run_dir / "logs")
    engines.ready()
    rollout = engines.sample(prompts, group_size=8, temperature=1.0, top_p=1.0, max_tokens=1024,
                             seed=stable_seed(run_seed, step))
    """

    def __init__(
        self,
        pool: EnginePool,
        tokenizer: PreTrainedTokenizerBase,
        dispatch: Dispatch,
        *,
        tp_size: int,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.pool = pool
        self.version = 0
        """Of the weights that engines serve; one that has others waits for the next update."""
        self.revive: Callable[[], None] = self._wait_for_first_weights
        """Called when too few engines serve this version (`enough_serve`); returns when enough do."""
        self._tokenizer = tokenizer
        self._dispatch = dispatch
        self._stop_ids = frozenset(stop_ids)
        self._tp_size = tp_size
        self._receiving: list[tuple[Engine, Any]] = []
        self._lengths: dict[tuple[int, ...], float] = {}  # by the prompt's tokens: ids of several data sets may be alike

    @classmethod
    def start(
        cls,
        settings: Settings,
        *,
        model_path: str,
        device: str,
        log_dir: str | Path,
        places: Sequence[dict[str, Any]] | None = None,
        worker: type[EngineWorker] = EngineWorker,
        note: Callable[[str], None] = print,
    ) -> EngineGroup:
        """Start `settings.rollout.engines` engines and return at once; `ready` waits for them.

        Args:
            device: `cpu` or `cuda`.
            log_dir: folder for `engine_<n>.log`.
            places: per engine, the Ray options of its place: one of its own (`Cluster.engine_places`), or one shared with actors
                (`ActorGroup.shared_places`); anywhere when not given.
            worker: what an engine is made of.
            note: takes lines for the user, about engines that fail.
        """
        rollout = settings.rollout
        trusted = settings.model.trust_remote_code
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trusted)
        log_files = [str(Path(log_dir).absolute() / f"engine_{index}.log") for index in range(rollout.engines)]
        stop_ids = stop_token_ids(tokenizer, rollout.stop_tokens)
        Path(log_dir).mkdir(parents=True, exist_ok=True)

        def make(index: int) -> Any:
            actor = ray.remote(worker).options(**(places[index] if places else {"num_cpus": 0, "num_gpus": 0}))
            return actor.remote(_options(settings, model_path, device, log_files[index], stop_ids))

        dispatch = Dispatch(
            concurrent=rollout.max_concurrent_responses,
            static=rollout.dispatch == "static",
            cut_tail_fraction=rollout.cut_tail_fraction,
            heartbeat_s=rollout.heartbeat_s,
            vocabulary=AutoConfig.from_pretrained(model_path, trust_remote_code=trusted).vocab_size,
            as_a_whole=settings.run.deterministic,
        )
        pool = EnginePool(make, log_files, deadline=functools.partial(Deadline.of, settings.cluster), note=note)
        return cls(pool, tokenizer, dispatch, tp_size=rollout.tensor_parallel_size, stop_ids=stop_ids)

    def ready(self) -> list[int]:
        """Wait until every engine has loaded the model; their process ids. Raises WorkerError."""
        return self.pool.ready()

    def generate(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int,
        top_k: int = 0,
        first: int = 0,
    ) -> Rollout:
        """`sample` for an evaluation: no response is cut.

        `first`: place of the first prompt in a longer list that these are a part of, and so of its seed.
        """
        dispatch = replace(self._dispatch, cut_tail_fraction=None)
        requests = _requests(prompts, group_size, temperature, top_p, max_tokens, seed, top_k, first)
        return self._run(prompts, requests, dispatch)

    def sample(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int,
        finished: Callable[[list[Group]], None] = lambda groups: None,
    ) -> Rollout:
        """Sample `group_size` responses to every prompt.

        A prompt's samples depend on the weights, the arguments and its place in `prompts`, not on the number of engines.
        Temperature 0 is greedy, with `group_size` 1. `finished` is called with groups as soon as they are there.
        """
        return self._run(prompts, _requests(prompts, group_size, temperature, top_p, max_tokens, seed), self._dispatch, finished)

    # ---- weights ----

    def begin_receiving(self) -> int:
        """Settle who takes part in the next update: every engine that answers now. Returns the number of their processes."""
        self.pool.call("weight_version")  # one that has died since it last worked is found here
        self._receiving = [(engine, engine.actor) for engine in self.pool.loaded]
        for engine, _ in self._receiving:
            engine.version = None
        return len(self._receiving) * self._tp_size

    @property
    def lost_receivers(self) -> bool:
        """Whether an engine that took part in the update has failed in it."""
        return len(self._still_receiving()) < len(self._receiving)

    def start_weight_update(self, sources: list[dict[str, Any]], *, record_digests: bool = False) -> None:
        """Begin the update; see `EngineWorker.start_weight_update`. An engine that fails in it is left out of the rest."""
        size = self._tp_size
        place = {engine.index: i for i, (engine, _) in enumerate(self._receiving)}
        self._call_receiving(
            "start_weight_update", lambda index: (sources, place[index] * size, len(place) * size, record_digests)
        )

    def update_weights(self, payloads: list[dict[str, Any]]) -> None:
        """Have every engine load one bucket; when this returns, the bucket may be refilled.

        Args:
            payloads: one for all processes, or one per tensor-parallel rank of an engine.
        """
        self._call_receiving("update_weights", lambda _: (payloads[0] if len(payloads) == 1 else payloads,))

    def finish_weight_update(self, version: int) -> None:
        """Put the new weights to use everywhere, as `version`."""
        self._call_receiving("finish_weight_update", lambda _: (version,))
        self.pool.updated(self._still_receiving(), version)
        self.version = version

    def serving(self) -> list[Engine]:
        """The engines that have the weights of `version`."""
        return [engine for engine in self.pool.loaded if engine.version == self.version]

    def enough_serve(self) -> bool:
        """Whether a rollout can be made: by any engine, or only by all, where its batches depend on their number."""
        serving = len(self.serving())
        return serving == len(self.pool.engines) if self._dispatch.as_a_whole else serving > 0

    def weight_versions(self) -> list[int]:
        """Version of the weights that each engine uses."""
        return self.pool.call("weight_version")

    def received_digests(self) -> dict[int, list[dict[str, int]]]:
        """Of every engine that took the last update, by its index, per tensor-parallel rank the digests of the tensors."""
        return self.pool.call_map("received_digests", {engine.index: () for engine in self._still_receiving()})

    def checksums(self) -> dict[int, dict[str, str]]:
        """Of every engine, by its index, the checksums of its tensors as the engine holds them."""
        return self.pool.call_map("checksums", {engine.index: () for engine in self.pool.loaded})

    def memory(self, *, timeout_s: float) -> list[Any | None]:
        """Per engine, what its processes hold (`EngineWorker.memory`); None from one that does not answer in time."""
        return self.pool.ask("memory", timeout_s=timeout_s)

    # ---- memory and end ----

    def settle(self) -> None:
        """Wait until no engine is starting: vLLM measures the free memory then."""
        self.pool.wait_for_any(all_engines=True)

    def no_starts(self) -> AbstractContextManager:
        """Within, engines that fail are replaced at the end only."""
        return self.pool.no_starts()

    def sleep(self, level: int = 2) -> None:
        """Free the GPUs' memory, of engines that are awake; nothing on CPUs."""
        awake = [engine for engine in self.pool.loaded if not engine.asleep]
        for engine in awake:
            engine.asleep = True
        self.pool.call_each("sleep", {engine.index: (level,) for engine in awake})

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory for `tags` back, of engines that sleep; nothing on CPUs."""
        asleep = [engine for engine in self.pool.loaded if engine.asleep]
        self.pool.call_each("wake_up", {engine.index: (tags,) for engine in asleep})
        for engine in asleep:
            engine.asleep = tags is not None and "kv_cache" not in tags

    def stop(self) -> None:
        """End all engines and their processes, also those that hang or have died."""
        self.pool.stop()

    # ---- parts ----

    def _call_receiving(self, method: str, arguments: Callable[[int], tuple]) -> None:
        self.pool.call_each(method, {engine.index: arguments(engine.index) for engine in self._still_receiving()})

    def _still_receiving(self) -> list[Engine]:
        """The engines that began the update and have not been replaced since."""
        return [engine for engine, actor in self._receiving if engine.actor is actor]

    def _run(
        self,
        prompts: list[Prompt],
        requests: list[SampleRequest],
        dispatch: Dispatch,
        finished: Callable[[list[Group]], None] = lambda groups: None,
    ) -> Rollout:
        groups: dict[int, Group] = {}

        def answered(number: int, response: SampleResponse) -> None:
            groups[number] = group = self._group(prompts[number], response)
            self._lengths[group.prompt.token_ids] = sum(t.response_length for t in group.trajectories) / len(group.trajectories)
            if not dispatch.as_a_whole:
                finished([group])

        for attempt in itertools.count(1):
            if not self.enough_serve():
                self.revive()
            generation = Generation(
                self.pool,
                requests,
                dispatch,
                order=self._order(prompts, dispatch),
                answered=answered,
                serving=self.serving,
                revive=self.revive,
            )
            try:
                outcome = generation.run()
                break
            except EngineLostError as error:
                groups.clear()
                if attempt == MOST_ATTEMPTS:
                    message = f"{attempt} times in a row an engine was lost in the same rollout ({error})"
                    raise WorkerError(message, may_pass=True) from error
        if dispatch.as_a_whole:
            finished([groups[number] for number in sorted(groups)])
        set_aside = [(prompts[number], reason) for number, reason in sorted(outcome.set_aside.items())]
        return Rollout([groups[number] for number in sorted(groups)], set_aside, outcome)

    def _order(self, prompts: list[Prompt], dispatch: Dispatch) -> list[int]:
        """Longest first, by the lengths that the prompts' responses had the last time, so that the engines end together."""
        known = [self._lengths[prompt.token_ids] for prompt in prompts if prompt.token_ids in self._lengths]
        if dispatch.static or len(self.pool.engines) == 1 or not known:
            return list(range(len(prompts)))
        mean = sum(known) / len(known)
        return sorted(range(len(prompts)), key=lambda number: -self._lengths.get(prompts[number].token_ids, mean))

    def _wait_for_first_weights(self) -> None:
        """Without updates an engine serves the weights of the model directory, and so does its replacement."""
        if self.version:
            raise WorkerError(f"no engine is left that has the weights of version {self.version}")
        self.pool.wait_for_any(all_engines=self._dispatch.as_a_whole)

    def _group(self, prompt: Prompt, response: SampleResponse) -> Group:
        ids = [self._said(sample.token_ids) for sample in response.samples]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Group(
            prompt,
            [
                Trajectory(
                    prompt=prompt,
                    response_ids=sample.token_ids,
                    inference_logprobs=sample.logprobs,
                    response_mask=[1] * len(sample.token_ids),
                    text=text,
                    truncated=sample.truncated,
                    weight_version=response.weight_version,
                )
                for sample, text in zip(response.samples, texts, strict=True)
            ],
        )

    def _said(self, token_ids: list[int]) -> list[int]:
        """What graders read: without a stop token that is not a special one, and so has a text."""
        return token_ids[:-1] if token_ids[-1] in self._stop_ids else token_ids


def _requests(
    prompts: list[Prompt],
    group_size: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
    top_k: int = 0,
    first: int = 0,
) -> list[SampleRequest]:
    return [
        SampleRequest(prompt.token_ids, group_size, temperature, top_p, max_tokens, stable_seed(seed, index), top_k)
        for index, prompt in enumerate(prompts, first)
    ]


def _options(settings: Settings, model_path: str, device: str, log_file: str, stop_ids: tuple[int, ...]) -> EngineOptions:
    rollout = settings.rollout
    precision = settings.actor.precision if rollout.precision == "auto" else rollout.precision
    return EngineOptions(
        model_path=model_path,
        device=device,
        dtype=DTYPES[precision],
        max_model_len=settings.max_model_len,
        log_file=log_file,
        tensor_parallel_size=rollout.tensor_parallel_size,
        max_concurrent_responses=rollout.max_concurrent_responses,
        expert_parallel=rollout.expert_parallel,
        stop_token_ids=stop_ids,
        sleeps=settings.cluster.colocate,
        trust_remote_code=settings.model.trust_remote_code,
        seed=settings.run.seed,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        cpu_kv_cache_gib=rollout.cpu_kv_cache_gib,
        threads=rollout.threads,
    )
