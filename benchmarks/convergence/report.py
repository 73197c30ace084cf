"""Put the study's tables into a page and draw its figures: `python -m benchmarks.convergence.report`.

A page has `<!-- table NAME -->` and `<!-- end -->` lines; what stands between them is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from benchmarks.convergence.figures import draw
from benchmarks.convergence.tables import TABLES, Results

ROOT = Path(__file__).parents[2]


def fill(page: str, results: Results) -> str:
    """The page with every table whose experiments are there. Raises KeyError for a name that is not in `TABLES`."""

    def table(match: re.Match[str]) -> str:
        needed, make = TABLES[match[1]]
        if not all(part in results for part in needed):
            return match[0]
        return f"<!-- table {match[1]} -->\n\n{make(results)}\n\n<!-- end -->"

    return re.sub(r"<!-- table (.+?) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "theory.md")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    options.figures.mkdir(parents=True, exist_ok=True)
    options.page.write_text(fill(options.page.read_text(), results))
    draw(results, options.figures)


if __name__ == "__main__":
    main()
