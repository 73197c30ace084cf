"""Bad command lines, YAML files, problems and saved rollouts."""

from __future__ import annotations

import gzip
import json

from tests.bad_input.cases import Case, both, folder, write
from tests.rollouts import random_rollout
from tic_megatron.observability.rollouts import write_rollout

COMMAND_LINES = {
    "nothing": ([], ["no subcommand", "train"]),
    "no such subcommand": (["trian"], ["'trian'", "train"]),
    "flags without a subcommand": (["--trainer.steps=3"], ["'--trainer.steps=3'", "train"]),
    "nothing but the subcommand": (["train"], ["model.path is not given"]),
    "a stray word": (["train", "quickstart.yaml"], ["'quickstart.yaml'", "--section.setting VALUE"]),
    "one dash": (["train", "-config", "x.yaml"], ["'-config'"]),
    "no value at the end": (["train", "--trainer.steps"], ["--trainer.steps needs a value"]),
    "no value before a flag": (["train", "--trainer.steps", "--run.seed=1"], ["--trainer.steps needs a value"]),
    "config without a value": (["train", "--config"], ["--config needs a value"]),
    "no name": (["train", "--=3"], ["'--=3'"]),
    "two dashes": (["train", "--", "x"], ["'--'"]),
    "value of print_config": (["train", "--print_config=yes"], ["print_config"]),
    "a section": (["train", "--trainer=3"], ["trainer is a section", "--trainer.steps"]),
    "a deeper name": (["train", "--trainer.steps.x=3"], ["unknown setting trainer.steps.x", "trainer.steps"]),
    "no section": (["train", "--steps=3"], ["unknown setting steps", "did you mean trainer.steps?"]),
    "another case": (["train", "--Trainer.Steps=3"], ["unknown setting Trainer.Steps", "did you mean trainer.steps?"]),
    "a dash for an underscore": (["train", "--trainer.prompts-per-step=3"], ["did you mean trainer.prompts_per_step?"]),
    "appending": (["train", "--run.allow_change+=run.seed"], ["unknown setting run.allow_change+", "run.allow_change"]),
    "config that is missing": (["train", "--config=no.yaml"], ["--config no.yaml"]),
    "config that is a folder": (["train", "--config=."], ["--config ."]),
    "config below a file": (["train", "--config=train.jsonl/c.yaml"], ["--config train.jsonl/c.yaml"]),
    "config of an unknown user": (["train", f"--config={'x' * 300}.yaml"], ["--config", "long"]),
    "a value that is very long": (["train", f"--trainer.steps={'9' * 5000}"], ["trainer.steps"]),
}

# Name -> text of the config file, words.
CONFIGS: dict[str, tuple[str | bytes, list[str]]] = {
    "unknown section": ("run:\n  seed: 1\ntariner:\n  steps: 4\n", ["unknown setting tariner (c.yaml:3)"]),
    "unknown dotted": ("run.sed: 1\n", ["unknown setting run.sed (c.yaml:1)", "did you mean run.seed?"]),
    "list at the top": ("- run\n", ["c.yaml:1", "name: value"]),
    "text at the top": ("hello\n", ["c.yaml:1", "name: value"]),
    "number at the top": ("\n\n3\n", ["c.yaml:3", "name: value"]),
    "number for a section": ("run: 3\n", ["c.yaml:1", "section run"]),
    "list for a section": ("run:\n  - seed: 3\n", ["c.yaml:2", "section run"]),
    "set twice": ("run:\n  seed: 3\n  seed: 4\n", ["c.yaml:3: run.seed", "first at c.yaml:2"]),
    "set twice, dotted": ("run:\n  seed: 3\nrun.seed: 4\n", ["c.yaml:3: run.seed", "first at c.yaml:2"]),
    "name that is a list": ("? [a]\n: 3\n", ["c.yaml:1", "name"]),
    "a line without a colon": ("run:\n  seed: 4\n bad\n", ["c.yaml:3: malformed YAML"]),
    "an open list": ("run:\n  allow_change: [a\n", ["c.yaml:3: malformed YAML"]),
    "an open text": ('run:\n  name: "a\n', ["c.yaml", "malformed YAML"]),
    "a tab": ("run:\n\tseed: 4\n", ["c.yaml:2: malformed YAML"]),
    "two colons": ("run:\n  seed: 4: 5\n", ["c.yaml:2: malformed YAML"]),
    "indentation": ("run:\n  seed: 4\n   name: x\n", ["c.yaml:3: malformed YAML"]),
    "two documents": ("run:\n---\nrun:\n", ["c.yaml:2: malformed YAML"]),
    "an unknown anchor": ("run:\n  seed: *x\n", ["c.yaml:2: malformed YAML"]),
    "an endless list": ("run:\n  allow_change: &x [*x]\n", ["run.allow_change", "c.yaml:2", "a list"]),
    "a list that explodes": (
        "run:\n  allow_change:\n"
        + "    - &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"    - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        ["run.allow_change", "c.yaml:3", "a list"],
    ),
    "deep nesting": ("run:\n  allow_change: " + "[" * 600 + "]" * 600 + "\n", ["c.yaml", "nest"]),
    "deep mappings": ("run: " + "{a: " * 600 + "1" + "}" * 600 + "\n", ["c.yaml", "nest"]),
    "an object": ("run:\n  seed: !!python/object/apply:os.getpid []\n", ["run.seed", "c.yaml:2", "whole number"]),
    "a character that there is not": ('run:\n  name: "\\UFFFFFFFF"\n', ["c.yaml: malformed YAML"]),
    "half a character": ('run:\n  name: "\\ud800"\n', ["run.name"]),
    "an unknown directive": ("%YAML 9.9\n---\nrun:\n  seed: 1\n", ["c.yaml:1: malformed YAML"]),
    "control characters": ("run:\n  name: a\x01b\n", ["c.yaml", "malformed YAML"]),
    "zero bytes": (b"\x00" * 100, ["c.yaml", "malformed YAML"]),
    "not UTF-8": (b"run:\n  name: \xff\xfe\n", ["c.yaml", "UTF-8"]),
    "UTF-16": ("run:\n  seed: 4\n".encode("utf-16"), ["c.yaml", "UTF-8"]),
    "compressed": (gzip.compress(b"run:\n  seed: 4\n"), ["c.yaml", "UTF-8"]),
    "a program": (b"\x7fELF\x02\x01\x01\x00" + bytes(range(256)), ["c.yaml", "UTF-8"]),
    "JSON that is cut off": ('{"run": {"seed": 4', ["c.yaml:1: malformed YAML"]),
    "merged settings": ("run: &r\n  seed: 4\neval:\n  <<: *r\n", ["unknown setting eval.<<", "c.yaml:4"]),
}

GOOD_ROW = '{"problem": "1+1=", "answer": "2"}'

# The third row of a file of five; what must be said after its place.
BAD_ROWS = {
    "no JSON": ("hello", ["malformed JSON"]),
    "cut off": ('{"problem": "1+1=", "answ', ["malformed JSON"]),
    "a comma too many": ('{"problem": "1+1=", "answer": "2",}', ["malformed JSON"]),
    "two objects": (GOOD_ROW + GOOD_ROW, ["malformed JSON"]),
    "single quotes": ("{'problem': '1+1=', 'answer': '2'}", ["malformed JSON"]),
    "a control character": ('{"problem": "1+\x011=", "answer": "2"}', ["malformed JSON"]),
    "no value": ('{"problem": "1+1=", "answer": NaN}', ["NaN"]),
    "infinity": ('{"problem": "1+1=", "answer": 1e999}', ["answer"]),
    "a number that is very long": ('{"problem": "1+1=", "answer": ' + "9" * 5000 + "}", ["malformed JSON"]),
    "deep nesting": ('{"problem": ' + "[" * 100_000, ["malformed JSON", "nest"]),
    "a list": ('["1+1=", "2"]', ["JSON object", "problem"]),
    "a number": ("3", ["JSON object"]),
    "null": ("null", ["JSON object"]),
    "no problem": ('{"question": "1+1=", "answer": "2"}', ["no field 'problem'", "'question'", "data.prompt_field"]),
    "no answer": ('{"problem": "1+1=", "solution": "2"}', ["no field 'answer'", "'solution'", "data.answer_field"]),
    "an empty object": ("{}", ["no field 'problem'", "none"]),
    "an empty problem": ('{"problem": "", "answer": "2"}', ["'problem' is empty"]),
    "a blank problem": ('{"problem": " \\n\\t", "answer": "2"}', ["'problem' is empty"]),
    "an empty answer": ('{"problem": "1+1=", "answer": ""}', ["'answer' is empty"]),
    "a problem that is null": ('{"problem": null, "answer": "2"}', ["'problem' is null"]),
    "an answer that is null": ('{"problem": "1+1=", "answer": null}', ["'answer' is null"]),
    "a problem that is a number": ('{"problem": 11, "answer": "2"}', ["'problem' is 11"]),
    "an answer that is a truth value": ('{"problem": "1+1=", "answer": true}', ["'answer' is true"]),
    "an answer that is a list": ('{"problem": "1+1=", "answer": ["2"]}', ["'answer' is"]),
    "no messages": ('{"problem": [], "answer": "2"}', ["'problem' is []"]),
    "a message that is text": ('{"problem": ["1+1="], "answer": "2"}', ["'problem' is", "chat messages"]),
    "a message without a role": ('{"problem": [{"content": "1+1="}], "answer": "2"}', ["chat messages"]),
    "a message without content": ('{"problem": [{"role": "user"}], "answer": "2"}', ["chat messages"]),
    "an empty message": ('{"problem": [{"role": "user", "content": " "}], "answer": "2"}', ["'problem' is empty"]),
    "a role that is a number": ('{"problem": [{"role": 1, "content": "1+1="}], "answer": "2"}', ["chat messages"]),
    "an answered problem": (
        '{"problem": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}], "answer": "2"}',
        ["assistant"],
    ),
    "half a character": ('{"problem": "1+\\ud800", "answer": "2"}', ["'problem'", "surrogate"]),
    "half a character in the answer": ('{"problem": "1+1=", "answer": "\\udc00"}', ["'answer'", "surrogate"]),
    "half a character in the role": ('{"problem": [{"role": "\\ud800", "content": "1"}], "answer": "2"}', ["'problem'"]),
    "the problem twice": ('{"problem": "1+1=", "problem": "1+2=", "answer": "2"}', ["'problem'", "twice"]),
    "the answer twice": ('{"problem": "1+1=", "answer": "2", "answer": "3"}', ["'answer'", "twice"]),
    "an id with half a character": ('{"problem": "1+1=", "answer": "2", "id": "\\ud800"}', ["'id'"]),
}
BAD_BYTES = {
    "Latin-1": ('{"problem": "wie groß", "answer": "2"}'.encode("latin-1"), ["UTF-8"]),
    "zero bytes": (b"\x00" * 40, ["malformed JSON"]),
    "a compressed row": (gzip.compress(GOOD_ROW.encode(), mtime=0), ["UTF-8"]),
}
# Whole files.
BAD_FILES = {
    "empty": (b"", ["no problems"]),
    "blank": (b"\n  \n\t\n", ["no problems"]),
    "a JSON list": (f"[{GOOD_ROW}]".encode(), [".jsonl:1", "JSON object"]),
    "JSON over several lines": (json.dumps(json.loads(GOOD_ROW), indent=1).encode(), [".jsonl:1", "malformed JSON"]),
    "UTF-16": (f"{GOOD_ROW}\n".encode("utf-16"), [".jsonl:1", "UTF-8"]),
    "compressed": (gzip.compress(f"{GOOD_ROW}\n".encode() * 9, mtime=0), [".jsonl:1", "UTF-8"]),
    "compressed, cut off": (gzip.compress(f"{GOOD_ROW}\n".encode() * 9, mtime=0)[:20], [".jsonl:1", "UTF-8"]),
    "Parquet": (b"PAR1" + bytes(range(256)) + b"PAR1", [".jsonl:1"]),
    "one long line": (b"x" * 100_000, [".jsonl:1", "malformed JSON"]),
}
OTHER_FORMATS = ("train.jsonl.gz", "train.txt", "train.pkl", "train")


def problems() -> list[Case]:
    cases = []
    settings = {"data.train": "train.jsonl", "data.eval": "eval.jsonl"}
    rows = {name: (row.encode(), words) for name, (row, words) in BAD_ROWS.items()} | BAD_BYTES
    for number, (name, (row, words)) in enumerate(rows.items()):
        file = "eval.jsonl" if number % 3 == 0 else "train.jsonl"
        content = b"\n".join([GOOD_ROW.encode()] * 2 + [row] + [GOOD_ROW.encode()] * 2)
        flags = ("--data.eval=eval.jsonl",) if file == "eval.jsonl" else ()
        cases.append(Case(f"row: {name}", (f"{file}:3", *words), spoil=write(file, content), flags=flags))
    for setting, file in settings.items():
        for name, (content, words) in BAD_FILES.items():
            flags = (f"--{setting}={file}",)
            cases.append(Case(f"{setting}: {name}", (file, *words), spoil=write(file, content), flags=flags))
        cases.append(Case(f"{setting}: folder", (setting, file), spoil=folder(file), flags=(f"--{setting}={file}",)))
    for name in OTHER_FORMATS:
        cases.append(Case(name, ("data.train", name, ".jsonl"), spoil=write(name, GOOD_ROW), flags=(f"--data.train={name}",)))
    long = json.dumps({"problem": "1+1=" * 200, "answer": "2"})
    cases += [
        Case("all too long", ("data.train", "0 problems left", "max_prompt_tokens 5"), flags=("--rollout.max_prompt_tokens=5",)),
        Case(
            "too many too long",
            ("data.train", "3 problems left", "leaving out 7"),
            spoil=write("train.jsonl", "\n".join([GOOD_ROW] * 3 + [long] * 7)),
        ),
        Case(
            "a long held-out problem",
            ("data.eval", "eval.jsonl:2", "max_prompt_tokens 128"),
            spoil=write("eval.jsonl", f"{GOOD_ROW}\n{long}\n"),
            flags=("--data.eval=eval.jsonl",),
        ),
        Case("another field", ("train.jsonl:1", "'question'", "data.prompt_field"), flags=("--data.prompt_field=question",)),
        Case("a field of a field", ("train.jsonl:1", "'answer.value'"), flags=("--data.answer_field=answer.value",)),
        Case("no held-out problems wanted", ("data.eval_limit is 0",), flags=("--data.eval_limit=0",)),
    ]
    return cases


def _rollout(edit=None, *, drop: int | None = None, vocab: int = 300, raw: bytes | None = None, to: str = "replay", steps=(1,)):
    """Write saved rollouts of four groups of four; `edit` changes the second row, or `raw` replaces it."""

    def spoil(workspace) -> None:
        for step in steps:
            path = workspace.root / to / "rollouts" / f"step_{step:06d}.jsonl"
            write_rollout(path, step, random_rollout(seed=0, n_prompts=4, group_size=4, vocab=vocab))
            rows = path.read_bytes().splitlines()[:drop]
            if raw is not None:
                rows[1] = raw
            if edit:
                row = json.loads(rows[1])
                edit(row)
                rows[1] = json.dumps(row).encode()
            path.write_bytes(b"".join(row + b"\n" for row in rows))

    return spoil


def _set(**changes):
    return lambda row: row.update(changes)


REPLAYS = {
    "no JSON": (_rollout(raw=b"hello"), ["line 2"]),
    "a list": (_rollout(raw=b"[]"), ["line 2", "prompt_id"]),
    "deep nesting": (_rollout(raw=b"[" * 100_000), ["line 2"]),
    "a long number": (_rollout(raw=b"9" * 5000), ["line 2"]),
    "not UTF-8": (_rollout(raw=b"\xff\xfe"), ["rollout.replay", "UTF-8"]),
    "cut off": (_rollout(raw=b'{"step": 1, "prompt'), ["line 2"]),
    "no tokens": (_rollout(_set(response_ids=[], inference_logprobs=[], response_mask=[])), ["line 2", "response_ids"]),
    "log-probs of other tokens": (_rollout(_set(inference_logprobs=[0.0])), ["line 2", "inference_logprobs"]),
    "no mask": (_rollout(lambda row: row.pop("response_mask")), ["line 2", "response_mask"]),
    "text for tokens": (
        _rollout(lambda row: row.update(response_ids=["a"] * len(row["response_ids"]))),
        ["line 2", "response_ids"],
    ),
    "text for log-probs": (
        _rollout(lambda row: row.update(inference_logprobs=["a"] * len(row["response_ids"]))),
        ["line 2", "inference_logprobs"],
    ),
    "a mask of twos": (
        _rollout(lambda row: row.update(response_mask=[2] * len(row["response_ids"]))),
        ["line 2", "response_mask"],
    ),
    "negative tokens": (
        _rollout(lambda row: row.update(response_ids=[-1] * len(row["response_ids"]))),
        ["line 2", "response_ids"],
    ),
    "text for the prompt's tokens": (_rollout(_set(prompt_token_ids=["a"])), ["line 2", "prompt_token_ids"]),
    "no prompt": (_rollout(_set(prompt_token_ids=[])), ["line 2", "prompt_token_ids"]),
    "text for the reward": (_rollout(_set(reward="1")), ["line 2", "reward"]),
    "text for the group": (_rollout(_set(group="1")), ["line 2", "group"]),
    "tokens of a larger vocabulary": (_rollout(vocab=5000), ["rollout.replay", "vocab_size of the model is 320"]),
    "empty": (_rollout(drop=0), ["rollout.replay", "empty"]),
    "prompts longer than a micro-batch": (
        _rollout(lambda row: row.update(prompt_token_ids=[5] * 600)),
        ["rollout.replay", "actor.max_tokens_per_microbatch 512"],
    ),
}


def replays() -> list[Case]:
    # Of one step, so that nothing but the spoilt file is wrong.
    flags = ("--rollout.replay=replay", "--trainer.steps=1")
    cases = [Case(f"replay: {name}", tuple(words), spoil=spoil, flags=flags) for name, (spoil, words) in REPLAYS.items()]
    cases += [
        Case(
            "replay: damaged in a later step",
            ("rollout.replay", "step_000002.jsonl", "vocab_size of the model is 320"),
            spoil=both(_rollout(), _rollout(vocab=5000, steps=(2,))),
            flags=("--rollout.replay=replay", "--trainer.steps=2"),
        ),
        Case("replay: missing", ("rollout.replay", "nope"), flags=("--rollout.replay=nope",)),
        Case("replay: folder without rollouts", ("rollout.replay", "model"), flags=("--rollout.replay=model",)),
        Case("replay: problems", ("rollout.replay", "train.jsonl", "line 1"), flags=("--rollout.replay=train.jsonl",)),
        Case(
            "replay: a step is missing",
            ("rollout.replay", "step 2"),
            spoil=_rollout(steps=(1, 3)),
            flags=("--rollout.replay=replay", "--trainer.steps=3"),
        ),
        Case(
            "replay: fewer steps than the run",
            ("rollout.replay", "step 3"),
            spoil=_rollout(steps=(1, 2)),
            flags=("--rollout.replay=replay", "--trainer.steps=4"),
        ),
        Case(
            "replay: graded otherwise",
            ("rollout.replay", "reward.function"),
            spoil=_rollout(),
            flags=(*flags, "--reward.function=exact_dense"),
        ),
    ]
    return cases


PLUGINS = {
    "no Python": (b"def f(:\n", ["algorithm.plugin", "plugin.py"]),
    "binary": (b"\x7fELF\x00\x01", ["algorithm.plugin", "plugin.py"]),
    "raises": (b"raise RuntimeError('out of order')\n", ["algorithm.plugin", "plugin.py", "out of order"]),
    "leaves": (b"import sys\nsys.exit(0)\n", ["algorithm.plugin", "plugin.py"]),
    "takes a name": (
        b"from tic_megatron.algorithms.objectives import OBJECTIVES, register_objective\n"
        b"register_objective('grpo', OBJECTIVES['grpo'])\n",
        ["algorithm.plugin", "'grpo'"],
    ),
    "registers nothing": (b"", ["algorithm.objective", "'mine'"]),
    "registers no objective": (
        b"from tic_megatron.algorithms.objectives import register_objective\nregister_objective('mine', 3)\n",
        ["algorithm.objective", "'mine'"],
    ),
}


def plugins() -> list[Case]:
    flags = ("--algorithm.plugin=plugin.py", "--algorithm.objective=mine")
    return [
        Case(f"plugin: {name}", tuple(words), spoil=write("plugin.py", text), flags=flags, python=True)
        for name, (text, words) in PLUGINS.items()
    ] + [Case("plugin: folder", ("algorithm.plugin", "plugin.py"), spoil=folder("plugin.py"), flags=flags)]


def all_cases() -> dict[str, list[Case]]:
    return {
        "command line": [Case(name, tuple(words), argv=tuple(argv)) for name, (argv, words) in COMMAND_LINES.items()],
        "config file": [Case(name, tuple(words), config=text) for name, (text, words) in CONFIGS.items()],
        "data": problems(),
        "replay": replays(),
        "plugin": plugins(),
    }
