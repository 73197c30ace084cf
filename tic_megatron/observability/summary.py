"""The outcome of a run: `summary.json`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tic_megatron.observability.files import atomic_writer

SUMMARY_FILE = "summary.json"


def write_summary(run_dir: Path | str, summary: dict[str, Any]) -> Path:
    """Write `summary.json`: `accuracy_before`, `accuracy_after` (null without evaluation), `steps`, `wall_s`, ...

    Numbers that are not finite become null. Returns the file's path.
    """
    path = Path(run_dir) / SUMMARY_FILE
    clean = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in summary.items()}
    with atomic_writer(path) as stream:
        json.dump(clean, stream, indent=2, allow_nan=False)
        stream.write("\n")
    return path
