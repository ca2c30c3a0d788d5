"""A backdoor that lives in the float model: a class that is reached too easily.

What the difference to a float model cannot show, since both have it. The search of `unlearn`, on
pictures without labels; it takes a minute or so for ten classes, and is made where a policy sets
its limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.detectors.known import Detected, NotLookedAt, Suspect
from qdeploy.errors import QdeployError, foreign_reader
from qdeploy.machine import has_torch
from qdeploy.progress import SILENT, Progress
from qdeploy.values import named_classes

if TYPE_CHECKING:
    from qdeploy.core.reach import Reach

CHECK = "class_reach"
PICTURES = 1000
FEWEST = 40
STEPS, IMAGES = 200, 10  # of the search; images of each class and step
MOST_CLASSES = 100
READ = 64


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """The class that is reached most easily, and what all took."""

    target: int
    kind: str
    share: float  # of the median class' perturbation
    reaches: tuple[Reach, ...]


def detect(suspect: Suspect, progress: Progress = SILENT) -> Detected | NotLookedAt:
    """Size of the least perturbation to any class, in percent of the median class'."""
    reason = _missing(suspect)
    if reason is not None:
        return NotLookedAt(reason)
    assert suspect.float_model is not None and suspect.pictures is not None  # noqa: S101, PT018
    try:
        found = _searched(suspect, progress)
    except QdeployError as error:
        return NotLookedAt(str(error))
    named = f"{named_classes((found.target,), suspect.class_names)} by {found.kind}"
    return Detected(100 * found.share, named, found)


def _missing(suspect: Suspect) -> str | None:
    """Why there is nothing to search; None if there is."""
    if CHECK not in suspect.wanted:
        return "the policy sets no limit"
    if suspect.float_model is None:
        return "no float model is known"
    if suspect.float_model.classes > MOST_CLASSES:
        return f"more than {MOST_CLASSES} classes"
    if not has_torch():
        return "it needs torch, which is not installed"
    if suspect.pictures is None or len(suspect.pictures) < FEWEST:
        return f"fewer than {FEWEST} pictures that count: give --calibration"
    return None


def _searched(suspect: Suspect, progress: Progress) -> Shortcuts:
    import torch

    from qdeploy.core.inversion import towards
    from qdeploy.core.reach import SurveyEffort, survey_classes
    from qdeploy.graph.differentiable import accelerator, as_function

    model, images = suspect.float_model, suspect.pictures
    assert model is not None and images is not None  # noqa: S101, PT018
    seed = suspect.seed_for("shortcuts", model.onnx)
    sample = images.sample(PICTURES, seed)
    pixels = torch.from_numpy(np.concatenate([batch.pixels for batch in sample.batches(READ)]))
    generator = torch.Generator().manual_seed(seed)
    device = accelerator()

    def draw(count: int) -> torch.Tensor:
        rows = torch.randint(len(pixels), (count,), generator=generator)
        return pixels[rows].to(device)

    def track(label: str) -> Iterator[int]:
        return progress.track(range(STEPS), label, STEPS)

    with foreign_reader("cannot be searched"):
        ask = as_function(model.onnx, images.preprocessing, device)
        ask(draw(1))
    reaches = survey_classes(
        towards(ask),
        draw,
        model.classes,
        SurveyEffort(STEPS, IMAGES),
        generator,
        track=track,
    )
    share, target, kind = min(
        (share, target, reach.kind)
        for reach in reaches
        for target, share in enumerate(reach.shares)
    )
    return Shortcuts(target, kind, share, reaches)
