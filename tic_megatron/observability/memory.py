"""Memory of every process after every phase of a step: `logs/memory.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MEMORY_FILE = "memory.jsonl"
GIB = 2**30
Usage = dict[str, int]
"""Bytes by name, see `process_memory`."""


def process_memory(*, on_gpu: bool) -> Usage:
    """What this process holds, in bytes, from counters that the kernel and torch keep anyway (well below a millisecond).

    Host memory: `resident`, of which `anonymous` is this process's alone and `shared_memory` is mapped by others too, and
    `resident_peak` since this function was last called (since the start of the process where that may not be reset).

    With `on_gpu` (torch must be imported), of the current device: `allocated` and `reserved` by torch here, `reserved_peak` since
    the last call, and the device's own `free` and `total`, which know of all processes.
    """
    names = {"VmRSS": "resident", "RssAnon": "anonymous", "RssShmem": "shared_memory", "VmHWM": "resident_peak"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    usage = {names[words[0][:-1]]: int(words[1]) * 1024 for words in lines if words[0][:-1] in names}
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, and nothing else
    if on_gpu:
        import torch

        usage["allocated"], usage["reserved"] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        usage["reserved_peak"] = torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        usage["free"], usage["total"] = torch.cuda.mem_get_info()
    return usage


class MemoryLog:
    """Appends a line per phase, and keeps the largest numbers for the metrics of the step."""

    def __init__(self, log_dir: Path | str) -> None:
        self._path = Path(log_dir) / MEMORY_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._peaks: dict[str, int] = {}

    def log(self, step: int, phase: str, *, actors: Sequence[Usage | None], engines: Sequence[Sequence[Usage] | None]) -> None:
        """Write the line of a phase that has ended. A line that the disk does not take is left out.

        Args:
            actors: per rank; None for one that did not answer in time.
            engines: per engine, its processes: the tensor-parallel ranks, and the one around them if that is another.
        """
        with suppress(OSError), self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "phase": phase, "actors": actors, "engines": engines}) + "\n")
        self._note("actor", [usage for usage in actors if usage])
        self._note("engine", [usage for processes in engines if processes for usage in processes])

    def metrics(self) -> dict[str, float]:
        """`memory/actor_max_gib` and `memory/engine_max_gib`: the largest peak of one process since the last call."""
        peaks, self._peaks = self._peaks, {}
        return {f"memory/{kind}_max_gib": peak / GIB for kind, peak in peaks.items()}

    def _note(self, kind: str, usages: Sequence[Usage]) -> None:
        peaks = [usage.get("reserved_peak", usage["resident_peak"]) for usage in usages]
        if peaks:
            self._peaks[kind] = max(self._peaks.get(kind, 0), *peaks)
