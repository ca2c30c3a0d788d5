"""The smallest file that keeps a limit: which layers need 8 bits, and which inputs stay float.

Every layer alone is put to 4 bits, and every layer's input alone on its grid, in a model whose
other weights have 8 bits; what that adds to the error of the logits is the layer's sensitivity.
Then the sensitive ones are given back, most error per byte first, and the fewest that keep the
limit are found by bisection. All of it is measured on calibration images, by the float model's own
answers.
"""

from __future__ import annotations

import csv
import glob
import io
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32

from qdeploy.core.grids import Grid
from qdeploy.progress import Progress
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.checks import CHECKS
from qdeploy.settings.device import DeviceProfile
from qdeploy.settings.methods import EfrapDescent, FromMoments, FromWeights, Rounding
from qdeploy.settings.recipe import Override, Recipe
from qdeploy.values import (
    BitSearch,
    FloatModel,
    Grids,
    LayerPlan,
    QuantPlan,
    RoundedLayer,
    Sensitivity,
)

BATCH = 32
IMAGES_PER_LAYER = 64  # that a sensitivity is measured on


@dataclass(frozen=True, slots=True)
class Searched:
    """What was chosen, and by what."""

    recipe: Recipe  # with the choice written out
    found: BitSearch
    at_8: frozenset[str]
    float_inputs: frozenset[str]

    @property
    def summary(self) -> str:
        """In one line."""
        found = self.found
        kept = f"{len(self.at_8)} of {len(found.layers)} layers at 8 bits"
        inputs = f", {len(self.float_inputs)} with inputs in float" if self.float_inputs else ""
        missed = (
            "" if found.agreement >= found.wanted else ", and nothing smaller than that kept it"
        )
        planned = self.recipe.rounding.name
        instead = "" if found.rounding == planned else f"; measured by {found.rounding}"
        return (
            f"{kept}{inputs}, {found.average_bits:.2f} bits a weight: {found.agreement:.1f} % of"
            f" the calibration images as in float32, for {found.wanted:g} %{missed}{instead}"
        )

    def as_csv(self) -> bytes:
        """The sensitivities as a table, the choice beside them."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(
            ["layer", "weights", "error of 4 bits", "error of its input", "bits", "input"]
        )
        for x in self.found.layers:
            bits, given = 8 if x.layer in self.at_8 else 4, x.layer in self.float_inputs
            row = [x.layer, x.weights, f"{x.four_bits:.3g}", f"{x.input:.3g}", bits]
            table.writerow([*row, "float" if given else "8 bits"])
        return text.getvalue().encode()


@dataclass(frozen=True, slots=True)
class _Move:
    """A layer given 8 bits, or an input left in float."""

    layer: str
    kind: str  # bits, input
    gain: float  # error that goes away
    price: float  # bytes


def search(
    task: RoundingTask, recipe: Recipe, device: DeviceProfile, progress: Progress
) -> Searched:
    """The recipe with the fewest bits that keeps the limit.

    Args:
        task: The model at 4 bits, apart from what the recipe says itself.
    """
    lab = _Lab.of(task, recipe, device, progress)
    layers = tuple(lab.sensitivities(progress))
    moves = sorted(_moves(layers, lab), key=lambda m: -m.gain / m.price)
    wanted = _wanted(recipe, device)
    tried: dict[int, float] = {}

    def planned(count: int) -> QuantPlan:
        return plan_layers(task.model, _written_out(recipe, moves[:count]), device)

    def agreement(count: int) -> float:
        if count not in tried:
            tried[count] = lab.agreement(planned(count))
            progress.note(f"{count} of {len(moves)} given back: {tried[count]:.1f} %")
        return tried[count]

    count = bisect_left(range(len(moves)), True, key=lambda n: agreement(n) >= wanted)
    reached, plan = agreement(count), planned(count)
    at_8 = frozenset(layer.site.name for layer in plan.layers if layer.bits == 8)
    float_inputs = frozenset(
        layer.site.name
        for layer in plan.layers
        if not any(use.input in plan.activations for use in layer.site.uses)
    )
    total = sum(x.weights for x in layers)
    return Searched(
        recipe=_written_out(recipe, moves[:count]),
        found=BitSearch(
            layers=layers,
            average_bits=sum(x.weights * (8 if x.layer in at_8 else 4) for x in layers) / total,
            agreement=reached,
            wanted=wanted,
            rounding=_in_one_pass(recipe.rounding).name,
        ),
        at_8=at_8,
        float_inputs=float_inputs,
    )


def _wanted(recipe: Recipe, device: DeviceProfile) -> float:
    """The agreement that the choice has to keep, percent."""
    if recipe.search.min_agreement is not None:
        return recipe.search.min_agreement
    limit = recipe.gate.limit(CHECKS["agreement"], device.budget)
    return (100 + (limit or 0.0)) / 2


def _written_out(recipe: Recipe, chosen: Sequence[_Move]) -> Recipe:
    """The recipe with an override for each move; what it says itself still comes last."""
    found = (
        Override(layers=glob.escape(m.layer), bits=8)
        if m.kind == "bits"
        else Override(layers=glob.escape(m.layer), activations="none")
        for m in chosen
    )
    return recipe.model_copy(update={"bits": 4}).with_decided(found)


def _moves(layers: Sequence[Sensitivity], lab: _Lab) -> list[_Move]:
    """What can be given back. A layer whose input is float runs in float: its bytes count again."""
    moves = []
    for x in layers:
        if x.layer in lab.open_layers:
            moves.append(_Move(x.layer, "bits", x.four_bits, x.weights / 2))
        if x.input > 0:
            moves.append(_Move(x.layer, "input", x.input, float(x.weights)))
    return moves


def _in_one_pass(rounding: Rounding) -> Rounding:
    """The recipe's method where its layers are independent, else the one that is nearest to it."""
    if isinstance(rounding, FromMoments):
        return rounding.model_copy(update={"inputs": "float"})
    return rounding if isinstance(rounding, FromWeights) else EfrapDescent()


@dataclass(frozen=True, slots=True, eq=False)
class _Lab:
    """A model whose layers have been solved at both widths, to be put together at will."""

    model: FloatModel
    widest: QuantPlan  # 8 bits wherever the recipe leaves it open
    activations: Mapping[str, Grid]  # by tensor
    solved: Mapping[tuple[str, int], tuple[LayerPlan, Grid, RoundedLayer]]  # by layer and bits
    open_layers: frozenset[str]  # whose bits the recipe leaves open
    inputs: Float32[np.ndarray, "images channels height width"]
    wanted: Float32[np.ndarray, "images classes"]

    @classmethod
    def of(
        cls, task: RoundingTask, recipe: Recipe, device: DeviceProfile, progress: Progress
    ) -> _Lab:
        images, spec = task.calibration(), _in_one_pass(recipe.rounding)
        widest = plan_layers(task.model, recipe.model_copy(update={"bits": 8}), device)
        grids = calibrate(task.model, widest, images, recipe.activations, progress)
        solved = {}
        for work in (task, replace(task, plan=widest, grids=grids)):
            rounded = round_layers(work, spec, progress=progress)
            for layer, found in zip(work.plan.layers, rounded, strict=True):
                solved[found.name, layer.bits] = (layer, work.grid(layer), found)
        some = images.sample(min(recipe.search.images, len(images)), task.seed)
        normalise = some.preprocessing.normalise
        inputs = np.concatenate([normalise(batch.pixels) for batch in some.batches(BATCH)])
        left = frozenset(name for name, bits in solved if bits == 4 and (name, 8) in solved)
        wanted = _logits(task.model.onnx, inputs)
        return cls(task.model, widest, task.grids.activations, solved, left, inputs, wanted)

    def sensitivities(self, progress: Progress) -> list[Sensitivity]:
        """Of every layer, over the error of 8-bit weights alone."""
        widest = {layer.site.name: layer.bits for layer in self.widest.layers}
        base, inputs, found = self._error(widest, {}), dict[str, float](), []
        for layer in progress.track(self.widest.layers, "sensitivity", len(widest)):
            name, added = layer.site.name, 0.0
            for tensor in {use.input for use in layer.site.uses} & set(self.activations):
                if tensor not in inputs:
                    inputs[tensor] = self._error(widest, {tensor: tensor}) - base
                added = max(added, inputs[tensor])
            size = int(np.prod(layer.site.shape))
            four = self._error({**widest, name: 4}, {}) - base if name in self.open_layers else 0.0
            found.append(Sensitivity(name, size, max(four, 0.0), added))
        return found

    def agreement(self, plan: QuantPlan) -> float:
        """Percent of the images with the float model's answer as `plan` has it."""
        bits = {layer.site.name: layer.bits for layer in plan.layers}
        got = self._run(bits, plan.activations, len(self.inputs))
        return 100 * float((got.argmax(1) == self.wanted.argmax(1)).mean())

    def _error(self, bits: Mapping[str, int], activations: Mapping[str, str]) -> float:
        count = min(IMAGES_PER_LAYER, len(self.inputs))
        wanted = self.wanted[:count].astype(np.float64)
        got = self._run(bits, activations, count)
        variance = np.square(wanted - wanted.mean(0)).sum()
        error = float(np.square(got - wanted).sum() / max(variance, np.finfo(np.float64).tiny))
        return error if np.isfinite(error) else np.inf

    def _run(
        self, bits: Mapping[str, int], activations: Mapping[str, str], count: int
    ) -> np.ndarray:
        """The logits with these bits by layer, and these tensors in uint8."""
        layers, weights, rounded = zip(*(self.solved[item] for item in bits.items()), strict=True)
        plan = replace(self.widest, layers=layers, activations=activations)
        grids = Grids(
            dict(zip(bits, weights, strict=True)), {t: self.activations[t] for t in activations}
        )
        return _logits(emit(self.model, plan, grids, rounded).onnx, self.inputs[:count])


def _logits(model: bytes, inputs: np.ndarray) -> np.ndarray:
    session = open_session(model, spinning=False)
    parts = [session.logits(inputs[at : at + BATCH]) for at in range(0, len(inputs), BATCH)]
    return np.concatenate(parts)
