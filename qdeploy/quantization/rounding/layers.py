"""Choose the integers of every layer."""

from __future__ import annotations

from qdeploy.progress import SILENT, Progress
from qdeploy.quantization.rounding.one_pass import round_in_one_pass, round_without_images
from qdeploy.quantization.rounding.task import FORGETFUL, LayerStore, RoundingTask
from qdeploy.settings.methods import Flip, Nearest, Rounding, Stochastic, Trained
from qdeploy.values import RoundedLayer

__all__ = ["FORGETFUL", "LayerStore", "RoundingTask", "round_layers", "round_to_nearest"]


def round_layers(
    task: RoundingTask,
    spec: Rounding,
    *,
    store: LayerStore = FORGETFUL,
    progress: Progress = SILENT,
) -> tuple[RoundedLayer, ...]:
    """The codes of every planned layer, in order. A layer that `store` has is not solved again."""
    if isinstance(spec, Nearest | Stochastic | Flip):
        return round_without_images(task, spec)
    if not isinstance(spec, Trained) and spec.inputs == "float":
        return round_in_one_pass(task, spec, store, progress)
    from qdeploy.quantization.rounding.layer_by_layer import (
        round_layer_by_layer,  # torch loads here
    )

    return round_layer_by_layer(task, spec, store, progress)


def round_to_nearest(task: RoundingTask) -> tuple[RoundedLayer, ...]:
    """What any other quantizer would have made of the same grids: the model under attack."""
    return round_without_images(task, Nearest())
