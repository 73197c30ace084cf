"""Breaks the objectives on purpose, one way at a time, and runs the tests: every mutation must be caught.

    python -m tests.theory.mutations [--jobs 2] [--only WORD]

Each mutation is one change of the source in a scratch copy of the package and its tests. Prints a table; exit code 1 when the
unchanged copy fails or a mutation survives.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parents[2]
TESTS = [
    "tests/theory/test_gradients.py",
    "tests/test_algorithm_parts.py",
    "tests/test_algorithms.py",
    "tests/theory/test_extensions.py",
    "tests/theory/test_baselines.py",
    "tests/theory/test_second_moments.py",
]
SOURCE = "tic_megatron/algorithms"
COPIED = [
    "pyproject.toml",
    "tic_megatron/__init__.py",
    SOURCE,
    "tests/__init__.py",
    "tests/conftest.py",
    "tests/ranks.py",
    "tests/algorithm_reference.py",
    "tests/test_algorithm_parts.py",
    "tests/test_algorithms.py",
    "tests/theory",
]
TIMEOUT_S = 200
"""Of one test: some mutations may hang."""


@dataclass(frozen=True)
class Mutation:
    """`old` occurs once in `file` (of tic_megatron/algorithms) and becomes `new`."""

    name: str
    file: str
    old: str
    new: str


def mutation_list() -> list[Mutation]:
    ratio, clip, weight, objective = "ratios.py", "clips.py", "normalisers.py", "objectives.py"
    n_t = "1.0 / (totals.n_trajectories * totals.max_response_tokens)"
    trajectory = "return segments.sum(token_log_ratio(trainer, old))\n"
    capped = "torch.exp(log_ratio.clamp(max=bound)) * advantage, log_ratio > bound"
    corrected = "    if correction is not None:\n"
    sides = "torch.where(positive, ratio > high, ratio < low)"
    gap = "(old_logprobs - inference_logprobs)"
    return [
        # normalisers
        Mutation("half the constant normaliser", weight, n_t, n_t.replace("1.0", "0.5")),
        Mutation("T_i for T", objective, '"tic_grpo": Objective(ratios.TRAJECTORY, clips.up_only, normalisers.constant_length',
                 '"tic_grpo": Objective(ratios.TRAJECTORY, clips.up_only, normalisers.response_length'),
        Mutation("T for T_i", weight, "1.0 / (totals.n_trajectories * lengths.clamp(min=1).double())",
                 "torch.full_like(lengths, " + n_t + ", dtype=torch.float64)"),
        Mutation("sum for mean over trajectories", weight, n_t, "1.0 / totals.max_response_tokens"),
        Mutation("N for the number of tokens", weight, "1.0 / max(totals.n_tokens, 1)", "1.0 / totals.n_trajectories"),
        Mutation("the local N", weight, "return torch.full_like(lengths, 1.0 / totals.n_trajectories,",
                 "return torch.full_like(lengths, 1.0 / len(lengths),"),
        Mutation("W once per token", objective, corrected,
                 "    if not objective.ratio.per_token:\n        weights = weights * segments.lengths\n" + corrected),
        # ratios
        Mutation("token ratio for W", ratio, "TRAJECTORY = Ratio(per_token=False, log_ratio=_trajectory)",
                 "TRAJECTORY = Ratio(per_token=True, log_ratio=_token)"),
        Mutation("mean for sum in L", ratio, trajectory,
                 "return segments.sum(token_log_ratio(trainer, old)) / segments.lengths.clamp(min=1)\n"),
        Mutation("no length mean in gspo", ratio, " / segments.lengths.clamp(min=1)", ""),
        Mutation("clamp before the sum", ratio, trajectory,
                 "return segments.sum(token_log_ratio(trainer, old).clamp(-1, 1))\n"),
        Mutation("L in fp32", ratio, "per_token.double())\n        return sum_over",
                 "per_token.float().double())\n        return sum_over"),
        Mutation("all-reduce in the backward", ratio, "        return grad, None\n",
                 "        grad = grad.clone()\n        dist.all_reduce(grad)\n        return grad, None\n"),
        Mutation("prefix without its own token", ratio, "return total - before[self.ids]",
                 "return total - per_token.double() - before[self.ids]"),
        Mutation("prefix sums across trajectories", ratio, "return total - before[self.ids]", "return total"),
        Mutation("detach forgotten in no_is", ratio, "token_log_ratio(trainer, trainer.detach())",
                 "token_log_ratio(trainer, trainer)"),
        Mutation("detached trajectory ratio", ratio, trajectory,
                 "return segments.sum(token_log_ratio(trainer, old)).detach() + 0 * trainer.sum()\n"),
        Mutation("half precision kept", ratio,
                 "dtype = torch.promote_types(torch.promote_types(trainer.dtype, old.dtype), torch.float32)",
                 "dtype = torch.promote_types(trainer.dtype, old.dtype)"),
        # clips
        Mutation("cap dropped", clip, "bound = math.log1p(clip.eps_high)", "bound = LOG_RATIO_BOUND"),
        Mutation("cap at eps", clip, "bound = math.log1p(clip.eps_high)", "bound = math.log(clip.eps_high + 1e-300)"),
        Mutation("cap at e^eps", clip, "bound = math.log1p(clip.eps_high)", "bound = clip.eps_high"),
        Mutation("cap for A > 0 only", clip, capped,
                 "torch.exp(torch.where(advantage > 0, log_ratio.clamp(max=bound), log_ratio)) * advantage, log_ratio > bound"),
        Mutation("lower cap in up-only", clip, capped,
                 "torch.exp(log_ratio.clamp(min=-bound, max=bound)) * advantage, log_ratio > bound"),
        Mutation("swapped clip sides", clip, sides,
                 "torch.where(positive, ratio < low, ratio > high)"),
        Mutation("max for PPO's min", clip, "positive = advantage >= 0", "positive = advantage < 0"),
        Mutation("clip of both sides", clip, sides, "(ratio > high) | (ratio < low)"),
        Mutation("sign of the advantage", clip, "torch.exp(log_ratio.clamp(max=bound)) * advantage",
                 "torch.exp(log_ratio.clamp(max=bound)) * -advantage"),
        Mutation("no clamp at 30", clip, "ratio = torch.exp(log_ratio.clamp(max=LOG_RATIO_BOUND))\n",
                 "ratio = torch.exp(log_ratio)\n"),
        Mutation("dual clip for A > 0 too", clip, "~positive & (ratio > clip.dual_clip)", "ratio > clip.dual_clip"),
        # objectives
        Mutation("traj_is without the lower side", objective, '"traj_is": Objective(ratios.TRAJECTORY, clips.two_sided',
                 '"traj_is": Objective(ratios.TRAJECTORY, clips.up_only'),
        Mutation("mask ignored", objective, "mask = mask.bool()", "mask = torch.ones_like(mask, dtype=torch.bool)"),
        Mutation("penalties without gspo's length mean", objective, "    if objective.ratio.length_mean:\n        weights",
                 "    if False:\n        weights"),
        # advantages
        Mutation("mean over the batch", "advantages.py", "rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
        Mutation("leave-one-out the wrong way", "advantages.py", "rewards.shape[1] / (rewards.shape[1] - 1)",
                 "(rewards.shape[1] - 1) / rewards.shape[1]"),
        Mutation("rounding in equal groups", "advantages.py", "torch.where(equal, torch.zeros_like(centred), centred)",
                 "centred"),
        Mutation("unbiased std", "advantages.py", "keepdim=True, correction=0", "keepdim=True, correction=1"),
        Mutation("dense baseline not given back", "advantages.py", "own - torch.cat([own[1:], own.new_zeros(1)])", "own"),
        Mutation("dense baseline of the token's reward", "advantages.py", "r.flip(0).cumsum(0).flip(0)", "r"),
        Mutation("ended responses count 0", "advantages.py", "r[-1:].expand(", "torch.zeros_like(r[-1:]).expand("),
        Mutation("dense std of the sums", "advantages.py", "table.var(dim=1, correction=0).mean()", "table[0].var(correction=0)"),
        # corrections and penalties
        Mutation("correction upside down", "corrections.py", gap, "(inference_logprobs - old_logprobs)"),
        Mutation("correction with gradient", "corrections.py", gap + ".detach()", gap),
        Mutation("one-sided mask", "corrections.py", "gap.abs() <= limit", "gap <= limit"),
        Mutation("k3 of the other sign", "penalties.py", "token_log_ratio(ref_logprobs, trainer_logprobs).clamp",
                 "token_log_ratio(trainer_logprobs, ref_logprobs).clamp"),
        Mutation("k2 without the half", "penalties.py", ".square() / 2", ".square()"),
    ]  # fmt: skip


def mutated(mutation: Mutation) -> str:
    """The changed text of the mutation's file. Raises ValueError when `old` is not there exactly once."""
    text = (ROOT / SOURCE / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"mutation {mutation.name!r}: {mutation.old!r} must occur once in {mutation.file}")
    return text.replace(mutation.old, mutation.new)


def scratch_copy(folder: Path, mutation: Mutation | None) -> None:
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    if mutation is not None:
        (folder / SOURCE / mutation.file).write_text(mutated(mutation))


class FirstFailure:
    """A pytest plugin that remembers the first test that failed."""

    name = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.split("::")[-1] + (" (timeout)" if "Timeout" in str(report.longrepr) else "")

    def pytest_collectreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = f"import of {report.nodeid}"


def run_tests(mutation: Mutation | None) -> tuple[str, float]:
    """(the first failing test, "" when all pass; processor seconds). Runs in a process of its own."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scratch_copy(folder, mutation)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = name  # for the tests' own processes
        sys.path.insert(0, name)
        sys.dont_write_bytecode = True
        for module in [m for m in sys.modules if m.split(".")[0] in ("tests", "tic_megatron")]:
            del sys.modules[module]
        import tic_megatron.algorithms

        assert Path(tic_megatron.algorithms.__file__).is_relative_to(folder)
        settings.register_profile("mutations", phases=[Phase.generate])  # any failure will do: no search for the smallest
        settings.load_profile("mutations")
        first = FirstFailure()
        arguments = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=no", f"--timeout={TIMEOUT_S}", *TESTS]
        with contextlib.redirect_stdout(io.StringIO()):
            code = pytest.main(arguments, plugins=[first])
        os.chdir(ROOT)
    return first.name or ("" if code == 0 else f"exit code {code}"), time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="mutations whose name contains this")
    options = parser.parse_args()
    chosen = [m for m in mutation_list() if options.only in m.name]
    for mutation in chosen:
        mutated(mutation)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, by the fork server
    context = multiprocessing.get_context("forkserver")  # a fresh process each, but torch is imported once
    context.set_forkserver_preload(["torch", "pytest", "hypothesis", "numpy"])
    survivors = 0
    with ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        failed, seconds = pool.submit(run_tests, None).result()
        print(f"unchanged: {failed or 'passes'}, {seconds:.0f} s of processor time\n", flush=True)
        if failed:
            return 1
        print("| mutation | caught by | processor s |\n|---|---|---|")
        for mutation, (caught, seconds) in zip(chosen, pool.map(run_tests, chosen), strict=True):
            survivors += not caught
            print(f"| {mutation.name} | {caught or '**survives**'} | {seconds:.0f} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutations caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
