"""How easily images are led to each class of one model, and which classes are reached too easily.

A backdoor that lives in a model is a shortcut: its class takes a much smaller universal
perturbation than the others (Wang et al., Neural Cleanse, S&P 2019).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qdeploy.core.inversion import KINDS, Objective, Perturbations, Radii

FIRST = {"additive": 0.07, "masked": 0.1}  # where the search starts, as a share of the largest
LEAST, MOST = 1e-3, 0.5
TOGETHER = 10  # classes that are searched at a time

Draw = Callable[[int], Float[Tensor, "images channels height width"]]  # so many images at random


@dataclass(frozen=True, slots=True)
class Reach:
    """Size of the least universal perturbation of one kind found for each class."""

    kind: str
    unit: str
    radii: tuple[float, ...]  # by class; the largest there is where none was found

    @property
    def median(self) -> float:
        """The typical class."""
        return statistics.median(self.radii)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the median, by class."""
        return tuple(radius / self.median for radius in self.radii)


@dataclass(frozen=True, slots=True)
class SurveyEffort:
    """How long is searched."""

    steps: int
    images: int  # of each class and step


def survey_classes(
    objective: Objective,
    draw: Draw,
    classes: int,
    effort: SurveyEffort,
    generator: torch.Generator,
    *,
    track: Callable[[str], Iterable[int]],
) -> tuple[Reach, ...]:
    """What leads to each class, one result for every kind of perturbation.

    Args:
        track: Gives the numbers of the steps, by what is said of them.
    """
    probe = draw(1)
    channels, height, width = probe.shape[1:]
    shape = (channels, height, width)
    groups = [range(i, min(i + TOGETHER, classes)) for i in range(0, classes, TOGETHER)]
    reaches = []
    for kind in KINDS:
        radii: list[float] = []
        for group in groups:
            triggers = _fresh(kind, group, shape, probe.device, generator)
            for _ in track(f"look for {kind.NAME} shortcuts, steps"):
                triggers.step(objective, draw(len(group) * effort.images))
            radii += torch.minimum(triggers.found, triggers.radii.most).tolist()
        reaches.append(Reach(kind.NAME, kind.UNIT, tuple(radii)))
    return tuple(reaches)


def suspects(reaches: Sequence[Reach], share: float) -> tuple[int, ...]:
    """Classes that some perturbation of less than `share` of the median leads to."""
    return tuple(
        sorted({c for reach in reaches for c, part in enumerate(reach.shares) if part < share})
    )


def _fresh(
    kind: type[Perturbations],
    group: range,
    shape: tuple[int, int, int],
    device: torch.device,
    generator: torch.Generator,
) -> Perturbations:
    scale = torch.full((len(group),), kind.scale(shape), device=device)
    radii = Radii(LEAST * scale, MOST * scale, FIRST[kind.NAME] * scale)
    return kind(tuple(group), shape, radii, generator)
