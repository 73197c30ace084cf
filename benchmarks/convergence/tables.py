"""The tables of the report, in Markdown, from the study's results."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Results = dict[str, dict]
METRICS = {"speed": "speed", "gain": "final gain", "stationarity": "mean ‖∇J‖² x 1000"}
SCALES = {"stationarity": (1e3, 2)}
MODES = {"best": "best step", "matched": "step 8"}
"""`step`, as in the tables, is the size of an update: step size x mean token weight."""


def plus_minus(interval: list[float], scale: float = 1.0, digits: int = 3) -> str:
    return f"{interval[0] * scale:.{digits}f} ± {interval[1] * scale:.{digits}f}"


def difference(interval: list[float], scale: float = 1.0, digits: int = 3) -> str:
    """With its sign; in bold where the interval leaves out 0."""
    text = f"{interval[0] * scale:+.{digits}f} ± {interval[1] * scale:.{digits}f}"
    return f"**{text}**" if abs(interval[0]) > interval[1] else text


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def at_step(row: dict, step: float) -> dict:
    """The point of a row at a matched step size."""
    return min(row["points"], key=lambda point: abs(point["step"] - step))


def rows_at_best(results: dict, code: bool = True) -> str:
    def line(label: str, row: dict) -> list[str]:
        best, half = row["best"], row["best"]["updates_to_half"]
        return [
            f"`{label}`" if code else label,
            f"{row['best_step']:g}",
            plus_minus(best["speed"]),
            plus_minus(best["gain"]),
            "never" if half is None else f"{half:.0f}",
            plus_minus(best["stationarity"], 1e3, 2),
            f"{best['peak']:.1f}",
            f"{100 * best['uncontrolled']:.1f} / {100 * best['capped']:.1f}",
        ]

    header = (
        "",
        "step",
        "speed",
        "final gain",
        "updates to half",
        "mean ‖∇J‖² x 1000",
        "largest ratio, A < 0",
        "above cap, A < 0 / A > 0, %",
    )
    return markdown(header, (line(*item) for item in results["rows"].items()))


def differences(results: dict) -> str:
    """A line per pair: speed at every choice of the step sizes, and the other metrics at two of them."""
    modes = list(dict.fromkeys(d["at"] for d in results["differences"]))
    squares = [("best", "stationarity"), ("matched", "stationarity")]
    columns = [("best", "speed"), ("best", "gain"), *((m, "speed") for m in modes if m != "best"), *squares]
    pairs = dict.fromkeys((d["a"], d["b"]) for d in results["differences"])
    rows = [[f"{a} - {b}", *(pair(results, a, b, mode, metric) for mode, metric in columns)] for a, b in pairs]
    return markdown(("", *(f"{METRICS[metric]}, {MODES.get(mode, mode)}" for mode, metric in columns)), rows)


def pair(results: dict, a: str, b: str, mode: str = "best", metric: str = "speed") -> str:
    found = next(d for d in results["differences"] if (d["a"], d["b"], d["at"]) == (a, b, mode))
    return difference(found[metric], *SCALES.get(metric, ()))


def staleness(results: dict) -> str:
    """Objective x K: speed at the best step; then the differences of the hierarchy."""
    ks, rows = (1, 2, 4, 8, 16), []
    for name in ("grpo", "traj_is", "no_is", "grpo2", "tic_grpo"):
        rows.append([f"`{name}`", *(plus_minus(results["rows"][f"{name} K={k}"]["best"]["speed"]) for k in ks)])
    for a, b in (("grpo2", "grpo"), ("tic_grpo", "grpo2"), ("tic_grpo", "no_is")):
        for mode in ("best", "matched"):
            rows.append([f"{a} - {b}, {mode}", *(pair(results, f"{a} K={k}", f"{b} K={k}", mode) for k in ks)])
    return markdown(("speed", *(f"K = {k}" for k in ks)), rows)


def estimators(results: dict) -> str:
    rows, since = results["rows"], sorted({row["updates_since_old"] for row in results["rows"]})
    names = list(dict.fromkeys(row["objective"] for row in rows))
    found = {(row["objective"], row["updates_since_old"]): row for row in rows}

    def cell(name: str, k: int) -> str:
        row = found[name, k]
        return f"{row['cosine']:.2f} / {row['cosine_with_old']:.2f} / {row['efficiency']:.3f}"

    lines = [[f"`{name}`" if "," not in name else name, *(cell(name, k) for k in since)] for name in names]
    return markdown(("cosine with ∇J(θ) / with ∇J(θ_old) / efficiency", *(f"{k} updates since" for k in since)), lines)


def factorial_effects(results: Results) -> str:
    """The effect of each of the three changes, in each setting of the other two."""
    rows = []
    for d in results["factorial_k4"]["differences"]:
        if d["at"] == "best":
            a, b = d["a"], d["b"]
            changed = next((x, y) for x, y in zip(a.split(" "), b.split(" "), strict=True) if x != y)
            rest = " ".join(x for x, y in zip(a.split(" "), b.split(" "), strict=True) if x == y)
            cells = [pair(results[part], a, b, metric=m) for part in ("factorial_k4", "factorial_k16") for m in ("speed", "gain")]
            rows.append([f"{changed[0]} for {changed[1]}", rest, *cells])
    rows.sort(key=lambda row: row[0])
    return markdown(("change", "the rest", "K = 4: speed", "final gain", "K = 16: speed", "final gain"), rows)


def length_bias(results: dict) -> str:
    rows = []
    for label, row in results["rows"].items():
        cosines = [f"{cosine:.2f}" for cosine in row["cosine"].values()]
        stationarity = f"{row['late_stationarity'] * 1e6:.2f}"
        rows.append([label.replace("+-", "± "), *cosines, f"{row['speed']:.3f}", f"{row['gain']:.3f}", stationarity])
    after = [f"after {update}" for update in next(iter(results["rows"].values()))["cosine"]]
    return markdown(("T_i", *(f"cosine {a}" for a in after), "speed", "final gain", "late ‖∇J‖² x 10⁶"), rows)


def lengths(results: dict) -> str:
    """Spread x objective: difference from equal lengths, at the best step and at the matched one."""
    words = [f"{kind} +-{spread}" for kind in ("independent", "long_answers") for spread in (6, 12, 18)]
    rows = []
    for mode, metric in (("best", "speed"), ("matched", "stationarity")):
        for word in words:
            cells = [pair(results, f"{n} {word}", f"{n} equal", mode, metric) for n in ("grpo", "dapo", "gspo")]
            rows.append([f"{METRICS[metric]}, {MODES[mode]}", word.replace("_", " ").replace("+-", "± "), *cells])
    return markdown(("minus its value at equal lengths", "T_i", "`grpo`", "`dapo`", "`gspo`"), rows)


def uncontrolled(results: dict) -> str:
    """Speed at every step size, with the largest ratio (A < 0) of the run; and at the best step size."""
    grid = (4.0, 8.0, 16.0, 32.0, 64.0)

    def cell(row: dict, step: float) -> str:
        found = at_step(row, step)
        return f"{plus_minus(found['speed'])} ({found['peak']:.0f})"

    rows = [[label, *(cell(row, s) for s in grid), plus_minus(row["best"]["speed"])] for label, row in results["rows"].items()]
    return markdown(("clip", *(f"step {s:g}" for s in grid), "best step"), rows)


def groups(results: dict) -> str:
    """Baseline x G, at the best step; then the differences from leave-one-out at the same step size."""
    sizes, rows = (2, 4, 8, 16, 32), []
    for baseline in ("group", "leave_one_out", "running", "value"):
        rows.append([baseline, *(plus_minus(results["rows"][f"{baseline} G={g}"]["best"]["speed"]) for g in sizes)])
    for a, b, mode in (
        ("leave_one_out", "group", "matched"),
        ("leave_one_out", "group", "best"),
        ("running", "leave_one_out", "best"),
        ("value", "leave_one_out", "best"),
    ):
        where = "same step size" if mode == "matched" else "best step"
        rows.append([f"{a} - {b}, {where}", *(pair(results, f"{a} G={g}", f"{b} G={g}", mode) for g in sizes)])
    return markdown(("speed", *(f"G = {g}" for g in sizes)), rows)


def lengths_of_responses(results: dict) -> str:
    sizes, rows = (6, 12, 24), []
    for name in ("grpo", "grpo2", "tic_grpo"):
        rows.append([f"`{name}`", *(plus_minus(results["rows"][f"{name} T={t}"]["best"]["speed"]) for t in sizes)])
    for a, b in (("grpo2", "grpo"), ("tic_grpo", "grpo2")):
        for mode in ("best", "matched"):
            rows.append([f"{a} - {b}, {mode}", *(pair(results, f"{a} T={t}", f"{b} T={t}", mode) for t in sizes)])
    return markdown(("speed", *(f"T = {t}" for t in sizes)), rows)


TABLES: dict[str, tuple[tuple[str, ...], Callable[[Results], str]]] = {
    "hierarchy": (("hierarchy",), lambda r: rows_at_best(r["hierarchy"])),
    "hierarchy differences": (("hierarchy",), lambda r: differences(r["hierarchy"])),
    "replication": (("replication",), lambda r: differences(r["replication"])),
    "estimators": (("estimators",), lambda r: estimators(r["estimators"])),
    "factorial effects": (("factorial_k4", "factorial_k16"), factorial_effects),
    "staleness": (("staleness",), lambda r: staleness(r["staleness"])),
    "response_length": (("response_length",), lambda r: lengths_of_responses(r["response_length"])),
    "length_bias": (("length_bias",), lambda r: length_bias(r["length_bias"])),
    "length_variance": (("length_variance",), lambda r: lengths(r["length_variance"])),
    "uncontrolled_ratio": (("uncontrolled_ratio",), lambda r: uncontrolled(r["uncontrolled_ratio"])),
    "uncontrolled_ratio differences": (("uncontrolled_ratio",), lambda r: differences(r["uncontrolled_ratio"])),
    "group_size": (("group_size",), lambda r: groups(r["group_size"])),
}
"""By name: the experiments needed, and the table."""
