"""The command line: what is refused, in which words, how soon; what wins over what; saved settings; help."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.models import make_tiny_qwen3
from tests.workspace import make_workspace, refusal, settings_of
from tic_megatron.cli import main
from tic_megatron.config import RunSettings, Settings

COMMAND = Path(sys.executable).with_name("tic-megatron")


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0, tie_word_embeddings=True)


@pytest.fixture
def workspace(tmp_path, tiny_qwen3, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_workspace(tmp_path, tiny_qwen3)


BAD_FLAGS = {
    "unknown setting": (["--trainer.stpes=4"], ["unknown setting trainer.stpes", "did you mean trainer.steps?"]),
    "setting without its section": (["--learning_rate", "1"], ["did you mean actor.learning_rate?"]),
    "section with a value": (["--trainer", "4"], ["trainer is a section", "--trainer.steps"]),
    "no value": (["--trainer.steps"], ["--trainer.steps needs a value"]),
    "no value before a flag": (["--trainer.steps", "--run.seed=1"], ["--trainer.steps needs a value"]),
    "stray word": (["quickstart.yaml"], ["unexpected argument 'quickstart.yaml'"]),
    "text for a number": (["--trainer.steps", "many"], ["trainer.steps is 'many'", "expected a whole number"]),
    "fraction for a whole number": (["--trainer.steps=1.5"], ["trainer.steps is '1.5'", "expected a whole number"]),
    "boolean for a number": (["--actor.learning_rate=true"], ["actor.learning_rate is 'true'", "expected a number"]),
    "number for a boolean": (["--cluster.colocate=2"], ["cluster.colocate is '2'", "expected true or false"]),
    "text for an optional number": (["--algorithm.eps_high=none"], ["algorithm.eps_high", "a number, or null"]),
    "not one of the choices": (["--cluster.device=gpu"], ["cluster.device is 'gpu'", "one of auto, cuda, cpu"]),
    "not a number": (["--actor.learning_rate=.nan"], ["actor.learning_rate is nan", "finite"]),
    "infinite": (["--actor.grad_clip=.inf"], ["actor.grad_clip is inf", "finite"]),
    "negative": (["--actor.learning_rate", "-1e-4"], ["actor.learning_rate is -0.0001", "at least 0"]),
    "no steps": (["--trainer.steps=0"], ["trainer.steps is 0", "at least 1"]),
    "group of one": (["--rollout.group_size=1"], ["rollout.group_size is 1", "at least 2"]),
    "top_p": (["--rollout.top_p=0.9"], ["rollout.top_p is 0.9", "give 1.0"]),
    "temperature 0": (["--rollout.temperature=0"], ["rollout.temperature is 0.0", "at least 0.01"]),
    "short engines": (["--rollout.max_model_len=191"], ["rollout.max_model_len is 191", "max_response_tokens 64 = 192"]),
    "engines too short to evaluate": (
        ["--rollout.max_model_len=200", "--eval.max_response_tokens=100"],
        ["rollout.max_model_len is 200", "rollout.max_prompt_tokens 128 + eval.max_response_tokens 100 = 228"],
    ),
    "too few positions for the engines": (
        ["--rollout.max_model_len=1025"],
        ["rollout.max_model_len 1025 exceeds max_position_embeddings 1024"],
    ),
    "too few positions to evaluate": (
        ["--eval.max_response_tokens=1000"],
        ["eval.max_response_tokens 1000 = 1128 exceeds max_position_embeddings 1024"],
    ),
    "stop token": (
        ["--rollout.stop_tokens=<|im_end|>,<|im_stop|>"],
        ["rollout.stop_tokens: '<|im_stop|>' is not one token", "nearest", "'<|im_end|>'"],
    ),
    "no such sleep": (["--rollout.sleep_level=3"], ["rollout.sleep_level", "one of 1, 2"]),
    "expert parallelism of one rank": (
        ["--rollout.expert_parallel=true"],
        ["rollout.expert_parallel is true", "rollout.tensor_parallel_size is 1"],
    ),
    "expert parallelism of a dense model": (
        ["--rollout.expert_parallel=true", "--rollout.tensor_parallel_size=2"],
        ["rollout.expert_parallel", "a dense one: leave it out"],
    ),
    "evaluation temperature": (["--eval.temperature=0.001"], ["eval.temperature is 0.001", "give 0, which is greedy"]),
    "several greedy responses": (["--eval.samples=4"], ["eval.samples is 4", "a temperature above 0"]),
    "greedy top_p": (["--eval.top_p=0.9"], ["eval.top_p is 0.9", "greedy", "eval.temperature above 0"]),
    "greedy top_k": (["--eval.top_k=5"], ["eval.top_k is 5", "greedy"]),
    "evaluation without nucleus": (["--eval.temperature=1", "--eval.top_p=0"], ["eval.top_p is 0.0", "more than 0"]),
    "eps_low": (["--algorithm.eps_low=1"], ["algorithm.eps_low is 1.0", "less than 1"]),
    "beta": (["--actor.adam_beta2=1.0"], ["actor.adam_beta2 is 1.0", "less than 1"]),
    "final rate above the peak": (["--actor.min_learning_rate=1"], ["actor.min_learning_rate is 1.0", "actor.learning_rate"]),
    "a rollout ahead": (["--rollout.steps_ahead=1"], ["rollout.steps_ahead is 1", "algorithm.correction truncate or mask"]),
    "two rollouts ahead": (["--rollout.steps_ahead=2"], ["rollout.steps_ahead is 2", "at most 1"]),
    "cut tail": (["--rollout.cut_tail_fraction=0.4"], ["rollout.cut_tail_fraction is 0.4", "at least 0.5 and less than 1"]),
    "heartbeat": (["--rollout.heartbeat_s=0"], ["rollout.heartbeat_s is 0", "more than 0"]),
    "prompts and updates": (["--trainer.prompts_per_step=5"], ["trainer.prompts_per_step is 5", "trainer.updates_per_step, 2"]),
    "micro-batch too small": (["--actor.max_tokens_per_microbatch=191"], ["actor.max_tokens_per_microbatch is 191", "= 192"]),
    "layout and ranks": (["--actor.tensor_parallel_size=2"], ["actor.tensor_parallel_size 2", "does not divide", "= 1 ranks"]),
    "SGD, distributed": (["--actor.optimizer=sgd"], ["actor.optimizer is sgd", "actor.distributed_optimizer false"]),
    "seed": (["--run.seed=-1"], ["run.seed is -1"]),
    "name as a path": (["--run.dir=null", "--run.name=../x"], ["run.name is ../x", "run.dir"]),
    "no model": (["--model.path="], ["model.path is not given"]),
    "no data": (["--data.train="], ["data.train is not given"]),
    "empty text": (["--data.prompt_field= "], ["data.prompt_field is empty"]),
    "unknown name in a list": (["--run.allow_change=trainer.step"], ["'trainer.step'", "did you mean trainer.steps?"]),
    "unknown objective": (["--algorithm.objective=ticgrpo"], ["objective 'ticgrpo'", "did you mean 'tic_grpo'?"]),
    "unknown reward": (["--reward.function=maths"], ["reward 'maths'", "did you mean 'math'?"]),
    "missing config": (["--config=no.yaml"], ["--config no.yaml", "No such file"]),
    "config is a folder": (["--config=."], ["--config .", "directory"]),
    "missing model": (["--model.path=./nope"], ["model.path", "no directory ./nope"]),
    "model is a file": (["--model.path=train.jsonl"], ["model.path", "train.jsonl is a file"]),
    "missing data": (["--data.train=no.jsonl"], ["data.train", "no.jsonl", "No such file"]),
    "missing held-out data": (["--data.eval=no.jsonl"], ["data.eval", "no.jsonl", "No such file"]),
    "data in another format": (["--data.train=x.parquet"], ["data.train", "x.parquet", ".jsonl"]),
    "other field": (["--data.prompt_field=question"], ["train.jsonl:1", "no field 'question'", "data.prompt_field"]),
    "too few problems": (["--trainer.prompts_per_step=12"], ["train.jsonl has 10 problems", "trainer.prompts_per_step 12"]),
    "too few short problems": (
        ["--rollout.max_prompt_tokens=5"],
        ["0 problems left after leaving out 10", "max_prompt_tokens 5"],
    ),
    "too few positions": (
        ["--rollout.max_response_tokens=1000", "--actor.max_tokens_per_microbatch=2000"],
        ["= 1128", "max_position_embeddings 1024"],
    ),
    "layers": (
        ["--actor.pipeline_parallel_size=4", "--cluster.gpus_per_node=4"],
        ["2 layers cannot fill 4"],
    ),
    "interleaved without a pipeline": (
        ["--actor.virtual_pipeline_parallel_size=2"],
        ["virtual_pipeline_parallel_size is 2", "raise actor.pipeline_parallel_size"],
    ),
    "too many interleaved parts": (
        ["--actor.pipeline_parallel_size=2", "--actor.virtual_pipeline_parallel_size=2", "--cluster.gpus_per_node=2"],
        ["the 1 layers of stage 0 cannot be cut into 2", "actor.virtual_pipeline_parallel_size"],
    ),
    "uneven stage without a pipeline": (["--actor.layers_in_last_stage=1"], ["layers_in_last_stage is 1", "leave it out"]),
    "uneven stages": (
        ["--actor.pipeline_parallel_size=2", "--actor.layers_in_first_stage=2", "--cluster.gpus_per_node=2"],
        ["2 layers cannot fill 2 stages", "actor.layers_in_first_stage"],
    ),
    "context and ranks": (
        ["--actor.context_parallel_size=2"],
        ["context_parallel_size 2 = 2 does not divide"],
    ),
    "context and the budget": (
        ["--actor.context_parallel_size=5", "--cluster.gpus_per_node=5", "--actor.max_tokens_per_microbatch=192"],
        ["max_tokens_per_microbatch is 192", "= 192, a multiple of 10 under actor.context_parallel_size 5: 200"],
    ),
    "experts of a dense model": (
        ["--actor.expert_parallel_size=2", "--cluster.gpus_per_node=2"],
        ["mixture-of-experts models", "a dense one: leave them out"],
    ),
    "experts and ranks": (
        ["--actor.expert_parallel_size=3", "--cluster.gpus_per_node=4"],
        ["expert_parallel_size 3"],
    ),
    "key-value heads": (["--actor.tensor_parallel_size=4", "--cluster.gpus_per_node=4"], ["num_key_value_heads 2", "2 does"]),
    "heads of the engine": (["--rollout.tensor_parallel_size=3"], ["rollout.tensor_parallel_size 3", "num_attention_heads 4"]),
    "run folder in a file": (["--run.dir=train.jsonl/run"], ["run.dir", "train.jsonl is a file"]),
    "run folder that cannot be made": (["--run.dir=/proc/tic/run"], ["run.dir: /proc/tic/run cannot be written"]),
    "missing checkpoint": (["--run.resume=runs/x"], ["run.resume", "runs/x"]),
    "missing rollouts": (["--rollout.replay=nope"], ["rollout.replay", "nope"]),
    "other file for rollouts": (["--rollout.replay=train.jsonl"], ["train.jsonl", "line 1"]),
    "folder without rollouts": (["--rollout.replay=model"], ["rollout.replay", "no saved rollouts at", "model"]),
}


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(workspace, capsys, flags, words):
    line = refusal(capsys, [*workspace.base, *flags])
    assert [word for word in words if word not in line] == [], line
    assert not (workspace.root / "run").exists()


BAD_FILES = {
    "unknown setting": ("run:\n  seed: 1\ntrainer:\n  stpes: 4\n", ["trainer.stpes (c.yaml:4)", "did you mean trainer.steps?"]),
    "unknown section": ("run:\n  seed: 1\ntariner:\n  steps: 4\n", ["unknown setting tariner (c.yaml:3)"]),
    "text for a number": ("trainer:\n  steps: 1e3\n", ["trainer.steps is '1e3' (c.yaml:2)", "whole number"]),
    "list for a number": ("trainer:\n  steps: [4]\n", ["trainer.steps", "(c.yaml:2)", "whole number"]),
    "mapping for a number": ("trainer:\n  steps: {a: 4}\n", ["trainer.steps", "(c.yaml:2)", "whole number"]),
    "null for text": ("run:\n  name:\n", ["run.name is null (c.yaml:2)", "expected text"]),
    "text for a list": ("run:\n  allow_change: trainer.steps\n", ["run.allow_change", "(c.yaml:2)", "expected a list"]),
    "value for a section": ("\ntrainer: 5\n", ["c.yaml:2", "section trainer"]),
    "list of sections": ("- trainer:\n", ["c.yaml:1", "name: value"]),
    "set twice": ("trainer:\n  steps: 4\n  steps: 5\n", ["c.yaml:3: trainer.steps", "first at c.yaml:2"]),
    "malformed": ("trainer:\n  steps: 4\n bad\n", ["c.yaml:3: malformed YAML"]),
    "unclosed": ("run:\n  allow_change: [a\n", ["c.yaml:3: malformed YAML"]),
    "tab": ("trainer:\n\tsteps: 4\n", ["c.yaml:2: malformed YAML"]),
    "control character": ("run:\n  name: \x01\n", ["c.yaml: malformed YAML"]),
    "two documents": ("run:\n---\nrun:\n", ["c.yaml:2: malformed YAML"]),
    "not UTF-8": (b"run:\n  name: \xff\n", ["c.yaml", "UTF-8"]),
}


@pytest.mark.parametrize(("text", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_config_files_are_refused_with_their_line(workspace, capsys, text, words):
    (workspace.root / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refusal(capsys, [*workspace.base, "--config", "c.yaml"])
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("argv", [[], ["trian"], ["--config", "x.yaml"]])
def test_bad_subcommands_are_refused(capsys, argv):
    assert "give one of: train" in refusal(capsys, argv)


def loaded_after(argv, cwd) -> set[str]:
    """Which heavy packages a fresh process has imported when it refuses a command line."""
    code = (
        "import sys; from tic_megatron.cli import main; assert main(sys.argv[1:]) == 2;"
        "print(*({'torch', 'transformers', 'ray', 'vllm', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return set(done.stdout.split())


def test_quick_refusals_import_nothing_heavy(workspace):
    (workspace.root / "bad.jsonl").write_text("{")
    flags = ["--trainer.stpes=4", "--rollout.group_size=1", "--data.train=bad.jsonl", "--actor.pipeline_parallel_size=4"]
    for flag in [*flags, "--model.path=./nope"]:
        assert loaded_after([*workspace.base, "--cluster.gpus_per_node=4", flag], workspace.root) == set()


def test_slow_refusals_start_no_worker_library(workspace):
    assert loaded_after([*workspace.base, "--rollout.max_prompt_tokens=5"], workspace.root) <= {"torch", "transformers"}


@pytest.mark.parametrize(
    ("flag", "word"), [("--trainer.stpes=4", "trainer.steps"), ("--data.train=bad.jsonl", "bad.jsonl:2: malformed JSON")]
)
def test_the_console_command_exits_with_2_and_one_line(workspace, flag, word):
    (workspace.root / "bad.jsonl").write_text('{"problem": "x", "answer": "1"}\nnot json\n')
    done = subprocess.run([COMMAND, *workspace.base, flag], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert word in done.stderr


def test_flags_win_over_the_file_which_wins_over_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("trainer: {steps: 7, prompts_per_step: 9}\nactor.learning_rate: 1e-4\n")
    for arguments in (["--trainer.steps=8", "--config", str(path)], [f"--config={path}", "--trainer.steps", "8"]):
        settings = settings_of(*arguments)
        assert (settings.trainer.steps, settings.trainer.prompts_per_step, settings.trainer.updates_per_step) == (8, 9, 4)
        assert settings.actor.learning_rate == 1e-4


def test_text_is_taken_as_written(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: {name: 123, dir: off}\ndata: {train: 2024-01-01, system_prompt: '#5: {x}', eval: ~}\ntrainer:\n")
    settings = settings_of("--config", str(path), "--data.answer_field", "null")
    assert settings.run == RunSettings(name="123", dir="off")
    assert (settings.data.train, settings.data.system_prompt, settings.data.eval) == ("2024-01-01", "#5: {x}", None)
    assert settings.data.answer_field == "null"
    flags = settings_of("--data.system_prompt=#5", "--run.dir=null", "--run.allow_change=run.seed, trainer.steps")
    assert (flags.data.system_prompt, flags.run.dir, flags.run.allow_change) == ("#5", None, ["run.seed", "trainer.steps"])


@hypothesis.settings(deadline=None, max_examples=25)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])), number=st.floats(allow_nan=False), names=st.lists(st.text("a:,'\n#"))
)
@example(text="\x85", number=0.0, names=[])
@example(text="a\u2028b 中", number=0.0, names=[])
def test_saved_settings_load_again(tmp_path_factory, text, number, names):
    settings = Settings()
    settings.data.system_prompt, settings.run.name, settings.run.allow_change = text, text, names
    settings.actor.learning_rate, settings.algorithm.eps_high = number, number
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    settings.save(path)
    assert settings_of("--config", str(path)) == settings


def test_help_documents_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for section in fields(Settings):
        for field in fields(getattr(Settings(), section.name)):
            (line,) = (line for line in lines if line.strip().startswith(f"--{section.name}.{field.name} "))
            description = lines[lines.index(line) + 1] if line.count("  ") == 1 else line
            assert len(description.partition("(type")[0].split()) >= 2, line
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out


def test_short_flags_of_an_evaluation(capsys, tmp_path):
    """They are settings by another name, in the command line only; what is printed can be read again."""
    flags = ["--model", "m", "--benchmarks", "aime24,math500=x.jsonl", "--out=o", "--eval.samples=4"]
    assert main(["evaluate", *flags, "--print_config"]) == 0
    printed = capsys.readouterr().out
    given = yaml.safe_load(printed)
    assert (given["model"]["path"], given["run"]["dir"], given["eval"]["samples"]) == ("m", "o", 4)
    assert given["eval"]["benchmarks"] == ["aime24", "math500=x.jsonl"]
    (tmp_path / "c.yaml").write_text(printed)
    assert main(["evaluate", "--config", str(tmp_path / "c.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert "unknown setting out" in refusal(capsys, ["train", "--out=o"])


def test_print_config(capsys, workspace):
    assert main([*workspace.base, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["prompts_per_step"] == 4
