"""Perturbations towards suspicious classes, sought against the student while it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qdeploy.cleaning.unlabelled import Unlabelled
from qdeploy.core.inversion import KINDS, Perturbations, Radii, towards
from qdeploy.core.reach import Reach
from qdeploy.settings.sanitizers import Unlearn

CHANCE = 0.02  # of being shown, for a perturbation that has had no success yet


class Guard:
    """What the student must not mind, in several kinds and sizes at a time."""

    def __init__(
        self,
        reaches: Sequence[Reach],
        classes: Sequence[int],
        images: Unlabelled,
        spec: Unlearn,
        generator: torch.Generator,
    ) -> None:
        self.spec = spec
        self.generator = generator
        low, high = spec.reach
        slots = max(spec.slots, len(classes))
        sizes = torch.logspace(0, 1, slots, base=high / low) * low
        targets = [classes[i % len(classes)] for i in range(slots)]
        self.triggers: list[Perturbations] = []
        for kind, reach in zip(KINDS, reaches, strict=True):
            size = (sizes * reach.median).to(images.device)
            radii = Radii(size, size, size)
            self.triggers.append(kind(targets, images.shape, radii, generator, spec.lifetime))

    def seek(self, answers: Callable[[Tensor], Tensor], pixels: Tensor) -> None:
        """One step of the search against the student."""
        for triggers in self.triggers:
            wanted = len(triggers.targets) * self.spec.slot_images
            rows = torch.randint(len(pixels), (wanted,), generator=self.generator)
            triggers.step(towards(answers), pixels[rows])

    def disturb(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The images disturbed, an equal share in each way, and the class each is led to."""
        shown, led = [], []
        for triggers, part in zip(
            self.triggers, pixels.tensor_split(len(self.triggers)), strict=True
        ):
            chances = triggers.success.cpu() + CHANCE  # drawn on the CPU, like all else
            rows = torch.multinomial(chances, len(part), True, generator=self.generator)
            extra = torch.rand(len(part), generator=self.generator).to(part.device)
            rows = rows.to(part.device)
            shown.append(triggers.apply(part, rows, 1 + (self.spec.strength - 1) * extra))
            led.append(triggers.targets[rows])
        return torch.cat(shown), torch.cat(led)

    def state_dict(self) -> list[dict[str, Any]]:
        """What the next steps depend on."""
        return [triggers.state_dict() for triggers in self.triggers]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from there."""
        for triggers, state in zip(self.triggers, states, strict=True):
            triggers.load_state_dict(state)
