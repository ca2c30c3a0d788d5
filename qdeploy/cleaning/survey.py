"""Which classes of a torch model are reached too easily; see `qdeploy.core.reach`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from qdeploy.cleaning.unlabelled import Material, Unlabelled
from qdeploy.core.inversion import towards
from qdeploy.core.reach import Reach, SurveyEffort, survey_classes
from qdeploy.progress import Progress
from qdeploy.settings.sanitizers import Unlearn
from qdeploy.training.precision import arithmetic


def survey(
    model: nn.Module, material: Material, spec: Unlearn, progress: Progress
) -> tuple[Reach, ...]:
    """What leads to each class of `model`, one result for every kind of perturbation.

    Time goes with the number of classes. Each process looks for itself; the least counts.
    """
    images, generator = material.images, material.generator
    ask = answering(model, images)
    classes = len(ask(images.pixels[:1].float() / 255)[0])

    def track(label: str) -> Iterator[int]:
        return progress.track(range(spec.survey_steps), label, spec.survey_steps)

    reaches = survey_classes(
        towards(ask),
        lambda count: images.draw(count, generator),
        classes,
        SurveyEffort(spec.survey_steps, spec.survey_images),
        generator,
        track=track,
    )
    found = [torch.tensor(reach.radii).to(images.device) for reach in reaches]
    least = [tuple(material.compute.least(radii).tolist()) for radii in found]
    return tuple(replace(r, radii=radii) for r, radii in zip(reaches, least, strict=True))


def answering(model: nn.Module, images: Unlabelled) -> Callable[[Tensor], Tensor]:
    """From pixels in [0, 1] to the logits of `model`, in float32."""

    def ask(pixels: Tensor) -> Tensor:
        with arithmetic(model):
            return model(images.normalise(pixels)).float()

    return ask
