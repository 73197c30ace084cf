"""The process that watches the driver: restarts, signals, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import wait_until_gone
from tic_megatron.supervisor import FORWARDED

ROOT = Path(__file__).resolve().parent.parent


class Launch:
    """A fresh process that supervises `drive(attempt)`, the body given; files in its folder tell what happened."""

    def __init__(self, folder: Path, drive: str, *, max_restarts: int = 2, reached: int = 0) -> None:
        self.folder = folder
        script = textwrap.dedent("""
            import os, signal, subprocess, sys, time
            from pathlib import Path
            from tic_megatron.supervisor import RESTART, supervise

            def write(name, text):
                Path(name + ".new").write_text(str(text))
                os.rename(name + ".new", name)

            def last_step():
                return int(Path("step").read_text()) if os.path.lexists("step") else 0

            def drive(attempt):
            {body}

            def note(line):
                print(line, flush=True)

            def leave(number):
                note(f"told by {{number.name}}")
                return 7

            limits = dict(max_restarts={max_restarts}, reached={reached})
            sys.exit(supervise(drive, **limits, last_step=last_step, leave=leave, note=note))
        """).format(body=textwrap.indent(textwrap.dedent(drive), "    "), max_restarts=max_restarts, reached=reached)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            # Under nohup and in the background of a shell, these are ignored, and so they would be here.
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in FORWARDED],  # noqa: PLW1509
        )

    def end(self) -> tuple[int, list[str]]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output.splitlines()

    def wait_for(self, name: str) -> str:
        end = time.monotonic() + 30
        while not (self.folder / name).exists():
            assert time.monotonic() < end and self.process.poll() is None, name
            time.sleep(0.02)
        return (self.folder / name).read_text()


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_driver_that_ends_by_itself_is_not_started_again(tmp_path, code):
    assert Launch(tmp_path, f"return {code}").end() == (code, [])


@pytest.mark.parametrize(
    ("death", "told"),
    [
        ("return RESTART", ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the driver was killed by SIGKILL; "),
        ("os._exit(1)", "the driver ended with code 1; "),  # as Ray does when its node is gone
        ("os._exit(0)", "the driver ended with code 0; "),
    ],
)
def test_a_driver_that_dies_is_started_again(tmp_path, death, told):
    code, lines = Launch(tmp_path, f"if attempt == 1:\n    return 0\nwrite('step', 5)\n{death}").end()
    assert (code, lines) == (0, [f"{told}restart 1 of 2, step 5 was the last"])


def test_restarts_are_bounded_where_the_run_gets_no_further(tmp_path):
    """Steps 3, 3, 4, 2, 4 at the ends of the attempts: the third is further, the last two are not."""
    code, lines = Launch(tmp_path, "write('step', [3, 3, 4, 2, 4, 9][attempt])\nreturn RESTART").end()
    assert code == 1
    assert [line.partition(",")[0] for line in lines[:-1]] == [
        "restart 1 of 2",
        "restart 2 of 2",
        "restart 1 of 2",
        "restart 2 of 2",
    ]
    assert lines[-1] == "error: given up after 2 restarts at step 4 (run.max_restarts)"


def test_the_watcher_outlives_the_disk(tmp_path):
    """A driver that fails of it is started again, also where its metrics cannot be read meanwhile, or make no sense."""
    body = "if attempt == 2:\n    return 0\nos.unlink('step') if attempt else os.symlink('nowhere', 'step')\n"
    code, lines = Launch(tmp_path, f"{body}write('step', 'x') if attempt else None\nreturn RESTART").end()
    assert (code, lines) == (0, [f"restart {number} of 2, step 0 was the last" for number in (1, 2)])


def test_a_run_that_goes_back_gets_further_than_where_it_began(tmp_path):
    """Its folder's last step, 100, is one that it has thrown away; it continues from 50."""
    (tmp_path / "step").write_text("100")
    code, lines = Launch(tmp_path, "write('step', 60 + 10 * attempt)\nreturn RESTART if attempt < 4 else 0", reached=50).end()
    assert code == 0
    assert lines == [f"restart 1 of 2, step {step} was the last" for step in (60, 70, 80, 90)]


def test_a_reader_that_is_gone_costs_no_result(tmp_path):
    assert Launch(tmp_path, "sys.stdout = open('/dev/full', 'w')\nprint('lost')\nreturn 0").end() == (0, [])


def test_an_error_that_escapes_is_a_failure_and_no_death(tmp_path):
    assert Launch(tmp_path, "raise ValueError('mine')").end() == (1, [])


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_signals_are_the_drivers(tmp_path, sent, received):
    """Once, and after one there is no restart, even if the driver dies of it."""
    drive = f"""
        got = []
        signal.signal({int(received)}, lambda number, frame: got.append(number))
        write('ready', os.getpid())
        while not got:
            time.sleep(0.01)
        time.sleep(0.3)
        write('got', len(got))
        return RESTART
    """
    launch = Launch(tmp_path, drive)
    launch.wait_for("ready")
    launch.process.send_signal(sent)
    assert launch.end() == (7, [f"told by {sent.name}"])
    assert (tmp_path / "got").read_text() == "1"


def test_a_killed_launcher_tells_the_driver_to_leave(tmp_path):
    drive = """
        signal.signal(signal.SIGTERM, lambda number, frame: (write('left', 1), os._exit(0)))
        write('ready', os.getpid())
        time.sleep(60)
    """
    launch = Launch(tmp_path, drive)
    driver = int(launch.wait_for("ready"))
    launch.process.kill()
    launch.process.wait()
    launch.process.stdout.close()
    assert wait_until_gone([driver]) == []
    assert (tmp_path / "left").exists()


ORPHANS = """
    if attempt == 1:
        write('second', ' '.join(pid for pid in Path('pids').read_text().split() if Path('/proc', pid).exists()))
        return 0
    # A child that ignores SIGTERM and has a child of its own, in a session of its own.
    code = "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN); "
    code += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True); "
    code += "print(p.pid, flush=True); time.sleep(300)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    write('pids', f"{child.pid} {child.stdout.readline()}")
"""


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "return RESTART"])
def test_nothing_that_a_driver_has_started_is_there_when_the_next_one_starts(tmp_path, ending):
    code, lines = Launch(tmp_path, f"{textwrap.dedent(ORPHANS)}\n{ending}").end()
    assert code == 0 and len(lines) == 1
    assert (tmp_path / "second").read_text() == ""
    assert not [pid for pid in (tmp_path / "pids").read_text().split() if psutil.pid_exists(int(pid))]
