"""What a run tells of its own speed: profiles on request, model FLOPs, idle shares; through the command, on two ranks."""

from __future__ import annotations

import gzip
import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.models import make_tiny_qwen3
from tests.rollouts import random_rollout
from tests.test_trainer import train
from tests.workspace import refusal, settings_of, write_rows
from tic_megatron.actors.flops import ModelFlops
from tic_megatron.actors.group import ActorGroup
from tic_megatron.actors.worker import ActorWorker
from tic_megatron.config import Settings
from tic_megatron.data.packing import has_equal_rewards, split_into_mini_batches
from tic_megatron.observability.metrics import read_metrics
from tic_megatron.observability.profiles import Profile
from tic_megatron.observability.rollouts import rollout_path, write_rollout


def test_a_run_measures_itself(tmp_path: Path) -> None:
    model = make_tiny_qwen3(tmp_path / "model", seed=0, tie_word_embeddings=True)
    write_rows(tmp_path / "train.jsonl", [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(8)])
    rollouts = {step: random_rollout(seed=step, n_prompts=8, group_size=4, vocab=300) for step in (1, 2)}
    for step, groups in rollouts.items():
        write_rollout(rollout_path(tmp_path / "saved", step), step, groups)
    paths = {"model.path": model, "data.train": tmp_path / "train.jsonl", "rollout.replay": tmp_path / "saved"}
    sizes = {
        **{"trainer.steps": 2, "trainer.prompts_per_step": 8, "trainer.updates_per_step": 2, "cluster.gpus_per_node": 2},
        **{"rollout.group_size": 4, "rollout.max_prompt_tokens": 64, "rollout.max_response_tokens": 40},
        **{"actor.max_tokens_per_microbatch": 256, "actor.peak_tflops": 0.5, "actor.profile_steps": "1,2"},
        "cluster.device": "cpu",
    }
    run = tmp_path / "run"
    taken = run / "profiles" / "step_1_rank_1.json.gz"  # where the disk refuses a profile, without which the run goes on
    taken.mkdir(parents=True)
    told = train(f"--run.dir={run}", *(f"--{key}={value}" for key, value in {**paths, **sizes}.items()))

    row = read_metrics(run / "metrics.jsonl")[1]
    flops = ModelFlops.of(AutoConfig.from_pretrained(model))
    expected = 0.0
    for k, mini_batch in enumerate(split_into_mini_batches(rollouts[2], 2)):
        passes = 3 if k == 0 else 4  # the first one's old log-probs are its own
        taught = [t for group in mini_batch if not has_equal_rewards(group) for t in group.trajectories]
        expected += passes * sum(flops.forward(len(t.tokens), t.response_length) for t in taught)
    seconds = row["timing/old_logprob_s"] + row["timing/update_s"]
    assert row["throughput/model_tflops_per_rank"] == pytest.approx(expected / seconds / 2 / 1e12, rel=1e-9)
    assert row["throughput/mfu"] == pytest.approx(row["throughput/model_tflops_per_rank"] / 0.5, rel=1e-9)
    assert all(0 <= row[f"idle/actors_{phase}"] < 1 for phase in ("old_logprob", "update", "step"))

    assert f"warning: a profile of step 1 is not written: Is a directory: {taken.parent}/" in told
    taken.rmdir()
    profiles = sorted(path.name for path in (run / "profiles").iterdir())
    assert profiles == ["step_1_rank_0.json.gz", "step_2_rank_0.json.gz", "step_2_rank_1.json.gz"]
    for name in profiles[1:]:
        with gzip.open(run / "profiles" / name, "rt") as stream:
            events = json.load(stream)["traceEvents"]
        names = {event.get("name", "") for event in events if event.get("ph") == "X"}
        assert "aten::mm" in names and any("Backward" in name for name in names)
        assert any("all_reduce" in name or "allreduce" in name for name in names)


class Profiled(ActorWorker):
    """A rank that does nothing but write its profile."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile


@pytest.mark.parametrize(("operators", "limit"), [(1, 400), (200, 5000)])
def test_a_disk_that_is_full_costs_a_profile_only(tmp_path: Path, operators: int, limit: int) -> None:
    """Also that of temporary files, on which torch raises nothing."""
    rank = Profiled(Profile(tmp_path, step=3, rank=1, on_gpu=False))
    for _ in range(operators):
        torch.ones(8) @ torch.ones(8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        problem = rank.finish_profile()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert problem is not None and problem.startswith("torch could not write all of its trace: ")
    assert rank.profile is None and list((tmp_path / "profiles").iterdir()) == []

    rank.profile = Profile(tmp_path, step=3, rank=1, on_gpu=False)
    (tmp_path / "profiles" / ".step_3_rank_1.json.gz").symlink_to("/dev/full")
    problem = rank.finish_profile()
    assert problem is not None and problem.startswith("No space left on device: ") and "make room" in problem
    assert list((tmp_path / "profiles").iterdir()) == []


def test_one_line_about_the_profiles_of_all_ranks() -> None:
    class Ranks:
        def call(self, method: str) -> list[str | None]:
            assert method == "finish_profile"
            return [None, "No space left on device: a", "No space left on device: b"]

    settings = Settings()
    settings.actor.profile_steps = [3]
    pool: Any = Ranks()
    group = ActorGroup(settings, pool, [])
    group._step = 2
    assert group.finish_profile() is None
    group._step = 3
    assert group.finish_profile() == "a profile of step 3 is not written: No space left on device: a (and 1 more ranks)"


def test_steps_to_profile(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["train", "--model.path=m", "--data.train=d.jsonl", "--trainer.steps=10", "--trainer.prompts_per_step=128"]
    assert settings_of(*base[1:], "--actor.profile_steps=3,4").actor.profile_steps == [3, 4]
    assert settings_of(*base[1:]).actor.profile_steps == []
    for steps, wrong in (("3,11", "11"), ("0", "0")):
        line = refusal(capsys, [*base, f"--actor.profile_steps={steps}"])
        assert f"actor.profile_steps is {wrong}: the run has steps 1 to 10" in line
    assert "actor.profile_steps" in refusal(capsys, [*base, "--actor.profile_steps=x"])
