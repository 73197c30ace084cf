"""Weight updates of real vLLM engines through shared memory, sent by another process, against plain transformers."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.models import make_tiny_qwen3, response_logprobs
from tests.processes import wait_until_gone
from tic_megatron.config import Settings
from tic_megatron.remote import WorkerError
from tic_megatron.rollout.engines import EngineGroup
from tic_megatron.trajectory import Prompt
from tic_megatron.weights.sending import (
    BroadcastSendBuffer,
    CudaIpcSendBuffer,
    WeightTransferError,
    compare_digests,
    merge_payloads,
)
from tic_megatron.weights.wire import (
    ALIGNMENT,
    Block,
    Bucket,
    BucketLayout,
    SharedMemoryBuffer,
    TensorAssembler,
    block_digest,
    broadcast,
    layout_blocks,
)

MAX_PROMPT, MAX_RESPONSE = 320, 8
BUCKET_BYTES = 48 * 1024
"""Less than a q_proj and a k_proj together: layers that vLLM fuses arrive in several buckets."""


# ---- the wire format ----


def blocks(seed=0, count=40):
    """Whole tensors of all kinds."""
    draw = random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    shapes = [(1,), (draw.randint(1, 99),), (draw.randint(1, 99), draw.randint(1, 99))]
    return [Block.whole(f"tensor.{i}", draw.choice(dtypes), draw.choice(shapes)) for i in range(count)]


def cut(block, pieces, dim):
    """A whole tensor as so many unequal blocks along a dimension."""
    ends = [*sorted(random.Random(0).sample(range(1, block.shape[dim]), pieces - 1)), block.shape[dim]]
    start = 0
    for end in ends:
        corner, size = list(block.start), list(block.size)
        corner[dim], size[dim] = start, end - start
        yield replace(block, start=tuple(corner), size=tuple(size))
        start = end


def test_a_bucket_holds_every_block_once_in_order():
    layout = layout_blocks(blocks())
    assert [replace(block, offset=0) for block in layout.blocks] == blocks()
    end = 0
    for block in layout.blocks:
        assert block.offset % ALIGNMENT == 0 and end <= block.offset < end + ALIGNMENT
        end = block.offset + block.nbytes
    assert end <= layout.nbytes < end + ALIGNMENT
    assert layout_blocks([]) == BucketLayout((), 0)


def test_views_of_a_bucket_do_not_overlap():
    layout = layout_blocks(blocks())
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    tensors = [torch.randn(block.shape).to(block.torch_dtype) for block in layout.blocks]
    for block, tensor in zip(layout.blocks, tensors, strict=True):
        block.view(flat).copy_(tensor)
    assert all(block.view(flat).equal(tensor) for block, tensor in zip(layout.blocks, tensors, strict=True))


def test_payload_round_trip():
    bucket = layout_blocks(blocks()).bucket({"shared_memory": "name"})
    assert Bucket.from_payload(bucket.to_payload()) == bucket


@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_make_the_tensor_and_their_digests_its_digest(dim):
    whole = Block.whole("a", torch.bfloat16, (37, 23))
    tensor = torch.randn(37, 23).bfloat16()
    parts = list(cut(whole, 5, dim))
    assembler = TensorAssembler()
    done = [assembler.take(part, part.of(tensor)) for part in random.Random(1).sample(parts, len(parts))]
    assert done[:-1] == [None] * 4 and done[-1].equal(tensor) and not assembler.incomplete
    digests = [block_digest(part.of(tensor), part.shape, part.start) for part in parts]
    assert sum(digests) % 2**64 == block_digest(tensor, (37, 23), (0, 0))
    assembler.take(parts[0], parts[0].of(tensor))
    assert assembler.incomplete == ["a"]


def test_a_digest_shows_every_change():
    """Against the definition, in whole numbers of any size; and by changes."""

    def defined(values):
        total = 0
        for position, bits in enumerate(values.reshape(-1).view(torch.int32).tolist()):
            mixed = (position + 1) * -7046029254386353131 % 2**64
            mixed = (mixed ^ (mixed >> 32)) * -4658895280553007687 % 2**64
            total += (bits + 0x5DEECE66D) * ((mixed ^ (mixed >> 29)) | 1)
        return total % 2**64

    tensor = torch.randn(50, 7)
    digest = block_digest(tensor, (50, 7), (0, 0))
    assert digest == defined(tensor)
    assert block_digest(tensor.t(), (7, 50), (0, 0)) == defined(tensor.t().contiguous())
    seen = {digest, block_digest(torch.zeros(50, 7), (50, 7), (0, 0)), block_digest(torch.zeros(49, 7), (49, 7), (0, 0))}
    for i in range(50):
        changed = tensor.clone()
        changed[i, i % 7] = torch.nextafter(changed[i, i % 7], torch.tensor(9.0))
        seen.add(block_digest(changed, (50, 7), (0, 0)))
        exchanged = tensor.clone()
        exchanged[i], exchanged[i - 1] = tensor[i - 1], tensor[i]
        seen.add(block_digest(exchanged, (50, 7), (0, 0)))
    assert len(seen) == 103


def test_digests_are_compared_rank_by_rank_where_shards_go_straight():
    sent = [
        {"rank": 0, "sharded": {"a": 1, "b": 2**63}, "replicated": {"c": 5}},
        {"rank": 1, "sharded": {"a": 10, "b": 2**63 + 1}, "replicated": {}},
    ]
    compare_digests(sent, {0: [{"a": 11, "b": 1, "c": 5}] * 2, 1: [{"a": 11, "b": 1, "c": 5}] * 2}, straight=False)
    ranks = [{"a": 1, "b": 2**63, "c": 5}, {"a": 10, "b": 2**63 + 1, "c": 5}]
    compare_digests(sent, {0: ranks, 1: ranks}, straight=True)
    with pytest.raises(WeightTransferError, match=r"engine 1, rank 0: 2 of 3 tensors differ .* first is a"):
        compare_digests(sent, {0: ranks, 1: ranks[::-1]}, straight=True)
    with pytest.raises(WeightTransferError, match=r"rank 1: 1 of 3 tensors differ .* first is c"):
        compare_digests(sent, {3: [{"a": 11, "b": 1, "c": 5}, {"a": 11, "b": 1}]}, straight=False)


RECEIVER = """
import sys, torch
from tic_megatron.weights.wire import SharedMemoryBuffer
buffer = SharedMemoryBuffer.attach(sys.argv[1])
tensor = buffer.flat[64:84].view(torch.float32)
assert tensor.tolist() == [0, 1, 2, 3, 4], tensor
tensor += 1
"""


def test_a_gpus_memory_is_named_once_per_update(monkeypatch):
    """And not in every bucket, for every engine: hundreds of GPUs have hundreds of names."""
    exported = []

    def reduce_tensor(tensor):
        exported.append(tensor)
        return None, ("handle", len(exported))

    gpu = SimpleNamespace(uuid="GPU-0")
    monkeypatch.setattr("torch.empty", lambda nbytes, **_: torch.zeros(nbytes, dtype=torch.uint8))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: gpu)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr("torch.multiprocessing.reductions.reduce_tensor", reduce_tensor)
    buffers = []
    for number in range(3):
        gpu.uuid = f"GPU-{number}"
        buffers.append(CudaIpcSendBuffer(64))
    for update in range(2):
        for buffer in buffers:
            buffer.begin_update()
        for bucket in range(5):
            sent = [{"blocks": [], "nbytes": 0, "rank": 0, "handle": buffer.handle(bucket % 2)} for buffer in buffers]
            (payload,) = merge_payloads(sent, straight=False)
            named = set(payload["handle"].pop("cuda_ipc", {}))
            assert payload["handle"] == {"slot": bucket % 2}
            assert named == ({"GPU-0", "GPU-1", "GPU-2"} if bucket < 2 else set())
        assert len(exported) == 6 * (update + 1)


@pytest.mark.parametrize("failing", [False, True])
def test_a_broadcast_between_gpus_waits_for_no_watchdog(failing):
    """The calls only: NCCL's `wait` returns at once unless it is given a time."""
    events: list[Any] = []

    def wait(timeout):
        events.append(("wait", timeout.total_seconds()))
        if failing:
            raise RuntimeError("timed out")

    group = SimpleNamespace(
        broadcast=lambda flat, root: events.append("broadcast") or SimpleNamespace(wait=wait),
        abort=lambda: events.append("abort"),
    )
    flat = cast(Any, SimpleNamespace(device=torch.device("cuda")))
    with pytest.raises(RuntimeError, match="timed out") if failing else contextlib.nullcontext():
        broadcast(cast(Any, group), flat, 7.0)
    assert events == ["broadcast", ("wait", 7.0), *(["abort"] if failing else [])]


def test_shared_memory_outlives_its_receivers():
    buffer = SharedMemoryBuffer.create(1000)
    _, tensor = layout_blocks([Block.whole("pad", torch.uint8, (64,)), Block.whole("a", torch.float32, (5,))]).blocks
    for _ in range(2):
        buffer.as_tensor(tensor).copy_(torch.arange(5.0))
        done = subprocess.run([sys.executable, "-c", RECEIVER, buffer.name], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert buffer.as_tensor(tensor).tolist() == [1, 2, 3, 4, 5]
    view = buffer.as_tensor(tensor)
    receiver = SharedMemoryBuffer.attach(buffer.name)
    buffer.close()
    assert view.tolist() == receiver.as_tensor(tensor).tolist() == [1, 2, 3, 4, 5]  # still mapped
    with pytest.raises(ValueError, match="closed"):
        buffer.as_tensor(tensor)


def test_a_name_never_reaches_other_memory():
    """A receiver that knows a buffer of the past must not find the one that has its file number now."""
    first = SharedMemoryBuffer.create(100)
    first.close()
    with pytest.raises(FileNotFoundError):
        SharedMemoryBuffer.attach(first.name)
    second = SharedMemoryBuffer.create(100)
    assert second.name.split("/")[:2] == first.name.split("/")[:2]
    with pytest.raises(FileNotFoundError):
        SharedMemoryBuffer.attach(first.name)


# ---- engines ----


@ray.remote(num_cpus=0)
class Sender:
    """A trainer's stand-in: another process, with one buffer that it refills for every bucket."""

    def __init__(self, model_dir, broadcast=False):
        self.state = load_file(Path(model_dir, "model.safetensors"))
        self.layouts = [layout_blocks(part) for part in self._parts()]
        nbytes = max(layout.nbytes for layout in self.layouts)
        if broadcast:
            self.buffer = BroadcastSendBuffer(nbytes, torch.device("cpu"), source=0)
        else:
            self.buffer = SharedMemoryBuffer.create(nbytes)

    def _parts(self):
        """Blocks in buckets of `BUCKET_BYTES`, whatever vLLM makes of them; larger tensors in unequal rows."""
        part = []
        for name, tensor in self.state.items():
            block = Block.whole(name, tensor.dtype, tuple(tensor.shape))
            for piece in cut(block, 3, 0) if block.nbytes > BUCKET_BYTES else [block]:
                if part and layout_blocks([*part, piece]).nbytes > BUCKET_BYTES:
                    yield part
                    part = []
                part.append(piece)
        yield part

    def buckets(self):
        return len(self.layouts)

    def fill(self, index):
        layout = self.layouts[index]
        flat = self.buffer.flat if isinstance(self.buffer, SharedMemoryBuffer) else self.buffer.flat(0)
        for block in layout.blocks:
            block.view(flat).copy_(block.of(self.state[block.name]))
        handle = self.buffer.handle if isinstance(self.buffer, SharedMemoryBuffer) else self.buffer.handle(0)
        return layout.bucket(handle).to_payload()

    def spoil(self):
        """What a sender does next: it overwrites the buffer."""
        self.buffer.flat.fill_(0x7F)

    def open(self):
        self.buffer.begin_update()
        return self.buffer.open("127.0.0.1", 60)

    def connect(self, n_receivers):
        self.buffer.connect(n_receivers, 60)

    def deliver(self, index):
        self.buffer.deliver(0, self.layouts[index].nbytes)

    def digests(self):
        return {n: block_digest(t, tuple(t.shape), (0, 0)[: t.dim()]) for n, t in self.state.items()}

    def stop(self):
        self.buffer.close()


def send(sender, engines, version, skip=()):
    engines.begin_receiving()
    engines.start_weight_update([], record_digests=True)
    for index in range(ray.get(sender.buckets.remote())):
        if index not in skip:
            engines.update_weights([ray.get(sender.fill.remote(index))])
            ray.get(sender.spoil.remote())
    engines.finish_weight_update(version)


class Setup:
    """An engine that serves `old`, and senders of `old` and `new`."""

    def __init__(self, folder, make_model, tp_size=1):
        self.old, self.new = make_model(folder / "old", seed=1), make_model(folder / "new", seed=2)
        settings = Settings()
        settings.rollout.tensor_parallel_size = tp_size
        settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens = MAX_PROMPT, MAX_RESPONSE
        self.engines = EngineGroup.start(settings, model_path=str(self.old), device="cpu", log_dir=folder)
        self.old_sender, self.new_sender = (Sender.remote(path) for path in (self.old, self.new))

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.engines.stop()
        ray.get([self.old_sender.stop.remote(), self.new_sender.stop.remote()])


tied = partial(make_tiny_qwen3, tie_word_embeddings=True, initializer_range=0.1)
untied = partial(make_tiny_qwen3, tie_word_embeddings=False, initializer_range=0.1)


def mixture(directory, *, seed):
    """A Qwen3 mixture of experts with the tokenizer of a dense model."""
    make_tiny_qwen3(directory, seed=seed, tie_word_embeddings=False)
    dense = AutoConfig.from_pretrained(directory).to_dict()
    config = Qwen3MoeConfig(
        **{name: value for name, value in dense.items() if name not in ("architectures", "model_type")},
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    for norm in (parameter for name, parameter in model.named_parameters() if name.endswith("norm.weight")):
        torch.nn.init.uniform_(norm, 0.5, 1.5)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=[tied, untied], ids=["tied", "untied"])
def setup(ray_cluster, request, tmp_path_factory):
    with Setup(tmp_path_factory.mktemp("transfer"), request.param) as setup:
        yield setup


def make_prompts():
    """Prompts that fill several blocks of the prefix cache, and short ones."""
    draw = random.Random(0)
    return [
        Prompt(f"p{i}", "", "", tuple(draw.randrange(3, 300) for _ in range(n))) for i, n in enumerate([320, 257, 300, 5, 40])
    ]


def largest_error(engines, model_dir, version):
    """Of the log-probs of fresh samples, against transformers with the weights of `model_dir`."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    rollout = engines.generate(make_prompts(), group_size=4, temperature=1.0, top_p=1.0, max_tokens=MAX_RESPONSE, seed=0)
    errors = []
    for t in (t for group in rollout.groups for t in group.trajectories):
        assert t.weight_version == version
        expected = response_logprobs(model, t.prompt.token_ids, t.response_ids, 1.0)
        errors += [abs(a - b) for a, b in zip(expected, t.inference_logprobs, strict=True)]
    return max(errors)


def logprobs(engines):
    """Of seeded samples, by prompt, sample, place and token."""
    rollout = engines.generate(make_prompts(), group_size=4, temperature=1.0, top_p=1.0, max_tokens=MAX_RESPONSE, seed=0)
    return {
        (group.prompt.id, i, place, token): value
        for group in rollout.groups
        for i, t in enumerate(group.trajectories)
        for place, (token, value) in enumerate(zip(t.response_ids, t.inference_logprobs, strict=True))
    }


def check_updates(setup):
    """Old weights, new ones, and the old ones again: served, hashed and numbered as they should be."""
    engines = setup.engines
    before = engines.checksums()
    assert ray.get(setup.new_sender.buckets.remote()) > 4
    assert largest_error(engines, setup.old, version=0) < 1e-5
    assert largest_error(engines, setup.new, version=0) > 0.1

    send(setup.new_sender, engines, version=1)
    assert engines.weight_versions() == [1]
    assert largest_error(engines, setup.new, version=1) < 1e-5  # its prompts' prefixes were cached with the old weights
    (received,) = engines.received_digests().values()
    assert all(digests == ray.get(setup.new_sender.digests.remote()) for digests in received)
    assert all(engines.checksums()[0][name] != digest for name, digest in before[0].items() if "rotary" not in name)

    send(setup.old_sender, engines, version=2)
    assert largest_error(engines, setup.old, version=2) < 1e-5
    (received,) = engines.received_digests().values()
    assert all(digests == ray.get(setup.old_sender.digests.remote()) for digests in received)
    assert engines.checksums() == before  # what a fresh engine has


def test_engine_serves_the_weights_that_were_sent(setup):
    check_updates(setup)


def test_incomplete_update_is_refused(setup):
    """A sender that forgets tensors: vLLM would go on with the old ones."""
    for missing in range(ray.get(setup.new_sender.buckets.remote())):
        with pytest.raises(WorkerError, match="lacks tensors of"):
            send(setup.new_sender, setup.engines, version=3, skip={missing})
        setup.engines.update_weights([ray.get(setup.new_sender.fill.remote(missing))])
        setup.engines.finish_weight_update(4)
    assert largest_error(setup.engines, setup.new, version=4) < 1e-5


def test_misuse_is_an_error(setup):
    payload = ray.get(setup.new_sender.fill.remote(0))
    with pytest.raises(WorkerError, match="start_weight_update must be called before update_weights"):
        setup.engines.update_weights([payload])


def test_weights_come_by_broadcast_too(setup):
    """As they do to engines on other machines or GPUs; by gloo instead of NCCL."""
    engines, sender = setup.engines, Sender.remote(setup.new, broadcast=True)
    for version in (5, 6):
        source = ray.get(sender.open.remote())
        connected = sender.connect.remote(engines.begin_receiving())
        engines.start_weight_update([source], record_digests=True)
        ray.get(connected)
        for index in range(ray.get(sender.buckets.remote())):
            payload = ray.get(sender.fill.remote(index))
            delivered = sender.deliver.remote(index)
            engines.update_weights([payload])
            ray.get(delivered)
        engines.finish_weight_update(version)
        assert engines.received_digests() == {0: [ray.get(sender.digests.remote())]}
        assert largest_error(engines, setup.new, version=version) < 1e-5
    ray.get(sender.stop.remote())


@pytest.mark.slow  # three processes import vLLM, two of them after the first
def test_tensor_parallel_engine_takes_the_weights(ray_cluster, tmp_path):
    with Setup(tmp_path, untied, tp_size=2) as setup:
        check_updates(setup)
        # The death of a rank, in a transfer too, is that of the engine: it is replaced, or the driver starts again.
        (engine,) = setup.engines.pool.engines
        actor = engine.actor
        ranks = [child for child in psutil.Process(engine.pid).children(recursive=True) if "VLLM" in " ".join(child.cmdline())]
        assert len(ranks) == 2
        ranks[1].kill()
        setup.engines.pool.call("checksums")
        assert engine.actor is not actor and setup.engines.pool.failures == 1
        assert wait_until_gone([rank.pid for rank in ranks]) == []


@pytest.mark.slow  # dense models come first
def test_mixture_of_experts_takes_the_weights(ray_cluster, tmp_path):
    with Setup(tmp_path, mixture) as setup:
        before = logprobs(setup.engines)
        send(setup.old_sender, setup.engines, version=0)
        after = logprobs(setup.engines)
        assert len(before) > 100 and before.keys() == after.keys()
        assert max(abs(before[token] - after[token]) for token in before) < 1e-5, "an update with the same weights"
        check_updates(setup)
