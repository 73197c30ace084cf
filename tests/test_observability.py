"""What a run keeps and shows: metrics, saved rollouts, curves, progress, logs."""

from __future__ import annotations

import io
import json
import math
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tic_megatron.config import LoggingSettings, SettingsError
from tic_megatron.observability.files import atomic_writer
from tic_megatron.observability.memory import MemoryLog
from tic_megatron.observability.metrics import MetricsLogger, check_logging, read_metrics
from tic_megatron.observability.plots import _reward, plot_curves
from tic_megatron.observability.progress import ProgressDisplay, format_duration, sparkline
from tic_megatron.observability.rollouts import find_rollout, read_replay, read_rollout, rollout_path, write_rollout
from tic_megatron.observability.summary import write_summary
from tic_megatron.observability.timers import PhaseTimers
from tic_megatron.rewards.workers import append_lines
from tic_megatron.trajectory import Group, Prompt, Trajectory

ONLY_JSONL = LoggingSettings(tensorboard=False)


def test_metrics_rows_survive_values_that_are_not_finite(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, ONLY_JSONL, "run", {})
    logger.log(1, {"a": 0.1, "b": math.nan, "c": math.inf, "d": -math.inf, "e": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # A reader that follows the standard, which has no NaN or Infinity.
    strict = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "a": 0.1, "b": None, "c": None, "d": None, "e": 3.0}
    assert read_metrics(tmp_path / "metrics.jsonl") == [strict]


def test_metrics_take_numbers_of_tensor_libraries(tmp_path: Path) -> None:
    import numpy as np
    import torch

    MetricsLogger(tmp_path, ONLY_JSONL, "run", {}).log(1, {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": np.int64(2)})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 0.5, "b": 0.25, "c": 2.0}]


def test_resumed_run_has_the_metrics_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def metrics(step: int) -> dict[str, float]:
        rng = random.Random(step)
        return {"reward/mean": rng.random(), "policy/loss": math.nan if step == 4 else rng.gauss(0, 1e-7)}

    whole = MetricsLogger(tmp_path / "whole", ONLY_JSONL, "run", {})
    for step in range(1, 11):
        whole.log(step, metrics(step))
    first = MetricsLogger(tmp_path / "cut", ONLY_JSONL, "run", {})
    for step in range(1, 8):  # the checkpoint is of step 5; the run dies while it writes step 8
        first.log(step, metrics(step))
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 8, "reward/me')
    second = MetricsLogger(tmp_path / "cut", ONLY_JSONL, "run", {})
    second.truncate_after(5)
    for step in range(6, 11):
        second.log(step, metrics(step))
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["metrics.jsonl"]


def test_rows_are_kept_when_a_run_begins_again(tmp_path: Path) -> None:
    """As after its checkpoints were lost: somebody may want to see what there was."""
    assert MetricsLogger(tmp_path, ONLY_JSONL, "run", {}).set_aside() is None
    for number in range(2):
        logger = MetricsLogger(tmp_path, ONLY_JSONL, "run", {})
        logger.log(1, {"a": float(number)})
        assert logger.set_aside() == tmp_path / f"metrics.jsonl.replaced{number or ''}"
        logger.log(1, {"a": 7.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 7.0}]
        (tmp_path / "metrics.jsonl").unlink()
    assert read_metrics(tmp_path / "metrics.jsonl.replaced1") == [{"step": 1, "a": 1.0}]


def test_metrics_with_a_bad_line_in_the_middle_name_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_tensorboard_reads_the_files_and_forgets_what_was_truncated(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = MetricsLogger(tmp_path, LoggingSettings(), "run", {})
    for step in range(1, 6):
        first.log(step, {"reward/mean": step / 10, "policy/loss": math.nan})
    first.close()
    time.sleep(1.1)  # the files are ordered by the second in their names
    second = MetricsLogger(tmp_path, LoggingSettings(), "run", {})
    second.truncate_after(3)
    for step in range(4, 7):
        second.log(step, {"reward/mean": step / 100})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    points = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert points == [(step, pytest.approx(step / (10 if step < 4 else 100))) for step in range(1, 7)]


def test_wandb_without_the_package_is_refused() -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(SettingsError, match=r"logging\.wandb_project.*pip install wandb"):
            check_logging(LoggingSettings(wandb_project="p"))
    check_logging(LoggingSettings())


def test_loggers_do_not_load_torch(tmp_path: Path) -> None:
    code = """
        import sys
        from tic_megatron.config import LoggingSettings
        from tic_megatron.observability import logs, metrics, plots, progress, rollouts, summary, timers
        assert sys.modules.keys().isdisjoint({"tensorboard", "matplotlib", "wandb"})
        metrics.MetricsLogger(sys.argv[1], LoggingSettings(), "run", {}).log(1, {"reward/mean": 0.5})
        plots.plot_curves(sys.argv[1])
        print(sys.modules.keys() & {"torch", "tensorflow", "ray", "vllm", "megatron", "matplotlib.pyplot"})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()"


def test_atomic_writer_leaves_the_old_file_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic_writer(path) as stream:
        stream.write("old")
    with pytest.raises(RuntimeError), atomic_writer(path) as stream:
        stream.write("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_timers_add_up_and_reset() -> None:
    timers = PhaseTimers()
    for _ in range(2):
        with timers("generate"):
            time.sleep(0.02)
    with pytest.raises(RuntimeError), timers("update"):
        raise RuntimeError
    metrics = timers.metrics()
    assert metrics.keys() == {"timing/generate_s", "timing/update_s"}
    assert 0.04 <= metrics["timing/generate_s"] < 1 and metrics["timing/update_s"] < 0.5
    assert timers.seconds("generate") == metrics["timing/generate_s"] and timers.seconds("none") == 0.0
    timers.reset()
    assert timers.metrics() == {}


floats = st.floats(allow_nan=False, allow_infinity=True)
token_ids = st.integers(0, 200_000)


@st.composite
def groups_strategy(draw: st.DrawFn) -> list[Group]:
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        texts = st.text(max_size=30)
        prompt = Prompt(draw(texts), draw(texts), draw(texts), tuple(draw(st.lists(token_ids, min_size=1, max_size=5))))
        group = Group(prompt, [])
        for _ in range(draw(st.integers(1, 3))):
            n = draw(st.integers(1, 6))
            group.trajectories.append(
                Trajectory(
                    prompt=prompt,
                    response_ids=draw(st.lists(token_ids, min_size=n, max_size=n)),
                    inference_logprobs=draw(st.lists(floats, min_size=n, max_size=n)),
                    response_mask=draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)),
                    text=draw(texts),
                    truncated=draw(st.booleans()),
                    weight_version=draw(st.integers(0, 10**6)),
                    reward=draw(floats),
                    advantage=draw(floats),
                )
            )
        groups.append(group)
    return groups


@given(groups_strategy())
@settings(max_examples=60, deadline=None)
def test_rollouts_round_trip_exactly(tmp_path_factory: pytest.TempPathFactory, groups: list[Group]) -> None:
    path = rollout_path(tmp_path_factory.mktemp("run"), 12)
    write_rollout(path, 12, groups)
    assert path.name == "step_000012.jsonl" and path.parent.name == "rollouts"
    assert read_rollout(path) == groups


def test_rollouts_keep_odd_text_and_prompts_that_occur_twice(tmp_path: Path) -> None:
    text = 'lines\r\n\x85\u2028 \ud800 \ufffd \x00 "quotes" 中 \\n'
    prompt = Prompt("train:1", text, "4", (1, 2))
    groups = [Group(prompt, [Trajectory(prompt, [3], [-1e-300], [1], text + str(i), False, i)]) for i in range(2)]
    write_rollout(tmp_path / "step_000001.jsonl", 1, groups)
    assert read_rollout(tmp_path / "step_000001.jsonl") == groups
    row = json.loads((tmp_path / "step_000001.jsonl").read_bytes().split(b"\n")[0].decode("utf-8", "surrogatepass"))
    assert {"step": 1, "prompt_id": "train:1", "answer": "4", "reward": 0.0, "weight_version": 0}.items() <= row.items()
    assert "中" in (tmp_path / "step_000001.jsonl").read_text(encoding="utf-8", errors="surrogatepass")


def test_rollouts_keep_dense_rewards_and_a_replay_must_ask_for_them(tmp_path: Path) -> None:
    prompt = Prompt("p", "1+1=", "2", (1,))
    dense = Trajectory(
        prompt, [3, 4], [-0.5, -0.5], [1, 0], "2", False, 0, reward=0.1, token_rewards=[0.1, 0.0], token_advantages=[-0.3, 0.0]
    )
    plain = Trajectory(prompt, [3], [-0.5], [1], "2", False, 0, reward=0.1)
    dense_file, plain_file, old_file = (tmp_path / f"{name}.jsonl" for name in ("dense", "plain", "old"))
    write_rollout(dense_file, 1, [Group(prompt, [dense])])
    write_rollout(plain_file, 1, [Group(prompt, [plain])])
    row = json.loads(plain_file.read_text())
    old_file.write_text(json.dumps({k: v for k, v in row.items() if not k.startswith("token_")}) + "\n")  # of an earlier version
    assert read_replay(dense_file, dense=True) == [Group(prompt, [dense])]
    assert read_replay(plain_file, dense=False) == read_replay(old_file, dense=False) == [Group(prompt, [plain])]
    with pytest.raises(SettingsError, match=r"dense\.jsonl holds one reward per token, but reward\.function gives one per resp"):
        read_replay(dense_file, dense=False)
    with pytest.raises(
        SettingsError, match=r"plain\.jsonl holds one reward per response, but reward\.function gives one per tok"
    ):
        read_replay(plain_file, dense=True)
    dense_file.write_text(dense_file.read_text().replace('"token_rewards": [0.1, 0.0]', '"token_rewards": [0.1]'))
    with pytest.raises(SettingsError, match="line 1: token_rewards must be null or have one number per response token"):
        read_rollout(dense_file)


def test_replay_finds_the_rollout_of_a_step(tmp_path: Path) -> None:
    path = rollout_path(tmp_path, 3)
    prompt = Prompt("p", "1+1=", "2", (1,))
    write_rollout(path, 3, [Group(prompt, [Trajectory(prompt, [3], [-0.5], [1], "2", False, 0)])])
    assert find_rollout(path, 1) == path  # one file serves every step
    assert find_rollout(path.parent, 3) == find_rollout(tmp_path, 3) == path
    for replay, step in ((tmp_path, 4), (tmp_path / "none", 3)):
        with pytest.raises(SettingsError, match=rf"rollout\.replay: no saved rollout of step {step}"):
            find_rollout(replay, step)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a JSON object"),
        ("[1]", "line 2: field 'prompt_id' is missing"),
        ('{"prompt_id": 3}', "field 'prompt_id' is missing or not text"),
        (None, "one entry per response token"),
    ],
)
def test_bad_rollouts_are_named(tmp_path: Path, line: str | None, message: str) -> None:
    path = tmp_path / "step_000001.jsonl"
    prompt = Prompt("p", "1+1=", "2", (1,))
    write_rollout(path, 1, [Group(prompt, [Trajectory(prompt, [3, 4], [-0.5, -0.5], [1, 1], "2", False, 0)])])
    good = path.read_text()
    path.write_text(good + (line or good.replace('"response_ids": [3, 4]', '"response_ids": [3]').strip()) + "\n")
    with pytest.raises(SettingsError, match=message):
        read_rollout(path)
    path.write_text("")
    with pytest.raises(SettingsError, match="is empty"):
        read_rollout(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_rollout(tmp_path / "none.jsonl")


def _synthetic_run(run_dir: Path, steps: int) -> None:
    logger = MetricsLogger(run_dir, ONLY_JSONL, "run", {})
    rng = random.Random(0)
    for step in range(1, steps + 1):
        metrics = {
            "reward/mean": 0.3 + 0.5 * step / steps,
            "policy/log_ratio_std": math.nan if step == 2 else 0.3 + rng.gauss(0, 0.02),
            "policy/ratio_capped_fraction": 0.07,
            "policy/ess": 0.9,
            "policy/grad_norm": rng.random(),
            "timing/generate_s": 0.4,
            "timing/update_s": 1.5,
        }
        logger.log(step, metrics | ({"eval/heldout/accuracy": 0.5} if step % 10 == 0 else {}))


@pytest.mark.parametrize("steps", [1, 2, 120, 3000])
def test_curves(tmp_path: Path, steps: int) -> None:
    from matplotlib.image import imread

    _synthetic_run(tmp_path, steps)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    image = imread(path)
    height, width, _ = image.shape
    assert height > 700 and width > 1400
    # Every one of the 2 x 3 panels holds colour (a drawn curve), not just axes and text.
    saturation = image[..., :3].max(axis=2) - image[..., :3].min(axis=2)
    for row in range(2):
        for column in range(3):
            panel = saturation[row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3]
            drawn = (panel > 0.3).sum()
            assert drawn > 8 or (steps < 10 and (row, column) == (0, 1)), (row, column, drawn)


@pytest.mark.parametrize(("reward", "shown"), [(-0.9, True), (0.4, False)])
def test_negative_rewards_are_on_the_page(reward: float, shown: bool) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    _reward(axes, [{"step": step, "reward/mean": reward, "reward/zero_advantage_fraction": 0.1} for step in range(1, 30)])
    bottom, top = axes.get_ylim()
    assert bottom <= reward <= top and (bottom == 0) == (not shown)


def test_curves_show_the_accuracy_before_training(tmp_path: Path) -> None:
    _synthetic_run(tmp_path, 10)  # one evaluation, at step 10
    without = plot_curves(tmp_path).read_bytes()
    assert plot_curves(tmp_path, {"eval/heldout/accuracy": 0.25}).read_bytes() != without


def test_curves_without_metrics(tmp_path: Path) -> None:
    assert plot_curves(tmp_path) is None
    MetricsLogger(tmp_path, ONLY_JSONL, "run", {}).log(1, {"something/else": 1.0})
    assert plot_curves(tmp_path).stat().st_size > 1000  # six panels that say "not measured"


def test_summary_is_json_whatever_it_holds(tmp_path: Path) -> None:
    path = write_summary(tmp_path, {"accuracy_before": None, "accuracy_after": math.nan, "steps": 3, "wall_s": 1.5})
    assert json.loads(path.read_text()) == {"accuracy_before": None, "accuracy_after": None, "steps": 3, "wall_s": 1.5}


METRICS = {
    "reward/mean": 0.31,
    "policy/log_ratio_std": 0.2104,
    "policy/ratio_capped_fraction": 0.061,
    "throughput/tokens_per_s": 18231.4,
}


def test_progress_is_one_line_per_step_without_a_terminal() -> None:
    stream = io.StringIO()
    with ProgressDisplay(30, title="quickstart", stream=stream) as progress:
        progress.accuracy(0.412)
        progress.phase("generate")
        progress.update(1, METRICS)
        progress.note("checkpoint saved")
        progress.update(2, METRICS | {"eval/heldout/accuracy": 0.55, "reward/mean": math.nan})
        progress.update(3, {})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and lines[1] == "checkpoint saved"
    assert lines[0].startswith(
        "step 1/30  reward 0.310  held-out accuracy 0.412  log-ratio std 0.210  capped 6.1%  tokens/s 18,231  s/step"
    )
    assert "held-out accuracy 0.412 -> 0.550" in lines[2] and "\x1b" not in stream.getvalue()


def test_progress_in_a_terminal_shows_all_and_cleans_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ProgressDisplay(30, title="quickstart", stream=stream) as progress:
        progress.accuracy(0.412)
        for step in range(1, 4):
            progress.phase("generate")
            progress.update(step, METRICS | {"reward/mean": step / 10})
        panel = Console(width=120, file=io.StringIO(), record=True)
        panel.print(progress._panel())
    shown = panel.export_text()
    for text in ("quickstart", "step 3/30", "generate", "left", "0.300", "0.412", "0.210", "6.1%", "18,231", "▁▅█"):
        assert text in shown, text
    assert "step 3/30" in stream.getvalue() and stream.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_time_left_follows_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 2.0, 4.0, 6.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = ProgressDisplay(10, start_step=5, stream=io.StringIO())
    assert progress.seconds_left is None
    with progress:
        for step in (6, 7, 8):
            progress.update(step, {})
    assert progress.seconds_left == pytest.approx(4.0)
    assert [format_duration(seconds) for seconds in (0.4, 59.6, 245, 7805)] == ["0s", "1m00s", "4m05s", "2h10m"]
    assert sparkline([0.5, 0.5]) == "▁▁" and sparkline([0.0, 0.5, 1.0]) == "▁▅█"


def test_redirected_output_lands_in_the_log(tmp_path: Path) -> None:
    code = """
        import logging, os, subprocess, sys, warnings
        from tic_megatron.observability.logs import redirect_output
        print("before", flush=True)
        redirect_output(sys.argv[1])
        print("python stdout é \\ud800")
        print("python stderr", file=sys.stderr)
        os.write(1, b"raw descriptor 1\\n"); os.write(2, b"raw descriptor 2\\n")
        logging.getLogger("library").warning("logged")
        subprocess.run(["echo", "child process"])
        sys.exit("the end")
    """
    log = tmp_path / "logs" / "actor.log"
    for _ in range(2):  # the second one appends
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(log)], check=False, capture_output=True, text=True
        )
        assert (done.stdout, done.stderr, done.returncode) == ("before\n", "", 1)
    content = log.read_text(encoding="utf-8")
    for text in ("python stdout é \\ud800", "python stderr", "raw descriptor 1", "raw descriptor 2", "child process", "the end"):
        assert content.count(text) == 2, text
    assert content.count("WARNING library: logged") == 2


def test_a_note_may_hold_anything() -> None:
    """A half of a character, which a model has written and a reward's error message repeats, in a terminal of any encoding."""
    for encoding in ("utf-8", "ascii", "latin-1"):
        raw = io.BytesIO()
        with ProgressDisplay(3, title="t", stream=io.TextIOWrapper(raw, encoding=encoding)) as progress:
            progress.note("not a number: \ud83d caf\u00e9 \u2713")
            assert raw.getvalue().decode(encoding).startswith("not a number: \\ud83d caf")


def test_rows_wait_for_room_on_the_disk(tmp_path: Path) -> None:
    """None is lost or written twice, whatever of it the disk took; nothing is on the disk without those before it."""
    logger = MetricsLogger(tmp_path, ONLY_JSONL, "run", {})
    logger.log(1, {"a": 1.0})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 7, before[1]))  # 7 bytes of the next row fit
        for step in (2, 3):
            with pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"):
                logger.log(step, {"a": float(step)})
            assert path.read_bytes() == whole
        with pytest.raises(OSError, match="File too large"):
            logger.flush()
        logger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    logger.log(4, {"a": 4.0})
    logger.flush()
    assert [(row["step"], row["a"]) for row in read_metrics(path)] == [(n, float(n)) for n in (1, 2, 3, 4)]


def test_what_a_run_can_do_without_does_not_end_it(tmp_path: Path) -> None:
    log = MemoryLog(tmp_path)
    (tmp_path / "memory.jsonl").symlink_to("/dev/full")
    log.log(1, "train", actors=[{"resident_peak": 2 << 30}], engines=[])
    assert log.metrics() == {"memory/actor_max_gib": 2.0}
    (tmp_path / "rewards.log").symlink_to("/dev/full")
    append_lines(tmp_path / "rewards.log", ["a grader died"])
