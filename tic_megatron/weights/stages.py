"""Which layers lie on which pipeline stage. Pure Python."""

from __future__ import annotations


def layers_of_stages(
    n_layers: int, n_stages: int, *, n_virtual: int = 1, first: int | None = None, last: int | None = None
) -> list[list[list[int]]]:
    """The layers of every part of every pipeline stage: [n_stages][n_virtual][layers].

    With n_virtual > 1 a micro-batch runs through the first part of all stages, then through the second of all, and so on.

    Args:
        n_layers: layers of the model.
        n_stages: pipeline-parallel size.
        n_virtual: parts per stage.
        first, last: layers of the first and of the last stage, where they differ from an equal share of the rest.

    Raises:
        ValueError: the layers cannot be shared out like that; the message says why.
    """
    counts = _counts(n_layers, n_stages, first, last)
    for stage, count in enumerate(counts):
        if count % n_virtual:
            raise ValueError(f"the {count} layers of stage {stage} cannot be cut into {n_virtual} equal parts")
    stages: list[list[list[int]]] = [[] for _ in counts]
    layer = 0
    for _ in range(n_virtual):
        for stage, count in enumerate(counts):
            part = count // n_virtual
            stages[stage].append(list(range(layer, layer + part)))
            layer += part
    return stages


def _counts(n_layers: int, n_stages: int, first: int | None, last: int | None) -> list[int]:
    if n_stages == 1:
        if first is not None or last is not None:
            raise ValueError("a single stage has all layers")
        return [n_layers]
    fixed = [count for count in (first, last) if count is not None]
    rest, others = n_layers - sum(fixed), n_stages - len(fixed)
    if rest < others or (others == 0 and rest != 0):
        raise ValueError(f"{n_layers} layers cannot fill {n_stages} stages" + (f", {fixed} of them fixed" if fixed else ""))
    if others and rest % others:
        raise ValueError(f"{rest} layers cannot be shared equally by {others} stages")
    share = rest // others if others else 0
    counts = [share] * others
    return ([first] if first is not None else []) + counts + ([last] if last is not None else [])
