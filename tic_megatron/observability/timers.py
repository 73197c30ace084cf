"""Wall time of the phases of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimers:
    """Adds up the seconds spent in named phases.

    Example:

        with timers("generate"):
            ...
        timers.metrics()     # {"timing/generate_s": 1.73}
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block; blocks of the same phase add up, and an error in the block counts too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def seconds(self, phase: str) -> float:
        """Seconds of a phase since the last reset; 0.0 when it did not run."""
        return self._seconds.get(phase, 0.0)

    def metrics(self) -> dict[str, float]:
        """`timing/<phase>_s` of all phases since the last reset."""
        return {f"timing/{phase}_s": seconds for phase, seconds in self._seconds.items()}

    def reset(self) -> None:
        """Start the next step."""
        self._seconds.clear()
