"""Sending a process's output, with that of its libraries, to a log file."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

MARK = "---- tic-megatron: "
"""How a line of `write_mark` begins."""


def redirect_output(path: Path | str) -> None:
    """From now on, all output of this process goes to the end of the file `path`: Python's, C libraries' and logging.

    The file descriptors 1 and 2 themselves are replaced, so child processes inherit the file too. For worker processes;
    there is no way back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # New objects: the old ones may be somebody's wrapper (Ray's, a test's capture) around another descriptor.
    sys.stdout, sys.stderr = _writer(1), _writer(2)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    write_mark(f"process {os.getpid()} begins")


def write_mark(what: str) -> None:
    """Write a line that parts what the log says so far from what comes (`last_stack`). A disk that is full is no error."""
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"\n{MARK}{what} ----\n".encode())


def _writer(descriptor: int) -> TextIO:
    return os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
