"""A checkpoint continues in another layout as in its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.layouts.cases import FULL, Layout
from tests.layouts.proof import merge, relative_error
from tic_megatron.checkpoints import Checkpoints, RunState

BOUND = 1e-5
ADAM_EPS = 1e-5
"""AdamW divides small gradients by themselves; with its usual epsilon, their rounding would become a move of the rate."""
CHANGES = [
    # (model, layout that saves, settings of it, [(layout that continues, settings of it, in the fast tier)])
    (
        "untied",
        Layout(tp=2),
        {},
        [
            (Layout(pp=2), {}, True),
            (Layout(dp=2), {}, True),
            (Layout(), {"distributed_optimizer": False}, True),
            (Layout(cp=2), {}, False),
            (Layout(pp=2, vpp=2), {}, False),
            (Layout(tp=2, pp=2, dp=2), {}, False),
        ],
    ),
    (
        "tied",
        Layout(pp=2, vpp=2, dp=2),
        {},
        [(Layout(tp=2), {}, False), (Layout(dp=8), {}, False), (Layout(pp=2, options={"layers_in_first_stage": 1}), {}, False)],
    ),
    ("tied", Layout(), {"distributed_optimizer": False}, [(Layout(pp=2), {}, False), (Layout(dp=2), {}, False)]),
    (
        "untied",
        Layout(dp=2),
        {"precision": "bf16"},
        [(Layout(), {}, False), (Layout(tp=2), {"distributed_optimizer": False}, False)],
    ),
    (
        "experts",
        Layout(ep=2, dp=2),
        {},
        [
            (Layout(), {}, True),
            (Layout(dp=2), {}, False),
            (Layout(pp=2), {}, False),
            (Layout(tp=2, etp=2), {}, False),
            (Layout(tp=2, ep=2, etp=1, dp=2), {}, False),
        ],
    ),
    (
        "experts",
        Layout(),
        {},
        [
            (Layout(ep=2, dp=2), {}, True),
            (Layout(tp=2, pp=2, ep=2, etp=2, cp=2), {}, False),
            (Layout(pp=2, vpp=2, ep=2, cp=2), {}, False),
        ],
    ),
]


def cases():
    for model, layout, options, others in CHANGES:
        for tier in (True, False):
            chosen = [(other, theirs) for other, theirs, fast in others if fast == tier]
            if chosen:
                name = "-".join([model, str(layout), *map(str, options.values()), "fast" if tier else "more"])
                yield pytest.param(model, layout, options, chosen, id=name, marks=() if tier else FULL)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by torch alone."""
    found: dict = {}
    _load_state_dict(found, FileSystemReader(directory), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(("model", "layout", "options", "others"), list(cases()))
def test_a_checkpoint_continues_in_another_layout(prover, rank_pool, tmp_path, model, layout, options, others):
    def run(layout: Layout, read: Path | None, write: Path, changes: dict) -> list[dict]:
        write.mkdir()
        job = {"layout": layout, "path": prover.paths(model)["old"], "read": read and str(read), "write": str(write)}
        job["options"] = {"adam_eps": ADAM_EPS} | options | changes
        return rank_pool.run("tests.layouts.ranks:continued", world_size=layout.world_size, timeout_s=180, **job)

    own = run(layout, None, tmp_path / "own", {})
    saved = tensors(tmp_path / "own")
    assert sum(name.startswith("optimizer.state.exp_avg.") for name in saved) * 4 == len(saved)
    assert all(values.any() for name, values in saved.items() if name.startswith("optimizer.state.exp_avg"))
    bound = BOUND if options.get("precision") != "bf16" else 2e-2
    for number, (other, changes) in enumerate(others):
        views = run(other, tmp_path / "own", tmp_path / f"other{number}", changes)
        # What was read is what was saved, bit by bit: weights, fp32 main weights, moments.
        again = tensors(tmp_path / f"other{number}")
        assert saved.keys() == again.keys()
        different = [name for name, values in saved.items() if not torch.equal(values, again[name])]
        assert not different, (other, different)
        progress = [(tmp_path / name / "progress.json").read_text() for name in ("own", f"other{number}")]
        assert progress[0] == progress[1]

        for k in range(2):
            assert reported(views, "norms", k)[0] == pytest.approx(reported(own, "norms", k)[0], rel=bound), other
            assert reported(views, "rates", k)[0] == reported(own, "rates", k)[0]
            assert sum(reported(views, "values", k)) == pytest.approx(sum(reported(own, "values", k)), abs=bound * 1e-2), other
        expected, got = merge(v["parameters"] for v in own), merge(v["parameters"] for v in views)
        errors = {name: relative_error(got[name], values.double()) for name, values in expected.items()}
        assert expected.keys() == got.keys()
        assert max(errors.values()) < bound, (other, max(errors, key=errors.get), max(errors.values()))


def reported(views: list[dict], what: str, k: int) -> list[float]:
    return [view[what][k] for view in views if view[what][k] is not None]


OVERTAKEN = [
    ("untied", Layout(tp=2), {}, True),
    ("experts", Layout(ep=2, dp=2), {}, True),
    ("untied", Layout(dp=2), {"precision": "bf16"}, False),
    ("untied", Layout(dp=2), {"precision": "bf16", "distributed_optimizer": False}, False),
    ("tied", Layout(pp=2, vpp=2), {"precision": "fp16"}, False),
    ("untied", Layout(), {"optimizer": "sgd", "distributed_optimizer": False}, False),
]


@pytest.mark.parametrize(
    ("model", "layout", "options"),
    [pytest.param(m, x, o, id="-".join([m, str(x), *o]), marks=() if f else FULL) for m, x, o, f in OVERTAKEN],
)
def test_what_is_written_is_what_was_there_when_the_save_began(prover, rank_pool, tmp_path, model, layout, options):
    """Training goes on, and everything that it may change is spoilt, before the first byte is written."""
    folders = [tmp_path / "at once", tmp_path / "later"]
    for folder in folders:
        folder.mkdir()
    job = {"layout": layout, "path": prover.paths(model)["old"], "folders": list(map(str, folders)), "options": options}
    for view in rank_pool.run("tests.layouts.ranks:overtaken", world_size=layout.world_size, timeout_s=180, **job):
        assert view["same"] and view["n"] > 20 and view["updates"] == (1, 1)
    files = sorted(path.name for path in folders[0].iterdir())
    assert "__0_0.distcp" in files
    for name in files:
        if name != ".metadata":  # has a random name of its own
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_a_failing_disk_of_one_rank_is_told_and_stops_nobody(prover, rank_pool, tmp_path):
    job = {"layout": Layout(dp=2), "path": prover.paths("untied")["old"], "folder": str(tmp_path)}
    said = rank_pool.run("tests.layouts.ranks:failing_disk", world_size=2, timeout_s=180, **job)[0]
    lines = {"limit": "File too large", "full": "No space left on device", "absent": "No such file or directory"}
    for case, line in lines.items():
        good, bad = said[case]
        assert good is None
        assert bad.startswith(f"{line}: {tmp_path / case}") and "__1_0.distcp (" in bad
    assert said["good"] == [None, None]
    assert len(tensors(tmp_path / "good")) > 40


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    changed = {"truncated": content[:-1], "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]}
    file.write_bytes(changed[how])


def test_damage_to_any_file_of_a_real_checkpoint_is_found(prover, rank_pool, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    job = {"layout": Layout(tp=2), "path": prover.paths("untied")["old"], "read": None, "options": {}}

    def write(folder: Path):
        rank_pool.run("tests.layouts.ranks:continued", world_size=2, timeout_s=180, write=str(folder), **job)
        return lambda: True

    def describe(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    for step in (10, 20):
        checkpoints.save(RunState(step=step), write, describe)
        assert checkpoints.finish() is None
    newest = checkpoints.folder / "step_20"
    files = [path for path in newest.rglob("*") if path.is_file()]
    names = {"manifest.json", "state.json", "progress.json", ".metadata", "metadata.json", "common.pt", "config.json"}
    assert {path.name for path in files} == names | {"__0_0.distcp", "__1_0.distcp"}
    for file in files:
        for how in ("truncated", "flipped"):
            content = file.read_bytes()
            damage(file, how)
            found, (line,) = checkpoints.newest()
            assert found.name == "step_10" and "step_20 is damaged" in line, (file, how)
            file.write_bytes(content)
    assert checkpoints.newest() == (newest, [])
