"""What a run evaluates on its own engines: held-out problems and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tic_megatron.config import EvalSettings, Settings
from tic_megatron.evaluation.accuracy import EvalResult, Generator, eval_name, evaluate
from tic_megatron.evaluation.benchmarks import EvalSet
from tic_megatron.rewards import RewardWorkers
from tic_megatron.rollout.requests import stable_seed
from tic_megatron.trajectory import Prompt


class Evaluations:
    """`held_out` problems, those of `data.eval`; and `benchmarks`, those of `eval.benchmarks`."""

    def __init__(
        self,
        settings: Settings,
        held_out: Sequence[Prompt],
        benchmarks: Sequence[EvalSet],
        engines: Generator,
        graders: Mapping[str, RewardWorkers],
    ) -> None:
        """`graders`: by the reward that they grade with (`reward.function`)."""
        self._settings = settings
        self._held_out = held_out
        self._benchmarks = benchmarks
        self._engines = engines
        self._graders = graders

    def is_due(self, step: int) -> bool:
        """Before the first step (0), every `trainer.eval_every` steps, and after the last."""
        trainer = self._settings.trainer
        return step in (0, trainer.steps) or (trainer.eval_every > 0 and step % trainer.eval_every == 0)

    def held_out(self) -> EvalResult | None:
        """As `eval` says; None without held-out problems."""
        if not self._held_out:
            return None
        settings = self._settings
        return evaluate(
            self._engines,
            self._held_out,
            self._graders[settings.reward.function],
            settings.eval,
            name=eval_name(settings.data.eval),
            max_tokens=settings.eval_response_tokens,
        )

    def benchmarks(self) -> list[EvalResult]:
        """Each as its table entry says, Avg@k at temperature 1, or greedy; or with `eval.benchmark_samples`."""
        return [self._benchmark(chosen) for chosen in self._benchmarks]

    def _benchmark(self, chosen: EvalSet) -> EvalResult:
        options, benchmark = self._settings.eval, chosen.benchmark
        samples = benchmark.samples if options.benchmark_samples is None else options.benchmark_samples
        return evaluate(
            self._engines,
            chosen.prompts,
            self._graders[benchmark.reward],
            EvalSettings(samples=samples, temperature=1.0) if samples else EvalSettings(),
            name=benchmark.name,
            max_tokens=self._settings.eval_response_tokens,
            seed=stable_seed("eval", options.seed, benchmark.name),
        )
