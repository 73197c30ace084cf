"""One vLLM engine: the process around an in-process `vllm.LLM`.

vLLM is imported only when an `EngineWorker` loads the model, after the environment that it reads has been set, so this module
is light and the driver may import it.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing.connection
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from tic_megatron.observability.logs import redirect_output
from tic_megatron.observability.memory import process_memory
from tic_megatron.rollout.requests import Advance, Progress, Sample, SampleRequest, SampleResponse

logger = logging.getLogger(__name__)

CPU_BLOCK_TOKENS = 32
"""KV-cache block on a CPU: the smallest that vLLM's kernel takes, so that a group shares its prompt's prefill early."""

FIRST_PORT, N_PORTS = 20_000, 12_000
"""Where engines look for free ports: above those of Ray's workers, below those that Linux gives away (from 32768 on)."""

SHORTEST_CALL_S, LONGEST_CALL_S = 0.05, 0.5
"""Seconds between two reports of an engine that works: the news may wait for the first, the driver's watch for the second."""


@dataclass(frozen=True)
class EngineOptions:
    """What an engine has to know."""

    model_path: str
    """Hugging Face directory or hub name."""
    device: str
    """`cpu` or `cuda`."""
    dtype: str
    """Of arithmetic and weights: `float32`, `bfloat16` or `float16`."""
    max_model_len: int
    """Longest prompt plus longest response, in tokens."""
    log_file: str
    """Where everything goes that the engine's process and its libraries print."""
    tensor_parallel_size: int = 1
    """Processes, or GPUs, that share the model."""
    max_concurrent_responses: int = 256
    """Responses that are worked on at the same time."""
    expert_parallel: bool = False
    """Whether they have whole experts each, instead of a part of every expert."""
    stop_token_ids: tuple[int, ...] = ()
    """More tokens that end a response, besides the model's own."""
    sleeps: bool = True
    """CUDA: whether the engine is to give its memory up at times (vLLM's sleep mode, an allocator of its own)."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""
    seed: int = 0
    """Seed of everything that has none of its own; requests have their own."""
    gpu_memory_utilization: float = 0.6
    """CUDA: share of a GPU's memory that the engine may use while awake."""
    cpu_kv_cache_gib: int = 1
    """CPU: size of the KV cache, per process."""
    threads: int = 1
    """CPU: threads per process."""


class EngineWorker:
    """Generates, and takes new weights. A plain class; `EngineGroup` makes Ray actors of it.

    It takes over the process: output goes to `options.log_file`, and the environment variables that vLLM reads are set. So it
    must be made before torch is imported, and once per process.
    """

    def __init__(self, options: EngineOptions) -> None:
        redirect_output(options.log_file)
        os.environ.update(_environment(options))
        self._options = options
        self._numbers: dict[str, int] = {}  # vLLM's id of a request -> the driver's number
        self._weight_version = 0
        self._update_started = 0.0
        self._ending = False

    def ready(self) -> int:
        """Load the model; the process id. Not a part of the constructor, whose errors Ray reports as the process's death."""
        from vllm import LLM

        self._llm = LLM(**_llm_arguments(self._options))
        self._llm.init_weight_transfer_engine({"init_info": {}})
        ranks = getattr(self._llm.llm_engine.engine_core.engine_core.model_executor, "workers", [])
        if ranks:
            threading.Thread(target=self._end_with, args=([rank.proc.sentinel for rank in ranks],), daemon=True).start()
        return os.getpid()

    def _end_with(self, sentinels: list[int]) -> None:
        """In a thread: a tensor-parallel process has died, and the engine is of no use any more. vLLM would raise an error that
        cannot be told from one of the program; a process that is gone is replaced."""
        multiprocessing.connection.wait(sentinels)
        if not self._ending:
            print("a tensor-parallel process of this engine has died", flush=True)
            os._exit(1)

    def advance(self, order: Advance) -> Progress:
        """Take requests on and work, until some are finished, there is room for more, or half a second is over.

        That it returns is the sign of life; the driver has the next call waiting, so the engine goes on without a pause.
        """
        begun = time.monotonic()
        if order.fresh:
            self._begin()
        refused = [(number, reason) for number, request in order.requests if (reason := self._add(number, request))]
        engine, outputs = self._llm.llm_engine, []
        busy = engine.has_unfinished_requests()
        if order.cut:
            outputs += self._cut()
        while engine.has_unfinished_requests():
            outputs += [output for output in engine.step() if output.finished]
            elapsed = time.monotonic() - begun
            news = outputs or engine.get_num_unfinished_requests() < order.low_water
            if elapsed >= LONGEST_CALL_S or (news and elapsed >= SHORTEST_CALL_S):
                break
        finished = [(self._numbers.pop(output.request_id), self._response(output)) for output in outputs]
        return Progress(finished, refused, engine.get_num_unfinished_requests(), time.monotonic() - begun if busy else 0.0)

    def _add(self, number: int, request: SampleRequest) -> str | None:
        """Give vLLM a request; its reason when it refuses."""
        from vllm.exceptions import VLLMClientError

        try:
            (internal_id,) = self._llm.enqueue(
                [{"prompt_token_ids": list(request.prompt_ids)}], [_sampling_params(request, self._options)], use_tqdm=False
            )
        except (ValueError, VLLMClientError) as error:
            return str(error)
        self._numbers[internal_id.split("-")[0]] = number  # vLLM adds a random part, which its outputs do not show
        return None

    def _response(self, output: Any) -> SampleResponse:
        return SampleResponse([_sample(sample) for sample in output.outputs], self._weight_version)

    def _cut(self) -> list[Any]:
        """End all responses with the tokens that they have, at least one each; the requests' outputs."""
        from vllm.v1.engine import FinishReason

        engine, finished = self._llm.llm_engine, []
        states = engine.output_processor.request_states
        while states:
            begun = {name: state for name, state in states.items() if state.detokenizer.num_output_tokens()}
            for state in begun.values():
                output = state.make_request_output([], None, FinishReason.ABORT, None)
                finished += [output] if output else []  # the request's last response brings the others
            self._forget(begun, [p for p in _parents(begun) if not p.child_requests])
            # Those that wait take the places of the dropped ones.
            finished += [output for output in engine.step() if output.finished]
        return finished

    def _begin(self) -> None:
        """Start afresh, without what an earlier rollout has left behind: its requests, when it was given up; and the prefixes
        that it has computed, which would make this one's rounding depend on it."""
        states = dict(self._llm.llm_engine.output_processor.request_states)
        self._forget(states, _parents(states))
        self._numbers.clear()
        self._llm.reset_prefix_cache()

    def _forget(self, states: dict[str, Any], parents: list[Any]) -> None:
        """Take responses, and the requests that they were the last of, out of vLLM, which keeps the latter otherwise."""
        self._llm.llm_engine.abort_request([*states, *(parent.request_id for parent in parents)], internal=True)

    def start_weight_update(self, sources: list[dict[str, Any]], first_rank: int, n_receivers: int, record_digests: bool) -> None:
        """Begin an update; no generation until it is finished.

        Args:
            sources: what is needed to join the senders' broadcasts (`weights.sending.Export`), if they broadcast.
            first_rank, n_receivers: of this engine's first process among the processes of all engines, and how many there are.
            record_digests: for `received_digests`.
        """
        self._update_started = time.monotonic()
        self._begin()  # a rollout that was given up may be under way, and would keep the old prefixes
        self._llm.collective_rpc("join_weight_update", args=(sources, first_rank, n_receivers, record_digests))
        self._llm.start_weight_update()

    def update_weights(self, payload: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Load one bucket (`Bucket.to_payload()`): one for all tensor-parallel ranks, or a list of one for each."""
        self._llm.update_weights({"update_info": payload})

    def finish_weight_update(self, version: int) -> None:
        """Put the new weights to use, as `version`, and forget all prefixes that the old ones computed."""
        self._llm.finish_weight_update(weight_version=str(version))
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept the prefixes that the old weights computed: requests are still running")
        self._weight_version = version
        logger.info("weights of version %d in use, %.3f s", version, time.monotonic() - self._update_started)

    def weight_version(self) -> int:
        """Version of the weights in use; 0 are those of the model directory."""
        return self._weight_version

    def received_digests(self) -> list[dict[str, int]]:
        """Of every tensor-parallel rank, the digest of every tensor of the last update, by Hugging Face name."""
        return self._llm.collective_rpc("received_digests")

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every tensor in the engine's own layout, by rank and name: equal engines have equal ones."""
        digests = {name: digest for rank in self._llm.collective_rpc("compute_weight_checksums") for name, digest in rank.items()}
        empty = [name for name, digest in digests.items() if digest == hashlib.sha256().hexdigest()]
        if empty:
            raise RuntimeError(f"{len(empty)} tensors have no bytes to take a checksum of, the first is {empty[0]}")
        return digests

    def sleep(self, level: int = 2) -> None:
        """Free the GPU's memory; level 2 drops the weights too, so an update must follow the waking. Nothing on a CPU."""
        if self._options.device == "cuda":
            self._llm.sleep(level=level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take the memory for `tags` (`weights`, `kv_cache`; all when not given) back. Nothing on a CPU."""
        if self._options.device == "cuda":
            self._llm.wake_up(tags=tags)

    def memory(self) -> list[dict[str, int]]:
        """What each process holds, in bytes (`process_memory`): the ranks, and this one where they are others."""
        ranks = self._llm.collective_rpc("memory")
        return ranks if len(ranks) == 1 else [*ranks, process_memory(on_gpu=False)]

    def shutdown(self) -> None:
        """End the tensor-parallel processes and free the memory."""
        self._ending = True
        self._llm.llm_engine.engine_core.shutdown()


def _environment(options: EngineOptions) -> dict[str, str]:
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's core lives in this process, beside its Ray actor
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM looks for a free port and takes it a while later; of those given to whoever asks for any, another process may have
        # taken it by then.
        "VLLM_PORT": os.environ.get("VLLM_PORT", str(FIRST_PORT + os.getpid() % N_PORTS)),
    }
    if options.device == "cpu":
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(options.threads)}
    return environment


def _llm_arguments(options: EngineOptions) -> dict[str, Any]:
    from vllm.config import WeightTransferConfig

    arguments = {
        "model": options.model_path,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "seed": options.seed,
        "trust_remote_code": options.trust_remote_code,
        "tensor_parallel_size": options.tensor_parallel_size,
        "enable_expert_parallel": options.expert_parallel,
        # Named, since vLLM picks its Ray executor inside a placement group, and that one refuses CPUs.
        "distributed_executor_backend": "uni" if options.tensor_parallel_size == 1 else "mp",
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "weight_transfer_config": WeightTransferConfig(backend="tic_megatron"),
        "max_num_seqs": options.max_concurrent_responses,
        "worker_extension_cls": "tic_megatron.weights.vllm_receiver.WorkerExtension",
    }
    if options.device == "cuda":
        return arguments | {"gpu_memory_utilization": options.gpu_memory_utilization, "enable_sleep_mode": options.sleeps}
    return arguments | {
        "enforce_eager": True,
        "kv_cache_memory_bytes": options.cpu_kv_cache_gib * 2**30,
        "block_size": CPU_BLOCK_TOKENS,
        # A seeded request whose prompt is prefilled in two chunks makes vLLM rewind its generator, which a CPU's cannot.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, options.max_model_len),
    }


def _parents(states: dict[str, Any]) -> list[Any]:
    """vLLM's requests of several responses that the states are responses of."""
    return list({id(state.parent_req): state.parent_req for state in states.values() if state.parent_req}.values())


def _sampling_params(request: SampleRequest, options: EngineOptions) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        max_tokens=request.max_tokens,
        seed=request.seed,
        stop_token_ids=list(options.stop_token_ids),
        logprobs=0,  # that of the sampled token only
        flat_logprobs=True,  # one list of floats: the usual dict per token doubles the time of a small model's rollout
        detokenize=False,  # the driver decodes whole responses
    )


def _sample(output: Any) -> Sample:
    reason = output.finish_reason
    if reason not in ("stop", "length", "abort"):
        raise RuntimeError(f"vLLM ended a response with {reason!r}")
    return Sample(list(output.token_ids), list(output.logprobs.logprobs), truncated=reason != "stop", cut=reason == "abort")
