"""Processes that run functions as the ranks of a job: started once, used by many tests, bounded in time.

    with RankPool() as pool:
        pool.run("tests.megatron_ranks:two_updates", world_size=2, timeout_s=120, cases=[...])  # -> [result of rank 0, of rank 1]

The function is called as `function(rank, world_size, store, **kwargs)`, in a process of its own. When time runs out, or a rank
fails, every rank's stacks and output are shown, and the processes are replaced.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_S = 120
"""A process of a new rank has so long to import what it needs and answer."""


@dataclass
class _Rank:
    process: subprocess.Popen
    connection: Connection
    log: Path


class RankPool:
    """Grows to the largest world size asked for."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="ranks")
        self.ranks: list[_Rank] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc_info) -> None:
        self.stop()
        self.folder.cleanup()

    def run(self, function: str, *, world_size: int, timeout_s: float, **kwargs) -> list:
        from tic_megatron.rendezvous import open_store

        self._grow(world_size)
        store, ranks = open_store("127.0.0.1", timeout_s), self.ranks[:world_size]
        for number, rank in enumerate(ranks):
            rank.connection.send_bytes(pickle.dumps((function, number, world_size, store.port, kwargs)))
        deadline = time.monotonic() + timeout_s
        results, failed = [], []
        for number, rank in enumerate(ranks):
            try:
                # When one rank has failed, the others soon do too, or hang in a collective with it.
                patience = 5.0 if failed else deadline - time.monotonic()
                if not rank.connection.poll(max(patience, 0.0)):
                    failed.append(f"rank {number} gave no answer")
                    continue
                ok, result = pickle.loads(rank.connection.recv_bytes())
            except (EOFError, OSError):
                ok, result = False, "the process died"
            (results if ok else failed).append(result if ok else f"rank {number}: {result}")
        if failed:
            raise AssertionError("\n".join([*failed, self._stacks(ranks)]))
        return results

    def stop(self) -> None:
        for rank in self.ranks:
            rank.connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
            rank.process.wait()
        self.ranks = []

    def _grow(self, world_size: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        started = []
        for number in range(len(self.ranks), world_size):
            address, log = f"{self.folder.name}/socket{number}-{time.monotonic_ns()}", Path(self.folder.name, f"log{number}")
            listener = Listener(address, "AF_UNIX")
            with log.open("w") as file:
                command = [sys.executable, "-m", "tests.ranks", address]
                process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
            started.append((listener, process, log))
        for listener, process, log in started:
            listener._listener._socket.settimeout(START_S)
            try:
                self.ranks.append(_Rank(process, listener.accept(), log))
            except TimeoutError:
                raise AssertionError(f"a process for a rank did not start:\n{log.read_text()[-3000:]}") from None
            finally:
                listener.close()

    def _stacks(self, ranks: list[_Rank]) -> str:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGUSR1)
        time.sleep(1.0)
        output = "\n".join(f"--- rank {number}\n{rank.log.read_text()[-6000:]}" for number, rank in enumerate(ranks))
        self.stop()
        return output


def main(address: str) -> None:
    """A rank: runs what it is sent, each job in a fork of its own, until the connection closes.

    A fork starts with everything imported and leaves nothing behind. (In one process the models of earlier jobs would stay, kept
    by hooks of autograd, and with them their process groups, whose gloo threads turn at full speed once a peer has gone.)
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _import_early()
    connection = Client(address, "AF_UNIX")
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _run(connection, *pickle.loads(job))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            connection.send_bytes(pickle.dumps((False, f"the process ended with status {status}")))


def _run(connection: Connection, function: str, rank: int, world_size: int, port: int, kwargs: dict) -> None:
    from tic_megatron.rendezvous import join_store

    try:
        module, name = function.split(":")
        store = join_store("127.0.0.1", port, START_S)
        answer = (True, getattr(importlib.import_module(module), name)(rank, world_size, store, **kwargs))
    except BaseException:
        answer = (False, traceback.format_exc())
    # Not `send`: torch would pass tensors as handles of shared memory, which are gone with the process.
    connection.send_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()


def _import_early() -> None:
    from tic_megatron.actors.megatron import cpu

    cpu.install()
    import tic_megatron.actors.megatron.backend
    import tic_megatron.actors.megatron.export  # noqa: F401


if __name__ == "__main__":
    main(sys.argv[1])
