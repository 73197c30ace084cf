"""`tic-megatron report`: the paper's tables and figures from run folders, against numpy and the paper's text."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.workspace import refusal
from tic_megatron.cli import main
from tic_megatron.evaluation.paper import COLUMNS, METHODS, MODELS, PUBLISHED

N = 30


def make_run(
    folder: Path, model: str, objective: str, normaliser: str | None = None, *, seed: int = 0, k: int = 32, **rollout
) -> dict:
    """A finished and evaluated run; the shares of right responses by benchmark, in the order of the problems."""
    draw = random.Random(f"{folder.name}{seed}")
    folder.mkdir(parents=True)
    settings = {
        "run": {"seed": seed, "dir": str(folder)},
        "model": {"path": f"Qwen/{model}"},
        "rollout": {"group_size": 16, **rollout},
        "algorithm": {"objective": objective, "normaliser": normaliser},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [{"step": s, "reward/mean": draw.random(), "eval/aime24/accuracy": draw.random()} for s in range(1, 21)]
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "config.yaml").write_text("eval: {max_response_tokens: 8192, save_every: 512}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = {}
    for column in COLUMNS:
        problems, found = [], []
        for index in range(N):
            scores = [float(draw.random() < 0.3) for _ in range(k)]
            greedy = draw.random() < 0.4
            problems.append(
                {
                    "problem": f"p{index}",
                    "scores": scores,
                    "accuracy": sum(scores) / k,
                    "greedy_score": 1.0,
                    "greedy_right": greedy,
                }
            )
            found.append(float(greedy) if column.samples == 1 else sum(scores) / k)
        path = folder / "evaluation" / column.benchmark / "problems.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in problems))
        shares[column.benchmark] = np.array(found)
    return shares


def table_rows(text: str, title: str) -> dict[tuple[str, str], list[str]]:
    part = text.partition(f"## {title}")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")]
    return {(line[0], line[1]): line[2:] for line in lines[1:]}


def shown(values: np.ndarray, sign: str = "") -> str:
    return f"{100 * values.mean():{sign}.2f} ± {100 * values.std(ddof=1) / np.sqrt(len(values)):.2f}"


def test_the_tables_are_those_of_the_saved_evaluations(tmp_path, capsys):
    grpo = make_run(tmp_path / "grpo", "Qwen3-1.7B", "dapo")
    tic = make_run(tmp_path / "tic", "Qwen3-1.7B", "tic_grpo")
    again = make_run(tmp_path / "again", "Qwen3-1.7B", "tic_grpo", seed=1)
    large = make_run(tmp_path / "large", "Qwen3-8B", "gspo", k=4)
    ablated = make_run(tmp_path / "ablated", "Qwen3-1.7B", "no_is", "token_mean")
    other = make_run(tmp_path / "other", "tiny", "no_is", "token_mean")
    folders = [str(tmp_path / name) for name in ("grpo", "tic", "again", "large", "other", "ablated")]
    assert main(["report", *folders, str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text() == text

    rows = table_rows(text, "Table 1")
    assert list(rows) == [(model, method) for model in MODELS for method in ("GRPO", "GSPO", "TIC-GRPO")]
    ablation = table_rows(text, "Table 2")
    assert list(ablation) == [("Qwen3-1.7B", m) for m in ("GRPO", "GRPO+Traj_IS", "GRPO+UB_Clip", "TIC-GRPO")]
    for column, baseline, ours, paper in zip(
        COLUMNS, rows["Qwen3-1.7B", "GRPO"][::2], rows["Qwen3-1.7B", "TIC-GRPO"][::2], (11.77, 6.98, 69.8, 12.11), strict=True
    ):
        base = grpo[column.benchmark]
        mean = (tic[column.benchmark] + again[column.benchmark]) / 2
        assert baseline == shown(base)
        assert ours == f"{shown(mean)} ({shown(mean - base, '+')})"
        assert rows["Qwen3-1.7B", "TIC-GRPO"][2 * COLUMNS.index(column) + 1] == f"{paper:g}"
    assert ablation["Qwen3-1.7B", "GRPO"] == rows["Qwen3-1.7B", "GRPO"]
    assert rows["Qwen3-8B", "GSPO"][0] == shown(large["aime24"]) + " [Avg@4]" and rows["Qwen3-8B", "GSPO"][4] == shown(
        large["math500"]
    )
    assert set(rows["Qwen3-8B", "GRPO"][::2]) == {"not measured"}
    assert table_rows(text, "Other runs")["tiny", "GRPO without IS"][0] == shown(other["aime24"])
    ours = table_rows(text, "Other runs")["Qwen3-1.7B", "GRPO without IS"][0]
    assert ours == f"{shown(ablated['aime24'])} ({shown(ablated['aime24'] - grpo['aime24'], '+')})"
    assert "[Avg@" not in rows["Qwen3-1.7B", "GRPO"][0]


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged(tmp_path, capsys):
    make_run(tmp_path / "a", "Qwen3-1.7B", "dapo")
    make_run(tmp_path / "b", "Qwen3-1.7B", "dapo", seed=1, group_size=8)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    line = refusal(capsys, ["report", *folders, str(tmp_path / "out")])
    assert "are both GRPO on Qwen3-1.7B, but differ in rollout.group_size (16, 8)" in line
    make_run(tmp_path / "c", "Qwen3-1.7B", "dapo", seed=1)
    (tmp_path / "c" / "evaluation" / "config.yaml").write_text("eval: {max_response_tokens: 4096, save_every: 1}")
    line = refusal(capsys, ["report", folders[0], str(tmp_path / "c"), str(tmp_path / "out")])
    assert "differ in evaluation: eval.max_response_tokens (8192, 4096)" in line


def test_what_methods_differ_in_besides_is_said(tmp_path, capsys):
    make_run(tmp_path / "a", "Qwen3-1.7B", "dapo")
    make_run(tmp_path / "b", "Qwen3-1.7B", "tic_grpo", "constant_length", seed=1)
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out")]) == 0
    assert "Differences besides" not in capsys.readouterr().out
    make_run(tmp_path / "c", "Qwen3-1.7B", "gspo", group_size=8)
    assert main(["report", *(str(tmp_path / name) for name in "abc"), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"- Qwen3-1.7B, rollout.group_size: 16 ({tmp_path / 'a'}, {tmp_path / 'b'}); 8 ({tmp_path / 'c'})" in out


def test_the_numbers_of_the_paper():
    """Against the tables in its text, which lies outside of the tree."""
    text = Path(__file__).resolve().parents[2] / "shared" / "paper" / "tic_grpo.txt"
    if not text.exists():
        pytest.skip("the paper's text is not at hand")
    found, model = {}, ""
    for line in text.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        model = cells[0] if cells[0] in MODELS else model
        if len(cells) == 5 and (method := next((m for m in METHODS if m.label == cells[0]), None)):
            found[model, method] = tuple(float(re.sub(r" \(.*", "", cell)) for cell in cells[1:])
    assert found == PUBLISHED


def test_the_figures(tmp_path, capsys):
    from matplotlib.image import imread

    cells = {"grpo": ("dapo", None), "tic": ("tic_grpo", None), "no_is": ("no_is", "token_mean"), "gspo": ("gspo", None)}
    for name, (objective, normaliser) in cells.items():
        make_run(tmp_path / name, "Qwen3-1.7B", objective, normaliser)
    make_run(tmp_path / "large", "Qwen3-8B", "dapo")
    folders = [str(tmp_path / name) for name in (*cells, "large")]
    assert main(["report", *folders, str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", *(f"figure_{n}.png" for n in (1, 3, 4))}
    one, two = imread(tmp_path / "out" / "figure_1.png"), imread(tmp_path / "out" / "figure_3.png")
    assert two.shape[0] > 1.7 * one.shape[0]  # a row of panels per model
    for image, n_rows in ((one, 1), (two, 2)):
        height, width, _ = image.shape
        saturation = image[..., :3].max(axis=2) - image[..., :3].min(axis=2)
        for row in range(n_rows):
            for column in range(2):
                panel = saturation[
                    row * height // n_rows : (row + 1) * height // n_rows, column * width // 2 : (column + 1) * width // 2
                ]
                assert (panel > 0.3).sum() > 200, (row, column)
    assert "![figure_3.png](figure_3.png)" in capsys.readouterr().out


def test_runs_that_were_not_evaluated_have_their_curves(tmp_path, capsys):
    make_run(tmp_path / "grpo", "Qwen3-1.7B", "dapo")
    for path in (tmp_path / "grpo" / "evaluation").rglob("*.jsonl"):
        path.unlink()
    assert main(["report", str(tmp_path / "grpo"), str(tmp_path / "out")]) == 0
    assert "evaluated on |" in (text := capsys.readouterr().out) and "| 20 | nothing |" in text
    assert (tmp_path / "out" / "figure_3.png").exists()


def spoil(name: str, text: str):
    return lambda run: (run / name).write_text(text)


BAD = {
    "no run": (lambda run: (run / "config.yaml").unlink(), "is not a run folder"),
    "no settings": (spoil("config.yaml", "a list"), "does not hold the settings of a run"),
    "no sections": (spoil("config.yaml", "model: {path: m}\nalgorithm: null"), "does not hold the settings of a run"),
    "metrics of something else": (spoil("metrics.jsonl", "[1]\n"), "is not a file of metrics"),
    "two problems of one id": (
        spoil("evaluation/aime24/problems.jsonl", 2 * '{"problem": "1", "accuracy": 1.0, "scores": [1.0]}\n'),
        "two problems of the same id",
    ),
    "metrics without steps": (spoil("metrics.jsonl", '{"reward/mean": 1}\n'), "is not a file of metrics"),
    "metrics that are a folder": (
        lambda run: [(run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()],
        "is not a file of metrics",
    ),
    "settings nested too deep": (spoil("config.yaml", "[" * 2000), "does not hold the settings of a run"),
    "no YAML": (spoil("config.yaml", "a: [1"), "does not hold the settings of a run"),
    "another method": (
        spoil("config.yaml", "model: {path: m}\nalgorithm: {objective: grpo, normaliser: null}"),
        "algorithm.objective grpo",
    ),
    "damaged metrics": (spoil("metrics.jsonl", "nonsense\n{}\n"), "is not a file of metrics"),
    "damaged results": (
        spoil("evaluation/aime24/problems.jsonl", '{"problem": "1", "accuracy": "x"}\n'),
        "is not of an evaluation",
    ),
    "results of something else": (spoil("evaluation/math500/problems.jsonl", "[1]\n"), "is not of an evaluation"),
}


@pytest.mark.parametrize(("damage", "words"), BAD.values(), ids=BAD)
def test_bad_runs_are_named(tmp_path, capsys, damage, words):
    make_run(tmp_path / "run", "Qwen3-1.7B", "dapo")
    damage(tmp_path / "run")
    line = refusal(capsys, ["report", str(tmp_path / "run"), str(tmp_path / "out")])
    assert words in line and str(tmp_path / "run") in line
    assert not (tmp_path / "out").exists()


def test_bad_words_are_refused(tmp_path, capsys):
    make_run(tmp_path / "run", "Qwen3-1.7B", "dapo")
    run = str(tmp_path / "run")
    assert "report takes 2 words or more: tic-megatron report RUN... OUT" in refusal(capsys, ["report", run])
    assert "is given twice" in refusal(capsys, ["report", run, run, str(tmp_path / "out")])
    assert "give the folder for the report last" in refusal(capsys, ["report", run, run])
    assert "cannot be written" in refusal(capsys, ["report", run, "/dev/null/out"])
    assert "cannot be looked up" in refusal(capsys, ["report", run, "x" * 300])
    assert "cannot be looked up" in refusal(capsys, ["report", "x" * 300, str(tmp_path / "out")])
    assert main(["report", "--help"]) == 0
    assert "RUN..." in capsys.readouterr().out
