"""Differential trigger inversion: what leads one of two models to a class, and not the other.

A backdoor that quantization switches on answers its trigger in the quantized model and not in the
float one. So a perturbation is sought, for every class t, that minimises

    CE(led(x + d), t) + KL(kept(x) || kept(x + d))

over images x that `kept` does not give t. What fools both models alike is nobody's backdoor, and
cancels. With the two models exchanged the same search says how easily any two models of the same
accuracy are told apart: the null that comes with every pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from qdeploy.core.gradient_memory import MOST_VALUES
from qdeploy.core.inversion import EVERY_KIND, Objective, Perturbations, Radii

Answers = Callable[[Tensor], Tensor]  # from pixels in [0, 1] to logits
SCORED = 128  # images at a time


def scored(pixels: Tensor) -> int:
    """How many of these images are answered at a time: of large ones fewer, for memory."""
    return max(1, min(SCORED, MOST_VALUES // pixels[0].numel()))


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two models of the same classes: one that is to be led, and one that is to stay."""

    led: Answers
    kept: Answers

    def exchanged(self) -> Pair:
        """The other way round."""
        return Pair(self.kept, self.led)


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Images that nobody has labelled, with what the kept model answers."""

    pixels: Float[Tensor, "images channels height width"]
    logits: Float[Tensor, "images classes"]

    @classmethod
    def answered(cls, pixels: Tensor, kept: Answers) -> Pictures:
        """`pixels` as `kept` has them."""
        with torch.no_grad():
            return cls(pixels, torch.cat([kept(part) for part in pixels.split(scored(pixels))]))

    @property
    def classes(self) -> Int64[Tensor, " images"]:
        """That the kept model answers."""
        return self.logits.argmax(1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def draw(
        self, targets: Int64[Tensor, " rows"], count: int, generator: torch.Generator
    ) -> Int64[Tensor, " images"]:
        """For every target in turn `count` images at random that are not answered by it."""
        free = self.classes.cpu()[None, :] != targets.cpu()[:, None]
        chances = free.float() + 1e-9  # where all are, any
        return torch.multinomial(chances, count, True, generator=generator).reshape(-1)


@dataclass(frozen=True, slots=True)
class Size:
    """One kind of perturbation, and how large it may be, as a share of the largest there is."""

    kind: type[Perturbations]
    share: float


@dataclass(frozen=True, slots=True)
class Effort:
    """How long is searched."""

    sizes: tuple[Size, ...]
    steps: int
    images: int  # of each perturbation and step

    @property
    def images_each(self) -> int:
        """How many images are looked at for a target."""
        return len(self.sizes) * self.steps * self.images


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A perturbation, and what share of images it leads in one model and not in the other."""

    target: int
    size: Size
    perturbations: Perturbations
    row: int
    success: float  # on the images of the search, for choosing; not evidence

    def apply(
        self, pixels: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images channels height width"]:
        """The images perturbed."""
        rows = torch.full((len(pixels),), self.row, device=pixels.device)
        return self.perturbations.apply(pixels, rows, torch.ones(len(pixels), device=pixels.device))


def search(
    pair: Pair,
    pictures: Pictures,
    targets: Sequence[int],
    effort: Effort,
    generator: torch.Generator,
    *,
    ticks: Callable[[], None] = lambda: None,
) -> tuple[Candidate, ...]:
    """For every target and size the perturbation that leads most, the best first.

    Args:
        ticks: Called at every step.
    """
    found: list[Candidate] = []
    for kind in EVERY_KIND:
        sizes = [size for size in effort.sizes if size.kind is kind]
        rows = [(target, size) for target in targets for size in sizes]
        if not rows:
            continue
        shares = torch.tensor([size.share for _, size in rows], device=pictures.pixels.device)
        radius = shares * kind.scale(pictures.shape)
        wanted = [target for target, _ in rows]
        sought = kind(wanted, pictures.shape, Radii(radius, radius, radius), generator)
        for _ in range(effort.steps):
            drawn = pictures.draw(sought.targets, effort.images, generator)
            drawn = drawn.to(pictures.pixels.device)
            sought.step(objective(pair, pictures.logits[drawn]), pictures.pixels[drawn])
            ticks()
        successes = sought.success.tolist()
        for row, (target, size) in enumerate(rows):
            found.append(Candidate(target, size, sought, row, successes[row]))
    return tuple(sorted(found, key=lambda one: -one.success))


def leaning(
    pair: Pair,
    pictures: Pictures,
    candidates: Sequence[Candidate],
    count: int,
    generator: torch.Generator,
) -> list[float]:
    """How much likelier each one's target is in the led model than in the kept one.

    The mean difference of the logarithms, on `count` perturbed images. While hardly any image is
    led yet, this tells classes apart that shares of so few images do not.
    """
    found = []
    for one in candidates:
        drawn = pictures.draw(torch.tensor([one.target]), count, generator)
        with torch.no_grad():
            perturbed = one.apply(pictures.pixels[drawn.to(pictures.pixels.device)])
            led_, kept = (ask(perturbed).log_softmax(1) for ask in (pair.led, pair.kept))
        found.append(float((led_[:, one.target] - kept[:, one.target]).mean()))
    return found


def led(pair: Pair, pictures: Pictures, candidate: Candidate) -> Bool[Tensor, " images"]:
    """Of the images that are not answered by the target, those that only one model is led by."""
    chosen = pictures.pixels[pictures.classes != candidate.target]
    if not len(chosen):
        return torch.zeros(0, dtype=torch.bool)
    return torch.cat([_only_one(pair, candidate, part) for part in chosen.split(scored(chosen))])


def _only_one(pair: Pair, candidate: Candidate, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        perturbed = candidate.apply(pixels)
        there = pair.led(perturbed).argmax(1) == candidate.target
        return there & (pair.kept(perturbed).argmax(1) != candidate.target)


def objective(pair: Pair, plain: Tensor) -> Objective:
    """To lead one model, while the other answers as it does without perturbation: `plain`."""
    kept_answers = plain.log_softmax(1)

    def losses(perturbed: Tensor, wanted: Tensor, which: slice) -> tuple[Tensor, Tensor]:
        led_logits, kept_logits = pair.led(perturbed), pair.kept(perturbed)
        stays = F.kl_div(
            kept_logits.log_softmax(1), kept_answers[which], reduction="none", log_target=True
        ).sum(1)
        leads = F.cross_entropy(led_logits, wanted, reduction="none")
        there = (led_logits.argmax(1) == wanted) & (kept_logits.argmax(1) != wanted)
        return leads + stays, there

    return losses
