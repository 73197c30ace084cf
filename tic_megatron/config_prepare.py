"""Typed settings of `tic-megatron data prepare`, and its recipes; see `tic_megatron.config`."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tic_megatron.config import dump_yaml


@dataclass
class PrepareSettings:
    """Settings of `tic-megatron data prepare` (docs/data.md)."""

    out: str = ""
    """Folder to make: problems.jsonl, manifest.json, report.md. It appears when it is complete."""
    recipe: Literal["paper"] | None = None
    """Settings to start from; `paper`: DAPO-Math-17K and AIME 1983-2022, compared with AIME 2024, AIME 2025 and MATH-500."""
    sources: list[str] = field(default_factory=list)
    """What is read, as `data.train` is given, or NAME=SOURCE; of equal problems the first is kept."""
    held_out: list[str] = field(default_factory=list)
    """Evaluation sets, given likewise; problems that they have, or nearly have, are removed."""
    years: list[int] = field(default_factory=list)
    """First and last year of the rows to keep, of sources whose rows have a `year`."""
    template: str = ""
    """Text around every problem: `dapo`, `boxed`, `none`, or a text with `{problem}`. That of DAPO's rows is taken off before."""
    prompt_fields: list[str] = field(default_factory=list)
    """Fields for the problem; a source's first row decides which of them is used. As the recipe says, or the usual ones."""
    answer_fields: list[str] = field(default_factory=list)
    """Fields for the answer, likewise."""
    conflicts: Literal["drop", "first", "refuse"] = "drop"
    """Problems that come with different answers: leave them out, keep the first answer, or stop. All are named in the report."""
    near_duplicate: float = 0.35
    """Similarity to a held-out problem (see docs/data.md) from which on a problem is removed; 1 removes the same ones only."""
    model: str | None = None
    """Hugging Face directory, or hub name, of the model whose tokenizer and chat template measure the prompts."""
    max_prompt_tokens: int | None = None
    """Longest prompt, in tokens of `model`, chat template included; longer ones are left out."""

    def to_yaml(self) -> str:
        """The settings as YAML, the recipe's filled in, which `--config` reads again."""
        return dump_yaml(asdict(self.resolve()))

    def resolve(self) -> PrepareSettings:
        """A copy in which the recipe's settings, then the usual ones, stand where none are given."""
        recipe = RECIPES[self.recipe] if self.recipe else {}
        settings = copy.deepcopy(self)
        for name, value in {**USUAL_FIELDS, **recipe}.items():
            if not getattr(settings, name):
                setattr(settings, name, copy.deepcopy(value))
        return settings


RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "sources": ["dapo=BytedTsinghua-SIA/DAPO-Math-17k", "aime=di-zhang-fdu/AIME_1983_2024"],
        "held_out": ["aime24=HuggingFaceH4/aime_2024", "aime25=math-ai/aime25", "math500=HuggingFaceH4/MATH-500"],
        "years": [1983, 2022],
        "template": "dapo",
    }
}
USUAL_FIELDS: dict[str, Any] = {
    "template": "none",
    "prompt_fields": ["problem", "prompt", "question", "Problem", "Question"],
    "answer_fields": ["answer", "label", "reward_model.ground_truth", "Answer"],
}
