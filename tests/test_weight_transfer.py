"""Weight updates of real vLLM engines through shared memory, sent by another process, against plain transformers."""

from __future__ import annotations

import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.models import make_tiny_qwen3, response_logprobs
from tic_megatron.config import Settings
from tic_megatron.remote import WorkerError
from tic_megatron.rollout.engines import EngineGroup
from tic_megatron.trajectory import Prompt
from tic_megatron.weights.wire import (
    ALIGNMENT,
    Bucket,
    BucketLayout,
    SharedMemoryBuffer,
    layout_bucket,
    tensor_hash,
)

MAX_PROMPT, MAX_RESPONSE = 320, 8
BUCKET_BYTES = 48 * 1024
"""Less than a q_proj and a k_proj together: layers that vLLM fuses arrive in several buckets."""


# ---- the wire format ----


def specs(seed=0, count=40):
    draw = random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    shapes = [(), (1,), (draw.randint(1, 99),), (draw.randint(1, 99), draw.randint(1, 99))]
    return [(f"tensor.{i}", draw.choice(dtypes), draw.choice(shapes)) for i in range(count)]


def test_a_bucket_holds_every_tensor_once_in_order():
    layout = layout_bucket(specs())
    assert [(t.name, t.torch_dtype, t.shape) for t in layout.tensors] == specs()
    end = 0
    for tensor in layout.tensors:
        assert tensor.offset % ALIGNMENT == 0 and end <= tensor.offset < end + ALIGNMENT
        end = tensor.offset + tensor.nbytes
    assert end <= layout.nbytes < end + ALIGNMENT
    assert layout_bucket([]) == BucketLayout((), 0)


def test_views_of_a_bucket_do_not_overlap():
    layout = layout_bucket(specs())
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    tensors = [torch.randn(shape).to(dtype) for _, dtype, shape in specs()]
    for place, tensor in zip(layout.tensors, tensors, strict=True):
        place.view(flat).copy_(tensor)
    assert all(place.view(flat).equal(tensor) for place, tensor in zip(layout.tensors, tensors, strict=True))


def test_payload_round_trip():
    bucket = layout_bucket(specs()).bucket({"shared_memory": "name"})
    assert Bucket.from_payload(bucket.to_payload()) == bucket


def test_hash_is_that_of_the_bytes():
    tensor = torch.arange(12.0).view(3, 4)
    assert tensor_hash(tensor.t().contiguous().t()) == tensor_hash(tensor)
    assert tensor_hash(tensor.t()) != tensor_hash(tensor)
    assert tensor_hash(tensor.bfloat16()) != tensor_hash(tensor)
    assert len(tensor_hash(torch.tensor(1.0))) == 64


RECEIVER = """
import sys, torch
from tic_megatron.weights.wire import SharedMemoryBuffer, WireTensor
buffer = SharedMemoryBuffer.attach(sys.argv[1])
tensor = buffer.as_tensor(WireTensor("a", "float32", (5,), 64))
assert tensor.tolist() == [0, 1, 2, 3, 4], tensor
tensor += 1
"""


def test_shared_memory_outlives_its_receivers():
    buffer = SharedMemoryBuffer.create(1000)
    (tensor,) = layout_bucket([("pad", torch.uint8, (64,)), ("a", torch.float32, (5,))]).tensors[1:]
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

    def __init__(self, model_dir):
        self.state = load_file(Path(model_dir, "model.safetensors"))
        self.layouts = [layout_bucket(part) for part in self._parts()]
        self.buffer = SharedMemoryBuffer.create(max(layout.nbytes for layout in self.layouts))

    def _parts(self):
        """The tensors in buckets of `BUCKET_BYTES`, whatever vLLM makes of them; larger ones alone."""
        part = []
        for name, tensor in self.state.items():
            spec = (name, tensor.dtype, tuple(tensor.shape))
            if part and layout_bucket([*part, spec]).nbytes > BUCKET_BYTES:
                yield part
                part = []
            part.append(spec)
        yield part

    def buckets(self):
        return len(self.layouts)

    def fill(self, index):
        for tensor in self.layouts[index].tensors:
            self.buffer.as_tensor(tensor).copy_(self.state[tensor.name])
        return self.layouts[index].bucket(self.buffer.handle).to_payload()

    def spoil(self):
        """What a sender does next: it overwrites the buffer."""
        self.buffer.as_tensor(layout_bucket([("all", torch.uint8, (self.buffer.nbytes,))]).tensors[0]).fill_(0x7F)

    def hashes(self):
        return {name: tensor_hash(tensor) for name, tensor in self.state.items()}

    def stop(self):
        self.buffer.close()


def send(sender, engines, version, skip=()):
    engines.start_weight_update()
    for index in range(ray.get(sender.buckets.remote())):
        if index not in skip:
            engines.update_weights(ray.get(sender.fill.remote(index)))
            ray.get(sender.spoil.remote())
    engines.finish_weight_update(version)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


class Setup:
    """An engine that serves `old`, and senders of `old` and `new`."""

    def __init__(self, folder, make_model, tp_size=1):
        self.old, self.new = make_model(folder / "old", seed=1), make_model(folder / "new", seed=2)
        settings = Settings()
        settings.rollout.tensor_parallel_size = tp_size
        settings.rollout.max_prompt_tokens, settings.rollout.max_response_tokens = MAX_PROMPT, MAX_RESPONSE
        self.engines = EngineGroup.start(settings, model_path=str(self.old), device="cpu", log_dir=folder)
        self.engines.init_weight_transfer({"record_hashes": True})
        self.old_sender, self.new_sender = (Sender.remote(path) for path in (self.old, self.new))

    def stop(self):
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
def setup(request, tmp_path_factory):
    setup = Setup(tmp_path_factory.mktemp("transfer"), request.param)
    yield setup
    setup.stop()


def make_prompts():
    """Prompts that fill several blocks of the prefix cache, and short ones."""
    draw = random.Random(0)
    return [
        Prompt(f"p{i}", "", "", tuple(draw.randrange(3, 300) for _ in range(n))) for i, n in enumerate([320, 257, 300, 5, 40])
    ]


def largest_error(engines, model_dir, version):
    """Of the log-probs of fresh samples, against transformers with the weights of `model_dir`."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    groups = engines.generate(make_prompts(), group_size=4, temperature=1.0, top_p=1.0, max_tokens=MAX_RESPONSE, seed=0)
    errors = []
    for t in (t for group in groups for t in group.trajectories):
        assert t.weight_version == version
        expected = response_logprobs(model, t.prompt.token_ids, t.response_ids, 1.0)
        errors += [abs(a - b) for a, b in zip(expected, t.inference_logprobs, strict=True)]
    return max(errors)


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
    assert engines.received_hashes() == [ray.get(setup.new_sender.hashes.remote())]
    assert all(engines.checksums()[0][name] != digest for name, digest in before[0].items() if "rotary" not in name)

    send(setup.old_sender, engines, version=2)
    assert largest_error(engines, setup.old, version=2) < 1e-5
    assert engines.received_hashes() == [ray.get(setup.old_sender.hashes.remote())]
    assert engines.checksums() == before  # what a fresh engine has


def test_engine_serves_the_weights_that_were_sent(setup):
    check_updates(setup)


def test_incomplete_update_is_refused(setup):
    """A sender that forgets tensors: vLLM would go on with the old ones."""
    for missing in range(ray.get(setup.new_sender.buckets.remote())):
        with pytest.raises(WorkerError, match="lacks tensors of"):
            send(setup.new_sender, setup.engines, version=3, skip={missing})
        setup.engines.update_weights(ray.get(setup.new_sender.fill.remote(missing)))
        setup.engines.finish_weight_update(4)
    assert largest_error(setup.engines, setup.new, version=4) < 1e-5


def test_misuse_is_an_error(setup):
    payload = ray.get(setup.new_sender.fill.remote(0))
    with pytest.raises(WorkerError, match="start_weight_update must be called before update_weights"):
        setup.engines.update_weights(payload)


@pytest.mark.slow  # three processes import vLLM, two of them after the first
def test_tensor_parallel_engine_takes_the_weights(tmp_path):
    setup = Setup(tmp_path, untied, tp_size=2)
    check_updates(setup)
    payload = ray.get(setup.new_sender.fill.remote(0))
    setup.engines.start_weight_update()
    setup.engines.update_weights([payload, payload])  # one per rank, as with CUDA IPC
    setup.stop()


@pytest.mark.slow  # dense models come first
def test_mixture_of_experts_takes_the_weights(tmp_path):
    setup = Setup(tmp_path, mixture)
    check_updates(setup)
    setup.stop()
