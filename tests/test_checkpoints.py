"""Checkpoints of a run folder: complete or absent, checked before use."""

from __future__ import annotations

import errno
import pickle
import random
import re
import shutil
import signal
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from tic_megatron.actors.group import ActorGroup
from tic_megatron.actors.megatron.checkpoint import _tensors
from tic_megatron.actors.megatron.metadata import check_common, check_metadata
from tic_megatron.checkpoints import MANIFEST, CheckpointError, Checkpoints, RunState, find_damage, find_pending, load_state
from tic_megatron.cli import main
from tic_megatron.config import Settings, SettingsError
from tic_megatron.remote import Deadline, WorkerError, WorkerPool


def write_actors(folder, step):
    draw = random.Random(step)
    for rank in range(2):
        (folder / f"__{rank}_0.distcp").write_bytes(draw.randbytes(5000))


def write_model(folder):
    (folder / "config.json").write_text("{}")


def save(checkpoints, step):
    def begin(folder):
        write_actors(folder, step)
        return lambda: True

    checkpoints.save(RunState(step=step, cursor={"place": step}), begin, write_model)
    assert checkpoints.finish() is None


@pytest.fixture
def saved(tmp_path):
    """Steps 10, 20 and 30, of which two are kept."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        save(checkpoints, step)
    return checkpoints


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_newest_is_found_and_the_oldest_are_removed(saved):
    checkpoint, problems = saved.newest()
    assert checkpoint.name == "step_30" and problems == []
    assert load_state(checkpoint) == RunState(step=30, cursor={"place": 30})
    assert sorted(path.name for path in saved.folder.iterdir()) == ["step_20", "step_30"]
    assert Checkpoints(saved.folder / "empty", keep=1).newest() == (None, [])


@pytest.mark.parametrize("damage", [truncate, flip, lambda file: file.unlink()], ids=["truncated", "flipped", "removed"])
@pytest.mark.parametrize("number", range(5))
def test_a_damaged_checkpoint_is_passed_over(saved, damage, number):
    file = files(saved.folder / "step_30")[number]
    damage(file)
    checkpoint, (problem,) = saved.newest()
    assert checkpoint.name == "step_20"
    # (A manifest that is another cannot say so: the file whose hash it is about differs.)
    assert "step_30 is" in problem and (file.name in problem or file.name == MANIFEST)


def test_there_are_five_files(saved):
    assert len(files(saved.folder / "step_30")) == 5


def test_a_file_too_many_is_damage_too(saved):
    (saved.folder / "step_30" / "actors" / "__2_0.distcp").write_bytes(b"?")
    checkpoint, (problem,) = saved.newest()
    assert checkpoint.name == "step_20" and "__2_0.distcp was not saved with it" in problem


def test_checkpoints_after_the_one_that_a_run_continues_from_are_moved_aside(saved):
    """They are of another course of the run, and would count as its newest."""
    before, _ = saved.newest()
    older = before.with_name("step_20")
    assert before.name == "step_30"
    saved.set_aside_others(older)
    assert saved.newest() == (older, [])
    assert (saved.folder / "step_30.replaced").is_dir()


def test_one_that_is_removed_while_it_is_read_is_no_damage(saved, monkeypatch):
    """By the run, which has saved a newer one: an export looks again."""
    looked = []

    def look(checkpoint):
        looked.append(checkpoint.name)
        if len(looked) == 1:
            for step in (40, 50):
                save(saved, step)
        return find_damage(checkpoint)

    monkeypatch.setattr("tic_megatron.checkpoints.find_damage", look)
    checkpoint, problems = saved.newest()
    assert (checkpoint.name, problems) == ("step_50", [])
    assert looked == ["step_30", "step_50"]


def test_links_are_followed(saved, tmp_path):
    """Checkpoints may lie on another disk, which may be absent."""
    moved = (saved.folder / "step_30").rename(tmp_path / "moved")
    (saved.folder / "step_30").symlink_to(moved)
    (saved.folder / "latest").symlink_to(saved.folder / "step_20")
    assert saved.newest()[0].name == "step_30"
    moved.rename(tmp_path / "absent")
    checkpoint, (problem,) = saved.newest()
    assert checkpoint.name == "step_20" and "step_30 is not a complete checkpoint" in problem
    saved.set_aside_others(saved.folder / "latest")
    assert sorted(path.name for path in saved.folder.iterdir()) == ["latest", "step_20", "step_30.replaced"]
    (saved.folder / "step_20").rename(tmp_path / "step_20")
    (saved.folder / "step_20").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match=r"no checkpoint of .* is intact: .*step_20 is not"):
        saved.newest()


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(saved, tmp_path, monkeypatch):
    """The run would begin again, and drop its metrics."""
    moved = saved.folder.rename(tmp_path / "scratch")
    assert saved.newest() == (None, [])
    saved.folder.symlink_to(moved)
    assert saved.newest()[0].name == "step_30"
    moved.rename(tmp_path / "absent")
    for use in (saved.newest, lambda: saved.set_aside_others(None)):
        with pytest.raises(SettingsError, match=r"checkpoints cannot be read \(No such file .*may hold checkpoints; restore it"):
            use()

    def refuse(place):
        raise PermissionError(errno.EACCES, "Permission denied")

    saved.folder.unlink()
    (tmp_path / "absent").rename(saved.folder)
    monkeypatch.setattr("os.listdir", refuse)  # as it does, but for root
    with pytest.raises(SettingsError, match=r"checkpoints cannot be read \(Permission denied\)"):
        saved.newest()


def test_an_unreadable_manifest_is_told_apart_from_none(saved):
    manifest = saved.folder / "step_30" / MANIFEST
    manifest.unlink()
    assert f"no {MANIFEST}" in find_damage(manifest.parent)
    manifest.mkdir()  # which cannot be read even by root
    assert "cannot be read (Is a directory)" in find_damage(manifest.parent)


def test_an_export_that_was_killed_is_in_nobodys_way(tmp_path, capsys):
    (tmp_path / ".out.unfinished" / "part").mkdir(parents=True)
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "there is no" in capsys.readouterr().err


def test_an_export_goes_where_it_does_no_harm(saved, capsys):
    run, checkpoint = saved.folder.parent, saved.folder / "step_30"
    for words, message in {
        (run, checkpoint / "hf"): "lies in the checkpoint",
        (run, saved.folder / "step_99"): "would be taken for a checkpoint",
        (run, "x" * 300): "cannot be looked up (File name too long)",
        ("x" * 300, run / "out"): "cannot be looked up (File name too long)",
        (run, "~nobody-of-that-name/out"): "a user that this machine does not have",
        (run / "nothing", run / "deep" / "out"): "there is no",
    }.items():
        assert main(["export", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    assert find_damage(checkpoint) is None and not (run / "deep").exists()


def test_a_run_does_not_start_again_over_damaged_checkpoints(saved):
    for step in (20, 30):
        flip(files(saved.folder / f"step_{step}")[0])
    with pytest.raises(SettingsError, match=r"no checkpoint of .* is intact: .*step_30 is damaged"):
        saved.newest()


def test_what_was_damaged_is_not_overwritten(saved):
    for number in ("", "1"):
        damaged = files(saved.folder / "step_30")[0]
        flip(damaged)
        content = damaged.read_bytes()
        save(saved, 30)
        assert saved.newest()[0].name == "step_30"
        aside = saved.folder / f"step_30.replaced{number}"
        assert (aside / damaged.relative_to(saved.folder / "step_30")).read_bytes() == content


def test_a_rollout_that_was_ready_too_late_lies_beside_its_checkpoint(saved):
    checkpoint = saved.folder / "step_30"
    assert find_pending(checkpoint) == (checkpoint, None)
    for _ in range(2):  # a damaged one is replaced
        saved.add_pending(30, lambda folder: (folder / "groups").write_text("all of them"))
        assert saved.problems() == [] and saved.newest() == (checkpoint, [])
        folder, problem = find_pending(checkpoint)
        assert problem is None and (folder / "groups").read_text() == "all of them"
        flip(folder / "groups")
        folder, problem = find_pending(checkpoint)
        assert folder is None and "step_30.pending is damaged: groups" in problem

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    saved.add_pending(20, full)
    assert saved.problems()[0].startswith("the rollout ahead of step 20 was not saved: No space left on device")
    assert find_pending(saved.folder / "step_20") == (saved.folder / "step_20", None)
    link = saved.folder.parent / "latest"
    link.symlink_to(saved.folder / "step_10")
    saved.add_pending(10, lambda folder: (folder / "groups").write_text("x"))
    assert find_pending(link) == (saved.folder / "step_10.pending", None)
    shutil.rmtree(saved.folder / "step_10.pending")
    # That of a checkpoint which somebody has removed is not taken for another one's.
    saved.add_pending(30, lambda folder: (folder / "groups").write_text("of the first step 30"))
    shutil.rmtree(checkpoint)
    save(saved, 30)
    assert find_pending(checkpoint) == (checkpoint, None)
    saved.add_pending(30, lambda folder: (folder / "groups").write_text("x"))
    # It goes where its checkpoint goes.
    saved.set_aside_others(saved.folder / "step_20")
    assert sorted(path.name for path in saved.folder.iterdir()) == ["step_20", "step_30.replaced", "step_30.replaced.pending"]
    saved.add_pending(20, lambda folder: (folder / "groups").write_text("x"))
    for step in (30, 40):
        save(saved, step)
    assert not [path.name for path in saved.folder.iterdir() if path.name.startswith("step_20")]


def test_checkpoints_of_another_course_are_moved_aside(saved, tmp_path):
    """Those of the folder that a run goes on in, which continues from a copy of elsewhere."""
    copy = shutil.copytree(saved.folder / "step_20", tmp_path / "copy" / "step_20")
    assert (saved.own_step(copy), saved.own_step(saved.folder / "step_20"), saved.own_step(None)) == (None, 20, None)
    saved.set_aside_others(copy)
    assert sorted(path.name for path in saved.folder.iterdir()) == ["step_20.replaced", "step_30.replaced"]
    assert saved.newest() == (None, [])


def test_a_process_of_low_priority_may_stay_so(saved, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.setpriority", refuse)  # as it does from nice 15, but for root
    assert find_damage(saved.folder / "step_30") is None


def test_finish_waits_after_an_interruption_too(tmp_path):
    """(Python's `join`, once interrupted, takes the thread for ended.)"""
    checkpoints, written = Checkpoints(tmp_path, keep=2), threading.Event()

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        checkpoints.save(RunState(step=1), lambda folder: written.is_set, write_model)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.finish()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert checkpoints.finish(timeout_s=0.1) is None and checkpoints.newest() == (None, [])
    written.set()
    assert checkpoints.finish() is None and checkpoints.newest()[0].name == "step_1"


def test_what_is_moved_aside_takes_a_free_name(saved):
    for number in ("", "1"):
        (saved.folder / f"step_30.replaced{number}").mkdir()
    (saved.folder / "step_30.replaced").rmdir()  # by somebody who needs room
    (saved.folder / "step_30.replaced1" / "kept").touch()
    saved.set_aside_others(saved.folder / "step_20")
    assert (saved.folder / "step_30.replaced" / MANIFEST).is_file()


def test_a_save_that_the_end_of_the_actors_overtakes_is_no_checkpoint(saved):
    """As after a second Ctrl-C: the thread that waits for the ranks finds none."""
    pool = WorkerPool("actor", [Mock()], [""], deadline=lambda method: Deadline(1.0, "cluster.timeout_s"))
    group = ActorGroup(Settings(), pool, [])
    pool.workers = []
    for asked in (lambda: pool.call("checkpoint_written"), lambda: pool.call_each("complete_checkpoint", [([],)])):
        with pytest.raises(WorkerError, match="the actors have been ended"):
            asked()
    pool.call = lambda method, *_: [None]  # still writing
    written = group.begin_checkpoint(saved.folder)
    del pool.call
    saved.save(RunState(step=40), lambda folder: written, write_model)
    assert saved.finish(timeout_s=20) == "the checkpoint of step 40 was not saved: the actors have been ended"
    assert saved.newest()[0].name == "step_30" and (saved.folder / "step_20").is_dir()


def test_ranks_that_never_write_cost_the_checkpoint_and_not_the_run(saved):
    settings = Settings()
    settings.cluster.timeout_s = 0.1
    pool: Any = SimpleNamespace(
        call=lambda method, *_: {"begin_checkpoint": None, "checkpoint_written": [{"entries": []}, None]}[method]
    )
    saved.save(RunState(step=40), ActorGroup(settings, pool, []).begin_checkpoint, write_model)
    problem = saved.finish(timeout_s=20)
    assert "1 of 2 ranks, rank 1 first, have not written to" in problem and "cluster.timeout_s" in problem
    assert names(saved) == ["step_20", "step_30"]


class Writers:
    """Actors that write until they are told to stop."""

    def __init__(self):
        self.done, self.problem = threading.Event(), None

    def begin(self, folder):
        write_actors(folder, 40)
        return self.written

    def written(self):
        if self.problem is not None:
            raise self.problem
        return self.done.is_set()


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_run_goes_on_while_a_checkpoint_is_written(saved):
    writers, state = Writers(), RunState(step=40, wall_s=1.0)
    saved.save(state, writers.begin, write_model)
    state.step = 41  # as the run goes on
    assert names(saved) == [".step_40.unfinished", "step_20", "step_30"]
    assert saved.newest()[0].name == "step_30"
    writers.done.set()
    assert saved.finish() is None
    assert names(saved) == ["step_30", "step_40"]
    assert load_state(saved.newest()[0]) == RunState(step=40, wall_s=1.0)


def test_a_save_waits_for_the_one_before(saved):
    writers = Writers()
    saved.save(RunState(step=40), writers.begin, write_model)
    threading.Timer(0.1, writers.done.set).start()
    save(saved, 50)
    assert names(saved) == ["step_40", "step_50"]


FAILURES = {
    "full": (OSError(errno.ENOSPC, "No space left on device", "f"), "No space left on device: f (make room"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "f"), "Read-only file system: f (make it writable"),
    "rank": (CheckpointError("rank 3 has written nothing"), "rank 3 has written nothing"),
}


@pytest.mark.parametrize("begins", [True, False], ids=["later", "at once"])
@pytest.mark.parametrize(("error", "line"), FAILURES.values(), ids=FAILURES)
def test_a_save_that_fails_leaves_the_others_as_they_are(saved, begins, error, line):
    writers = Writers()
    writers.problem = error

    def fails(folder):
        raise error

    saved.save(RunState(step=40), writers.begin if begins else fails, write_model)
    problem = saved.finish()
    assert problem.startswith("the checkpoint of step 40 was not saved: ") and line in problem
    assert saved.problems() == [problem] and saved.problems() == [] and saved.failed == 1
    assert names(saved) == ["step_20", "step_30"]
    assert all(find_damage(saved.folder / name) is None for name in names(saved))
    save(saved, 40)
    assert saved.newest()[0].name == "step_40" and saved.failed == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(RunState(step=10), Writers().begin, write_model)
    assert re.search(r"step 10 was not saved: (Not a directory|File exists): .*checkpoints", checkpoints.finish())


def test_what_a_killed_run_left_is_removed(saved):
    left = saved.folder / ".step_40.unfinished" / "actors"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    assert saved.newest()[0].name == "step_30"
    saved.remove_unfinished()
    assert names(saved) == ["step_20", "step_30"]


class Command:
    """What an unpickler would run."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_metadata_makes_checkpoint_classes_only(tmp_path):
    file, touched = tmp_path / ".metadata", tmp_path / "touched"
    tensor = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([2, 3]), [])
    file.write_bytes(pickle.dumps(Metadata({"a": tensor})))
    check_metadata(file)
    file.write_bytes(pickle.dumps(Metadata({"a": tensor}, planner_data=Command(touched))))
    with pytest.raises(
        pickle.UnpicklingError, match=r"asks for pathlib\.Path\.touch, which no checkpoint needs|asks for builtins"
    ):
        check_metadata(file)
    assert not touched.exists()


def test_only_tensors_of_the_model_are_saved():
    """Transformer Engine's layers keep objects besides, which nobody could read again: one each, or one for each expert."""
    names = ["linear_qkv.weight", "mlp.experts.linear_fc1.weight0", "mlp.experts.linear_fc1.weight15"]
    objects = ["linear_qkv._extra_state", *(f"mlp.experts.linear_fc1._extra_state{number or ''}" for number in range(16))]
    model: Any = SimpleNamespace(sharded_state_dict=lambda: dict.fromkeys([*names, *objects]))
    assert list(_tensors(model)) == names


def _text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _that_changes_what_it_names(file):
    """A pickle of checkpoint classes only when it is read for the first time: it sets an attribute of a function that it may
    name, which is still set when it is read again, and makes `os.system` of `torch.Size`."""
    function, asked = b"ctorch.serialization\n_get_layout\n", b"h\x00"
    data = b"\x80\x04" + function + _text("torch.strided") + b"\x85Rq\x000"

    def choose(first, second, slot):
        cache = b"}(" + asked + first + _text("again") + second + b"u"
        return function + b"}" + _text("cache") + cache + b"sb0" + function + asked + b"\x85Rq" + bytes([slot]) + b"0"

    data += choose(_text("torch"), _text("posix"), 1) + choose(_text("Size"), _text("system"), 2)
    data += choose(b")", _text(f"touch {file}"), 3) + b"h\x01h\x02\x93h\x03\x85R0"
    data += function + b"}" + _text("cache") + b"}(" + _text("torch.strided") + _text("again") + b"usb0"
    return data + b"ctorch.distributed.checkpoint.metadata\nMetadata\n}\x85R."


def test_metadata_changes_nothing_that_it_names(tmp_path):
    torch.serialization._get_layout("torch.strided")  # fills its cache
    before = dict(torch.serialization._get_layout.cache)
    file, touched = tmp_path / ".metadata", tmp_path / "touched"
    file.write_bytes(_that_changes_what_it_names(touched))
    try:
        with pytest.raises(pickle.UnpicklingError, match=r"changes <function _get_layout.*, which no checkpoint needs"):
            check_metadata(file)
        assert torch.serialization._get_layout.cache == before
    finally:
        torch.serialization._get_layout.cache = before
    for named in ("Metadata", "TensorProperties"):  # a class, whose instances are made afterwards
        state = b"N}" + _text("storage_data") + b"Ns\x86b"
        file.write_bytes(b"\x80\x04ctorch.distributed.checkpoint.metadata\n" + named.encode() + b"\n" + state + b".")
        with pytest.raises(pickle.UnpicklingError, match=r"changes <class '.*, which no checkpoint needs"):
            check_metadata(file)


@pytest.mark.parametrize("content", [{"a": 1}, Command("touched")])
def test_nothing_is_common_to_all_ranks(tmp_path, monkeypatch, content):
    """Whatever the environment says, which Megatron-core leaves it to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = tmp_path / "common.pt"
    torch.save({}, file)
    check_common(file)
    torch.save(content, file)
    with pytest.raises(pickle.UnpicklingError):
        check_common(file)
    assert not (tmp_path / "touched").exists()


def test_a_checkpoint_is_checked_where_nothing_can_be_synchronized(saved, monkeypatch):
    """On a file system that is an image, say; and what cannot be read is told."""

    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("os.fsync", refuse)
    assert find_damage(saved.folder / "step_30") is None
    assert saved.newest() == (saved.folder / "step_30", [])
