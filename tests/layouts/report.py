"""Proves every layout and prints what was found: `python -m tests.layouts.report [--json]`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tests.layouts.cases import MODELS
from tests.layouts.proof import Finding, Prover
from tests.ranks import RankPool


def line(f: Finding) -> str:
    where = f"{f.model:10} {f.layout!s:32} {f.objective:9} {f.rollout:5} {f.max_tokens:4}"
    errors = f"gradient {f.worst_error:.1e} ({f.worst_tensor}) norm {f.norm_error:.1e} L {f.log_ratio_error:.1e}"
    return f"{where}  {errors} wrong zeros {f.wrong_zeros} noise {f.noise}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    parser.add_argument("--model", default="", help="models whose name contains this")
    options = parser.parse_args()
    found = []
    with RankPool() as pool, tempfile.TemporaryDirectory() as folder:
        prover = Prover(pool, Path(folder))
        for model, layouts in MODELS.items():
            for layout in layouts:
                if options.only not in str(layout) or options.model not in model:
                    continue
                findings = prover.prove(layout, model)
                found += findings
                if not options.json:
                    for finding in findings:
                        print(line(finding), flush=True)
    if options.json:
        print(json.dumps([finding.as_json() for finding in found], indent=1))


if __name__ == "__main__":
    main()
