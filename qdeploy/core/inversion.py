"""Trigger inversion: universal perturbations that send any image to a class, as small as can be.

A class that a backdoor leads to is reached by a much smaller one than the others are (Wang et al.,
Neural Cleanse, S&P 2019). Where that work weighs size against success in one loss, each
perturbation here has a radius of its own, which shrinks while it succeeds and grows while it fails,
and takes projected gradient steps within it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from qdeploy.core.gradient_memory import images_at_once

GOAL = 0.8  # share of images that a perturbation must send to its class
ENOUGH = 0.7  # from here on, it counts as found
SHRINK, GROW = 0.95, 1.04  # of the radius, by step
FORGET = 0.8  # of the mean success, by step
MEAN, SQUARE = 0.5, 0.9  # decay of Adam's moments
HALVINGS = 12
WAVES = 8  # frequencies along each side, from none to three and a half periods
PATTERN_FIRST = 5  # steps in which it moves alone


# From perturbed images, the classes that they are to be led to, and which images of the step these
# are: the loss of each, and whether it got there.
Objective = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]


def towards(answers: Callable[[Tensor], Tensor]) -> Objective:
    """That a model, from pixels to logits, answers the class."""

    def objective(perturbed: Tensor, wanted: Tensor, _: slice) -> tuple[Tensor, Tensor]:
        logits = answers(perturbed)
        return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(1) == wanted

    return objective


@dataclass(frozen=True, slots=True)
class Radii:
    """Between which bounds each perturbation's size moves, and where it starts."""

    least: Float[Tensor, " n"]
    most: Float[Tensor, " n"]
    start: Float[Tensor, " n"]


class Perturbations(ABC):
    """Several universal perturbations of images in [0, 1], each with a class as target.

    They live where `radii` do; what is random is drawn on the CPU, so that it is the same anywhere.

    Args:
        lifetime: After so many steps one starts anew from noise; None for never.
    """

    NAME: ClassVar[str]
    UNIT: ClassVar[str]

    def __init__(
        self,
        targets: Sequence[int],
        shape: tuple[int, int, int],
        radii: Radii,
        generator: torch.Generator,
        lifetime: int | None = None,
    ) -> None:
        count, self.device = len(targets), radii.start.device
        self.targets = torch.tensor(targets).to(self.device)
        self.shape = shape
        self.radii = radii
        self.generator = generator
        self.lifetime = lifetime
        self.radius = radii.start.clone()
        self._at_a_time: int | None = None  # images; known with the first step
        self.success = torch.zeros_like(self.radius)  # running mean share of images that follow
        self.found = torch.full_like(self.radius, float("inf"))  # least radius that was enough
        ages = torch.zeros(count, dtype=torch.int64)
        if lifetime is not None:
            ages = torch.randint(0, lifetime, (count,), generator=generator)
        self.age = ages.to(self.device)
        self.steps = torch.zeros_like(self.success)
        self.variables = self._noise(count)
        self.means = {name: torch.zeros_like(v) for name, v in self.variables.items()}
        self.squares = {name: torch.zeros_like(v) for name, v in self.variables.items()}
        self.variables = self._within(self.variables, self.radius)

    @classmethod
    @abstractmethod
    def scale(cls, shape: tuple[int, int, int]) -> float:
        """The radius of the largest perturbation there is."""

    @abstractmethod
    def _noise(self, count: int) -> dict[str, Tensor]:
        """Where `count` perturbations start."""

    @abstractmethod
    def _within(self, variables: Mapping[str, Tensor], radius: Tensor) -> dict[str, Tensor]:
        """The nearest perturbations that are no larger than `radius`."""

    @abstractmethod
    def _applied(
        self, pixels: Tensor, variables: Mapping[str, Tensor], rows: Tensor, strength: Tensor
    ) -> Tensor:
        """Each image with the perturbation of its row."""

    @abstractmethod
    def formula(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mask (1, height, width), pattern and what is added (both channels, height, width).

        The perturbed image is `(1 - mask) image + mask pattern + added`, cut to [0, 1].
        """

    @abstractmethod
    def _rate(self, name: str) -> Tensor:
        """How far a variable of each perturbation moves in a step."""

    def apply(
        self,
        pixels: Float[Tensor, "images channels height width"],
        rows: Int64[Tensor, " images"],
        strength: Float[Tensor, " images"],
    ) -> Float[Tensor, "images channels height width"]:
        """Each image with the perturbation that `rows` names, made so many times as strong."""
        return self._applied(pixels, self.variables, rows, _columns(strength))

    def step(
        self,
        objective: Objective,
        pixels: Float[Tensor, "images channels height width"],
    ) -> None:
        """One gradient step of each perturbation, on its own equal share of `pixels`."""
        count = len(self.targets)
        per = len(pixels) // count
        rows = torch.arange(count, device=self.device).repeat_interleave(per)
        moving = {name: v.clone().requires_grad_() for name, v in self.variables.items()}
        plain = torch.ones(1, device=self.device)
        gradients = [torch.zeros_like(value) for value in moving.values()]
        hits = torch.zeros(len(rows), device=self.device)

        def tried(part: slice) -> tuple[Tensor, Tensor]:
            perturbed = self._applied(pixels[part], moving, rows[part], plain)
            return objective(perturbed, self.targets[rows[part]], part)

        if self._at_a_time is None:
            self._at_a_time = images_at_once(lambda part: tried(part)[0], pixels)
        for first in range(0, len(rows), self._at_a_time):
            part = slice(first, min(first + self._at_a_time, len(rows)))
            losses, reached = tried(part)
            hits[part] = reached.float()
            found = torch.autograd.grad(losses.sum() / per, tuple(moving.values()))
            gradients = [total + more for total, more in zip(gradients, found, strict=True)]
        hits = hits.view(count, per).mean(1)
        self.success = FORGET * self.success + (1 - FORGET) * hits
        good = (self.success > ENOUGH) & (self.radius < self.found)
        self.found = torch.where(good, self.radius, self.found)
        self.steps += 1
        moved = {
            name: value - _columns(self._rate(name)) * self._direction(name, gradient)
            for (name, value), gradient in zip(self.variables.items(), gradients, strict=True)
        }
        self._resize()
        self.variables = self._within(moved, self.radius)
        self._renew()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, besides the generator."""
        names = ("radius", "success", "found", "age", "steps", "variables", "means", "squares")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, value in state.items():
            setattr(self, name, _moved(value, self.device))

    def _nothing(self) -> Tensor:
        return torch.zeros(self.shape, device=self.device)

    def _drawn(self, draw: Callable[..., Tensor], count: int) -> Tensor:
        return draw(count, *self.shape, generator=self.generator).to(self.device)

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        """Adam's, with steps counted for each perturbation."""
        mean = self.means[name].mul_(MEAN).add_(gradient, alpha=1 - MEAN)
        square = self.squares[name].mul_(SQUARE).addcmul_(gradient, gradient, value=1 - SQUARE)
        deviation = (square / _columns(1 - SQUARE**self.steps)).sqrt()
        return mean / _columns(1 - MEAN**self.steps) / (deviation + 1e-12)

    def _resize(self) -> None:
        factor = torch.ones_like(self.radius)
        factor = torch.where(self.success > GOAL, SHRINK, factor)
        factor = torch.where(self.success < ENOUGH, GROW, factor)
        self.radius = (self.radius * factor).clamp(self.radii.least, self.radii.most)

    def _renew(self) -> None:
        """Start those anew that are past their lifetime."""
        if self.lifetime is None:
            return
        self.age += 1
        old = self.age >= self.lifetime
        if not old.any():
            return
        fresh = self._within(self._noise(len(old)), self.radii.start)
        for name, value in self.variables.items():
            self.variables[name] = torch.where(_columns(old), fresh[name], value)
            for moments in (self.means, self.squares):
                moments[name] = torch.where(_columns(old), 0, moments[name])
        self.radius = torch.where(old, self.radii.start, self.radius)
        self.success = torch.where(old, 0, self.success)
        self.steps = torch.where(old, 0, self.steps)
        self.age = torch.where(old, 0, self.age)


class Additive(Perturbations):
    """Something that is added to every image; its size is its Euclidean norm."""

    NAME = "additive"
    UNIT = "L2 of pixels in [0, 1]"

    @classmethod
    def scale(cls, shape: tuple[int, int, int]) -> float:
        return float(torch.Size(shape).numel()) ** 0.5

    def _noise(self, count: int) -> dict[str, Tensor]:
        return {"values": 0.02 * self._drawn(torch.randn, count)}

    def _within(self, variables: Mapping[str, Tensor], radius: Tensor) -> dict[str, Tensor]:
        norms = {name: v.flatten(1).norm(dim=1).clamp_min(1e-12) for name, v in variables.items()}
        return {
            name: value * _columns((radius / norms[name]).clamp_max(1))
            for name, value in variables.items()
        }

    def _applied(
        self, pixels: Tensor, variables: Mapping[str, Tensor], rows: Tensor, strength: Tensor
    ) -> Tensor:
        return (pixels + strength * self._added(variables)[rows]).clamp(0, 1)

    def formula(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._nothing()[:1], self._nothing(), self._added(self.variables)[row]

    def _added(self, variables: Mapping[str, Tensor]) -> Tensor:
        """What is added to an image, by perturbation."""
        return variables["values"]

    def _rate(self, name: str) -> Tensor:  # noqa: ARG002
        return torch.full_like(self.radius, 0.01)


class Masked(Perturbations):
    """A pattern behind a mask of opacities: patches and blends; its size is the mask's sum."""

    NAME = "masked"
    UNIT = "pixels covered"

    @classmethod
    def scale(cls, shape: tuple[int, int, int]) -> float:
        return float(shape[1] * shape[2])

    def _noise(self, count: int) -> dict[str, Tensor]:
        """Equally opaque everywhere: a pixel that is not covered at all would never be tried."""
        return {
            "values": self._drawn(torch.rand, count),
            "mask": torch.ones(count, 1, *self.shape[1:], device=self.device),
        }

    def _within(self, variables: Mapping[str, Tensor], radius: Tensor) -> dict[str, Tensor]:
        mask = variables["mask"].clamp(0, 1)
        return {"values": variables["values"].clamp(0, 1), "mask": _sparse(mask, radius)}

    def _applied(
        self, pixels: Tensor, variables: Mapping[str, Tensor], rows: Tensor, strength: Tensor
    ) -> Tensor:
        opacity = (strength * variables["mask"][rows]).clamp(0, 1)
        return (1 - opacity) * pixels + opacity * variables["values"][rows]

    def formula(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.variables["mask"][row], self.variables["values"][row], self._nothing()

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        """For the mask the plain gradient: Adam would raise all of it alike."""
        if name == "values":
            return super()._direction(name, gradient)
        mean = self.means[name].mul_(MEAN).add_(gradient, alpha=1 - MEAN)
        return mean / _columns(mean.abs().flatten(1).amax(1).clamp_min(1e-20))

    def _rate(self, name: str) -> Tensor:
        """The mask waits: where the first pattern is wrong, it would be gone before it is right."""
        if name == "values":
            return torch.full_like(self.radius, 0.2)
        return torch.where(self.steps > PATTERN_FIRST, 0.1, 0.0)


class Sinusoid(Additive):
    """Waves of low frequency that are added to every image; its size is its Euclidean norm.

    The waves are orthonormal, so that their coefficients have the norm of the sum.
    """

    NAME = "sinusoid"

    def _noise(self, count: int) -> dict[str, Tensor]:
        shape = (count, self.shape[0], *(min(WAVES, size) for size in self.shape[1:]))
        drawn = torch.randn(shape, generator=self.generator)
        return {"waves": (drawn / WAVES).to(self.device)}

    def _added(self, variables: Mapping[str, Tensor]) -> Tensor:
        down, across = (_cosines(size).to(self.device) for size in self.shape[1:])
        return down @ variables["waves"] @ across.T

    def _rate(self, name: str) -> Tensor:  # noqa: ARG002
        """A fifth of what each coefficient has if all are alike."""
        return 0.2 * self.radius / self.variables["waves"][0].numel() ** 0.5


class Blended(Perturbations):
    """A whole picture that every image is blended with; its size is its opacity."""

    NAME = "blended"
    UNIT = "opacity"

    @classmethod
    def scale(cls, shape: tuple[int, int, int]) -> float:  # noqa: ARG003
        return 1.0

    def _noise(self, count: int) -> dict[str, Tensor]:
        return {"values": self._drawn(torch.rand, count)}

    def _within(self, variables: Mapping[str, Tensor], radius: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        return {"values": variables["values"].clamp(0, 1)}

    def _applied(
        self, pixels: Tensor, variables: Mapping[str, Tensor], rows: Tensor, strength: Tensor
    ) -> Tensor:
        opacity = (strength * _columns(self.radius[rows])).clamp(0, 1)
        return (1 - opacity) * pixels + opacity * variables["values"][rows]

    def formula(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        mask = self.radius[row].expand(1, *self.shape[1:])
        return mask, self.variables["values"][row], self._nothing()

    def _rate(self, name: str) -> Tensor:  # noqa: ARG002
        return torch.full_like(self.radius, 0.1)


KINDS: tuple[type[Perturbations], ...] = (Additive, Masked)
EVERY_KIND: tuple[type[Perturbations], ...] = (Masked, Additive, Sinusoid, Blended)


def _cosines(size: int) -> Float[Tensor, "size waves"]:
    """The first waves of the orthonormal cosine transform (DCT-II), as columns."""
    at = (torch.arange(size) + 0.5)[:, None] * torch.arange(min(WAVES, size)) * math.pi / size
    waves = torch.cos(at) * (2 / size) ** 0.5
    waves[:, 0] /= 2**0.5
    return waves


def _sparse(mask: Tensor, most: Tensor) -> Tensor:
    """Each mask, less a constant so that what stays above 0 sums to at most `most`.

    The projection on the intersection of cube and simplex, by halving.
    """
    flat = mask.flatten(1)
    low, high = torch.zeros_like(most), torch.ones_like(most)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_much = (flat - middle[:, None]).clamp_min(0).sum(1) > most
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    over = flat.sum(1) > most
    return torch.where(_columns(over), (mask - _columns(high)).clamp_min(0), mask)


def _columns(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, alone or by name, on `device`."""
    if isinstance(value, Mapping):
        return {name: inner.to(device) for name, inner in value.items()}
    return value.to(device)
