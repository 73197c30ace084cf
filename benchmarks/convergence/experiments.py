"""The questions of the study, as lists of configurations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.convergence.ascent import BASELINES, Lengths, Run
from tic_megatron.algorithms import OBJECTIVES, clips, normalisers, ratios
from tic_megatron.algorithms.objectives import Objective

UNSET = 0.0
RUNS = {name: Run(objective, UNSET) for name, objective in OBJECTIVES.items()}
"""Every preset with its own clip range; the step size is set by the study."""

FULL_GRID = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
GRID = (4.0, 8.0, 16.0, 32.0, 64.0)
MATCHED = 8.0


@dataclass(frozen=True)
class Variant:
    """One row: a configuration, to be run at several step sizes. `positions`: the longest response of its tasks."""

    label: str
    run: Run
    positions: int = 12


@dataclass(frozen=True)
class Experiment:
    """Variants with the step sizes to try, and the pairs of labels (a, b) whose difference a - b is wanted.

    `steps`: update sizes in units of the policy gradient, i.e. step size x mean token weight (see `mean_token_weight`).
    `raw_steps`: step sizes as such, in units of T: the same for every objective. `first_seed`: see `Laboratory`.
    """

    name: str
    variants: tuple[Variant, ...]
    pairs: tuple[tuple[str, str], ...]
    steps: tuple[float, ...] = GRID
    raw_steps: tuple[float, ...] = field(default=())
    first_seed: int = 0


def hierarchy() -> Experiment:
    """(a) Every preset, K = 4."""
    order = ("grpo", "grpo2", "tic_grpo", "traj_is", "dapo", "gspo", "no_is")
    pairs = [
        ("grpo2", "grpo"),
        ("tic_grpo", "grpo2"),
        *(("tic_grpo", name) for name in order if name not in ("tic_grpo", "grpo2")),
    ]
    return Experiment("hierarchy", tuple(Variant(n, RUNS[n]) for n in order), tuple(pairs), FULL_GRID, raw_steps=(2.0, 16.0))


def replication() -> Experiment:
    """(a) again, with other tasks and other random numbers: the tiers of the theorems, young and old policies."""
    variants, pairs = [], []
    for k in (4, 16):
        variants += [Variant(f"{n} K={k}", replace(RUNS[n], updates_per_refresh=k)) for n in ("grpo", "grpo2", "tic_grpo")]
        pairs += [(f"{a} K={k}", f"{b} K={k}") for a, b in (("grpo2", "grpo"), ("tic_grpo", "grpo2"))]
    return Experiment("replication", tuple(variants), tuple(pairs), first_seed=1000)


def factorial(k: int) -> Experiment:
    """Which of the three changes does it: ratio x clip x normaliser, one clip range for all."""
    rows = {}
    for ratio_name, ratio in (("token", ratios.TOKEN), ("trajectory", ratios.TRAJECTORY)):
        for clip_name, clip in (("two-sided", clips.two_sided), ("up-only", clips.up_only)):
            for weight_name, weight in (("1/T_i", normalisers.response_length), ("1/T", normalisers.constant_length)):
                objective = Objective(ratio, clip, weight, 0.2, 0.28)
                rows[ratio_name, clip_name, weight_name] = Run(objective, UNSET, updates_per_refresh=k)
    variants = tuple(Variant(" ".join(key), run) for key, run in rows.items())
    pairs = []
    for ratio_name, clip_name, weight_name in rows:
        this = " ".join((ratio_name, clip_name, weight_name))
        if ratio_name == "token":
            pairs.append((" ".join(("trajectory", clip_name, weight_name)), this))
        if clip_name == "two-sided":
            pairs.append((" ".join((ratio_name, "up-only", weight_name)), this))
        if weight_name == "1/T_i":
            pairs.append((" ".join((ratio_name, clip_name, "1/T")), this))
    return Experiment(f"factorial_k{k}", variants, tuple(pairs), GRID[1:])


def staleness() -> Experiment:
    """(b) K, at a fixed number of updates, samples and samples per update: only the age of pi_old changes."""
    names = ("grpo", "grpo2", "tic_grpo", "traj_is", "no_is")
    variants, pairs = [], []
    for k in (1, 2, 4, 8, 16):
        variants += [Variant(f"{n} K={k}", replace(RUNS[n], updates_per_refresh=k)) for n in names]
        pairs += [(f"{a} K={k}", f"{b} K={k}") for a, b in (("grpo2", "grpo"), ("tic_grpo", "grpo2"), ("tic_grpo", "no_is"))]
    return Experiment("staleness", tuple(variants), tuple(pairs))


def response_length() -> Experiment:
    """(b') Longest response T, the mean length being about half of it."""
    names, variants, pairs = ("grpo", "grpo2", "tic_grpo"), [], []
    for positions in (6, 12, 24):
        variants += [Variant(f"{n} T={positions}", replace(RUNS[n], updates_per_refresh=8), positions) for n in names]
        pairs += [(f"{a} T={positions}", f"{b} T={positions}") for a, b in (("grpo2", "grpo"), ("tic_grpo", "grpo2"))]
    return Experiment("response_length", tuple(variants), tuple(pairs), GRID[1:])


def length_variance() -> Experiment:
    """(c) The same decisions in longer or shorter texts: the mean of T_i is 30 or so, its spread changes, T stays 48."""
    names, variants, pairs = ("grpo", "dapo", "gspo"), [], []
    for spread, kind in ((0, "long_answers"), *((s, k) for k in ("long_answers", "independent") for s in (6, 12, 18))):
        lengths = Lengths(centre=30, spread=spread, kind=kind, longest=48)
        word = f"{kind} +-{spread}" if spread else "equal"
        variants += [Variant(f"{n} {word}", replace(RUNS[n], lengths=lengths)) for n in names]
        if spread:
            pairs += [(f"{n} {word}", f"{n} equal") for n in names]
        if (spread, kind) in ((0, "long_answers"), (18, "long_answers")):  # T_i does not enter: equal to the last digit
            variants.append(Variant(f"tic_grpo {word}", replace(RUNS["tic_grpo"], lengths=lengths)))
    pairs.append(("tic_grpo long_answers +-18", "tic_grpo equal"))
    return Experiment("length_variance", tuple(variants), tuple(pairs), GRID[1:4])


def uncontrolled_ratio() -> Experiment:
    """(d) What bounds the ratio where A < 0, with old policies (K = 16), everything else equal (weights 1/T, eps 0.2 / 0.28)."""
    variants, pairs = [], []
    for word, ratio in (("token", ratios.TOKEN), ("trajectory", ratios.TRAJECTORY)):
        two_sided = Run(Objective(ratio, clips.two_sided, normalisers.constant_length, 0.2, 0.28), UNSET, updates_per_refresh=16)
        open_below = replace(two_sided, eps_low=1.0)
        up_only = replace(two_sided, objective=replace(two_sided.objective, clip=clips.up_only))
        unclipped = replace(two_sided, objective=replace(two_sided.objective, clip=clips.unclipped))
        rows = {
            "two-sided": two_sided,
            "two-sided, dual clip 3": replace(two_sided, dual_clip=3.0),
            "two-sided, no lower bound": open_below,
            "up-only": up_only,
            "none": unclipped,
        }
        variants += [Variant(f"{word}: {label}", run) for label, run in rows.items()]
        labels = [f"{word}: {label}" for label in rows]
        pairs += [(labels[3], labels[0]), (labels[2], labels[0]), (labels[3], labels[2]), (labels[3], labels[4])]
    return Experiment("uncontrolled_ratio", tuple(variants), tuple(pairs))


def group_size() -> Experiment:
    """(e) G at 32 responses per update, with four baselines."""
    variants, pairs = [], []
    for g in (2, 4, 8, 16, 32):
        run = replace(RUNS["tic_grpo"], group_size=g, groups=32 // g)
        variants += [Variant(f"{baseline} G={g}", replace(run, baseline=baseline)) for baseline in BASELINES]
        pairs += [(f"leave_one_out G={g}", f"group G={g}")]
        pairs += [(f"{baseline} G={g}", f"leave_one_out G={g}") for baseline in ("running", "value")]
    return Experiment("group_size", tuple(variants), tuple(pairs))


def all_experiments() -> dict[str, Experiment]:
    """By name, in the order of the report."""
    made = (
        hierarchy(),
        factorial(4),
        factorial(16),
        staleness(),
        response_length(),
        length_variance(),
        uncontrolled_ratio(),
        group_size(),
        replication(),
    )
    return {experiment.name: experiment for experiment in made}
