"""Choose the integers of every layer."""

from __future__ import annotations

from typing import cast

from qdeploy.machine import require_torch
from qdeploy.progress import SILENT, Progress
from qdeploy.quantization.rounding.one_pass import round_in_one_pass, round_without_images
from qdeploy.quantization.rounding.task import FORGETFUL, LayerStore, RoundingTask
from qdeploy.settings.methods import FromMoments, FromWeights, Nearest, Rounding, Trained
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
    if spec.needs == "nothing":
        return round_without_images(task, cast("FromWeights", spec))
    if spec.needs == "moments" and cast("FromMoments", spec).inputs == "float":
        return round_in_one_pass(task, cast("FromMoments", spec), store, progress)
    require_torch(f"rounding {spec.name}")
    from qdeploy.quantization.rounding.layer_by_layer import round_layer_by_layer

    return round_layer_by_layer(task, cast("FromMoments | Trained", spec), store, progress)


def round_to_nearest(task: RoundingTask) -> tuple[RoundedLayer, ...]:
    """What any other quantizer would have made of the same grids: the model under attack."""
    return round_without_images(task, Nearest())
