"""Lets Megatron-core run on a CPU over gloo, in a process that has no CUDA device.

Megatron-core names CUDA where it only means "the accelerator": `device="cuda"`, `torch.cuda.current_device()`,
`tensor.type() == "torch.cuda.FloatTensor"`. `install()` gives those names a CPU meaning. It patches torch for the whole
process, so it belongs in actor processes only (never in the driver's, never beside vLLM, whose CPU worker patches torch too).
"""

from __future__ import annotations

import contextlib
import functools

import torch

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
_CPU = torch.device("cpu")


def install() -> None:
    """Patch torch so that "cuda" means the CPU. Does nothing where CUDA is available, or when called again."""
    if torch.cuda.is_available() or getattr(torch, "_tic_megatron_cpu", False):
        return
    # Megatron compiles small fused functions on import; on a CPU that costs a C++ build and gains nothing.
    torch.compile = lambda function=None, **options: function if function is not None else (lambda f: f)
    import megatron.core  # noqa: F401  (its import must see the real torch, apart from compile)

    for name in _FACTORIES:
        setattr(torch, name, _factory_on_cpu(getattr(torch, name)))
    _patch_tensor_methods()
    _patch_cuda_module()
    _patch_experts()
    _patch_unequal_collectives()
    torch._tic_megatron_cpu = True


def _is_accelerator(device) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, torch.device) and device.type == "cuda")


def _factory_on_cpu(factory):
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if _is_accelerator(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # pinning needs a CUDA driver
        return factory(*args, **kwargs)

    return on_cpu


def _patch_tensor_methods() -> None:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self, *args, **kwargs):
        args = tuple(_CPU if _is_accelerator(a) else a for a in args)
        if _is_accelerator(kwargs.get("device")):
            kwargs["device"] = _CPU
        return tensor_to(self, *args, **kwargs)

    def type_(self, *args, **kwargs):
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        # The optimizers sort parameters by the names of CUDA tensor types.
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to
    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


class _Stream:
    """A stream on which everything is already done."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other) -> None: ...

    def wait_event(self, event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event=None):
        return event or _Event()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        return None


class _Event:
    """An event that has already happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None) -> None: ...

    def wait(self, stream=None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _returns(value):
    """A fresh function (torch's compiler wants no object under two names) that ignores its arguments."""
    return lambda *args, **kwargs: value


def _patch_cuda_module() -> None:
    cuda = torch.cuda
    cuda.current_device = _returns(_CPU)
    cuda.device_count = _returns(0)
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _returns(None))
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _returns(None), _returns(None)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream, cuda.default_stream = _returns(_Stream()), _returns(_Stream())
    cuda.stream = _returns(contextlib.nullcontext())
    cuda.memory_allocated, cuda.max_memory_allocated = _returns(0), _returns(0)

    # Megatron forks "the CUDA generator" per parallel region; on a CPU that is the process's one generator.
    from megatron.core.tensor_parallel import random as megatron_random

    cuda.manual_seed = torch.default_generator.manual_seed
    for module in (cuda, cuda.random, megatron_random):
        name = "_{}_cuda_rng_state" if module is megatron_random else "{}_rng_state"
        setattr(module, name.format("get"), lambda *args, **kwargs: torch.random.get_rng_state())
        setattr(module, name.format("set"), lambda state, *args, **kwargs: torch.random.set_rng_state(state))


def _patch_experts() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    def to_numpy(tensor, as_numpy: bool = False, record_stream: bool = False):
        # The token counts that it moves "to the CPU" become the split sizes of a collective, which must be plain numbers.
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_numpy


def _patch_unequal_collectives() -> None:
    """gloo gathers and reduce-scatters equal parts only; where experts are sharded over TP and EP the parts differ."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_unequal(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, use_global_buffer=use_global_buffer)
        parts = gather(_padded(input_, max(output_split_sizes)), group).chunk(group.size())
        return torch.cat([part[:n] for part, n in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter_unequal(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, use_global_buffer=use_global_buffer)
        longest = max(input_split_sizes)
        parts = torch.cat([_padded(part, longest) for part in input_.split(input_split_sizes)])
        return reduce_scatter(parts, group)[: input_split_sizes[group.rank()]].contiguous()

    mappings._gather_along_first_dim = gather_unequal
    mappings._reduce_scatter_along_first_dim = reduce_scatter_unequal


def _padded(x: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(n - x.shape[0], *x.shape[1:])])
