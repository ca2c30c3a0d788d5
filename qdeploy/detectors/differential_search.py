"""The part of differential trigger inversion that runs in torch: screening, then full searches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from qdeploy.core.differential import (
    Candidate,
    Effort,
    Pair,
    Pictures,
    Size,
    leaning,
    led,
    scored,
    search,
)
from qdeploy.core.inversion import Additive, Blended, Masked, Sinusoid
from qdeploy.data import Preprocessing
from qdeploy.detectors.saturating import saturating_pairs
from qdeploy.errors import PlanError
from qdeploy.formats.onnx.standard import in_standard_operators
from qdeploy.graph.differentiable import accelerator, as_function
from qdeploy.graph.io import serialize
from qdeploy.messages.encoded import in_two
from qdeploy.progress import Progress
from qdeploy.values import FloatModel

SCREENING = Effort(
    (
        Size(Masked, 0.02), Size(Masked, 0.08), Size(Additive, 0.05), Size(Additive, 0.09),
        Size(Sinusoid, 0.09), Size(Blended, 0.15),
    ),
    steps=25,
    images=4,
)  # fmt: skip
FULL = Effort(
    (
        *(Size(Masked, share) for share in (0.01, 0.02, 0.04, 0.08)),
        *(Size(Additive, share) for share in (0.05, 0.07, 0.09)),
        *(Size(Sinusoid, share) for share in (0.05, 0.09)),
        *(Size(Blended, share) for share in (0.1, 0.2)),
    ),
    steps=65,
    images=6,
)
FINALISTS = 2  # classes that are searched in full, by each kind of perturbation
LEANING = 32  # images by which classes are compared after the screening
TOGETHER = 10  # classes that are screened at a time
COMPARED = 4  # perturbations that are compared on all images, of each class searched in full
# Floating-point operations of the whole search: some five minutes of two cores, or of one GPU.
BUDGET = {"cpu": 3e13, "cuda": 2.5e15}
MOST = 2.0  # so many times the budget the least effort may take
FEWEST_CLASSES = 4
FEWEST_OTHERS = 20  # images that are not answered by a class already
LOSSY_COST = 2  # of products with those pairs, which nobody counts
PASSES = 3  # a gradient costs three times a forward pass


@dataclass(frozen=True, slots=True)
class Models:
    """Both models as functions of pixels, and what one image costs them."""

    pair: Pair
    classes: int
    operations: float  # floating-point operations of both for an image

    def answers(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """The classes that both give, by name."""
        with torch.no_grad():
            images = _tensor(pixels)
            parts = images.split(scored(images))
            both = {"file": self.pair.led, "float model": self.pair.kept}
            return {
                name: torch.cat([ask(part).argmax(1) for part in parts]).cpu().numpy()
                for name, ask in both.items()
            }


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """Which classes are screened, the likeliest first, and how the best of them are searched."""

    order: tuple[int, ...]
    finalists: int  # classes, by each kind of perturbation
    full: Effort

    @property
    def screened(self) -> int:
        """How many."""
        return len(self.order)


def open_models(
    file: bytes, float_model: FloatModel, preprocessing: Preprocessing, *, saturating: bool = False
) -> Models:
    """Both as differentiable functions, on an accelerator where torch has one.

    Args:
        saturating: The file as x86 without VNNI computes it.

    Raises:
        PlanError: one has an operator through which there are no gradients here, or is too large.
        InputError: the file's operators on integers do not fit together.
    """
    if in_two(float_model.onnx) is not None:
        raise PlanError("a model of more than 2 GiB is not searched: it would be in memory twice")
    device = accelerator()
    standard = serialize(in_standard_operators(file, "the file"))
    lossy = saturating_pairs(standard) if saturating else {}
    led_answers = as_function(standard, preprocessing, device, lossy)
    kept_answers = as_function(float_model.onnx, preprocessing, device)
    probe = torch.zeros(1, *float_model.input_shape, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        led_answers(probe)
        kept_answers(probe)
    operations = (LOSSY_COST if lossy else 1) * float(counted.get_total_flops())
    return Models(Pair(led_answers, kept_answers), float_model.classes, operations)


def plan_of(models: Models, pixels: np.ndarray) -> SearchPlan:
    """As many classes as the budget allows; those first that the file leans to.

    The leaning is of the mean log-probability on plain images, beside the float model's.

    Raises:
        PlanError: even the least effort takes too much.
    """
    half = BUDGET[accelerator().type] / 2  # for screening, and as much for the full searches
    image = 2 * PASSES * models.operations  # both models are led
    most = max(FEWEST_CLASSES, int(half / (image * SCREENING.images_each)))
    each = image * FULL.images_each
    finalists = max(1, min(FINALISTS, int(half / each)))
    full = FULL if each <= half else replace(FULL, sizes=SCREENING.sizes)
    least = image * (FEWEST_CLASSES * SCREENING.images_each + full.images_each)
    if least > 2 * MOST * half:
        raise PlanError(
            f"one image takes {models.operations:.2g} operations, too many for a search here"
        )
    with torch.no_grad():
        sample = _tensor(pixels[:128])
        leanings = [
            models.pair.led(part).log_softmax(1) - models.pair.kept(part).log_softmax(1)
            for part in sample.split(scored(sample))
        ]
    order = torch.cat(leanings).mean(0).argsort(descending=True).tolist()
    return SearchPlan(tuple(order[:most]), finalists, full)


def searched(
    models: Models,
    direction: str,
    pixels: np.ndarray,
    plan: SearchPlan,
    seed: int,
    progress: Progress,
) -> Iterator[Candidate]:
    """The best perturbation towards each of the likeliest classes.

    Args:
        direction: Which model is led: "file", or "float model" for the null.
    """
    pair = models.pair if direction == "file" else models.pair.exchanged()
    pictures = Pictures.answered(_tensor(pixels), pair.kept)
    generator = torch.Generator().manual_seed(seed)
    order = [t for t in plan.order if int((pictures.classes != t).sum()) >= FEWEST_OTHERS]
    groups = [order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)]
    kinds = len({size.kind for size in SCREENING.sizes})
    screening, full = kinds * SCREENING.steps * len(groups), kinds * plan.full.steps
    what = "the file" if direction == "file" else "the float model, as the null"
    steps = iter(progress.track(range(screening + full), f"lead {what}, steps", screening + full))

    def tick() -> None:
        next(steps, None)

    screened: list[Candidate] = []
    for group in groups:
        screened += search(pair, pictures, group, SCREENING, generator, ticks=tick)
    leanings = leaning(pair, pictures, screened, LEANING, generator)
    ordered = [one for _, one in sorted(zip(leanings, screened, strict=True), key=_by_leaning)]
    found: list[Candidate] = []
    for kind in dict.fromkeys(size.kind for size in plan.full.sizes):
        # Kinds are not compared with each other: one that every class bears hides the others.
        of_kind = dict.fromkeys(one.target for one in ordered if one.size.kind is kind)
        sizes = tuple(size for size in plan.full.sizes if size.kind is kind)
        targets = list(of_kind)[: plan.finalists]
        effort = replace(plan.full, sizes=sizes)
        found += search(pair, pictures, targets, effort, generator, ticks=tick)
    for _ in steps:
        pass
    for target in dict.fromkeys(one.target for one in found):
        of_target = [one for one in (*found, *screened) if one.target == target]
        yield _best(pair, pictures, of_target)


def _by_leaning(pair: tuple[float, Candidate]) -> float:
    return -pair[0]


def _best(pair: Pair, pictures: Pictures, found: list[Candidate]) -> Candidate:
    """The one that leads most images of the search, of those that seemed to."""
    compared = sorted(found, key=lambda one: -one.success)[:COMPARED]
    shares = [float(led(pair, pictures, one).float().mean()) for one in compared]
    first = int(np.argmax(shares))
    return replace(compared[first], success=shares[first])


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(accelerator())
