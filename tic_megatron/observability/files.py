"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A text file (UTF-8) that appears at `path` when the block ends without an error, and not at all otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Decoded text of an untrained model may hold lone surrogates, which strict UTF-8 refuses.
        with open(temporary, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on that file system, or lower trainer.keep_checkpoints"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable for this user"),
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENOENT: "is run.dir on a file system that all nodes share?",
}


def disk_problem(error: OSError, place: Path) -> str:
    """What the disk did, where, and what to do, in one line. `place`: for errors that name no file."""
    advice = _ADVICE.get(error.errno, "see whether that file system is healthy")
    return f"{error.strerror or error}: {error.filename or place} ({advice})"


def lower_priority() -> None:
    """Have the calling thread take what training leaves of the processors (on Linux, where threads have priorities)."""
    if sys.platform == "linux":
        with suppress(OSError):  # it may be lower already
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
