"""Bad evaluations: command lines of `evaluate`, benchmarks, chat templates, and folders of other evaluations."""

from __future__ import annotations

import json

from tests.bad_input.cases import Case, Spoil, both, edit_json, folder, remove, write
from tests.workspace import Workspace
from tic_megatron.commands.evaluate_preflight import IDENTITY_FILE
from tic_megatron.config_evaluate import EvaluateSettings

BASE = ("evaluate", "--model=model", "--out=out", "--benchmarks=mine=train.jsonl", "--eval.max_response_tokens=64")
"""A good command line."""

FLAGS = {
    "no model": (["--model="], ["model.path is not given", "--model"]),
    "no benchmarks": (["--benchmarks="], ["eval.benchmarks is not given", "--benchmarks aime24"]),
    "a model that is not there": (["--model=nothing-here"], ["model.path", "nothing-here"]),
    "a model that is a file": (["--model=train.jsonl"], ["model.path: train.jsonl is a file"]),
    "an unknown benchmark": (["--benchmarks=amie24"], ["no benchmark 'amie24'", "did you mean aime24?"]),
    "a benchmark unlike any": (["--benchmarks=gsm8k"], ["no benchmark 'gsm8k'", "math500"]),
    "a benchmark twice": (["--benchmarks=mine=train.jsonl,mine=train.jsonl"], ["mine is there twice"]),
    "a benchmark without a file": (["--benchmarks=aime24="], ["'aime24=' names no file"]),
    "a name that is a path": (["--benchmarks=a/b=train.jsonl"], ["'a/b' is no plain name"]),
    "a benchmark that is not there": (["--benchmarks=aime24=nothing.jsonl"], ["eval.benchmarks: aime24", "nothing.jsonl"]),
    "a benchmark of another format": (["--benchmarks=math500=model/config.json"], ["model/config.json"]),
    "a short flag without a value": (["--benchmarks"], ["needs a value"]),
    "a misspelt setting": (["--eval.sample=3"], ["unknown setting eval.sample", "did you mean eval.samples?"]),
    "a setting of training": (["--trainer.steps=3"], ["unknown setting trainer.steps"]),
    "negative samples": (["--eval.samples=-1"], ["eval.samples is -1", "at least 0"]),
    "text for samples": (["--eval.samples=many"], ["eval.samples is 'many'", "a whole number"]),
    "nothing to generate": (["--eval.samples=0", "--eval.greedy=false"], ["eval.samples is 0", "eval.greedy"]),
    "greedy samples": (["--eval.temperature=0"], ["eval.temperature is 0.0", "eval.samples 0"]),
    "nearly greedy samples": (["--eval.temperature=0.001"], ["eval.temperature is 0.001"]),
    "too hot": (["--eval.temperature=3"], ["eval.temperature is 3.0", "at most 2"]),
    "no nucleus": (["--eval.top_p=0"], ["eval.top_p is 0.0"]),
    "no response": (["--eval.max_response_tokens=0"], ["eval.max_response_tokens is 0"]),
    "a response longer than the model": (
        ["--eval.max_response_tokens=1024"],
        ["eval.max_response_tokens 1024", "no room", "lower"],
    ),
    "prompts longer than the model": (
        ["--eval.max_response_tokens=1015"],
        ["10 of 10 prompts are too long", "max_position_embeddings 1024", "eval.max_response_tokens 1015", "lower that to"],
    ),
    "no limit": (["--eval.limit=0"], ["eval.limit is 0"]),
    "no batch": (["--eval.save_every=0"], ["eval.save_every is 0"]),
    "a template without the problem": (["--eval.template=Solve it."], ["eval.template is 'Solve it.'", "{problem}", "dapo"]),
    "a blank template": (["--eval.template= "], ["eval.template"]),
    "an unknown reward": (["--reward.function=exct"], ["reward.function", "did you mean 'exact'?"]),
    "an unknown reward that nobody uses": (
        ["--benchmarks=aime24=train.jsonl", "--reward.function=exct"],
        ["reward.function", "did you mean 'exact'?"],
    ),
    "a password in an address that nobody uses": (
        ["--benchmarks=aime24=train.jsonl", "--reward.function=https://user:sesame@127.0.0.1/grade"],
        ["reward.function", "password"],
    ),
    "out in the place of the model": (["--out=model"], ["run.dir", "the model's directory", "--out"]),
    "a dense reward": (["--reward.function=exact_dense"], ["reward.function: exact_dense gives a reward per token", "mine"]),
    "a punishment": (["--reward.overlong_buffer_tokens=9"], ["reward.overlong_buffer_tokens is 9"]),
    "one field for both": (["--data.answer_field=problem"], ["data.answer_field is problem", "data.prompt_field"]),
    "a field that is not there": (["--data.answer_field=label"], ["train.jsonl:1", "'label'", "data.answer_field"]),
    "no engine": (["--rollout.engines=0"], ["rollout.engines is 0"]),
    "an engine that cannot be cut": (
        ["--rollout.tensor_parallel_size=3"],
        ["rollout.tensor_parallel_size", "num_attention_heads"],
    ),
    "experts of a dense model": (
        ["--rollout.expert_parallel=true", "--rollout.tensor_parallel_size=2"],
        ["rollout.expert_parallel", "dense"],
    ),
    "experts on one rank": (["--rollout.expert_parallel=true"], ["rollout.expert_parallel is true", "tensor_parallel_size is 1"]),
    "caches that do not fit": (["--rollout.cpu_kv_cache_gib=100000"], ["rollout.cpu_kv_cache_gib 100000", "memory"]),
    "no GPU": (["--cluster.device=cuda"], ["cluster.device is cuda", "no GPU"]),
    "an unknown stop token": (["--rollout.stop_tokens=<|im_stop|>"], ["rollout.stop_tokens", "'<|im_end|>'"]),
    "a cluster without a port": (["--cluster.address=somewhere"], ["cluster.address is somewhere", "HOST:PORT"]),
    "a cluster on no machine": (["--cluster.address=a..b:6379"], ["cluster.address", "a..b:6379", "ray start"]),
    "a cluster that does not answer": (["--cluster.address=127.0.0.1:1"], ["cluster.address", "127.0.0.1:1", "ray start"]),
    "out below a file": (["--out=train.jsonl/x"], ["run.dir", "train.jsonl is a file", "--out"]),
    "out of an unknown user": (["--out=~nobody-of-that-name/x"], ["run.dir", "~nobody-of-that-name"]),
    "an unknown template file": (["--model.chat_template=no.jinja"], ["model.chat_template", "no.jinja", "auto, base"]),
    "thinking in plain text": (
        ["--model.chat_template=base", "--model.enable_thinking=true"],
        ["model.enable_thinking is true", "model.chat_template base"],
    ),
    "thinking that the template does not know": (
        ["--model.enable_thinking=false"],
        ["model.enable_thinking is false", "template"],
    ),
}

FILES: dict[str, tuple[Spoil, list[str], list[str]]] = {
    "a row without an answer": (
        write("b.jsonl", '{"problem": "?"}\n'),
        ["--benchmarks=aime24=b.jsonl"],
        ["b.jsonl:1", "'answer'"],
    ),
    "a row without a problem": (
        write("b.jsonl", '{"problem": "?", "answer": "7"}\n{"answer": "7"}\n'),
        ["--benchmarks=math500=b.jsonl"],
        ["b.jsonl:2", "'problem'"],
    ),
    "an answer that is no AIME's": (
        write("b.jsonl", '{"problem": "?", "answer": "1000"}\n'),
        ["--benchmarks=aime25=b.jsonl"],
        ["b.jsonl:1", "'1000'", "integer from 0 to 999"],
    ),
    "two problems of one id": (
        write("b.jsonl", '{"id": 7, "problem": "?", "answer": "7"}\n{"id": "7", "problem": "!", "answer": "7"}\n'),
        ["--benchmarks=mine=b.jsonl"],
        ["b.jsonl:2", "the id '7' of", "b.jsonl:1"],
    ),
    "a benchmark without rows": (write("b.jsonl", "\n"), ["--benchmarks=mine=b.jsonl"], ["eval.benchmarks: mine", "b.jsonl"]),
    "malformed rows": (write("b.jsonl", "{\n"), ["--benchmarks=mine=b.jsonl"], ["b.jsonl:1", "malformed JSON"]),
    "a template that is no template": (
        write("t.jinja", "{% for message in messages %}"),
        ["--model.chat_template=t.jinja"],
        ["model.chat_template", "t.jinja", "line 1"],
    ),
    "an empty template": (
        write("t.jinja", " \n"),
        ["--model.chat_template=t.jinja"],
        ["model.chat_template", "t.jinja is empty"],
    ),
    "a template that is not text": (write("t.jinja", b"\xff"), ["--model.chat_template=t.jinja"], ["t.jinja is not UTF-8 text"]),
    "a template that is a folder": (
        folder("t.jinja"),
        ["--model.chat_template=t.jinja"],
        ["model.chat_template", "cannot be read"],
    ),
    "a template that fails": (
        write("t.jinja", "{{ messages[0].content + 1 }}"),
        ["--model.chat_template=t.jinja"],
        ["model.chat_template", "t.jinja fails"],
    ),
    "a template that says nothing": (
        write("t.jinja", "{# nothing #}"),
        ["--model.chat_template=t.jinja"],
        ["model.chat_template", "t.jinja makes no text"],
    ),
    "a model without weights": (remove("model/model.safetensors"), [], ["model.path", "safetensors"]),
    "a model of another kind": (edit_json("model/config.json", model_type="llama"), [], ["config.json", "model_type 'llama'"]),
}


def _evaluation(workspace: Workspace) -> None:
    """A folder `out` as a command like BASE leaves it."""
    from tic_megatron.commands import COMMANDS
    from tic_megatron.commands.arguments import build_parser, read_settings
    from tic_megatron.commands.evaluate import _folder
    from tic_megatron.commands.evaluate_preflight import evaluate_preflight

    command = COMMANDS["evaluate"]
    words = [*BASE[1:], "--cluster.device=cpu"]
    settings = read_settings(build_parser("evaluate", command), EvaluateSettings, words, command.short)[0].resolve()
    with _folder(settings, evaluate_preflight(settings)):
        pass


def _response(index: int, **changes) -> str:
    row = {"problem": f"train:{index + 1}", "index": index, "sample": 0, "seed": None, "response": "7", "tokens": 2}
    row |= {"truncated": False, "score": 0.0, "right": False, "fault": None}
    return json.dumps(row | changes) + "\n"


FOLDERS: dict[str, tuple[Spoil, list[str], list[str]]] = {
    "other samples": (_evaluation, ["--eval.samples=3"], ["run.dir", "eval.samples (None there, 3 here)", "--out"]),
    "another seed": (_evaluation, ["--eval.seed=1"], ["run.dir", "eval.seed (0 there, 1 here)"]),
    "another template": (_evaluation, ["--eval.template=boxed"], ["run.dir", "eval.template"]),
    "another precision": (_evaluation, ["--rollout.precision=bf16"], ["run.dir", "rollout.precision (fp32 there, bf16 here)"]),
    "other problems": (
        both(_evaluation, write("train.jsonl", '{"problem": "1+1=", "answer": "2"}\n')),
        [],
        ["run.dir", "other problems, prompts or answers of mine"],
    ),
    "another grader": (_evaluation, ["--reward.function=exact"], ["run.dir", "reward.function (math there, exact here)"]),
    "another model": (
        both(_evaluation, write("model/generation_config.json", '{"eos_token_id": 3}')),
        [],
        ["run.dir", "another model", "--out"],
    ),
    "a training run": (write("out/config.yaml", "run:\n  seed: 3\n"), [], ["run.dir", "training run", "--out"]),
    "a damaged identity": (both(_evaluation, write(f"out/{IDENTITY_FILE}", "{}")), [], ["run.dir", IDENTITY_FILE]),
    "damaged settings": (both(_evaluation, write("out/config.yaml", "- x\n")), [], ["run.dir", "config.yaml"]),
    "responses of others": (
        both(_evaluation, write("out/mine/greedy.jsonl", _response(0) + _response(2))),
        [],
        ["run.dir", "greedy.jsonl, line 2", "remove the file"],
    ),
    "too many responses": (
        both(_evaluation, write("out/mine/greedy.jsonl", "".join(map(_response, range(11))))),
        [],
        ["run.dir", "greedy.jsonl, line 11"],
    ),
    "responses that are none": (
        both(_evaluation, write("out/mine/greedy.jsonl", _response(0, tokens="2"))),
        [],
        ["run.dir", "greedy.jsonl, line 1"],
    ),
}

TRAINING = {
    "an unknown benchmark": (["--eval.benchmarks=amie24"], ["no benchmark 'amie24'", "did you mean aime24?"]),
    "a benchmark that is not there": (["--eval.benchmarks=aime24=nothing.jsonl"], ["eval.benchmarks: aime24", "nothing.jsonl"]),
    "k of no benchmarks": (["--eval.benchmark_samples=3"], ["eval.benchmark_samples is 3", "eval.benchmarks"]),
    "a benchmark template without the problem": (
        ["--eval.benchmark_template=x"],
        ["eval.benchmark_template is 'x'", "{problem}"],
    ),
    "a benchmark called as the held-out problems": (
        ["--data.eval=train.jsonl", "--eval.benchmarks=train=train.jsonl"],
        ["eval.benchmarks: train is the name of data.eval too"],
    ),
    "benchmark prompts that are too long": (
        ["--eval.benchmarks=math500=train.jsonl"],
        ["eval.benchmarks: math500: 10 of 10 problems are longer than rollout.max_prompt_tokens 128", "raise the limit to"],
    ),
    "thinking that the template does not know": (["--model.enable_thinking=true"], ["model.enable_thinking is true"]),
    "an unknown template file": (["--model.chat_template=no.jinja"], ["model.chat_template", "no.jinja"]),
}


def all_cases() -> dict[str, list[Case]]:
    files = {**FILES, **FOLDERS}
    return {
        "evaluate": [Case(name, tuple(words), argv=(*BASE, *flags)) for name, (flags, words) in FLAGS.items()],
        "evaluate, files": [
            Case(name, tuple(words), argv=(*BASE, *flags), spoil=spoil) for name, (spoil, flags, words) in files.items()
        ],
        "evaluate in training": [Case(name, tuple(words), flags=tuple(flags)) for name, (flags, words) in TRAINING.items()],
    }
