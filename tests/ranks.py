"""Runs a function on several ranks, each in a fresh process, bounded in time.

    run_ranks("tests.megatron_ranks:gradients", world_size=2, timeout_s=120, model="...") -> [result of rank 0, of rank 1]

The function is called as `function(rank, world_size, master, **kwargs)`. When time runs out every rank prints its stacks.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(function: str, *, world_size: int, timeout_s: float, **kwargs) -> list:
    master = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            job = (function, rank, world_size, master, timeout_s, kwargs)
            Path(folder, f"in{rank}").write_bytes(pickle.dumps(job))
            command = [sys.executable, "-m", "tests.ranks", f"{folder}/in{rank}", f"{folder}/out{rank}"]
            with Path(folder, f"log{rank}").open("w") as log:
                ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True))
        try:
            codes = [process.wait(timeout=timeout_s + 30) for process in ranks]
        finally:
            for process in ranks:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if any(codes):
            logs = "\n".join(f"--- rank {r}\n{Path(folder, f'log{r}').read_text()[-6000:]}" for r in range(world_size))
            raise AssertionError(f"exit codes {codes}\n{logs}")
        return [pickle.loads(Path(folder, f"out{r}").read_bytes()) for r in range(world_size)]


def main(job_file: str, result_file: str) -> None:
    function, rank, world_size, master, timeout_s, kwargs = pickle.loads(Path(job_file).read_bytes())
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(rank, world_size, master, **kwargs)
    Path(result_file).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
