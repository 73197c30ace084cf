"""What `train` and `evaluate` share: a folder that one process works in, and a driver whose failures become lines and codes."""

from __future__ import annotations

import fcntl
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from tic_megatron.config import SettingsError, one_line
from tic_megatron.observability.files import disk_problem
from tic_megatron.supervisor import RESTART

LOCK_FILE = ".lock"


def say(line: str) -> None:
    """Tell the user, unless whoever read it is gone."""
    with suppress(OSError):
        print(f"tic-megatron: {line}", file=sys.stderr, flush=True)


def lock(file: TextIO, folder: Path) -> None:
    """Lock a folder's lock file until it is closed. SettingsError when another process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SettingsError(
            f"run.dir: another process is at work in {folder}; wait for its end, or give another --run.dir"
        ) from error
    except OSError:
        say(f"warning: the file system of {folder} has no locks; see that no other process uses the folder")


def drive(work: Callable[[], int], folder: Path, *, what: str, interrupted: Callable[[], str]) -> int:
    """Do the work of a driver's process; its exit code, or that of a failure, which is told: of bad input that a worker has
    found, of an interruption (and what `interrupted` says of it), and of others with a traceback in `logs/driver.log`. RESTART
    when a fresh start may help."""
    from tic_megatron.remote import may_pass  # Ray and all that it brings

    try:
        return work()
    except SettingsError as error:
        say(f"error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        say(f"interrupted; {interrupted()}")
        return 130
    except Exception as error:
        log = folder / "logs" / "driver.log"
        reason = disk_problem(error, folder) if isinstance(error, OSError) else _last_line(error)
        say(f"error: the {what} failed: {reason} (details: {log})")
        with suppress(OSError), log.open("a", encoding="utf-8") as file:  # the disk may be full
            traceback.print_exc(file=file)
        return RESTART if may_pass(error) else 1


def _last_line(error: Exception) -> str:
    """The end of the message: an error from a Ray worker is a whole traceback, whose last line says what happened. Our own errors
    need no name."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return re.sub(r"^tic_megatron[\w.]*: ", "", lines[-1].strip())
