"""The receiving half of the weight transfer, which runs inside vLLM's workers.

vLLM imports this module in every worker, because `EngineWorker` names `WorkerExtension` as its `worker_extension_cls`; the
import registers the weight-transfer backend `tic_megatron`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel
from vllm.platforms import current_platform

from tic_megatron.observability.memory import process_memory
from tic_megatron.rendezvous import join_store
from tic_megatron.weights.vllm_cpu_experts import apply_expert_map
from tic_megatron.weights.wire import Bucket, SharedMemoryBuffer, TensorAssembler, block_digest, broadcast, make_group

REBUILD_DEVICE = 6
"""Place of the device among the arguments of torch's `rebuild_cuda_tensor`."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing is agreed upon before an update."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket: the fields of `Bucket.to_payload()`."""

    blocks: list[list[Any]]
    nbytes: int
    handle: dict[str, Any]


class BucketWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads the Hugging Face tensors that the actors send in buckets, whatever the transport (`weights.sending.Transport`)."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tied = tied_layers(self.model)
        self._shared: dict[str, SharedMemoryBuffer] = {}
        self._opened: dict[int, torch.Tensor] = {}
        self._groups: dict[int, tuple[ProcessGroup, float]] = {}  # by sender; with the seconds that a broadcast may take
        self._room: torch.Tensor | None = None
        self._assembler = TensorAssembler()
        self._record_digests = False
        self.received_digests: dict[str, int] = {}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to connect to before an update."""

    def join(self, sources: list[dict[str, Any]], rank: int, n_receivers: int, record_digests: bool) -> None:
        """Before an update: join the senders' broadcasts, if there are any, as receiver `rank` of `n_receivers`."""
        self._record_digests = record_digests
        self._groups = {}
        for source in sources:
            timeout_s = source["timeout_s"]
            store = join_store(source["host"], source["port"], timeout_s)
            group = make_group(store, 1 + rank, 1 + n_receivers, self.device, timeout_s)
            self._groups[source["source"]] = group, timeout_s

    def start_weight_update(self) -> None:
        """Prepare every layer to be loaded again."""
        self.received_digests = {}
        self._assembler = TensorAssembler()
        self._opened = {}  # the last update may have been broken off
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():  # left from an update that was broken off
                info.load_numel, info.loaded_weights = 0, []
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket. (The base class's method then synchronizes an accelerator, and raises without one.)"""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load one bucket; afterwards the sender may refill it."""
        bucket = Bucket.from_payload(asdict(update_info))
        flat = self._reach(bucket)
        if self._record_digests:
            self._digest(bucket, flat)
        self.model.load_weights(self._assembler.take_all(bucket.blocks, flat))
        keep_own_copies(self.model, flat)

    def finish_weight_update(self) -> None:
        """Put the new weights to use. Raises RuntimeError if a layer did not get all of its weights."""
        incomplete = incomplete_layers(self.model, self._tied) + self._assembler.incomplete
        if incomplete:
            raise RuntimeError(f"the weight update lacks tensors of {len(incomplete)} layers, the first is {incomplete[0]}")
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack(self.model, self._tied)
        # GPU memory of the actors is released once per update, as it is exported; the broadcasts' groups live for one.
        self._opened, self._groups = {}, {}

    def shutdown(self) -> None:
        """Let go of the sender's memory."""
        for buffer in self._shared.values():
            buffer.close()
        self._shared, self._opened, self._groups, self._room = {}, {}, {}, None

    def _reach(self, bucket: Bucket) -> torch.Tensor:
        """The bucket's bytes: uint8, at least [nbytes], on the model's device or in memory that it can read."""
        handle = bucket.handle
        if "shared_memory" in handle:
            name = handle["shared_memory"]
            if name not in self._shared:
                self._shared[name] = SharedMemoryBuffer.attach(name)
            return self._shared[name].flat
        if "slot" in handle:
            return self._open_gpu_memory(handle)
        if self._room is None or self._room.numel() < bucket.nbytes:
            self._room = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self.device)
        flat = self._room[: bucket.nbytes]
        group, timeout_s = self._groups[handle["broadcast"]]
        broadcast(group, flat, timeout_s)
        return flat

    def _open_gpu_memory(self, handle: dict[str, Any]) -> torch.Tensor:
        """Memory that the actor on the same GPU has exported; once per update, since each export counts one reader."""
        slot = handle["slot"]
        if slot not in self._opened:
            uuid = str(torch.cuda.get_device_properties(self.device).uuid)
            if uuid not in handle.get("cuda_ipc", {}):
                raise RuntimeError(f"no actor has sent weights from this engine's GPU, {uuid}")
            arguments = list(handle["cuda_ipc"][uuid])
            arguments[REBUILD_DEVICE] = self.device.index  # the sender's numbering of the GPUs is another
            self._opened[slot] = rebuild_cuda_tensor(*arguments)
        return self._opened[slot]

    def _digest(self, bucket: Bucket, flat: torch.Tensor) -> None:
        for block in bucket.blocks:
            digest = block_digest(block.view(flat), block.shape, block.start)
            self.received_digests[block.name] = (self.received_digests.get(block.name, 0) + digest) % 2**64


def keep_own_copies(model: torch.nn.Module, flat: torch.Tensor) -> None:
    """Copy what vLLM still needs of a bucket's memory, before it is refilled.

    vLLM keeps references to a layer's tensors until the layer is complete. Most are, as buckets end with vLLM's layers; not
    experts that fill several buckets, nor an embedding whose vocabulary vLLM pads.
    """
    memory = flat.untyped_storage().data_ptr()
    for layer in model.modules():
        for _, arguments in get_layerwise_info(layer).loaded_weights:
            for name, value in arguments.arguments.items():
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == memory:
                    arguments.arguments[name] = value.clone()


def tied_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers whose parameters all belong to an earlier layer, as those of a tied output head do."""
    tied: list[torch.nn.Module] = []
    seen: set[int] = set()
    for layer in model.modules():
        parameters = {id(parameter) for parameter in layer._parameters.values() if parameter is not None}
        if parameters and parameters <= seen:
            tied.append(layer)
        seen |= parameters
    return tied


def incomplete_layers(model: torch.nn.Module, tied: list[torch.nn.Module]) -> list[str]:
    """Names of the layers that an update has not filled; vLLM would keep their old weights, or parts of them, silently."""
    incomplete = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or layer in tied or is_deferred_attention_layer(layer):  # filled, or nothing of its own to fill
            continue
        expected = sum(get_tensor_load_numel(parameter) for parameter in layer._parameters.values() if parameter is not None)
        padded = isinstance(layer, VocabParallelEmbedding) and info.load_numel > 0  # the padding of the vocabulary isn't sent
        if info.load_numel < expected and not padded:
            incomplete.append(f"{name} ({info.load_numel} of {expected} elements)")
    return incomplete


def repack(model: torch.nn.Module, tied: list[torch.nn.Module]) -> None:
    """Repeat the packing for CPU kernels that vLLM does after the first load but not after an update.

    It skips experts, and tied layers, which get no tensor of their own: an output head would go on with the old embeddings.
    """
    for layer in tied:
        layer.quant_method.process_weights_after_loading(layer)
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)


class WorkerExtension:
    """Methods added to every vLLM worker, callable with `collective_rpc`."""

    rank: int  # vLLM's
    weight_transfer_engine: BucketWeightTransferEngine

    def memory(self) -> dict[str, int]:
        """What this process holds, in bytes."""
        return process_memory(on_gpu=current_platform.is_cuda())

    def join_weight_update(self, sources: list[dict[str, Any]], first_rank: int, n_receivers: int, record_digests: bool) -> None:
        """What is particular to the next update: see `BucketWeightTransferEngine.join`; `first_rank` is that of the engine's
        first worker."""
        self._weight_update_active = False  # vLLM's: the last one may have been broken off
        self.weight_transfer_engine.join(sources, first_rank + self.rank, n_receivers, record_digests)

    def received_digests(self) -> dict[str, int]:
        """`block_digest` of every tensor of the last update, by Hugging Face name, if recording was asked for."""
        return self.weight_transfer_engine.received_digests


def _keep_linear_weights() -> None:
    """Have vLLM keep linear weights beside their CPU packing: it drops them, and their checksums are then those of nothing."""
    dispatch = layer_utils.dispatch_cpu_unquantized_gemm

    def dispatch_and_keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        dispatch(layer, remove_weight=False)

    layer_utils.dispatch_cpu_unquantized_gemm = dispatch_and_keep


WeightTransferEngineFactory.register_engine("tic_megatron", BucketWeightTransferEngine)
if current_platform.is_cpu():
    _keep_linear_weights()
    apply_expert_map()
