"""Run folders that cannot be used or hold something else, and checkpoints that cannot be continued from."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from pathlib import Path

import yaml

from tests.bad_input.cases import Case, Spoil, both, cut, folder, write
from tests.workspace import settings_of, write_rows
from tic_megatron.checkpoints import MODEL_FOLDER, SETTINGS_FILE, Checkpoints, RunState, Written
from tic_megatron.data.prompts import PromptCursor, load_prompts

RUN = "run"
STEPS = (1, 2)
STEP_1, STEP_2 = "run/checkpoints/step_1", "run/checkpoints/step_2"
SHARD, STATE, MANIFEST = "actors/__0_0.distcp", "state.json", "manifest.json"


def make_run(workspace) -> None:
    """The folder of a run that was left after its second step, all but the tensors as a real one writes it."""
    import transformers

    root = workspace.root / RUN
    (root / "logs").mkdir(parents=True)
    settings = settings_of(*workspace.base[1:]).resolve()
    settings.save(root / "config.yaml")
    (root / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "reward/mean": 0.5}) + "\n" for step in STEPS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(workspace.model)
    cursor = PromptCursor(load_prompts(workspace.root / "train.jsonl", tokenizer, settings.data), seed=0)
    config = transformers.AutoConfig.from_pretrained(workspace.model)
    checkpoints = Checkpoints(root, keep=2)
    for step in STEPS:
        cursor.next(4)
        state = RunState(step=step, cursor=cursor.state_dict())

        def describe(place: Path) -> None:
            config.save_pretrained(place / MODEL_FOLDER)
            tokenizer.save_pretrained(place / MODEL_FOLDER)
            settings.save(place / SETTINGS_FILE)

        checkpoints.save(state, functools.partial(_save_actors, step=step), describe)
    assert checkpoints.finish() is None


def _save_actors(place: Path, step: int) -> Written:
    draw = random.Random(step)
    for rank in range(2):
        (place / f"__{rank}_0.distcp").write_bytes(draw.randbytes(3000))
    (place / ".metadata").write_bytes(draw.randbytes(100))
    (place / "progress.json").write_text(json.dumps({"updates_done": 2 * step, "updates_applied": 2 * step}))
    return lambda: True


def flip(name: str) -> Spoil:
    """One bit, in the middle."""

    def spoil(workspace) -> None:
        path = workspace.root / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return spoil


def unlink(name: str) -> Spoil:
    return lambda workspace: (workspace.root / name).unlink()


def rewrite(name: str, content: str | bytes) -> Spoil:
    """Write a file of a checkpoint, and its manifest to match."""

    def spoil(workspace) -> None:
        from tic_megatron.checkpoints import _describe

        path = workspace.root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        checkpoint = next(parent for parent in path.parents if (parent / MANIFEST).exists())
        (checkpoint / MANIFEST).write_text(json.dumps(_describe(checkpoint)))

    return spoil


def change_config(**changes) -> Spoil:
    """Entries of the run's config.yaml, as `section__name`."""

    def spoil(workspace) -> None:
        path = workspace.root / RUN / "config.yaml"
        sections = yaml.safe_load(path.read_text())
        for key, value in changes.items():
            section, _, name = key.partition("__")
            sections[section][name] = value
        path.write_text(yaml.safe_dump(sections))

    return spoil


# Settings that decide what is trained: a folder whose run had others is not continued.
CHANGES = {
    "actor.learning_rate": "1e-3",
    "actor.optimizer": "sgd",
    "actor.precision": "bf16",
    "algorithm.objective": "grpo",
    "algorithm.eps_high": "0.5",
    "algorithm.kl_coefficient": "0.1",
    "algorithm.entropy_coefficient": "0.1",
    "data.prompt_field": "answer",
    "data.system_prompt": "Be brief.",
    "reward.function": "exact",
    "reward.timeout_s": "0.1",
    "reward.memory_gib": "1",
    "rollout.group_size": "8",
    "rollout.max_response_tokens": "32",
    "rollout.temperature": "0.7",
    "rollout.precision": "bf16",
    "run.seed": "7",
    "trainer.prompts_per_step": "8",
    "trainer.updates_per_step": "4",
}


def other_runs() -> list[Case]:
    cases = []
    for key, value in CHANGES.items():
        more = {
            "actor.optimizer": ("--actor.distributed_optimizer=false",),
            "data.prompt_field": ("--data.answer_field=problem",),
        }.get(key, ())
        words = ("run.dir", "holds another run", key, "--run.allow_change")
        cases.append(Case(f"other {key}", words, spoil=make_run, flags=(f"--{key}={value}", *more)))
    return cases


def fill(name: str, content: str | bytes) -> Spoil:
    return both(make_run, write(name, content))


DAMAGED = {
    "config.yaml is empty": (fill("run/config.yaml", ""), ["run.dir", "config.yaml"]),
    "config.yaml is text": (fill("run/config.yaml", "hello"), ["run.dir", "config.yaml"]),
    "config.yaml is a list": (fill("run/config.yaml", "- run\n"), ["run.dir", "config.yaml"]),
    "config.yaml has a section that is text": (fill("run/config.yaml", "run: 3\n"), ["run.dir", "config.yaml"]),
    "config.yaml is no YAML": (fill("run/config.yaml", "run: [\n"), ["run.dir", "config.yaml"]),
    "config.yaml is binary": (fill("run/config.yaml", b"\xff\xfe\x00"), ["run.dir", "config.yaml"]),
    "config.yaml has zero bytes": (fill("run/config.yaml", b"\x00" * 9), ["run.dir", "config.yaml"]),
    "config.yaml is nested too deep": (fill("run/config.yaml", "[" * 600), ["run.dir", "config.yaml"]),
    "config.yaml would make an object": (
        fill("run/config.yaml", "run: {seed: !!python/object/apply:os.getpid []}\n"),
        ["run.dir", "config.yaml"],
    ),
    "config.yaml is missing": (both(make_run, unlink("run/config.yaml")), ["run.dir", "config.yaml"]),
    "config.yaml is a folder": (both(make_run, folder("run/config.yaml")), ["run.dir", "config.yaml"]),
    "config.yaml has another type": (both(make_run, change_config(run__seed="zero")), ["run.dir", "run.seed"]),
    "metrics with a bad line": (
        fill("run/metrics.jsonl", '{"step": 1}\nhello\n{"step": 2}\n'),
        ["run.dir", "metrics.jsonl", "line 2"],
    ),
    "metrics without steps": (fill("run/metrics.jsonl", '{"reward/mean": 1}\n'), ["run.dir", "metrics.jsonl", "line 1", "step"]),
    "metrics of a list": (fill("run/metrics.jsonl", "[1]\n"), ["run.dir", "metrics.jsonl", "line 1"]),
    "metrics with text for a step": (fill("run/metrics.jsonl", '{"step": "1"}\n'), ["run.dir", "metrics.jsonl", "line 1"]),
    "metrics that are words": (
        fill("run/metrics.jsonl", '{"step": 1, "reward/mean": "good"}\n'),
        ["run.dir", "metrics.jsonl", "line 1", "'reward/mean' is not a number"],
    ),
    "metrics that are binary": (fill("run/metrics.jsonl", b"\xff\xfe\n"), ["run.dir", "metrics.jsonl"]),
    "metrics that are a folder": (both(make_run, folder("run/metrics.jsonl")), ["run.dir", "metrics.jsonl"]),
    **{
        f"{name} is a file": (write(f"run/{name}", "x"), ["run.dir", f"run/{name}"])
        for name in ("logs", "checkpoints", "rollouts", "tensorboard", "hf")
    },
    **{
        f"{name} is a folder": (folder(f"run/{name}"), ["run.dir", f"run/{name}"])
        for name in ("summary.json", "curves.png", "requeue")
    },
}

MOVED_REWARD = ("--reward.function=b/r.py:f",)


def moved_reward(workspace) -> None:
    """A run whose reward function was in `a/r.py`, and is in `b/r.py` now."""
    make_run(workspace)
    program = b"def f(response): return 1.0\n"
    write("b/r.py", program)(workspace)
    change_config(reward__function=f"{workspace.root}/a/r.py:f")(workspace)
    for name in (STEP_1, STEP_2):
        state = json.loads((workspace.root / name / STATE).read_text())
        state["programs"] = {"reward.function": hashlib.sha256(program).hexdigest()}
        rewrite(f"{name}/{STATE}", json.dumps(state))(workspace)


# What is done to a checkpoint; what is said of it.
CHECKPOINT_DAMAGE = {
    "cut off": (lambda step: cut(f"{step}/{SHARD}", -1), SHARD),
    "flipped": (lambda step: flip(f"{step}/{SHARD}"), SHARD),
    "without a shard": (lambda step: unlink(f"{step}/{SHARD}"), SHARD),
    "with a flipped state": (lambda step: flip(f"{step}/{STATE}"), STATE),
    "without its state": (lambda step: unlink(f"{step}/{STATE}"), STATE),
    "with flipped metadata": (lambda step: flip(f"{step}/actors/.metadata"), ".metadata"),
    "with a file too many": (lambda step: write(f"{step}/actors/extra", "x"), "extra"),
    "without a manifest": (lambda step: unlink(f"{step}/{MANIFEST}"), MANIFEST),
    "with a manifest that is no JSON": (lambda step: write(f"{step}/{MANIFEST}", "{"), MANIFEST),
    "with a manifest that is a list": (lambda step: write(f"{step}/{MANIFEST}", "[]"), MANIFEST),
    "with a binary manifest": (lambda step: write(f"{step}/{MANIFEST}", b"\xff\xfe"), MANIFEST),
    "with a state that is no JSON": (lambda step: rewrite(f"{step}/{STATE}", "{"), STATE),
    "with a state that is a list": (lambda step: rewrite(f"{step}/{STATE}", "[]"), STATE),
    "with a state of other names": (lambda step: rewrite(f"{step}/{STATE}", '{"steps": 3}'), STATE),
    "with text for a step": (lambda step: rewrite(f"{step}/{STATE}", '{"step": "two"}'), STATE),
    "with a cursor that is text": (lambda step: rewrite(f"{step}/{STATE}", '{"step": 2, "cursor": "x"}'), STATE),
    "with an empty cursor": (lambda step: rewrite(f"{step}/{STATE}", '{"step": 2, "cursor": {"x": 1}}'), STATE),
}


def checkpoints() -> list[Case]:
    cases = []
    for name, (damage, word) in CHECKPOINT_DAMAGE.items():
        spoil = both(make_run, damage(STEP_1), damage(STEP_2))
        cases.append(Case(f"all {name}", ("run.dir", "step_2", word), spoil=spoil))
        spoil = both(make_run, damage(STEP_2))
        cases.append(Case(f"named: {name}", ("run.resume", "step_2", word), spoil=spoil, flags=(f"--run.resume={STEP_2}",)))
        # The same for a run that goes on in another folder.
        flags = (f"--run.resume={STEP_2}", "--run.dir=other")
        if name in ("cut off", "without a manifest", "with a state of other names"):
            cases.append(Case(f"from elsewhere: {name}", ("run.resume", "step_2", word), spoil=spoil, flags=flags))
    others = ["step_3", "step_2/actors", "step_2/manifest.json", ""]
    for name in others:
        flags = (f"--run.resume=run/checkpoints/{name}",)
        cases.append(Case(f"named: {name or 'the folder of all'}", ("run.resume", "checkpoints"), spoil=make_run, flags=flags))
    other_seed = (f"--run.resume={STEP_2}", "--run.dir=other", "--run.seed=9")

    def other_problems(workspace) -> None:
        make_run(workspace)
        write_rows(workspace.root / "train.jsonl", [{"problem": f"{n}+2=", "answer": str(n + 2)} for n in range(10)])

    def kept_elsewhere(workspace) -> None:
        make_run(workspace)
        shutil.move(workspace.root / STEP_2, workspace.root / "kept")

    def other_model(workspace) -> None:
        make_run(workspace)
        workspace.edit_config(rms_norm_eps=0.01)

    def absent(name: str) -> Spoil:
        """As when the disk that it lies on is not mounted."""

        def spoil(workspace) -> None:
            make_run(workspace)
            place = workspace.root / RUN / name
            if place.exists():
                shutil.move(place, workspace.root / "elsewhere")
            place.symlink_to(workspace.root / "scratch" / name)

        return spoil

    return [
        *cases,
        *(
            Case(
                f"{name} on a disk that is absent", ("run.dir", f"run/{name} is a link to", f"scratch/{name}"), spoil=absent(name)
            )
            for name in ("checkpoints", "hf", "logs", "metrics.jsonl")
        ),
        Case(
            "a reward that was moved and changed",
            ("reward.function", "r.py:f has changed since"),
            spoil=both(moved_reward, write("b/r.py", "def f(response): return 2.0\n")),
            flags=MOVED_REWARD,
        ),
        Case(
            "other end tokens",
            ("model.path", "would end elsewhere", "(2, 5)"),
            spoil=both(make_run, write("model/generation_config.json", '{"eos_token_id": [2, 5]}')),
        ),
        Case("another model", ("model.path", "rms_norm_eps (1e-06 there, 0.01 here)"), spoil=other_model),
        Case(
            "deep manifests",
            ("run.dir", MANIFEST),
            spoil=both(make_run, *(write(f"{s}/{MANIFEST}", "[" * 100_000) for s in (STEP_1, STEP_2))),
        ),
        Case("named: the run folder", ("run.resume", "run"), spoil=make_run, flags=("--run.resume=run",)),
        Case("named: nonsense", ("run.resume", "yes"), flags=("--run.resume=yes",)),
        Case("named: a number", ("run.resume", "20"), flags=("--run.resume=20",)),
        Case("named: misspelt", ("run.resume", "Auto"), flags=("--run.resume=Auto",)),
        Case("never over a run", ("run.dir", "holds a run already"), spoil=make_run, flags=("--run.resume=never",)),
        Case("other problems", ("data.train", "not those of the checkpoint"), spoil=other_problems),
        Case(
            "from a copy: other settings",
            ("run.resume", "kept holds another run", "run.seed"),
            spoil=kept_elsewhere,
            flags=("--run.resume=kept", *other_seed[1:]),
        ),
        Case("from elsewhere: other settings", ("run.resume", "run.seed"), spoil=make_run, flags=other_seed),
        Case("fewer steps than are done", ("trainer.steps", "step_2"), spoil=make_run, flags=("--trainer.steps=1",)),
    ]


# Files of a checkpoint that match its manifest: its settings, and its model's configuration.
SETTINGS_OF: dict[str, str | bytes] = {
    "no settings": "hello",
    "binary settings": b"\xff\xfe\x00",
    "settings that are too deep": "[" * 5000,
    "another precision": "actor: {precision: int8}\n",
    "a list for a precision": "actor: {precision: [fp32]}\n",
}
MODEL_OF: dict[str, str | bytes] = {
    "no JSON": "{",
    "binary": b"\xff\xfe\x00",
    "another kind": '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}',
    "another type": '{"model_type": "qwen3", "hidden_size": "wide"}',
    "a list": "[]",
}


def of_a_checkpoint() -> list[Case]:
    argv = ("export", STEP_2, "out")
    cases = [
        Case(
            f"export: {name}",
            ("export", f"{STEP_2}/config.yaml"),
            spoil=both(make_run, rewrite(f"{STEP_2}/config.yaml", content)),
            argv=argv,
        )
        for name, content in SETTINGS_OF.items()
    ]
    for name, content in MODEL_OF.items():
        spoil = both(make_run, rewrite(f"{STEP_2}/model/config.json", content))
        cases.append(Case(f"export: a model that is {name}", ("export", f"{STEP_2}/model/config.json"), spoil=spoil, argv=argv))
        words = (f"{STEP_2}/model/config.json",)
        cases.append(Case(f"a model in the checkpoint that is {name}", words, spoil=spoil))
    return cases


def folders() -> list[Case]:
    return [
        Case("run folder: a file", ("run.dir", "train.jsonl is a file"), flags=("--run.dir=train.jsonl",)),
        Case("run folder: in a file", ("run.dir", "train.jsonl is a file"), flags=("--run.dir=train.jsonl/a/b",)),
        Case("run folder: in /proc", ("run.dir", "/proc/tic/run cannot be written"), flags=("--run.dir=/proc/tic/run",)),
        Case("run folder: a device", ("run.dir", "/dev/null is a file"), flags=("--run.dir=/dev/null",)),
        Case("run folder: the model", ("run.dir", "model.path"), flags=("--run.dir=model",)),
        *(Case(f"damaged: {name}", tuple(words), spoil=spoil) for name, (spoil, words) in DAMAGED.items()),
    ]


def all_cases() -> dict[str, list[Case]]:
    return {"other run": other_runs(), "run folder": folders(), "checkpoint": checkpoints(), "of a checkpoint": of_a_checkpoint()}
