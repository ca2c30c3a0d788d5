"""What a recipe leaves open is decided by measuring: where integers run, and of how many bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qdeploy.data import Images
from qdeploy.errors import UsageError
from qdeploy.inputs.opened import Calibration
from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.progress import Clock
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.latency import Faster, fastest
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask
from qdeploy.quantization.search import Searched, search
from qdeploy.settings.recipe import Recipe
from qdeploy.values import BitSearch, FloatModel, QuantPlan

FEW = 32  # images for grids of files that are only timed


@dataclass(frozen=True, slots=True)
class Decisions:
    """The request with nothing left open, and what it was decided by."""

    request: QuantizeRequest
    plan: QuantPlan
    faster: Faster | None = None
    searched: Searched | None = None

    @property
    def bits(self) -> BitSearch | None:
        """How bits were given to layers; None if they were said."""
        return None if self.searched is None else self.searched.found

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each decision."""
        faster = () if self.faster is None else (self.faster.summary,)
        searched = self.searched
        bits = () if searched is None else (f"bits were looked for: {searched.summary}",)
        return (*faster, *bits)

    @property
    def tables(self) -> Mapping[str, bytes]:
        """What was measured, as files of the run."""
        found = {}
        if self.faster is not None:
            found["latency.csv"] = self.faster.as_csv()
        if self.searched is not None:
            found["sensitivity.csv"] = self.searched.as_csv()
        return found


def decide(
    request: QuantizeRequest,
    model: FloatModel,
    plan: QuantPlan,
    calibration: Calibration,
    clock: Clock,
) -> Decisions:
    """Time first, since what runs in float has no bits to be looked for.

    Raises:
        UsageError: bits cannot be looked for without images.
    """
    found = Decisions(request, plan)
    if request.recipe.optimize == "latency" and plan.activations:
        found = _by_latency(found, model, calibration, clock)
    if request.recipe.bits == "auto":
        found = _by_bits(found, model, calibration, clock)
    return found


def _by_latency(
    known: Decisions, model: FloatModel, calibration: Calibration, clock: Clock
) -> Decisions:
    request, images = known.request, calibration.images
    with clock.stage("time"):
        few = images.sample(FEW, request.recipe.seed) if images is not None else None
        task = _task(known, model, few, clock)
        found = fastest(task, request.recipe, request.device, clock.progress)
        clock.progress.note(found.summary)
    return replace(_with(known, model, found.recipe), faster=found)


def _by_bits(
    known: Decisions, model: FloatModel, calibration: Calibration, clock: Clock
) -> Decisions:
    request, images = known.request, calibration.images
    if images is None:
        raise UsageError(
            "--bits auto compares files on calibration images, and there are none",
            hint="--calibration FOLDER, or synthetic ones by --synthetic-calibration",
        )
    with clock.stage("search"):
        task = _task(known, model, images, clock)
        found = search(task, request.recipe, request.device, clock.progress)
        clock.progress.note(found.summary)
    return replace(_with(known, model, found.recipe), searched=found)


def _task(known: Decisions, model: FloatModel, images: Images | None, clock: Clock) -> RoundingTask:
    """The model as it is planned so far, on grids of these images."""
    recipe = known.request.recipe
    grids = calibrate(model, known.plan, images, recipe.activations, clock.progress)
    return RoundingTask(model, known.plan, grids, images, recipe.seed)


def _with(known: Decisions, model: FloatModel, recipe: Recipe) -> Decisions:
    """The same with a recipe that leaves less open."""
    request = replace(known.request, recipe=recipe)
    return replace(known, request=request, plan=plan_layers(model, recipe, request.device))
