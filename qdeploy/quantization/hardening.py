"""Integers chosen end to end: against perturbations towards a class, or for accuracy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from qdeploy.core.differential import Pair, Pictures, objective
from qdeploy.core.inversion import Additive, Blended, Masked, Perturbations, Radii, Sinusoid
from qdeploy.core.program import evaluate
from qdeploy.core.rounding.end_to_end import (
    Choices,
    EndToEnd,
    Network,
    choose_end_to_end,
)
from qdeploy.core.rounding.nearest import nearest
from qdeploy.data import Images, Preprocessing
from qdeploy.graph.assemble import assemble
from qdeploy.graph.differentiable import accelerator, normaliser
from qdeploy.graph.io import initializers, serialize
from qdeploy.graph.parts import as_program
from qdeploy.progress import SILENT, Progress
from qdeploy.quantization.rounding.task import RoundingTask
from qdeploy.settings.recipe import HardeningSpec
from qdeploy.values import RoundedLayer, WeightSite, WeightUse

# Each target is approached by perturbations of these kinds and sizes at a time.
SLOTS: Mapping[type[Perturbations], tuple[float, ...]] = {
    Masked: (0.01, 0.02, 0.04, 0.08),
    Additive: (0.05, 0.07, 0.09),
    Sinusoid: (0.09,),
    Blended: (0.15,),
}
SLOT_IMAGES = 4  # of each perturbation and step
WARM_UP = 40  # steps of the search alone
LIFETIME = 60  # steps after which a perturbation starts anew
CHANCE = 0.02  # of being shown, for one that has had no success yet
PICTURES = 1024
READ = 64


@dataclass(frozen=True, slots=True)
class Hardened:
    """The layers as they are now, and how much moved."""

    layers: tuple[RoundedLayer, ...]
    moved: float  # share of all codes


def harden(
    task: RoundingTask,
    rounded: Sequence[RoundedLayer],
    targets: Sequence[int],
    spec: HardeningSpec,
    seed: int,
    progress: Progress = SILENT,
) -> Hardened:
    """Choose the integers of all layers again, together.

    Args:
        rounded: Where it begins.
        targets: Classes that nothing may lead to which does not in the float model; none for
            accuracy alone.

    Raises:
        PlanError: there is an operator through which there are no gradients here.
        DivergedError: the loss is no longer a finite number.
    """
    device = accelerator()
    images = task.calibration()
    by_name = {layer.name: layer for layer in rounded}
    opened = _open(task, by_name, images.preprocessing, device)
    network = opened.network
    pixels = _pixels(images.sample(PICTURES, seed)).to(device)
    generator = torch.Generator().manual_seed(seed)
    disturbance = None
    if targets:
        against = _Adversary(network, pixels, targets, generator)
        for _ in progress.track(range(WARM_UP), "seek perturbations", WARM_UP):
            against.seek()
        disturbance = against
    settings = EndToEnd(spec.steps, spec.images, spec.learning_rate, spec.bias_rate)
    steps = progress.track(range(spec.steps), "choose end to end", spec.steps)
    choose_end_to_end(network, pixels, settings, generator, steps, disturbance)
    return _result(task, by_name, opened)


class _Adversary:
    """Perturbations towards some classes, which follow the network as it changes."""

    def __init__(
        self, network: Network, pixels: Tensor, targets: Sequence[int], generator: torch.Generator
    ) -> None:
        self._network, self._generator = network, generator
        self._pictures = Pictures.answered(pixels, network.reference)
        self._sought: list[Perturbations] = []
        for kind, shares in SLOTS.items():
            wanted = [target for target in targets for _ in shares]
            radius = torch.tensor(shares * len(targets), device=pixels.device)
            radius = radius * kind.scale(self._pictures.shape)
            radii = Radii(radius, radius, radius)
            self._sought.append(kind(wanted, self._pictures.shape, radii, generator, LIFETIME))

    def seek(self) -> None:
        """One step of every perturbation against the network as it is."""
        pair = Pair(self._network.answers(), self._network.reference)
        pictures = self._pictures
        for sought in self._sought:
            drawn = pictures.draw(sought.targets, SLOT_IMAGES, self._generator)
            drawn = drawn.to(pictures.pixels.device)
            sought.step(objective(pair, pictures.logits[drawn]), pictures.pixels[drawn])

    def __call__(self, pixels: Tensor) -> Tensor:
        """The images perturbed, those ways more often that lead more; after one more step."""
        self.seek()
        chances = torch.cat([sought.success.cpu() + CHANCE for sought in self._sought])
        owners = [(s, row) for s in self._sought for row in range(len(s.targets))]
        chosen = torch.multinomial(chances, len(pixels), True, generator=self._generator)
        perturbed = torch.empty_like(pixels)
        for place in chosen.unique().tolist():
            at = (chosen == place).to(pixels.device)
            sought, row = owners[place]
            rows = torch.full((int(at.sum()),), row, device=pixels.device)
            once = torch.ones(len(rows), device=pixels.device)
            perturbed[at] = sought.apply(pixels[at], rows, once)
        return perturbed


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """The network, and under which name it reads the bias of each use of a weight."""

    network: Network
    biases: Mapping[str, str]  # by the output of the use; only those that learn


def _open(
    task: RoundingTask,
    rounded: Mapping[str, RoundedLayer],
    preprocessing: Preprocessing,
    device: torch.device,
) -> _Opened:
    """The file as it would be written now, as a function of its weights and biases."""
    model, problems = task.model, task.problems()
    data = serialize(assemble(model, task.plan, task.grids, rounded))
    ends = [model.input_name], [model.output_name]
    program = as_program(data).part(*ends).to(device)
    floats = as_program(model.onnx).part(*ends).to(device)
    of_output = {output: step for step in program.steps for output in step.outputs}
    weights, names = {}, {}
    for layer in task.plan.layers:
        site = layer.site
        codes = site.to_matrix(rounded[site.name].codes)
        choices = Choices(problems[site.name], codes, device)
        weights[_weight(site)] = (choices, partial(_in_layout, site))
        for use in site.uses:
            inputs = of_output[use.output].inputs
            if use.takes_bias and len(inputs) > 2 and inputs[2]:
                names[use.output] = inputs[2]
    biases = {name: program.constants[name].clone().requires_grad_() for name in names.values()}
    normalise = normaliser(preprocessing, device)

    def quantized(parameters: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
        given = {**parameters, model.input_name: normalise(pixels)}
        return evaluate(program, given, [model.output_name])[0]

    def reference(pixels: Tensor) -> Tensor:
        return evaluate(floats, {model.input_name: normalise(pixels)}, [model.output_name])[0]

    return _Opened(Network(quantized, reference, weights, biases), names)


def _result(task: RoundingTask, rounded: Mapping[str, RoundedLayer], opened: _Opened) -> Hardened:
    """The layers with what was chosen."""
    problems, constants = task.problems(), initializers(task.model.onnx)
    moved = total = 0
    layers = []
    for layer in task.plan.layers:
        site, before = layer.site, rounded[layer.site.name]
        choices, _ = opened.network.weights[_weight(site)]
        matrix = choices.codes()
        codes = site.from_matrix(matrix)
        moved += int((codes != before.codes).sum())
        total += codes.size
        corrections = before.bias_corrections
        if all(use.output in opened.biases for use in site.uses):
            corrections = tuple(_correction(use, constants, opened) for use in site.uses)
        layers.append(
            replace(
                before,
                codes=codes,
                rounding_used=f"{before.rounding_used}, end to end",
                flipped=float((matrix != nearest(problems[site.name])).mean()),
                output_error=float("nan"),
                bias_corrections=corrections,
            )
        )
    return Hardened(tuple(layers), moved / max(total, 1))


def _correction(
    use: WeightUse, constants: Mapping[str, np.ndarray], opened: _Opened
) -> Float64[np.ndarray, " channels"]:
    """What was learnt of a bias beyond the float model's."""
    learnt = opened.network.biases[opened.biases[use.output]].detach().cpu().numpy()
    given = constants[use.bias] if use.bias is not None else np.zeros_like(learnt)
    return learnt.astype(np.float64) - given.astype(np.float64)


def _weight(site: WeightSite) -> str:
    """The tensor that a file's layer multiplies by."""
    return f"{site.weight}.dequantized"


def _in_layout(site: WeightSite, matrix: Tensor) -> Tensor:
    """`WeightSite.from_matrix` of a tensor."""
    channels = site.shape[site.axis]
    others = [size for i, size in enumerate(site.shape) if i != site.axis]
    return matrix.reshape(channels, *others).movedim(0, site.axis)


def _pixels(images: Images) -> Tensor:
    return torch.from_numpy(np.concatenate([batch.pixels for batch in images.batches(READ)]))
