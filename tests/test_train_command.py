"""`tic-megatron train`: bad models and rows are refused before the start; how runs end; which runs a folder may continue."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import yaml

from tests.bad_input.folder_cases import STEP_1, STEP_2, make_run
from tests.models import make_tiny_qwen3
from tests.rollouts import random_rollout
from tests.workspace import make_workspace, refusal, settings_of, write_rows
from tic_megatron.checkpoints import CheckpointError, Checkpoints, RunState
from tic_megatron.cli import main
from tic_megatron.commands.engine_layout import check_engine_devices, check_engine_memory, core_warnings
from tic_megatron.commands.machine import cpu_warnings
from tic_megatron.commands.model_files import count_parameters
from tic_megatron.commands.preflight import preflight
from tic_megatron.commands.run_folder import begin_state
from tic_megatron.config import Settings, SettingsError
from tic_megatron.config_checks import check_settings
from tic_megatron.observability.rollouts import write_rollout


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0, tie_word_embeddings=True)


@pytest.fixture
def workspace(tmp_path, tiny_qwen3, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_workspace(tmp_path, tiny_qwen3)


def remove(*names):
    return lambda workspace: [(workspace.model / name).unlink() for name in names]


def cut_off(workspace):
    path = workspace.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit_tokenizer(**changes):
    def edit(workspace):
        path = workspace.model / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


MIXTURE = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}


def experts(workspace):
    workspace.edit_config(**MIXTURE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6)


BAD_MODELS = {
    "no config": (remove("config.json"), [], ["config.json cannot be read"]),
    "config that is no JSON": (lambda w: (w.model / "config.json").write_text("{"), [], ["config.json is not valid JSON"]),
    "another model": (lambda w: w.edit_config(model_type="llama"), [], ["model_type 'llama'", "give a Qwen3 model"]),
    "experts": (
        experts,
        ["--actor.expert_parallel_size=3", "--cluster.gpus_per_node=3"],
        ["not divide num_experts 4"],
    ),
    "matrices of experts": (
        experts,
        ["--actor.expert_tensor_parallel_size=4", "--actor.expert_parallel_size=2", "--cluster.gpus_per_node=8"],
        ["actor.expert_tensor_parallel_size 4 does not divide moe_intermediate_size 6"],
    ),
    "tensor-parallel experts": (
        experts,
        ["--actor.tensor_parallel_size=2", "--actor.expert_tensor_parallel_size=1", "--cluster.gpus_per_node=2"],
        ["expert_tensor_parallel_size 1 must be actor.tensor_parallel_size 2", "raise actor.expert_parallel_size"],
    ),
    "experts without sequence parallelism": (
        experts,
        ["--actor.tensor_parallel_size=2", "--actor.sequence_parallel=false", "--cluster.gpus_per_node=2"],
        ["actor.sequence_parallel false", "leave it on"],
    ),
    "matrices of the engine": (
        lambda w: w.edit_config(intermediate_size=126),
        ["--rollout.tensor_parallel_size=4"],
        ["rollout.tensor_parallel_size 4 does not divide intermediate_size 126"],
    ),
    "key-value heads of the engine": (
        lambda w: w.edit_config(num_attention_heads=12, num_key_value_heads=4, intermediate_size=96),
        ["--rollout.tensor_parallel_size=6"],
        ["rollout.tensor_parallel_size 6", "num_key_value_heads 4", "4 is one that fits"],
    ),
    "vocabulary of the engine": (
        lambda w: w.edit_config(num_attention_heads=6, num_key_value_heads=3, intermediate_size=96),
        ["--rollout.tensor_parallel_size=3"],
        ["rollout.tensor_parallel_size 3", "vLLM pads vocab_size", "to 320; 2 does"],
    ),
    "experts of the engine": (
        experts,
        ["--rollout.tensor_parallel_size=4"],
        ["rollout.tensor_parallel_size 4 does not divide moe_intermediate_size 6"],
    ),
    "more ranks of the engine than experts": (
        lambda w: w.edit_config(**MIXTURE, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64),
        ["--rollout.tensor_parallel_size=4"],
        ["rollout.tensor_parallel_size 4 is more than num_experts 2", "vLLM refuses"],
    ),
    "experts over the engine's ranks": (
        lambda w: w.edit_config(**MIXTURE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=6),
        ["--rollout.tensor_parallel_size=4", "--rollout.expert_parallel=true"],
        ["rollout.tensor_parallel_size 4 does not divide num_experts 6", "3 does"],
    ),
    "dense layers beside the engine's experts": (
        lambda w: (experts(w), w.edit_config(mlp_only_layers=[0], moe_intermediate_size=8, intermediate_size=126)),
        ["--rollout.tensor_parallel_size=4"],
        ["rollout.tensor_parallel_size 4 does not divide intermediate_size 126"],
    ),
    "cache of the engine": (
        lambda w: w.edit_config(num_hidden_layers=20000, layer_types=None),
        ["--cluster.device=cpu"],
        ["rollout.cpu_kv_cache_gib is 1, but the cache of one text of 192 tokens", "needs 2.1 GiB; give at least 3"],
    ),
    "scaled RoPE": (lambda w: w.edit_config(rope_scaling={"type": "yarn"}, rope_parameters=None), [], ["RoPE scaling 'yarn'"]),
    "sliding window": (lambda w: w.edit_config(use_sliding_window=True), [], ["sliding-window attention"]),
    "quantized": (lambda w: w.edit_config(quantization_config={"bits": 4}), [], ["quantized weights"]),
    "no heads": (lambda w: w.edit_config(num_attention_heads=None), [], ["num_attention_heads None"]),
    "vocabulary": (
        lambda w: w.edit_config(vocab_size=321),
        ["--actor.tensor_parallel_size=2", "--cluster.gpus_per_node=2"],
        ["actor.tensor_parallel_size 2 does not divide vocab_size 321"],
    ),
    "small vocabulary": (lambda w: w.edit_config(vocab_size=200), [], ["tokenizer", "vocab_size 200"]),
    "no weights": (remove("model.safetensors"), [], ["model.safetensors are missing"]),
    "weights cut off": (cut_off, [], ["model.safetensors", "it is cut off"]),
    "pointer instead of weights": (
        lambda w: (w.model / "model.safetensors").write_text("version https://git-lfs\noid sha256:0\n"),
        [],
        ["model.safetensors is not a safetensors file"],
    ),
    "index of a missing shard": (
        lambda w: (w.model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        [],
        ["model-2.safetensors are missing"],
    ),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), [], ["has no tokenizer"]),
    "no chat template": (remove("chat_template.jinja"), [], ["no chat template"]),
    "no end token": (edit_tokenizer(eos_token=None), [], ["no end token"]),
}


@pytest.mark.parametrize(("spoil", "flags", "words"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models_are_refused(workspace, capfd, spoil, flags, words):
    spoil(workspace)
    line = refusal(capfd, [*workspace.base, *flags])
    assert [word for word in words if word not in line] == [], line


def test_a_rollout_ahead_on_shared_gpus_is_refused(workspace, capfd):
    ahead = ["--rollout.steps_ahead=1", "--algorithm.correction=truncate", "--cluster.device=cuda"]
    line = refusal(capfd, [*workspace.base, *ahead])
    assert "rollout.steps_ahead is 1" in line and "cluster.colocate" in line


def test_malformed_row_is_named(workspace, capfd):
    with (workspace.root / "train.jsonl").open("a") as file:
        file.write('{"problem": "1+1=", "answer": }\n')
    assert f"{workspace.root}/train.jsonl:11: malformed JSON" in refusal(capfd, workspace.base)


def test_unreachable_hub_name_is_one_line(workspace, capfd, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(workspace.root / "cache"))
    assert "model.path: nobody/no-such-model-here is no directory" in refusal(
        capfd, [*workspace.base, "--model.path=nobody/no-such-model-here"]
    )


def checked(workspace, *flags):
    """What preflight makes of a good command line."""
    settings = settings_of(*workspace.base[1:], *flags)
    check_settings(settings)
    settings = settings.resolve()
    return settings, preflight(settings)


def test_preflight_loads_what_the_run_needs(workspace):
    write_rows(workspace.root / "eval.jsonl", [{"problem": f"{n}+2=", "answer": n + 2} for n in range(8)])
    settings, inputs = checked(workspace, "--data.eval=eval.jsonl", "--data.eval_limit=5", "--run.dir=null", "--run.name=x")
    assert (len(inputs.train_prompts), len(inputs.eval_prompts), inputs.hf_config.model_type) == (10, 5, "qwen3")
    assert (inputs.model_dir, inputs.warnings, inputs.tokenizer.eos_token) == (workspace.model, [], "<|im_end|>")
    assert settings.run.dir == str(workspace.root / "runs" / "x") and not Path(settings.run.dir).exists()
    assert settings.cluster.device in ("cpu", "cuda") and settings.rollout.precision == "fp32"


def dense_rollout(path, *, dense: bool):
    groups = random_rollout(seed=0, n_prompts=4, group_size=4, vocab=300, dense=dense)
    write_rollout(path, 1, groups)
    return f"--rollout.replay={path}"


@pytest.mark.parametrize("objective", ["grpo", "dapo", "grpo2", "gspo", "no_is"])
def test_dense_rewards_need_the_trajectory_ratio(workspace, capfd, objective):
    line = refusal(capfd, [*workspace.base, "--reward.function=exact_dense", f"--algorithm.objective={objective}"])
    assert f"reward.function gives a reward per token, and {objective} does not say" in line and "(traj_is, tic_grpo)" in line
    settings, _ = checked(workspace, "--reward.function=exact_dense", "--algorithm.objective=traj_is")
    assert settings.reward.function == "exact_dense"


def test_replayed_rollouts_must_be_graded_as_the_run_grades(workspace, capfd):
    dense = dense_rollout(workspace.root / "dense.jsonl", dense=True)
    plain = dense_rollout(workspace.root / "rollouts" / "step_000001.jsonl", dense=False)
    assert "dense.jsonl holds one reward per token" in refusal(capfd, [*workspace.base, dense])
    line = refusal(capfd, [*workspace.base, "--reward.function=exact_dense", f"--rollout.replay={workspace.root}"])
    assert "step_000001.jsonl holds one reward per response, but reward.function gives one per token" in line
    checked(workspace, plain)
    checked(workspace, dense, "--reward.function=exact_dense")


def test_long_training_problems_are_left_out_and_counted_but_held_out_ones_refused(workspace):
    rows = [{"problem": "1+1=" * repeats, "answer": "2"} for repeats in (1, 1, 1, 1, 60, 70)]
    write_rows(workspace.root / "train.jsonl", rows)
    write_rows(workspace.root / "eval.jsonl", rows[3:])
    _, inputs = checked(workspace)
    assert len(inputs.train_prompts) == 4
    (warning,) = inputs.warnings
    assert "2 of 6 problems are left out" in warning and "train.jsonl:6" in warning and "max_prompt_tokens 128" in warning
    with pytest.raises(
        SettingsError, match=r"data\.eval: 2 of 3 problems are longer .*eval\.jsonl:3, has \d+\); raise the limit"
    ):
        checked(workspace, "--data.eval=eval.jsonl")


def test_warnings_for_a_long_warm_up_and_shared_problems(workspace):
    _, inputs = checked(workspace, "--trainer.steps=4", "--actor.lr_warmup_updates=8", "--data.eval=train.jsonl")
    assert ["warm-up of 8 updates" in inputs.warnings[0], "10 of 10 held-out problems" in inputs.warnings[1]] == [True, True]


BAD_DEVICES = {
    "too many ranks": (["--cluster.gpus_per_node=8"], ["cluster.gpus_per_node is 8", "this machine has 4 GPUs"]),
    "nodes without a cluster": (["--cluster.nodes=2"], ["cluster.nodes is 2, but without cluster.address"]),
    "engine over two nodes": (
        ["--cluster.gpus_per_node=2", "--rollout.tensor_parallel_size=4"],
        ["rollout.tensor_parallel_size 4 does not divide cluster.gpus_per_node 2", "on one node"],
    ),
    "engine over two nodes of a cluster": (
        ["--cluster.gpus_per_node=2", "--rollout.tensor_parallel_size=4", "--cluster.nodes=2", "--cluster.address=10.0.0.1:6379"],
        ["rollout.tensor_parallel_size 4 does not divide cluster.gpus_per_node 2", "on one node"],
    ),
    "more engines than GPUs to share": (
        ["--cluster.gpus_per_node=4", "--rollout.engines=3", "--rollout.tensor_parallel_size=2"],
        ["rollout.engines 3 x rollout.tensor_parallel_size 2 = 6 needs more GPUs than the 4 of the actors"],
    ),
}


@pytest.mark.parametrize(("flags", "words"), BAD_DEVICES.values(), ids=BAD_DEVICES)
def test_layouts_that_do_not_fit_the_gpus_are_refused(workspace, capfd, monkeypatch, flags, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    line = refusal(capfd, [*workspace.base, *flags])
    assert [word for word in words if word not in line] == [], line


def test_engines_apart_need_gpus_besides_the_actors():
    settings = settings_of("--cluster.colocate=false", "--cluster.gpus_per_node=4", "--rollout.engines=2")
    check_engine_devices(settings, gpus=6)
    with pytest.raises(SettingsError, match=r"gpus_per_node 4 \+ rollout\.engines 2 x .* 1 = 6 GPUs, but this machine has 5"):
        check_engine_devices(settings, gpus=5)
    settings.cluster.address = "10.0.0.1:6379"  # whose nodes are not known yet
    check_engine_devices(settings, gpus=0)


def test_a_cluster_whose_gpus_are_not_used_is_remarked():
    settings = settings_of("--cluster.device=cpu", "--cluster.address=10.0.0.1:6379")
    assert "GPUs that the cluster's nodes may have are not used; give cluster.device cuda" in cpu_warnings(settings)[0]
    settings.cluster.device = "cuda"
    assert cpu_warnings(settings) == []


def test_engines_without_memory_for_the_model_and_a_text_are_refused():
    """Against vLLM's published numbers of Qwen3-8B: 8.19 G parameters, 36 layers, 8 key-value heads of 128."""
    hf = types.SimpleNamespace(num_hidden_layers=36, num_key_value_heads=8, head_dim=128)
    settings = settings_of("--cluster.device=cpu", "--rollout.precision=fp32", "--rollout.max_model_len=32768")
    with pytest.raises(SettingsError, match=r"cpu_kv_cache_gib is 1, but .* 32768 tokens .* needs 9\.0 GiB; give at least 10"):
        check_engine_memory(hf, 8_190_000_000, settings, None)
    settings.rollout.cpu_kv_cache_gib = 10
    check_engine_memory(hf, 8_190_000_000, settings, None)
    settings.cluster.device, settings.rollout.precision = "cuda", "bf16"
    check_engine_memory(hf, 8_190_000_000, settings, None)  # a GPU of another machine
    with pytest.raises(SettingsError, match=r"0\.6 of a GPU is 14\.4 GiB, but .*15\.3 GiB .* and 4\.5 GiB for one text"):
        check_engine_memory(hf, 8_190_000_000, settings, 24 * 2**30)
    settings.rollout.tensor_parallel_size = 2
    check_engine_memory(hf, 8_190_000_000, settings, 24 * 2**30)


def test_parameters_are_counted_from_the_headers(workspace):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workspace.model)
    assert count_parameters(workspace.model) == sum(parameter.numel() for parameter in model.parameters())


def test_a_warning_for_more_threads_than_cores():
    settings = settings_of("--cluster.gpus_per_node=2", "--rollout.engines=2", "--rollout.threads=2")
    assert core_warnings(settings, cores=4) == []
    (line,) = core_warnings(settings, cores=3)
    assert "2 actors (2) and of 2 engines (4), taking turns, want 4 cores, but this machine has 3" in line
    settings.cluster.colocate = False
    (line,) = core_warnings(settings, cores=5)
    assert "at the same time, since cluster.colocate is false, want 6 cores, but this machine has 5" in line


@pytest.fixture
def forked_trainer(monkeypatch):
    """Puts a function in the trainer's place: how a run ends is tested here, not training."""

    def install(train):
        monkeypatch.setitem(sys.modules, "tic_megatron.trainer", types.SimpleNamespace(train=train))

    return install


@pytest.fixture
def trainer(forked_trainer, monkeypatch):
    """The same, in this process: a fork of one in which Ray has run prints lines of gRPC's."""
    monkeypatch.setattr("tic_megatron.commands.train.supervise", lambda drive, **_: drive(0))
    return forked_trainer


def finish(rewards, **metrics):
    def train(settings, inputs):
        rows = [{"step": step, "reward/mean": reward, **metrics} for step, reward in enumerate(rewards, 1)]
        Path(settings.run.dir, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"accuracy_before": 0.25, "accuracy_after": None, "steps": len(rewards), "wall_s": 125.4}

    return train


def test_a_run_ends_with_a_table(workspace, capfd, trainer):
    trainer(finish([0.0, 0.5]))
    assert main(workspace.base) == 0
    out = capfd.readouterr().out
    assert "0.250" in out and "not measured" in out and "2m05s" in out and "ever rewarded" not in out
    assert yaml.safe_load((workspace.root / "run" / "config.yaml").read_text())["run"]["dir"] == str(workspace.root / "run")


def test_a_run_without_any_reward_says_so(workspace, capfd, trainer):
    trainer(finish([0.0, 0.0]))
    assert main(workspace.base) == 0
    assert "No response was ever rewarded" in capfd.readouterr().out


def test_punishments_are_told_apart_from_rewards(workspace, capfd, trainer):
    """A mean of -0.4 teaches, unless all of it is the overlong punishment."""
    trainer(finish([-0.5, -0.4]))
    assert main([*workspace.base, "--run.name=a"]) == 0
    assert "rewarded" not in capfd.readouterr().out
    trainer(finish([-0.5, -0.5], **{"reward/overlong_mean": -0.5}))
    assert main([*workspace.base, f"--run.dir={workspace.root}/other"]) == 0
    assert "No response was ever rewarded" in capfd.readouterr().out


def test_a_failure_is_one_line_and_a_log(workspace, capfd, trainer):
    def train(settings, inputs):
        raise RuntimeError("worker 3 died")

    trainer(train)
    assert main(workspace.base) == 1
    err = capfd.readouterr().err
    log = workspace.root / "run" / "logs" / "driver.log"
    assert err == f"tic-megatron: error: the run failed: RuntimeError: worker 3 died (details: {log})\n"
    assert "Traceback" in log.read_text() and "worker 3 died" in log.read_text()

    def lose_checkpoint(settings, inputs):
        raise CheckpointError("the checkpoint of step 2 was not saved: No space left on device: f (make room)")

    trainer(lose_checkpoint)
    assert main(workspace.base) == 1
    assert "the run failed: the checkpoint of step 2 was not saved: No space" in capfd.readouterr().err
    trainer(finish([1.0]))  # nothing was trained, so other settings may use the folder
    assert main([*workspace.base, "--run.seed=9"]) == 0


def test_an_interrupted_run_exits_with_130(workspace, capfd, trainer):
    def train(settings, inputs):
        raise KeyboardInterrupt

    trainer(train)
    assert main(workspace.base) == 130
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_bad_input_found_in_a_worker_is_one_line(workspace, capfd, trainer):
    def train(settings, inputs):
        raise SettingsError("ray::Worker()\n  File x, line 3\ntic_megatron.config.SettingsError: model.path: no such tensor")

    trainer(train)
    assert refusal(capfd, workspace.base) == "tic-megatron: error: model.path: no such tensor"


@pytest.fixture
def trained(workspace, capfd, trainer):
    """A workspace whose run folder holds a run."""
    trainer(finish([0.5]))
    assert main(workspace.base) == 0
    capfd.readouterr()
    return workspace


def test_the_same_run_may_continue(trained):
    assert main(trained.base) == 0
    layout = ["--actor.tensor_parallel_size=2", "--cluster.gpus_per_node=2", "--trainer.save_every=3", "--trainer.steps=200"]
    evaluation = ["--eval.samples=2", "--eval.temperature=1", "--rollout.max_model_len=300", "--cluster.colocate=false"]
    assert main([*trained.base, *layout, *evaluation]) == 0


def test_a_folder_with_another_run_is_refused(trained, capfd):
    line = refusal(capfd, [*trained.base, "--actor.learning_rate=1e-3", "--rollout.group_size=8"])
    assert (
        "holds another run" in line and "actor.learning_rate (1e-06 there, 0.001 here)" in line and "rollout.group_size" in line
    )
    assert "--run.allow_change rollout.group_size,actor.learning_rate" in line


def test_a_change_may_be_allowed(trained, capfd):
    changes = ["--actor.learning_rate=1e-3", "--run.seed=3"]
    assert "run.seed" in refusal(capfd, [*trained.base, *changes, "--run.allow_change=actor.learning_rate"])
    assert main([*trained.base, *changes, "--run.allow_change=actor.learning_rate,run.seed"]) == 0


def test_another_layout_is_told_and_recorded(trained, capfd):
    layout = ["--cluster.gpus_per_node=2", "--actor.context_parallel_size=2", "--actor.virtual_pipeline_parallel_size=1"]
    assert main([*trained.base, *layout]) == 0
    assert "goes on with other settings: actor.context_parallel_size 2 (was 1)" in capfd.readouterr().err
    (line,) = (trained.root / "run" / "changes.jsonl").read_text().splitlines()
    changes = json.loads(line)["changes"]
    assert changes == {"actor.context_parallel_size": [1, 2], "cluster.gpus_per_node": [1, 2]}
    assert main([*trained.base, *layout]) == 0
    assert "other settings" not in capfd.readouterr().err


def test_moved_problems_and_models_are_the_same_run(trained, capfd):
    moved = trained.root / "moved"
    moved.mkdir()
    shutil.copy(trained.root / "train.jsonl", moved)
    shutil.copytree(trained.model, moved / "model")
    paths = [f"--data.train={moved / 'train.jsonl'}", f"--model.path={moved / 'model'}"]
    assert main([*trained.base, *paths]) == 0
    assert "data.train" in capfd.readouterr().err
    penalty = ["--algorithm.kl_coefficient=0.1", "--run.allow_change=algorithm.kl_coefficient"]  # its reference is the model
    assert main([*trained.base, *paths, *penalty]) == 0
    capfd.readouterr()
    assert "differs in model.path" in refusal(capfd, [*trained.base, *penalty])


def test_adamw_cannot_continue_sgd(trained, capfd):
    allowed = [*trained.base, "--run.allow_change=actor.optimizer", "--actor.distributed_optimizer=false"]
    assert main([*allowed, "--actor.optimizer=sgd"]) == 0
    capfd.readouterr()
    assert "no moments for adamw" in refusal(capfd, [*allowed, "--actor.optimizer=adamw"])


def test_more_steps_are_another_run_when_the_learning_rate_decays(workspace, capfd, trainer):
    trainer(finish([0.5]))
    decay = [*workspace.base, "--actor.lr_decay=linear"]
    assert main(decay) == 0
    capfd.readouterr()
    assert "trainer.steps (100 there, 200 here)" in refusal(capfd, [*decay, "--trainer.steps=200"])


def test_a_reward_or_plugin_of_another_content_is_another_run(workspace, capfd, trainer):
    programs = {name: workspace.root / f"{name}.py" for name in ("grade", "add")}
    programs["grade"].write_text("def grade(response): return 1.0\n")
    programs["add"].write_text("x = 1\n")
    command = [*workspace.base, "--reward.function=grade.py:grade", "--algorithm.plugin=add.py"]

    def train(settings, inputs):
        checkpoints = Checkpoints(Path(settings.run.dir), keep=1)
        checkpoints.save(begin_state(inputs.checkpoint, settings), lambda folder: lambda: True, lambda folder: None)
        checkpoints.finish()
        return finish([0.5])(settings, inputs)

    trainer(train)
    for _ in range(2):
        assert main(command) == 0
    capfd.readouterr()
    for name, setting in (("grade", "reward.function"), ("add", "algorithm.plugin")):
        before = programs[name].read_text()
        programs[name].write_text(before + "# changed\n")
        line = refusal(capfd, command)
        assert f"{setting}: {programs[name]}" in line and f"--run.allow_change {setting}" in line
        if name == "grade":
            programs[name].write_text(before)
    assert main([*command, "--run.allow_change=algorithm.plugin"]) == 0
    assert main(command) == 0  # the checkpoint since is of the new one


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"data.eval": "/elsewhere/held.jsonl", "eval.benchmarks": ["aime24"], "actor.threads": 2}, True),
        ({"data.eval": "/there/other.jsonl"}, False),
        ({"data.eval": None}, False),
        ({"data.eval_limit": 7}, False),
        ({"eval.samples": 4}, False),
    ],
)
def test_accuracies_are_compared_with_those_of_the_same_kind(tmp_path, changes, kept):
    settings = Settings()
    settings.data.eval = "/there/held.jsonl"
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = RunState(3, None, None, 0.25, 0.5, {"aime24": 0.125}, {"aime24": 0.75})
    checkpoints.save(state, lambda folder: lambda: True, lambda folder: settings.save(folder / "config.yaml"))
    assert checkpoints.finish() is None
    for key, value in changes.items():
        section, _, name = key.partition(".")
        setattr(getattr(settings, section), name, value)
    found = begin_state(tmp_path / "checkpoints" / "step_3", settings)
    assert (found.accuracy_before, found.benchmarks_before) == ((0.25, {"aime24": 0.125}) if kept else (None, {}))
    assert (found.step, found.accuracy, found.benchmarks) == ((3, 0.5, {"aime24": 0.75}) if kept else (3, None, {}))


def test_a_restart_goes_on_from_the_checkpoint_that_was_named(workspace, forked_trainer):
    make_run(workspace)
    shutil.copytree(workspace.root / STEP_1, workspace.root / "kept")

    def train(settings, inputs):
        with (workspace.root / "seen").open("a") as seen:
            seen.write(f"{inputs.checkpoint.name} ")
        if len((workspace.root / "seen").read_text().split()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # before it has saved anything
        return finish([0.5])(settings, inputs)

    forked_trainer(train)
    assert main([*workspace.base, "--run.resume=kept"]) == 0
    assert (workspace.root / "seen").read_text().split() == ["kept", "kept"]
    assert (workspace.root / f"{STEP_2}.replaced").is_dir()


def test_never_resuming_refuses_any_run(trained, capfd):
    assert "holds a run already" in refusal(capfd, [*trained.base, "--run.resume=never"])


def test_a_run_without_its_settings_is_refused(trained, capfd):
    config = trained.root / "run" / "config.yaml"
    config.write_text("nonsense")
    assert "is not the config.yaml of a run" in refusal(capfd, trained.base)
    config.unlink()
    assert "config.yaml cannot be read" in refusal(capfd, trained.base)


def test_other_files_in_the_folder_do_no_harm(workspace, trainer):
    (workspace.root / "run" / "checkpoints").mkdir(parents=True)
    (workspace.root / "run" / "notes.txt").write_text("mine")
    trainer(finish([0.5]))
    assert main([*workspace.base, "--run.resume=never"]) == 0


def test_a_folder_that_another_process_uses_is_refused(workspace, capfd, trainer):
    trainer(finish([0.5]))
    (workspace.root / "run").mkdir()
    with (workspace.root / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is at work in" in refusal(capfd, workspace.base)
    assert main(workspace.base) == 0  # it is free again


def test_an_address_with_a_key_is_not_told(trained, capfd):
    hidden = ("?api_key=hush", "?x-api-key=hush", "?accessToken=hush", "?a=1&subscription-key=hush", "#token=hush")
    with_logins = ("http://me:hush@host/grade", "http://me:hush@host:port/grade?key=hush")
    for address in (*(f"http://host/grade{part}" for part in hidden), *with_logins):
        assert "hush" not in refusal(capfd, [*trained.base, f"--reward.function={address}"])


def test_what_there_is_to_continue_from_is_seen_under_the_lock(trained, monkeypatch):
    def look(settings):
        with (trained.root / "run" / ".lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise SettingsError("seen")

    monkeypatch.setattr("tic_megatron.commands.train.preflight", look)
    assert main(trained.base) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_told_to_leave_during_the_checks(workspace, monkeypatch, number):
    def wait(settings):
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr("tic_megatron.commands.train.preflight", wait)
    monkeypatch.setattr("tic_megatron.preemption.os._exit", sys.exit)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end:
            main(workspace.base)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert end.value.code == 0
    assert (workspace.root / "run" / "requeue").read_text() == f"left at {number.name} after step 0\n"


@pytest.mark.parametrize(
    ("number", "code", "marker"), [(signal.SIGTERM, 0, "left at SIGTERM after step 0\n"), (signal.SIGINT, 130, None)]
)
def test_told_to_leave_before_there_is_anything_to_save(workspace, capfd, forked_trainer, number, code, marker):
    """While Ray starts, say: the signal takes the driver, or Ray's handler does."""

    def train(settings, inputs):
        os.kill(os.getppid(), number)  # to the launcher, which passes it on
        time.sleep(60)

    forked_trainer(train)
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, handler)  # in the background of a shell it would be ignored
    try:
        assert main(workspace.base) == code
    finally:
        signal.signal(number, before)
    path = workspace.root / "run" / "requeue"
    assert (path.read_text() if path.exists() else None) == marker
    assert sum(line.startswith("tic-megatron:") for line in capfd.readouterr().err.splitlines()) == 1


def test_a_marker_that_was_taken_at_once(workspace, capfd, trainer):
    """By whoever watches for it, while the rollout ahead is still waited for."""
    trainer(lambda settings, inputs: None)
    assert main(workspace.base) == 0
    assert "left as it was told to; the same command continues" in capfd.readouterr().err
