"""A page on what a prepared training set holds, and what was left out of it and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tic_megatron.data.prepare import MANIFEST, MOST_LISTED, Prepared

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


def write_report(result: Prepared) -> str:
    """The report as Markdown. Lists stop at 20 entries; the manifest has them all."""
    sections = [_head(result), _sources(result), _conflicts(result), _overlaps(result), _contents(result), _examples(result)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(result: Prepared) -> str:
    output = result.output
    return (
        f"# Training set: {result.kept:,} problems\n\n"
        f"`{output['name']}`, {output['bytes']:,} bytes, SHA-256 `{output['sha256']}`. Checksums of the sources, settings "
        f"and all that was left out stand in `{MANIFEST}`."
    )


def _sources(result: Prepared) -> str:
    columns = ["rows", "other_years", "repeated", "elsewhere", "conflicting", "held_out", "too_long", "kept"]
    titles = ["rows", "other years", "repeated", "in an earlier source", "conflicting answers", "held out", "too long", "kept"]
    rows = [[source.name, *(f"{getattr(source, name):,}" for name in columns)] for source in result.sources]
    if len(rows) > 1:
        rows.append(["**all**", *(f"{sum(getattr(source, name) for source in result.sources):,}" for name in columns)])
    lines = [
        f"- `{source.name}` is `{source.source}`, problem in `{source.prompt_field}`, answer in `{source.answer_field}`"
        + (f"; instructions were taken off {source.instructions_taken_off:,} problems" if source.instructions_taken_off else "")
        for source in result.sources
    ]
    kept = " (the problems themselves are kept, with their first answers)" if result.settings["conflicts"] == "first" else ""
    note = f"\n\nConflicting answers{kept}: counted with the source of their first row." if result.conflicts else ""
    return "## Sources\n\n" + _table(["source", *titles], rows) + "\n\n" + "\n".join(lines) + note


def _conflicts(result: Prepared) -> str:
    if not result.conflicts:
        return "## Conflicting answers\n\nNone: all rows of a problem agree."
    what = "kept with the first answer" if result.settings["conflicts"] == "first" else "left out"
    lines = [
        f"- `{each['id']}`: " + "; ".join(f"{_code(a['answer'])} ({a['row']})" for a in each["answers"][:4])
        for each in result.conflicts
    ]
    return f"## Conflicting answers\n\nProblems with different answers: {len(result.conflicts)}; {what}:\n\n" + _some(lines)


def _overlaps(result: Prepared) -> str:
    title = "## Overlap with evaluation sets\n\n"
    if not result.held_out:
        return title + "Not looked for: no evaluation sets were given (`held_out`)."
    sets = ", ".join(f"{each['name']} ({each['rows']})" for each in result.held_out)
    if not result.overlaps:
        return title + f"None with {sets}."
    same = sum(each["exact"] for each in result.overlaps)
    ordered = sorted(result.overlaps, key=lambda each: (-each["exact"], -each["similarity"], each["id"]))
    rows = [
        [
            f"`{each['id']}`" + (f" ({_cell(each['source_id'])})" if each["source_id"] else ""),
            f"{each['held_out_set']}: {_cell(each['held_out_id'])}",
            "same" if each["exact"] else f"{each['similarity']:.2f}",
            _code(each["answer"]),
            _code(each["held_out_answer"]),
        ]
        for each in ordered
    ]
    shown = _table(["problem", "held-out problem", "similarity", "answer", "held-out answer"], rows[:MOST_LISTED])
    rest = f"\n\nand {len(rows) - MOST_LISTED} more in `{MANIFEST}`" if len(rows) > MOST_LISTED else ""
    return (
        title
        + f"Compared with {sets}. {len(rows)} problems are left out, {same} of them the same text, the others with a similarity "
        + f"of {result.settings['near_duplicate']} or more:\n\n{shown}{rest}"
    )


def _contents(result: Prepared) -> str:
    if not result.kept:
        return "## What is in it\n\nNothing."
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(result.answer_kinds.items(), key=lambda kv: (-kv[1], kv[0])))
    lines = [f"- answers: {kinds}"]
    for kind, first in result.answers.items():
        if result.answer_kinds[kind] <= min(MOST_LISTED, 0.05 * result.kept):  # oddities among many of another kind
            lines.append(f"- {kind}: " + ", ".join(f"{_code(answer)} (`{row_id}`)" for row_id, answer in first))
    if result.years:
        lines.append(f"- years: {min(result.years)} to {max(result.years)}, {sum(result.years.values()):,} problems")
    if result.too_long:
        longest = max(each["tokens"] for each in result.too_long)
        limit = result.settings["max_prompt_tokens"]
        lines.append(f"- left out as longer than {limit} tokens: {len(result.too_long):,} (the longest has {longest:,})")
    lengths = [["characters of the bare problem", *_percentiles(result.characters)]]
    if result.tokens:
        lengths.append(["tokens of the prompt", *_percentiles(result.tokens)])
    table = _table(["length", *("least" if p == 0 else "most" if p == 100 else f"{p} %" for p in PERCENTILES)], lengths)
    return "## What is in it\n\n" + "\n".join(lines) + "\n\n" + table


def _examples(result: Prepared) -> str:
    blocks = [
        f"`{record['id']}`, answer {_code(record['answer'])}:\n\n" + "\n".join(f"> {line}" for line in _short(record["problem"]))
        for record in result.examples.values()
    ]
    return "## The first of every source\n\n" + "\n\n".join(blocks) if blocks else ""


def _short(text: str) -> list[str]:
    return (text if len(text) <= 600 else text[:597] + "...").splitlines()


def _percentiles(values: Iterable[int]) -> list[str]:
    ordered = sorted(values)
    return [f"{ordered[min(len(ordered) - 1, len(ordered) * p // 100)]:,}" for p in PERCENTILES]


def _some(lines: Sequence[str]) -> str:
    rest = [f"- and {len(lines) - MOST_LISTED} more in `{MANIFEST}`"] if len(lines) > MOST_LISTED else []
    return "\n".join([*lines[:MOST_LISTED], *rest])


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])


def _code(text: Any) -> str:
    shown = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{shown if len(shown) <= 60 else shown[:57] + '...'}`"


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
