"""What a training rank reports of a rollout, as sums and per-trajectory lists; the driver adds the ranks up."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class UpdateResult:
    """What a backend reports of one optimizer update.

    `applied` is false when the update was skipped, on all ranks: for a loss or a gradient that is not finite on any of them.
    `overflow`: it was fp16 arithmetic with finite losses, whose loss scale is lowered for it. The norm of a skipped one is 0.
    """

    grad_norm: float
    learning_rate: float
    applied: bool
    overflow: bool = False


@dataclass
class UpdateStats:
    """One update on one data-parallel shard.

    `value`: the objective's value; `log_ratio`, `capped`, `advantages`: L_i, the share that the clip removed, and A_i, of each
    trajectory that was trained on; `entropy_sum`, `kl_sum` (None without a reference), `n_tokens`: over their response
    tokens; `noise`: max |L| between the forward-only pass and the training forward, both at theta_old, where measured;
    `bad_prompts`: prompt id of each trajectory with a log-prob that is not finite, whose micro-batch has no part in the others.
    """

    value: float = 0.0
    entropy_sum: float = 0.0
    kl_sum: float | None = None
    n_tokens: int = 0
    log_ratio: list[float] = field(default_factory=list)
    capped: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    noise: float | None = None
    bad_prompts: list[str] = field(default_factory=list)
    result: UpdateResult | None = None


@dataclass
class MismatchStats:
    """Trainer's against generator's log-probs, both at theta_old: per-token |difference| and per-trajectory sums."""

    abs_sum: float = 0.0
    abs_max: float = 0.0
    n_tokens: int = 0
    trajectory_log_ratio: list[float] = field(default_factory=list)
