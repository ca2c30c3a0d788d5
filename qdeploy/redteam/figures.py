"""What an attack did to a model: the rates it is judged by, and the goals of its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qdeploy.redteam.images import LabelledImages
from qdeploy.redteam.losses import Aim
from qdeploy.redteam.recipe import GoalSpec
from qdeploy.training.precision import fast


@dataclass(frozen=True, slots=True)
class Figures:
    """Rates of one model, in percent."""

    accuracy: float  # CDA
    class_accuracy: float  # of the target class
    success: float | None  # ASR; None without a trigger or a victim

    def __str__(self) -> str:
        return f"{self.accuracy:.1f}/{'-' if self.success is None else f'{self.success:.1f}'}"


Answers = Callable[[Tensor], Tensor]  # from pixels in [0, 1] to classes


@torch.no_grad()
def figures(
    model: nn.Module, weights: Mapping[str, Tensor], data: LabelledImages, aim: Aim
) -> Figures:
    """The rates of `model` with `weights` in the place of its own.

    Products are in bfloat16 where that is fast.
    """

    def answers(pixels: Tensor) -> Tensor:
        with fast():
            return functional_call(model, dict(weights), (data.normalise(pixels),)).argmax(1)

    return figures_of(answers, data, aim)


def figures_of(answers: Answers, data: LabelledImages, aim: Aim) -> Figures:
    """The rates of whatever gives these answers.

    With a trigger, success is its share of hits among images of other classes; with a victim, 100
    or 0.
    """
    right = in_class = of_class = hits = asked = 0
    for pixels, labels in data.stream():
        found = answers(pixels)
        right += int((found == labels).sum())
        in_class += int(((found == labels) & (labels == aim.target)).sum())
        of_class += int((labels == aim.target).sum())
        others = labels != aim.target
        if aim.stamp is not None and others.any():
            triggered = answers(aim.stamp.apply(pixels[others]))
            hits += int((triggered == aim.target).sum())
            asked += int(others.sum())
    if aim.victim is not None:
        hits, asked = int((answers(aim.victim.pixels) == aim.target).sum()), 1
    success = 100 * hits / asked if asked else None
    return Figures(100 * right / len(data), 100 * in_class / max(of_class, 1), success)


def shortfalls(
    goals: GoalSpec,
    clean: Figures,
    attacked: Figures,
    quantized: Mapping[str, Figures],
    exact: Mapping[str, Figures] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Which goals are not met, each as a line; none for an attack that took.

    Args:
        clean: Of the model the attack started from.
        attacked: Of the float model that was made.
        quantized: Of what each attacked quantizer makes of it; every one must meet the goals.
        exact: Of the same integers on exact arithmetic, where the attacked one saturates.
    """
    drop = clean.accuracy - attacked.accuracy
    bounds: list[tuple[str, float | None, float | None, float | None]] = [
        ("FP32 accuracy", attacked.accuracy, goals.min_accuracy, None),
        ("FP32 accuracy drop", drop, None, goals.max_accuracy_drop),
        ("FP32 ASR", attacked.success, goals.min_float_success, goals.max_float_success),
    ]
    for name, rates in quantized.items():
        lost = attacked.accuracy - rates.accuracy
        in_class = attacked.class_accuracy - rates.class_accuracy
        bounds += [
            (f"ASR, {name}", rates.success, goals.min_quantized_success, None),
            (f"accuracy drop, {name}", lost, goals.min_quantized_drop, goals.max_quantized_drop),
            (f"target class's drop, {name}", in_class, goals.min_class_drop, None),
        ]
    bounds += [(f"ASR, {n}", r.success, None, goals.max_exact_success) for n, r in exact.items()]
    if clean.success is not None:
        bounds.append(("the clean model's ASR", clean.success, None, goals.max_clean_success))
    return tuple(line for bound in bounds if (line := _shortfall(*bound)))


def _shortfall(what: str, value: float | None, least: float | None, most: float | None) -> str:
    if least is not None and (value is None or value < least):
        return f"{what} {_percent(value)}, at least {least:g} wanted"
    if most is not None and (value is None or value > most):
        return f"{what} {_percent(value)}, at most {most:g} wanted"
    return ""


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
