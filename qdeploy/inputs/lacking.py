"""Everything that a command lacks, found out before any work and said at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qdeploy.disk.printable import printable
from qdeploy.errors import UsageError
from qdeploy.formats.opening import sniff
from qdeploy.inputs.requests import QuantizeRequest, Request
from qdeploy.inputs.sources import CARD_HINT, Sources
from qdeploy.values import ARCHITECTURE_HINT, SHAPE_HINT

CALIBRATION_HINT = (
    "give --calibration FOLDER_OR_ZIP (a few hundred unlabelled images), name them in the"
    " model card, or use --synthetic-calibration, which gets no verdict"
)


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that nobody has said yet, and how to say it."""

    what: str
    hint: str


def require_all(request: Request, *, images: bool = True) -> None:
    """Find out whether the model is described well enough, and the images are there.

    Args:
        images: Whether any will be looked at.

    Raises:
        UsageError: something is missing; all of it is named.
        InputError: the file cannot be read, or is of no known format.
    """
    lacks = [*_of_the_model(request, images=images), *(_of_the_data(request) if images else ())]
    if lacks:
        hints = [lack.hint for lack in lacks]
        if len(hints) > 1:
            hints = [f"{number}. {hint}" for number, hint in enumerate(hints, 1)]
        raise UsageError(
            f"model {request.sources.model}: {'; '.join(lack.what for lack in lacks)}",
            hint="\n".join(hints),
        )


def _of_the_model(request: Request, *, images: bool) -> Iterator[Lack]:
    sources, row = request.sources, sniff(request.sources.model)
    if row.tensors_alone and sources.architecture is None and not request.run_code_from_model:
        yield Lack("is a state dict, which needs an architecture", ARCHITECTURE_HINT)
    if sources.card is None and images and _looks_at_pixels(request):
        yield Lack("has no model card", card_hint(sources))
    elif row.content != "onnx" and sources.stated.shape is None:
        yield Lack("the input shape is not known", SHAPE_HINT)


def _of_the_data(request: Request) -> Iterator[Lack]:
    if isinstance(request, QuantizeRequest) and _lacks_calibration(request):
        yield Lack("no calibration images are known", CALIBRATION_HINT)


def card_hint(sources: Sources) -> str:
    """How to begin a card."""
    card = printable(sources.model.with_suffix(".toml"))
    return CARD_HINT.format(model=printable(sources.model), path=card)


def _looks_at_pixels(request: Request) -> bool:
    if request.sources.test is not None:
        return True
    return isinstance(request, QuantizeRequest) and _needs_images(request)


def _needs_images(request: QuantizeRequest) -> bool:
    recipe = request.recipe
    return recipe.rounding.needs != "nothing" or recipe.activations.bits != "none"


def _lacks_calibration(request: QuantizeRequest) -> bool:
    return (
        _needs_images(request)
        and request.sources.calibration is None
        and not request.synthetic_calibration
    )
