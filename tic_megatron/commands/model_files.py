"""Checks of a Hugging Face model directory that need no heavy library: its kind, its weights' files, and the layout."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from tic_megatron.config import Settings, SettingsError
from tic_megatron.config_checks import LARGEST, shorten
from tic_megatron.weights.stages import layers_of_stages

NEEDED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
SIZES = [
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings"),
]
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The number formats of safetensors that weights may have; others are those of quantized models."""
Header = dict[str, Any]
"""Of one tensor: `dtype`, `shape`, `data_offsets`."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def locate_model(path: str) -> Path:
    """The directory of a model: `path` itself, or where its hub files have been downloaded to."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists():
        raise SettingsError(f"model.path: {path} is a file; give the model's directory")
    if not HUB_NAME.fullmatch(path) or path.startswith("."):
        raise SettingsError(f"model.path: there is no directory {path}; give a Hugging Face directory or a hub name")
    return _download(path)


def _download(name: str) -> Path:
    """Fetch a hub model: first its configuration, so that a model of the wrong kind costs nothing."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        HfApi().model_info(name, timeout=10)  # unlike the downloads, this does not retry for half a minute without a network
    except Exception as error:
        try:
            return Path(snapshot_download(name, allow_patterns=NEEDED_FILES, local_files_only=True))
        except Exception:
            reason = re.sub(r"\[Errno .*?\] ", "", str(error).strip().partition("\n")[0]) or "no answer"
            hint = "give an existing directory or a hub name that can be reached"
            raise SettingsError(f"model.path: {name} is no directory, and the hub does not give it ({reason}); {hint}") from error
    try:
        read_config(Path(hf_hub_download(name, "config.json")).parent)
        return Path(snapshot_download(name, allow_patterns=NEEDED_FILES))
    except OSError as error:
        raise SettingsError(
            f"model.path: the download of {name} failed ({str(error).partition(chr(10))[0]}); try again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"model.path: {path} cannot be read ({error.strerror}); give a Hugging Face model directory"
        ) from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg} in line {error.lineno}"
        raise SettingsError(f"model.path: {path} is not valid JSON ({reason}); download it again") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"model.path: {path} is not valid JSON; download it again") from error
    if not isinstance(content, dict):
        raise SettingsError(f"model.path: {path} is not a JSON object; download it again")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a model that can be trained; SettingsError when it is missing or not a plain Qwen3."""
    path = directory / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise SettingsError(f"model.path: {path} has model_type {kind!r}; give a Qwen3 model (model_type 'qwen3' or 'qwen3_moe')")
    _check_variant(config, path)
    _check_values(config, path)
    if kind == "qwen3_moe":
        _check_mixture(config, path)
    return config


def _check_variant(config: dict[str, Any], path: Path) -> None:
    """Refuse what the actors would silently compute otherwise than the generator."""
    ropes = {name: config.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    for name, rope in ropes.items():
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            _refuse(path, name, rope, "it must be a mapping of names to values, the same for all layers")
    if all(ropes.values()):
        _refuse(path, "rope_scaling", ropes["rope_scaling"], "rope_parameters is there too: leave one of them out")
    rope = ropes["rope_parameters"] or ropes["rope_scaling"]
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rotary_share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    layer_types = config.get("layer_types") or []
    slides = bool(config.get("use_sliding_window")) or (isinstance(layer_types, list) and "sliding_attention" in layer_types)
    variants = {
        f"RoPE scaling {shorten(repr(rope_type))}": rope_type != "default",
        f"RoPE on a part of the head ({shorten(repr(rotary_share))})": rotary_share not in (None, 1.0),
        "sliding-window attention": slides,
        "biases of the attention": config.get("attention_bias") is True,
        "quantized weights": config.get("quantization_config") is not None,
        f"the activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
    }
    for variant, present in variants.items():
        if present:
            raise SettingsError(f"model.path: {path} asks for {variant}, which cannot be trained here; give a plain Qwen3 model")


def _check_values(config: dict[str, Any], path: Path) -> None:
    """Refuse values that transformers, vLLM or Megatron would stumble over, or take for something else."""
    for name in SIZES:
        # transformers knows the usual one, of dense models
        if name != "head_dim" or name in config or config["model_type"] == "qwen3_moe":
            size(config, name, path.parent)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        _refuse(path, "num_key_value_heads", groups, f"it must divide num_attention_heads {heads}")
    if config.get("head_dim", 2) % 2:
        _refuse(path, "head_dim", config["head_dim"], "it must be even")
    layers, layer_types = config["num_hidden_layers"], config.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * layers:
        _refuse(path, "layer_types", layer_types, f"it must be 'full_attention' for each of num_hidden_layers {layers}")
    architecture = ARCHITECTURES[config["model_type"]]
    if config.get("architectures") not in (None, [architecture]):
        _refuse(path, "architectures", config["architectures"], f"it must be ['{architecture}']")
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 1.0))
    for name, value in (("rms_norm_eps", config.get("rms_norm_eps", 1.0)), ("rope_theta", theta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            _refuse(path, name, value, "it must be a number above 0")
    for name in ("tie_word_embeddings", "attention_bias", "norm_topk_prob"):
        if not isinstance(config.get(name, False), bool):
            _refuse(path, name, config[name], "it must be true or false")
    for name in ("dtype", "torch_dtype"):
        if config.get(name) not in (None, "float32", "bfloat16", "float16", "float64"):
            _refuse(path, name, config[name], "it must be float32, bfloat16 or float16")
    check_token_ids(config, path, config["vocab_size"])


def check_token_ids(config: dict[str, Any], path: Path, vocabulary: int) -> None:
    """Refuse special tokens, of a model's or its generation's configuration, that are not in the vocabulary."""
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        ids = config.get(name)
        for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                _refuse(path, name, ids, f"it must be a token of vocab_size {vocabulary}")


def _check_mixture(config: dict[str, Any], path: Path) -> None:
    name = expert_count_name(config)
    for needed in (name, "moe_intermediate_size", "num_experts_per_tok"):
        size(config, needed, path.parent)
    chosen, experts = config["num_experts_per_tok"], config[name]
    if chosen > experts:
        _refuse(path, "num_experts_per_tok", chosen, f"it must be at most {name} {experts}")
    if "decoder_sparse_step" in config:
        size(config, "decoder_sparse_step", path.parent)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in dense):
        _refuse(path, "mlp_only_layers", dense, "it must be a list of layers")


def _refuse(path: Path, name: str, value: object, reason: str) -> NoReturn:
    raise SettingsError(f"model.path: {path} has {name} {shorten(repr(value))}; {reason}")


def check_layout(config: dict[str, Any], directory: Path, settings: Settings) -> None:
    """Refuse parallel sizes of the actors that the model's shapes are not divisible by."""
    actor = settings.actor
    tp = actor.tensor_parallel_size
    shares = [
        ("num_attention_heads", "actor.tensor_parallel_size", tp),
        ("num_key_value_heads", "actor.tensor_parallel_size", tp),
        ("intermediate_size", "actor.tensor_parallel_size", tp),
        ("vocab_size", "actor.tensor_parallel_size", tp),
    ]
    if config["model_type"] == "qwen3_moe":
        shares += [
            (expert_count_name(config), "actor.expert_parallel_size", actor.expert_parallel_size),
            ("moe_intermediate_size", "actor.expert_tensor_parallel_size", actor.experts_tensor_parallel),
        ]
        _check_expert_layout(settings)
    elif actor.expert_parallel_size > 1 or actor.expert_tensor_parallel_size is not None:
        raise SettingsError(
            "actor.expert_parallel_size and actor.expert_tensor_parallel_size are for mixture-of-experts models, and "
            f"{directory} is a dense one: leave them out"
        )
    if actor.router_replay == "on" and config["model_type"] != "qwen3_moe":
        raise SettingsError(f"actor.router_replay is on, but {directory} is a dense model: leave it out")
    for name, setting, parts in shares:
        check_share(config, directory, name, setting, parts)
    try:
        layers_of_stages(
            size(config, "num_hidden_layers", directory),
            actor.pipeline_parallel_size,
            n_virtual=actor.virtual_pipeline_parallel_size,
            first=actor.layers_in_first_stage,
            last=actor.layers_in_last_stage,
        )
    except ValueError as error:
        raise SettingsError(
            f"actor.pipeline_parallel_size {actor.pipeline_parallel_size} does not fit num_hidden_layers of {directory}: "
            f"{error}; change it, actor.virtual_pipeline_parallel_size, or actor.layers_in_first_stage and _last_stage"
        ) from error


def check_share(config: dict[str, Any], directory: Path, name: str, setting: str, parts: int) -> None:
    """Refuse a setting that does not divide a size of the model, and name one that does."""
    if size(config, name, directory) % parts:
        fitting = max(n for n in range(1, parts) if config[name] % n == 0)
        raise SettingsError(f"{setting} {parts} does not divide {name} {config[name]} of {directory}; {fitting} does")


def expert_count_name(config: dict[str, Any]) -> str:
    """transformers' older or newer name of the number of experts, whichever the configuration has."""
    return "num_experts" if "num_experts" in config else "num_local_experts"


def _check_expert_layout(settings: Settings) -> None:
    """Combinations that Megatron-core computes wrongly, silently or not."""
    actor = settings.actor
    tp, etp = actor.tensor_parallel_size, actor.experts_tensor_parallel
    if actor.expert_parallel_size == 1 and etp != tp:
        raise SettingsError(
            f"actor.expert_tensor_parallel_size {etp} must be actor.tensor_parallel_size {tp} at actor.expert_parallel_size 1: "
            "Megatron-core does not add up the experts' gradients otherwise; leave it out, or raise actor.expert_parallel_size"
        )
    if tp > 1 and not actor.sequence_parallel:
        raise SettingsError(
            f"actor.sequence_parallel false does not go with experts at actor.tensor_parallel_size {tp}: every rank would send "
            "all tokens to them; leave it on"
        )


def size(config: dict[str, Any], name: str, directory: Path) -> int:
    """A positive whole number of the model's configuration."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        _refuse(directory / "config.json", name, value, "it must be a positive whole number of at most 31 bits")
    return value


def check_weights(directory: Path) -> None:
    """Refuse missing, empty or cut-off safetensors files, from their headers alone."""
    for path in _weight_files(directory):
        if not path.is_file():
            others = " (only .safetensors weights are read)" if list(directory.glob("*.bin")) else ""
            raise SettingsError(f"model.path: the weights {path} are missing{others}; give a complete model directory")
        _read_header(path)


def check_tensors(hf, directory: Path) -> None:
    """Refuse checked weights that lack a tensor of the model, or have it in another shape or not as floating-point numbers.

    Args:
        hf: the model's Hugging Face configuration.
    """
    from tic_megatron.weights.names import qwen3_weights  # imports torch

    found = _tensors(directory)
    place = _index(directory) if _index(directory).exists() else directory / "model.safetensors"
    for expected in (tensor for weight in qwen3_weights(hf) for tensor in weight.parts):
        path, tensor = found.get(expected.name, (place, None))
        if tensor is None:
            raise SettingsError(
                f"model.path: the tensor {expected.name} is missing in {place}, though config.json asks for it; download the "
                "weights again, or give the config.json that belongs to them"
            )
        if tuple(tensor["shape"]) != expected.shape or tensor["dtype"] not in ITEM_BYTES:
            raise SettingsError(
                f"model.path: {path} has {expected.name} as {tensor['dtype']} {tensor['shape']}, but by config.json it must be "
                f"floating-point numbers {list(expected.shape)}; give weights and config.json of one model"
            )
    more = re.compile(r"model\.layers\.(\d+)\.")
    for name in found:
        layer = more.match(name)
        if layer and int(layer[1]) >= hf.num_hidden_layers:
            raise SettingsError(
                f"model.path: the weights in {directory} have {name}, but config.json has num_hidden_layers "
                f"{hf.num_hidden_layers}; give weights and config.json of one model"
            )


def count_parameters(directory: Path) -> int:
    """Elements of all tensors of a model whose weights have been checked."""
    return sum(math.prod(tensor["shape"]) for path in _weight_files(directory) for tensor in _read_header(path).values())


def _index(directory: Path) -> Path:
    return directory / "model.safetensors.index.json"


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor name -> file, from the index; None without one."""
    index = _index(directory)
    if not index.exists():
        return None
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise SettingsError(f"model.path: {index} is not a valid index of safetensors files; download it again")
    return names


def _weight_files(directory: Path) -> list[Path]:
    weight_map = _weight_map(directory)
    names = ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values()))
    return [directory / name for name in names]


def _tensors(directory: Path) -> dict[str, tuple[Path, Header]]:
    """Tensor name -> its file and its entry there; with an index those that it lists."""
    headers = {path: _read_header(path) for path in _weight_files(directory)}
    weight_map = _weight_map(directory)
    if weight_map is None:
        return {name: (path, entry) for path, header in headers.items() for name, entry in header.items()}
    for name, file in weight_map.items():
        if name not in headers[directory / file]:
            raise SettingsError(f"model.path: {_index(directory)} has {name} in {file}, which lacks it; download both again")
    return {name: (directory / file, headers[directory / file][name]) for name, file in weight_map.items()}


def _read_header(path: Path) -> dict[str, Header]:
    """The tensors of a safetensors file: 8 bytes with the header's length, a JSON header, the data without gaps."""
    actual = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < actual else {}
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        sound = bool(tensors) and all(_is_sound(entry) for entry in tensors.values())
        ends = [(0, 0), *sorted(tuple(entry["data_offsets"]) for entry in tensors.values())]
        sound = sound and all(before[1] == after[0] for before, after in pairwise(ends))
    except OSError as error:
        raise SettingsError(f"model.path: {path} cannot be read ({error.strerror}); give a file that can") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise SettingsError(f"model.path: {path} is not a safetensors file ({actual} bytes); download it again")
    expected = 8 + length + ends[-1][1]
    if actual != expected:
        what = "it is cut off" if actual < expected else "something was added"
        raise SettingsError(f"model.path: {path} has {actual} bytes instead of {expected}: {what}; download it again")
    return tensors


def _is_sound(entry: Header) -> bool:
    """Whether a tensor's description is one, and its bytes are as many as its shape says."""
    begin, end = entry["data_offsets"]
    numbers = [begin, end, *entry["shape"]]
    if not all(type(number) is int and number >= 0 for number in numbers) or type(entry["dtype"]) is not str:
        return False
    bytes_each = ITEM_BYTES.get(entry["dtype"])
    return bytes_each is None or end - begin == bytes_each * math.prod(entry["shape"])
