"""A profile of one rank's training phases of a step, for chrome://tracing, Perfetto, or TensorBoard."""

from __future__ import annotations

import errno
import gzip
import os
import tempfile
from pathlib import Path

PROFILES_FOLDER = "profiles"


class Profile:
    """torch's profiler, from now until `finish`, which writes `RUN/profiles/step_N_rank_R.json.gz`.

    Operators on the CPU and, on CUDA, kernels with their streams; without shapes, stacks or memory, which would slow them down.
    """

    def __init__(self, run_dir: Path | str, step: int, rank: int, *, on_gpu: bool) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.path = Path(run_dir) / PROFILES_FOLDER / f"step_{step}_rank_{rank}.json.gz"
        self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        self._profiler.start()

    def finish(self) -> None:
        """Stop, and write the file; a trace that is there is a whole one. OSError if it cannot be written."""
        self._profiler.stop()
        unfinished = self.path.with_name(f".{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                trace, last = Path(folder, "trace.json"), b""
                trace.touch()
                self._profiler.export_chrome_trace(str(trace))
                with trace.open("rb") as lines, gzip.open(unfinished, "wb") as file:
                    for last in lines:
                        file.write(last)
                if b'"traceName"' not in last:  # torch raises nothing when it finds no room, and leaves what it has written
                    raise OSError(errno.EIO, "torch could not write all of its trace", str(trace))
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)
