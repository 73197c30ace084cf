"""Bad model directories: configuration, weights, tokenizer."""

from __future__ import annotations

import json
import struct

from tests.bad_input.cases import Case, Spoil, both, cut, edit_json, folder, remove, write
from tests.bad_input.settings_cases import MIXTURE

CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", "model/model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja"

BAD_CONFIGS = {
    "missing": (remove(CONFIG), ["config.json cannot be read"]),
    "a folder": (folder(CONFIG), ["config.json cannot be read"]),
    "empty": (write(CONFIG, ""), ["config.json is not valid JSON"]),
    "cut off": (cut(CONFIG, 100), ["config.json is not valid JSON"]),
    "binary": (write(CONFIG, b"\xff\xfe\x00"), ["config.json is not valid JSON"]),
    "a list": (write(CONFIG, "[]"), ["config.json is not a JSON object"]),
    "deep nesting": (write(CONFIG, "[" * 100_000), ["config.json is not valid JSON"]),
    "a long number": (write(CONFIG, '{"vocab_size": ' + "9" * 5000 + "}"), ["config.json is not valid JSON"]),
    "no type": (edit_json(CONFIG, model_type=...), ["config.json", "model_type None"]),
    "Llama": (edit_json(CONFIG, model_type="llama"), ["config.json", "model_type 'llama'"]),
    "Qwen2": (edit_json(CONFIG, model_type="qwen2"), ["config.json", "model_type 'qwen2'"]),
    "a type that is a list": (edit_json(CONFIG, model_type=["qwen3"]), ["config.json", "model_type"]),
    "a classifier": (
        edit_json(CONFIG, architectures=["Qwen3ForSequenceClassification"]),
        ["config.json", "architectures", "Qwen3ForCausalLM"],
    ),
    "an architecture that is a number": (edit_json(CONFIG, architectures=3), ["config.json", "architectures"]),
    "YaRN": (edit_json(CONFIG, rope_scaling={"type": "yarn"}, rope_parameters=...), ["config.json", "RoPE scaling 'yarn'"]),
    "YaRN beside plain RoPE": (
        edit_json(CONFIG, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        ["config.json", "rope_scaling", "rope_parameters is there too"],
    ),
    "YaRN of some layers": (
        edit_json(CONFIG, rope_parameters={"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}),
        ["config.json", "rope_parameters", "the same for all layers"],
    ),
    "RoPE on half of a head": (edit_json(CONFIG, partial_rotary_factor=0.5), ["config.json", "RoPE on a part of the head (0.5)"]),
    "RoPE on half of a head, the new way": (
        edit_json(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}),
        ["config.json", "RoPE on a part of the head (0.5)"],
    ),
    "a type of RoPE that is a list": (edit_json(CONFIG, rope_parameters={"rope_type": [1]}), ["config.json", "RoPE scaling [1]"]),
    "RoPE that is a number": (edit_json(CONFIG, rope_parameters=3), ["config.json", "rope_parameters"]),
    "RoPE of base 0": (
        edit_json(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 0}),
        ["config.json", "rope_theta"],
    ),
    "RoPE with text for a base": (
        edit_json(CONFIG, rope_parameters={"rope_type": "default", "rope_theta": "big"}),
        ["config.json", "rope_theta"],
    ),
    "sliding window": (edit_json(CONFIG, use_sliding_window=True), ["config.json", "sliding-window"]),
    "sliding layers": (
        edit_json(CONFIG, layer_types=["full_attention", "sliding_attention"]),
        ["config.json", "sliding-window"],
    ),
    "kinds of too few layers": (edit_json(CONFIG, layer_types=["full_attention"]), ["config.json", "layer_types"]),
    "quantized": (edit_json(CONFIG, quantization_config={"bits": 4}), ["config.json", "quantized"]),
    "another activation": (edit_json(CONFIG, hidden_act="gelu"), ["config.json", "activation 'gelu'"]),
    "more key-value heads than heads": (edit_json(CONFIG, num_key_value_heads=8), ["config.json", "num_key_value_heads 8"]),
    "key-value heads that do not divide": (edit_json(CONFIG, num_key_value_heads=3), ["config.json", "num_key_value_heads 3"]),
    "an odd head": (edit_json(CONFIG, head_dim=31), ["config.json", "head_dim 31"]),
    "a head that vLLM cannot": (edit_json(CONFIG, head_dim=48), ["head_dim 48", "multiple of 32"]),
    "a small vocabulary": (edit_json(CONFIG, vocab_size=200), ["tokenizer", "vocab_size 200"]),
    "an end token outside of the vocabulary": (edit_json(CONFIG, eos_token_id=320), ["config.json", "eos_token_id 320"]),
    "an end token that is text": (edit_json(CONFIG, eos_token_id="end"), ["config.json", "eos_token_id 'end'"]),
    "an end token below 0": (edit_json(CONFIG, eos_token_id=[2, -1]), ["config.json", "eos_token_id"]),
    "no epsilon": (edit_json(CONFIG, rms_norm_eps="small"), ["config.json", "rms_norm_eps 'small'"]),
    "a negative epsilon": (edit_json(CONFIG, rms_norm_eps=-1e-6), ["config.json", "rms_norm_eps -1e-06"]),
    "ties that are text": (edit_json(CONFIG, tie_word_embeddings="yes"), ["config.json", "tie_word_embeddings 'yes'"]),
    "bias that is a number": (edit_json(CONFIG, attention_bias=2), ["config.json", "attention_bias 2"]),
    "an unknown number format": (edit_json(CONFIG, dtype="float99"), ["config.json", "dtype 'float99'"]),
    "more layers than weights": (edit_json(CONFIG, num_hidden_layers=3, layer_types=...), ["model.layers.2.", "missing"]),
    "fewer layers than weights": (edit_json(CONFIG, num_hidden_layers=1, layer_types=...), ["model.layers.1.", "config.json"]),
    "another width": (edit_json(CONFIG, hidden_size=128), ["model.safetensors", "[320, 64]", "[320, 128]"]),
    "another inner width": (edit_json(CONFIG, intermediate_size=256), ["model.safetensors", "mlp.gate_proj", "[256, 64]"]),
    "another vocabulary": (edit_json(CONFIG, vocab_size=352), ["model.safetensors", "embed_tokens", "[352, 64]"]),
    "more heads": (edit_json(CONFIG, num_attention_heads=8), ["model.safetensors", "q_proj"]),
    "a longer head": (edit_json(CONFIG, head_dim=64), ["model.safetensors", "[128, 64]"]),
    "no ties": (edit_json(CONFIG, tie_word_embeddings=False), ["lm_head.weight", "missing"]),
    "biases": (edit_json(CONFIG, attention_bias=True), ["config.json", "biases of the attention"]),
    "a mixture without the length of a head": (both(MIXTURE, edit_json(CONFIG, head_dim=...)), ["config.json", "head_dim None"]),
    "an unknown part nested too deep": (
        edit_json(CONFIG, auto_map_of_nobody=json.loads("[" * 600 + '{"auto_map": 1}' + "]" * 600)),
        ["config.json", "auto_map"],
    ),
    "a tokenizer's configuration nested too deep": (
        write(TOKENIZER_CONFIG, "[" * 100_000),
        ["tokenizer_config.json is not valid JSON"],
    ),
    "a mixture of dense weights": (MIXTURE, ["mlp.gate.weight", "missing"]),
    "no experts": (both(MIXTURE, edit_json(CONFIG, num_experts=...)), ["config.json", "experts"]),
    "zero experts": (both(MIXTURE, edit_json(CONFIG, num_experts=0)), ["config.json", "num_experts 0"]),
    "more experts per token than experts": (
        both(MIXTURE, edit_json(CONFIG, num_experts_per_tok=5)),
        ["config.json", "num_experts_per_tok 5", "num_experts 4"],
    ),
    "no experts per token": (both(MIXTURE, edit_json(CONFIG, num_experts_per_tok=0)), ["config.json", "num_experts_per_tok 0"]),
    "experts without width": (both(MIXTURE, edit_json(CONFIG, moe_intermediate_size="x")), ["moe_intermediate_size 'x'"]),
    "a step of 0": (both(MIXTURE, edit_json(CONFIG, decoder_sparse_step=0)), ["config.json", "decoder_sparse_step 0"]),
    "a step that is text": (
        both(MIXTURE, edit_json(CONFIG, decoder_sparse_step="1")),
        ["config.json", "decoder_sparse_step '1'"],
    ),
    "dense layers that are text": (both(MIXTURE, edit_json(CONFIG, mlp_only_layers="0")), ["config.json", "mlp_only_layers '0'"]),
    "normalisation that is text": (both(MIXTURE, edit_json(CONFIG, norm_topk_prob="x")), ["config.json", "norm_topk_prob 'x'"]),
}
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings"),
)


def configs() -> list[Case]:
    cpu = ("--cluster.device=cpu",)
    cases = [Case(f"config: {name}", ("model", *words), spoil=spoil, flags=cpu) for name, (spoil, words) in BAD_CONFIGS.items()]
    for number, name in enumerate(SIZES):
        for value in (-1, "64", 10**12) if number % 2 else (0, 2.5, True):
            words = ("config.json", f"{name} {value!r}")
            cases.append(Case(f"config: {name} {value!r}", words, spoil=edit_json(CONFIG, **{name: value})))
        if name != "head_dim":  # whose default is known
            words = ("config.json", f"{name} None")
            cases.append(Case(f"config: no {name}", words, spoil=edit_json(CONFIG, **{name: ...})))
    return cases


def with_header(change) -> Spoil:
    """Change the header of the weights, a JSON object; the data stays."""

    def spoil(workspace) -> None:
        path = workspace.root / WEIGHTS
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        encoded = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])

    return spoil


NORM = "model.norm.weight"


def entry(**changes) -> Spoil:
    """Change the description of one tensor."""

    def change(header) -> None:
        header[NORM] = {**header[NORM], **changes}

    return with_header(change)


def drop_entry(key: str) -> Spoil:
    return with_header(lambda header: header[NORM].pop(key) and None)


def overlap(header) -> None:
    header[NORM]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]


def header_of(encoded: bytes, length: int | None = None) -> Spoil:
    return write(WEIGHTS, struct.pack("<Q", len(encoded) if length is None else length) + encoded + bytes(64))


BAD_WEIGHTS = {
    "missing": (remove(WEIGHTS), ["model.safetensors", "missing"]),
    "of another format": (both(remove(WEIGHTS), write("model/pytorch_model.bin", b"x")), ["missing", "only .safetensors"]),
    "a folder": (folder(WEIGHTS), ["model.safetensors", "missing"]),
    "empty": (write(WEIGHTS, b""), ["model.safetensors is not a safetensors file"]),
    "of seven bytes": (write(WEIGHTS, b"1234567"), ["model.safetensors is not a safetensors file"]),
    "cut off": (cut(WEIGHTS, -100), ["model.safetensors", "cut off"]),
    "cut off by a byte": (cut(WEIGHTS, -1), ["model.safetensors", "cut off"]),
    "cut off in the header": (cut(WEIGHTS, 500), ["model.safetensors is not a safetensors file"]),
    "with more at the end": (
        lambda w: (w.root / WEIGHTS).write_bytes((w.root / WEIGHTS).read_bytes() + b"x"),
        ["model.safetensors", "bytes"],
    ),
    "a pointer": (write(WEIGHTS, "version https://git-lfs\noid sha256:0\n"), ["model.safetensors is not a safetensors file"]),
    "a page of the web": (write(WEIGHTS, "<!doctype html>" + "x" * 999), ["model.safetensors is not a safetensors file"]),
    "a huge header": (header_of(b"{}", 2**63), ["model.safetensors is not a safetensors file"]),
    "a header that is no JSON": (header_of(b"hello"), ["model.safetensors is not a safetensors file"]),
    "a header that is a list": (header_of(b"[]"), ["model.safetensors is not a safetensors file"]),
    "a header without tensors": (header_of(b"{}"), ["model.safetensors is not a safetensors file"]),
    "a deep header": (header_of(b"[" * 100_000), ["model.safetensors is not a safetensors file"]),
    "a header that is not UTF-8": (header_of(b'{"\xff": 1}'), ["model.safetensors is not a safetensors file"]),
    "a tensor that is a number": (with_header(lambda h: h | {NORM: 3}), ["model.safetensors is not a safetensors file"]),
    "a tensor without offsets": (drop_entry("data_offsets"), ["model.safetensors is not a safetensors file"]),
    "a tensor without a shape": (drop_entry("shape"), ["model.safetensors is not a safetensors file"]),
    "a tensor without a number format": (drop_entry("dtype"), ["model.safetensors is not a safetensors file"]),
    "no offsets": (entry(data_offsets=[]), ["model.safetensors is not a safetensors file"]),
    "offsets that are text": (entry(data_offsets=["0", "1"]), ["model.safetensors is not a safetensors file"]),
    "negative offsets": (entry(data_offsets=[-256, 0]), ["model.safetensors is not a safetensors file"]),
    "offsets backwards": (entry(data_offsets=[256, 0]), ["model.safetensors is not a safetensors file"]),
    "offsets of another tensor": (with_header(overlap), ["model.safetensors"]),
    "offsets of another length": (entry(data_offsets=[0, 128]), ["model.safetensors is not a safetensors file"]),
    "a shape that is text": (entry(shape="64"), ["model.safetensors is not a safetensors file"]),
    "a negative shape": (entry(shape=[-64]), ["model.safetensors is not a safetensors file"]),
    "an unknown number format": (entry(dtype="F99"), ["model.safetensors", "F99"]),
    "whole numbers": (entry(dtype="I32"), ["model.safetensors", NORM, "I32"]),
    "eight bits": (entry(dtype="F8_E4M3", shape=[256]), ["model.safetensors", NORM, "F8_E4M3"]),
    "another shape": (entry(shape=[8, 8]), ["model.safetensors", NORM, "[8, 8]", "[64]"]),
    "a tensor missing": (with_header(lambda h: {k.replace("q_norm", "qnorm"): v for k, v in h.items()}), ["q_norm.weight"]),
    "another name": (with_header(lambda h: {k.replace("model.", "m."): v for k, v in h.items()}), ["model.embed_tokens.weight"]),
    "an index of a missing file": (
        write(INDEX, '{"weight_map": {"model.norm.weight": "model-2.safetensors"}}'),
        ["model-2.safetensors", "missing"],
    ),
    "an index that is no JSON": (write(INDEX, "{"), ["model.safetensors.index.json"]),
    "an index that is binary": (write(INDEX, b"\xff\xfe"), ["model.safetensors.index.json"]),
    "an index that is a list": (write(INDEX, "[]"), ["model.safetensors.index.json"]),
    "an index that is a folder": (folder(INDEX), ["model.safetensors.index.json"]),
    "an index without a map": (write(INDEX, "{}"), ["model.safetensors.index.json"]),
    "an empty index": (write(INDEX, '{"weight_map": {}}'), ["model.safetensors.index.json"]),
    "an index of numbers": (write(INDEX, '{"weight_map": {"a": 3}}'), ["model.safetensors.index.json"]),
    "an index of lists": (write(INDEX, '{"weight_map": {"a": ["b"]}}'), ["model.safetensors.index.json"]),
    "an index that is a map of text": (write(INDEX, '{"weight_map": "a"}'), ["model.safetensors.index.json"]),
    "a deep index": (write(INDEX, "[" * 100_000), ["model.safetensors.index.json"]),
    "an index of one tensor": (
        write(INDEX, '{"weight_map": {"model.norm.weight": "model.safetensors"}}'),
        ["model.safetensors.index.json", "model.embed_tokens.weight"],
    ),
    "an index of tensors that the file lacks": (
        write(INDEX, '{"weight_map": {"model.embed_tokens.weight": "model.safetensors", "nothing": "model.safetensors"}}'),
        ["model.safetensors.index.json"],
    ),
    "an index that leads elsewhere": (
        write(INDEX, '{"weight_map": {"model.norm.weight": "../train.jsonl"}}'),
        ["train.jsonl is not a safetensors file"],
    ),
}


def weights() -> list[Case]:
    cases = [Case(f"weights: {name}", ("model", *words), spoil=spoil) for name, (spoil, words) in BAD_WEIGHTS.items()]
    reference = ("--algorithm.kl_coefficient=0.1", "--algorithm.reference_path=reference")

    def copied(spoil: Spoil) -> Spoil:
        """The reference is the model, spoilt; the model is not."""

        def make(workspace) -> None:
            (workspace.root / "reference").mkdir()
            for name in ("config.json", "model.safetensors"):
                content = (workspace.model / name).read_bytes()
                (workspace.root / "reference" / name).write_bytes(content)
            workspace.model.rename(workspace.root / "kept")
            (workspace.root / "reference").rename(workspace.model)
            spoil(workspace)
            workspace.model.rename(workspace.root / "reference")
            (workspace.root / "kept").rename(workspace.model)

        return make

    for name in ("missing", "cut off", "another shape", "a tensor missing", "a huge header", "an index of a missing file"):
        spoil, _ = BAD_WEIGHTS[name]
        words = ("algorithm.reference_path", "reference/model")
        cases.append(Case(f"reference: weights {name}", words, spoil=copied(spoil), flags=reference))
    cases += [
        Case("reference: folder", ("algorithm.reference_path", "safetensors"), spoil=folder("reference"), flags=reference),
        Case("reference: file", ("algorithm.reference_path", "file"), spoil=write("reference", "x"), flags=reference),
        Case(
            "reference: hub name",
            ("algorithm.reference_path", "nobody/no-such-model"),
            flags=("--algorithm.kl_coefficient=0.1", "--algorithm.reference_path=nobody/no-such-model"),
        ),
    ]
    return cases


BAD_TOKENIZERS = {
    "missing": (remove(TOKENIZER), ["no tokenizer", "tokenizer.json"]),
    "empty": (write(TOKENIZER, ""), ["tokenizer.json is not valid JSON"]),
    "cut off": (cut(TOKENIZER, 1000), ["tokenizer.json is not valid JSON"]),
    "binary": (write(TOKENIZER, b"\xff\xfe\x00\x01"), ["tokenizer.json is not valid JSON"]),
    "deep nesting": (write(TOKENIZER, "[" * 100_000), ["tokenizer.json is not valid JSON"]),
    "a list": (write(TOKENIZER, "[]"), ["tokenizer"]),
    "an empty object": (write(TOKENIZER, "{}"), ["tokenizer"]),
    "without a model": (edit_json(TOKENIZER, model=...), ["tokenizer"]),
    "with an unknown model": (edit_json(TOKENIZER, model={"type": "Nothing"}), ["tokenizer"]),
    "with a vocabulary that is a list": (edit_json(TOKENIZER, model={"type": "BPE", "vocab": [], "merges": []}), ["tokenizer"]),
    "with added tokens that are text": (edit_json(TOKENIZER, added_tokens="x"), ["tokenizer"]),
    "a folder": (folder(TOKENIZER), ["tokenizer.json"]),
    "configuration cut off": (cut(TOKENIZER_CONFIG, 30), ["tokenizer_config.json is not valid JSON"]),
    "configuration that is a list": (write(TOKENIZER_CONFIG, "[]"), ["tokenizer_config.json"]),
    "configuration with a limit that is text": (edit_json(TOKENIZER_CONFIG, eos_token=3), ["tokenizer"]),
    "without an end token": (edit_json(TOKENIZER_CONFIG, eos_token=...), ["no end token"]),
    "with an end token that is null": (edit_json(TOKENIZER_CONFIG, eos_token=None), ["no end token"]),
    "without a template": (remove(TEMPLATE), ["no chat template"]),
    "with an empty template": (write(TEMPLATE, ""), ["chat template"]),
    "with a template that gives nothing": (write(TEMPLATE, "{% if false %}x{% endif %}"), ["chat template"]),
    "with a template that is not closed": (write(TEMPLATE, "{% for m in messages %}"), ["chat template"]),
    "with a template of unknown words": (write(TEMPLATE, "{% frobnicate %}"), ["chat template"]),
    "with a template that fails": (write(TEMPLATE, "{{ 1 / 0 }}"), ["chat template"]),
    "with a template that refuses": (write(TEMPLATE, "{{ raise_exception('no such role') }}"), ["chat template", "no such role"]),
    "with a template that never ends": (
        write(TEMPLATE, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        ["chat template"],
    ),
    "with a template that is not UTF-8": (write(TEMPLATE, b"\xff\xfe"), ["chat_template.jinja", "UTF-8"]),
    "with more tokens than the model": (edit_json(CONFIG, vocab_size=100), ["tokenizer", "vocab_size 100"]),
    "generation configuration cut off": (
        write("model/generation_config.json", "{"),
        ["generation_config.json is not valid JSON"],
    ),
    "generation configuration that is a list": (write("model/generation_config.json", "[]"), ["generation_config.json"]),
    "generation configuration with a bad end": (
        write("model/generation_config.json", '{"eos_token_id": "end"}'),
        ["generation_config.json", "eos_token_id"],
    ),
}


def tokenizers() -> list[Case]:
    return [Case(f"tokenizer: {name}", ("model", *words), spoil=spoil) for name, (spoil, words) in BAD_TOKENIZERS.items()]


def directories() -> list[Case]:
    return [
        Case("model: missing", ("model.path", "./nope"), flags=("--model.path=./nope",)),
        Case("model: a file", ("model.path", "train.jsonl is a file"), flags=("--model.path=train.jsonl",)),
        Case("model: an empty folder", ("model.path", "config.json"), spoil=folder("empty"), flags=("--model.path=empty",)),
        Case("model: a run folder", ("model.path", "config.json"), spoil=folder("r/hf"), flags=("--model.path=r",)),
        Case("model: no hub name", ("model.path", "a/b/c"), flags=("--model.path=a/b/c",)),
        Case("model: an address", ("model.path",), flags=("--model.path=https://example.invalid/model",)),
        Case("model: an unknown hub name", ("model.path", "nobody/no-such-model"), flags=("--model.path=nobody/no-such-model",)),
    ]


def all_cases() -> dict[str, list[Case]]:
    return {"model": [*directories(), *configs()], "weights": weights(), "tokenizer": tokenizers()}
