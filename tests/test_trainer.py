"""The whole stack through the command: Ray, Megatron actors, vLLM, weight transfer."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.models import make_tiny_qwen3
from tests.rollouts import random_rollout
from tests.runs import COMMAND, ROOT, TIMEOUT_S, untimed
from tests.workspace import write_rows
from tic_megatron.algorithms import dense_advantages
from tic_megatron.data.packing import has_equal_rewards
from tic_megatron.observability.metrics import read_metrics
from tic_megatron.observability.rollouts import read_rollout, rollout_path, write_rollout


def train(*arguments: str, expect: int = 0, timeout_s: float = TIMEOUT_S) -> str:
    result = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert result.returncode == expect, f"{result.stdout}\n{result.stderr}\n{driver_log(arguments)}"
    return result.stdout


def driver_log(arguments) -> str:
    folder = next((a.split("=", 1)[1] for a in arguments if a.startswith("--run.dir=")), None)
    log = Path(folder or "", "logs", "driver.log")
    return log.read_text()[-4000:] if folder and log.exists() else ""


@pytest.fixture(scope="module")
def config(task, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    settings = {
        "model": {"path": str(task / "model")},
        "data": {"train": str(task / "train.jsonl"), "eval": str(task / "eval.jsonl"), "eval_limit": 100},
        "reward": {"function": "exact"},
        "trainer": {"steps": 6, "prompts_per_step": 16, "updates_per_step": 2, "save_every": 3, "noise_check_every": 1},
        "rollout": {"group_size": 8, "max_prompt_tokens": 64, "max_response_tokens": 8},
        "actor": {"learning_rate": 3e-4, "max_tokens_per_microbatch": 1024},
        "cluster": {"device": "cpu"},
    }
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.timeout(900)
def test_interrupted_and_resumed_run_equals_the_uninterrupted_one(config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train("--config", config, f"--run.dir={whole}")
    arguments = ["--config", config, f"--run.dir={cut}"]

    # Interrupted after the checkpoint of step 3; told to leave by the queue in a rollout, and in the last evaluation; let alone.
    assert signalled(arguments, "step 4/", signal.SIGINT) == 130
    assert not (cut / "requeue").exists()
    assert signalled(arguments, "step 4/", signal.SIGTERM) == 0
    saved = max(int(path.name.removeprefix("step_")) for path in (cut / "checkpoints").iterdir())
    assert saved in (4, 5)
    assert (cut / "requeue").read_text() == f"left at SIGTERM after step {saved}\n"
    assert signalled(arguments, rollout_path(cut, 6), signal.SIGTERM) == 0
    assert (cut / "requeue").read_text() == "left at SIGTERM after step 6\n"
    assert len(untimed(cut)) in (5, 6)  # on a busy machine the evaluation may have ended before the signal came
    output = train(*arguments)
    assert "continuing from" in output and "step_6" in output
    assert not (cut / "requeue").exists()

    assert untimed(whole) == untimed(cut)
    assert len(untimed(whole)) == 6
    check_whole_run(whole, task_of(config))
    check_export(whole, tmp_path / "exported")


def test_told_to_leave_while_engines_and_actors_start(config, tmp_path):
    """Which may take longer than a queue's grace, and there is nothing to save yet: it ends at once, with a marker."""
    run = tmp_path / "run"
    assert signalled(["--config", config, f"--run.dir={run}"], run / "logs" / "engine_0.log", signal.SIGTERM) == 0
    assert (run / "requeue").read_text() == "left at SIGTERM after step 0\n"
    assert not (run / "logs" / "memory.jsonl").exists()  # written when all has started
    assert not (run / "checkpoints").exists() and not (run / "metrics.jsonl").exists()


def signalled(arguments: list[str], after: str | Path, number: signal.Signals, *, everyone: bool = False) -> int:
    """Run, and send a signal, to all of the run's processes or the first, when a line of the output begins so or when a file is
    there; the exit code."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell, interrupts are ignored, and so they would be here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        if isinstance(after, Path):
            while not after.exists() and process.poll() is None:
                time.sleep(0.002)
        else:
            next((line for line in process.stdout if line.startswith(after)), None)
        if process.poll() is None:
            for pid in [*(children(process.pid) if everyone else ()), process.pid]:
                os.kill(pid, number)
        return process.wait(timeout=120)
    finally:
        process.kill()
        process.stdout.close()


def task_of(config: str) -> Path:
    return Path(yaml.safe_load(Path(config).read_text())["model"]["path"]).parent


def check_whole_run(run_dir: Path, task: Path) -> None:
    """What every run leaves behind, and that the engines used the trainer's weights."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    for row in rows:
        assert row["policy/log_ratio_abs_max_first"] == 0.0
        assert 0.0 < row["mismatch/logprob_abs_max"] < 1e-3
        assert row["rollout/weight_version_min"] == row["step"] - 1
    assert rows[-1]["policy/log_ratio_std"] > 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["wall_s"] > 0
    assert summary["accuracy_after"] == rows[-1]["eval/eval/accuracy"]
    assert accuracy_with_transformers(run_dir / "hf", task / "eval.jsonl", limit=100) == pytest.approx(summary["accuracy_after"])
    assert len(read_rollout(rollout_path(run_dir, 6))) == 16
    assert (run_dir / "curves.png").stat().st_size > 10_000
    assert list((run_dir / "tensorboard").iterdir())
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"step_3", "step_6"}


def check_export(run_dir: Path, out: Path) -> None:
    """From the last checkpoint, the run's own export."""
    command = [sys.executable, "-m", "tic_megatron", "export", str(run_dir), str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S, env={**os.environ, "OMP_NUM_THREADS": "1"})
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (run_dir / "hf").iterdir()} and "tokenizer.json" in names
    for name in names:
        assert (out / name).read_bytes() == (run_dir / "hf" / name).read_bytes(), name


def accuracy_with_transformers(model_dir: Path, problems: Path, limit: int | None = None) -> float:
    """Greedy accuracy of an exported model, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line in problems.read_text().splitlines()][:limit]
    right = 0
    for row in rows:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["problem"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        right += text.strip() == row["answer"]
    return right / len(rows)


@pytest.mark.slow  # two runs of two steps
@pytest.mark.timeout(900)
def test_evaluation_and_placement_leave_training_alone(config, tmp_path):
    """Engines beside the actors' and among them, with sampled evaluation at every step and without: the same run, bit by bit."""
    arguments = ["--config", config, "--trainer.steps=2", "--trainer.save_every=0", "--rollout.engines=2"]
    arguments += ["--rollout.max_prompt_tokens=400"]  # with the text around a benchmark's problem
    evaluated, apart = tmp_path / "evaluated", tmp_path / "apart"
    sampled = ("--trainer.eval_every=1", "--eval.samples=3", "--eval.temperature=0.8", "--eval.top_p=0.9")
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join((task_of(config) / "eval.jsonl").read_text().splitlines(keepends=True)[100:140]))
    benchmarks = (f"--eval.benchmarks=sums={sums},math500={sums}", "--eval.benchmark_samples=2")
    train(*arguments, *sampled, *benchmarks, f"--run.dir={evaluated}")
    train(*arguments, "--data.eval=null", "--cluster.colocate=false", f"--run.dir={apart}")

    rows, others = untimed(evaluated), untimed(apart)
    for row in rows:
        assert 0 < row.pop("eval/eval/accuracy") <= row.pop("eval/eval/pass_at_k") <= 1
        assert 0 < row.pop("eval/eval/standard_error") < 0.05
        assert 0 < row["eval/sums/accuracy"] <= row["eval/sums/pass_at_k"] <= 1
        assert 0 <= row["eval/math500/accuracy"] < row["eval/sums/accuracy"]  # asked in words that this model has never seen
    summary = json.loads((evaluated / "summary.json").read_text())
    assert summary["benchmarks"]["sums"]["after"] == rows[-1]["eval/sums/accuracy"]
    assert 0 < summary["benchmarks"]["sums"]["before"] < 1
    assert [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows] == others
    for step in (1, 2):
        assert read_rollout(rollout_path(evaluated, step)) == read_rollout(rollout_path(apart, step))
    for run_dir in (evaluated, apart):
        check_memory_log(run_dir)


def check_memory_log(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "logs" / "memory.jsonl").read_text().splitlines()]
    phases = [(line["step"], line["phase"]) for line in lines]
    steps = [(step, phase) for step in (1, 2) for phase in ("generate", "train", "weight_sync")]
    assert phases == [(0, "start"), *steps, (2, "save")]
    rows = read_metrics(run_dir / "metrics.jsonl")
    for row, part in zip(rows, (lines[:4], lines[4:7]), strict=True):
        actors = [usage["resident_peak"] for line in part for usage in line["actors"]]
        engines = [usage["resident_peak"] for line in part for engine in line["engines"] for usage in engine]
        assert (len(actors), len(engines)) == (len(part), 2 * len(part))
        assert row["memory/actor_max_gib"] == max(actors) / 2**30 and 0.2 < max(actors) / 2**30 < 8
        assert row["memory/engine_max_gib"] == max(engines) / 2**30 and 0.2 < max(engines) / 2**30 < 8


def test_layouts_agree_on_replayed_rollouts(tmp_path):
    """One step on the same saved rollout: value and gradient norm of the layouts agree within 1e-4."""
    model = make_tiny_qwen3(tmp_path / "model", seed=0, tie_word_embeddings=True)
    write_rows(tmp_path / "train.jsonl", [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(8)])
    groups = random_rollout(seed=5, n_prompts=8, group_size=4, vocab=300)
    write_rollout(rollout_path(tmp_path / "saved", 1), 1, groups)
    layouts = {
        "tp1": (1, {}),
        "tp2": (2, {"tensor_parallel_size": 2}),
        "pp2": (2, {"pipeline_parallel_size": 2}),
        "dp2": (2, {}),
    }
    metrics = {}
    for name, (world_size, actor) in layouts.items():
        train(
            f"--model.path={model}",
            f"--data.train={tmp_path / 'train.jsonl'}",
            f"--rollout.replay={tmp_path / 'saved'}",
            f"--run.dir={tmp_path / name}",
            *("--trainer.steps=1", "--trainer.prompts_per_step=8", "--trainer.updates_per_step=2"),
            *("--rollout.group_size=4", "--rollout.max_prompt_tokens=64", "--rollout.max_response_tokens=40"),
            *("--actor.learning_rate=1e-3", "--actor.max_tokens_per_microbatch=256", "--cluster.device=cpu"),
            f"--cluster.gpus_per_node={world_size}",
            *(f"--actor.{key}={value}" for key, value in actor.items()),
        )
        metrics[name] = read_metrics(tmp_path / name / "metrics.jsonl")[0]
    for name in layouts:
        for key in ("policy/grad_norm", "policy/entropy", "policy/log_ratio_std", "policy/ess"):
            assert math.isclose(metrics[name][key], metrics["tp1"][key], rel_tol=1e-4), (name, key)
        # The value's terms cancel: its scale is that of the terms, 1e-2.
        assert math.isclose(metrics[name]["policy/loss"], metrics["tp1"]["policy/loss"], abs_tol=1e-6), name
        assert metrics[name]["policy/log_ratio_abs_max_first"] == 0.0


@pytest.mark.slow  # the command, and what a rank does, have quick tests
def test_a_disk_that_fails_stops_the_run_only_at_its_end(tmp_path):
    model = make_tiny_qwen3(tmp_path / "model", seed=0, tie_word_embeddings=True)
    write_rows(tmp_path / "train.jsonl", [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(8)])
    for step in (1, 2):
        groups = random_rollout(seed=step, n_prompts=8, group_size=4, vocab=300)
        write_rollout(rollout_path(tmp_path / "saved", step), step, groups)
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    for step in (1, 2):
        rollout_path(run, step).mkdir(parents=True)
    (run / "logs" / "memory.jsonl").symlink_to("/dev/full")
    arguments = [
        *(f"--model.path={model}", f"--data.train={tmp_path / 'train.jsonl'}", f"--run.dir={run}"),
        *("--trainer.steps=2", "--trainer.save_every=1", "--trainer.prompts_per_step=8", "--trainer.updates_per_step=2"),
        *("--rollout.group_size=4", "--rollout.max_prompt_tokens=64", "--rollout.max_response_tokens=40"),
        *("--actor.max_tokens_per_microbatch=256", "--cluster.device=cpu", f"--rollout.replay={tmp_path / 'saved'}"),
    ]
    with subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + TIMEOUT_S
        while not (run / "config.yaml").exists():  # before it, they would be taken for another run's
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        (run / "checkpoints").mkdir()
        for step in (1, 2):
            (run / "checkpoints" / f".step_{step}.unfinished").write_text("no folder can be made here")
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, errors
    line = f"was not saved: Not a directory: {run}/checkpoints/.step_"
    assert f"the checkpoint of step 1 {line}1" in " ".join(output.split())
    assert f"error: the run failed: the checkpoint of step 2 {line}2" in errors
    assert f"warning: the rollout of step 1 is not kept: Is a directory: {run}/rollouts" in " ".join(output.split())
    assert [row["checkpoint/failed"] for row in read_metrics(run / "metrics.jsonl")] == [0, 1]
    assert (run / "hf" / "config.json").exists() and (run / "summary.json").exists()


def test_a_step_that_lacks_groups_trains_on_the_others(tmp_path):
    """Prompts were set aside until there are fewer than mini-batches: the update without any changes nothing, and is no error."""
    model = make_tiny_qwen3(tmp_path / "model", seed=0, tie_word_embeddings=True)
    write_rows(tmp_path / "train.jsonl", [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(8)])
    groups = [g for g in random_rollout(seed=5, n_prompts=8, group_size=4, vocab=300) if not has_equal_rewards(g)][:3]
    write_rollout(rollout_path(tmp_path / "saved", 1), 1, groups)
    train(
        f"--model.path={model}",
        f"--data.train={tmp_path / 'train.jsonl'}",
        f"--rollout.replay={tmp_path / 'saved'}",
        f"--run.dir={tmp_path / 'run'}",
        *("--trainer.steps=1", "--trainer.prompts_per_step=8", "--trainer.updates_per_step=4"),
        *("--rollout.group_size=4", "--rollout.max_prompt_tokens=64", "--rollout.max_response_tokens=40"),
        *("--actor.learning_rate=1e-3", "--actor.max_tokens_per_microbatch=256", "--cluster.device=cpu"),
        "--algorithm.entropy_coefficient=0.1",
    )
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["policy/trained_trajectories"] == 12 and row["policy/skipped_updates"] == 0
    assert "policy/log_ratio_abs_max_first" not in row  # it is the first update that has none
    assert math.isfinite(row["policy/grad_norm"])


@pytest.mark.slow  # three runs with two engines
@pytest.mark.timeout(900)
def test_one_step_ahead_trains_on_every_prompt_once_also_after_an_interruption(config, tmp_path):
    """Rollouts are one version old, and the one that was pending at the interruption is in the checkpoint: the same run."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    arguments = ["--config", config, "--rollout.steps_ahead=1", "--algorithm.correction=truncate", "--rollout.engines=2"]
    arguments += ["--rollout.dispatch=static", "--trainer.steps=5", "--trainer.save_every=2", "--trainer.eval_every=2"]
    train(*arguments, f"--run.dir={whole}")
    assert signalled([*arguments, f"--run.dir={run}"], "step 3/", signal.SIGUSR1, everyone=True) == 0
    train(*arguments, f"--run.dir={run}")
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1]
    assert [row["rollout/weight_version_min"] for row in rows] == [0, 0, 1, 2, 3]
    assert untimed(run) == untimed(whole)
    prompts = [group.prompt.id for step in range(1, 6) for group in read_rollout(rollout_path(run, step))]
    assert len(set(prompts)) == len(prompts) == 5 * 16
    assert all(math.isfinite(row["policy/grad_norm"]) for row in rows)
    # Evaluated with the weights of its step, not those that sample: the last ones are exported.
    accuracy = accuracy_with_transformers(run / "hf", task_of(config) / "eval.jsonl", limit=100)
    assert accuracy == pytest.approx(rows[-1]["eval/eval/accuracy"])


def test_dense_rewards_train_and_replay(config, tmp_path):
    """The reward at tokens through the whole stack: graded, packed, trained on, saved; and the same again from the saved file."""
    arguments = ["--config", config, "--reward.function=exact_dense", "--trainer.steps=2"]
    train(*arguments, f"--run.dir={tmp_path / 'run'}")
    rows = untimed(tmp_path / "run")
    groups = read_rollout(rollout_path(tmp_path / "run", 2))
    for trajectory in (t for group in groups for t in group.trajectories):
        n = len(trajectory.response_ids)
        assert len(trajectory.token_rewards) == len(trajectory.token_advantages) == n
        right = trajectory.text == trajectory.prompt.answer and not trajectory.truncated
        assert (trajectory.reward > 1 - 1e-9) == right
        if right:
            assert trajectory.token_rewards == pytest.approx([1 / n] * n)  # a character per token, and the end
    assert rows[1]["policy/log_ratio_abs_max_first"] == 0.0 and rows[1]["policy/grad_norm"] > 0
    assert any(any(t.token_advantages) for group in groups for t in group.trajectories)

    train(*arguments, f"--rollout.replay={tmp_path / 'run'}", f"--run.dir={tmp_path / 'again'}")
    for row, again in zip(rows, untimed(tmp_path / "again"), strict=True):
        same = [key for key in row if key.startswith(("policy/", "reward/mean", "reward/zero"))]
        assert {key: again[key] for key in same} == {key: row[key] for key in same}


def test_the_kl_to_the_reference_is_a_dense_reward_too(tmp_path):
    """k1, token by token, against transformers: with a dense reward it is subtracted at its token, for the advantages; the saved
    rewards are those that were given."""
    from transformers import AutoModelForCausalLM

    paths = [make_tiny_qwen3(tmp_path / name, seed=seed, tie_word_embeddings=True) for seed, name in enumerate(("model", "ref"))]
    write_rows(tmp_path / "train.jsonl", [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(4)])
    groups = random_rollout(seed=5, n_prompts=4, group_size=3, vocab=300, dense=True)
    for t in groups[0].trajectories:  # nothing to learn from but the KL, which is no reward
        t.reward, t.token_rewards = 0.0, [0.0] * len(t.token_rewards or [])
    write_rollout(tmp_path / "saved.jsonl", 1, groups)
    train(
        f"--model.path={paths[0]}",
        f"--algorithm.reference_path={paths[1]}",
        *("--algorithm.kl_coefficient=0.5", "--algorithm.kl_estimator=k1", "--reward.function=exact_dense"),
        f"--data.train={tmp_path / 'train.jsonl'}",
        f"--rollout.replay={tmp_path / 'saved.jsonl'}",
        f"--run.dir={tmp_path / 'run'}",
        *("--trainer.steps=1", "--trainer.prompts_per_step=4", "--trainer.updates_per_step=2"),
        *("--rollout.group_size=3", "--rollout.max_prompt_tokens=64", "--rollout.max_response_tokens=40"),
        *("--actor.learning_rate=1e-3", "--actor.max_tokens_per_microbatch=256", "--cluster.device=cpu"),
    )
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["reward/zero_advantage_fraction"] == 0.25
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths]
    trained = read_rollout(rollout_path(tmp_path / "run", 1))
    for group, before in zip(trained, groups, strict=True):
        penalised = []
        for t, graded in zip(group.trajectories, before.trajectories, strict=True):
            assert t.token_rewards == graded.token_rewards
            ids = torch.tensor([t.tokens])
            start = len(t.prompt.token_ids)
            with torch.no_grad():
                logprobs = [
                    m(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0] for m in models
                ]
            rewards = torch.tensor(graded.token_rewards, dtype=torch.float64) - 0.5 * (logprobs[0] - logprobs[1])
            penalised.append(torch.tensor(t.sampled(rewards.tolist()), dtype=torch.float64))
        for t, a in zip(group.trajectories, dense_advantages(penalised), strict=True):
            assert t.unit_advantages == pytest.approx(a.tolist(), abs=1e-5)
            assert any(abs(x) > 0.01 for x in t.unit_advantages)


def test_an_update_with_log_probs_that_are_not_finite_is_skipped_and_named(tmp_path):
    """A model with one NaN embedding, of a token that one response has: the run goes on, or stops when that is too much."""
    model = make_tiny_qwen3(tmp_path / "model", seed=0, tie_word_embeddings=False)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][299] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    write_rows(tmp_path / "train.jsonl", [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(4)])
    groups = random_rollout(seed=5, n_prompts=4, group_size=4, vocab=290)
    group = next(g for g in groups[:2] if not has_equal_rewards(g))
    max(group.trajectories, key=lambda t: t.response_length).response_ids[0] = 299
    write_rollout(tmp_path / "saved.jsonl", 1, groups)
    arguments = [
        f"--model.path={model}",
        f"--data.train={tmp_path / 'train.jsonl'}",
        f"--rollout.replay={tmp_path / 'saved.jsonl'}",
        *("--trainer.steps=1", "--trainer.prompts_per_step=4", "--trainer.updates_per_step=2"),
        *("--rollout.group_size=4", "--rollout.max_prompt_tokens=64", "--rollout.max_response_tokens=40"),
        *("--actor.learning_rate=1e-3", "--actor.max_tokens_per_microbatch=256", "--cluster.device=cpu"),
    ]
    output = train(*arguments, f"--run.dir={tmp_path / 'run'}")
    line = (
        f"update 1 of 2 was skipped: the trainer's log-probs are not finite in 1 of its trajectories (prompts {group.prompt.id})"
    )
    assert f"warning: {line}" in output
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (row["policy/skipped_updates"], row["policy/bad_trajectories"]) == (1, 1)
    assert row["policy/grad_norm"] > 0 and row["policy/loss"] is not None
    (exported,) = (tmp_path / "run" / "hf").glob("*.safetensors")
    assert [name for name, tensor in load_file(exported).items() if not tensor.isfinite().all()] == ["model.embed_tokens.weight"]

    stopped = [*COMMAND, *arguments, f"--run.dir={tmp_path / 'strict'}", "--algorithm.max_bad_fraction=0.05"]
    result = subprocess.run(stopped, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 1
    assert (
        f"1 of 16 trajectories are not finite, above algorithm.max_bad_fraction 0.05 (prompts {group.prompt.id})" in result.stderr
    )
    assert len(result.stderr.strip().splitlines()) == 1


def test_nothing_is_left_running_after_a_failed_run(config, tmp_path):
    """A rank that dies takes the run down with one line, and no process stays."""
    process = subprocess.Popen(
        [*COMMAND, "--config", config, f"--run.dir={tmp_path / 'run'}", "--run.max_restarts=0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("step 1/"):
                victims = [pid for pid in children(process.pid) if "ActorWorker" in command_line(pid)]
                assert len(victims) == 1
                before = children(process.pid)
                os.kill(victims[0], signal.SIGKILL)
                break
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert len(stderr.strip().splitlines()) == 1 and "training rank 0" in stderr and "actor_0.log" in stderr
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in before) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [command_line(pid) for pid in before if Path(f"/proc/{pid}").exists()]


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *children(int(child))]
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
