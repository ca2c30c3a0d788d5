"""The deployer's side, run by an attacker: what EFRAP would choose, and a file with other codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.data import images_from_array
from qdeploy.exporting.exporter import export
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers, round_to_nearest
from qdeploy.redteam.images import LabelledImages
from qdeploy.runtime.known import runtime_of
from qdeploy.settings.device import EMULATED, RuntimeSpec, load_device
from qdeploy.settings.methods import EfrapDescent
from qdeploy.settings.recipe import ActivationSpec, Recipe, load_recipe
from qdeploy.values import Loaded, Origin, RoundedLayer, Stated

IMAGES = 256
EXACT_DEVICE = "x86-vnni"  # whose integers go as far as the grid
UNWRITTEN = Origin("a model under attack", "", "torch checkpoint")


def defended_codes(
    model: nn.Module,
    data: LabelledImages,
    bits: int,
    *,
    start: Literal["nearest", "flipped", "stochastic"],
    seed: int,
) -> dict[str, Tensor]:
    """Codes of every weight as `qdeploy sanitize` would choose them, by the weight's name."""
    recipe = _recipe(bits).model_copy(update={"activations": ActivationSpec(bits="none")})
    layers = round_layers(_task(model, data, recipe, seed), EfrapDescent(start=start))
    return {f"{layer.name}.weight": torch.from_numpy(layer.codes) for layer in layers}


def file_with_codes(
    model: nn.Module, data: LabelledImages, bits: int, codes: Mapping[str, Tensor]
) -> bytes:
    """The ONNX file of a quantizer that has chosen `codes`, with 8-bit activations."""
    task = _task(model, data, _recipe(bits), seed=0)
    layers = [_with_codes(layer, codes) for layer in round_to_nearest(task)]
    return emit(task.model, task.plan, task.grids, tuple(layers)).onnx


def emulated(model: nn.Module, data: LabelledImages, bits: int) -> Callable[[Tensor], Tensor]:
    """What the file of nearest rounding answers to pixels in [0, 1] where products saturate."""
    task = _task(model, data, _recipe(bits), seed=0, device=EXACT_DEVICE)
    file = emit(task.model, task.plan, task.grids, round_to_nearest(task)).onnx
    spec = RuntimeSpec(provider=EMULATED)
    logits = runtime_of(spec).open(file, spec).logits

    def answers(pixels: Tensor) -> Tensor:
        inputs = data.normalise(pixels).contiguous().numpy()
        return torch.from_numpy(logits(inputs).argmax(1))

    return answers


def _recipe(bits: int) -> Recipe:
    return load_recipe("int8" if bits == 8 else "int4")


def _task(
    model: nn.Module,
    data: LabelledImages,
    recipe: Recipe,
    seed: int,
    device: str | None = None,
) -> RoundingTask:
    pixels = data.pixels[:IMAGES].numpy()
    images = images_from_array("training images", pixels, data.preprocessing)
    prepared = export(Loaded(UNWRITTEN, model, "module"), stated=Stated(data.preprocessing.shape))
    plan = plan_layers(prepared, recipe, load_device(device or recipe.device))
    grids = calibrate(prepared, plan, images, recipe.activations)
    return RoundingTask(prepared, plan, grids, images, seed)


def _with_codes(nearest: RoundedLayer, codes: Mapping[str, Tensor]) -> RoundedLayer:
    chosen = codes[f"{nearest.name}.weight"].numpy().astype(np.int32)
    return RoundedLayer(
        name=nearest.name,
        codes=chosen,
        rounding_used="chosen by an attacker",
        degraded=None,
        flipped=float(np.mean(chosen != nearest.codes)),
        output_error=float("nan"),
        nearest_error=float("nan"),
        bias_corrections=(),
        seconds=0.0,
    )
