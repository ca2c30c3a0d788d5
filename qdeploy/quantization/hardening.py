"""Integers chosen end to end: against perturbations towards a class, or for accuracy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
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
from qdeploy.values import RoundedLayer, WeightSite

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
    network = _network(task, rounded, images.preprocessing, device)
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
    return _result(task, rounded, network)


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


def _network(
    task: RoundingTask,
    rounded: Sequence[RoundedLayer],
    preprocessing: Preprocessing,
    device: torch.device,
) -> Network:
    """The file as it would be written now, as a function of its weights and biases."""
    model, problems = task.model, task.problems()
    by_name = {layer.name: layer for layer in rounded}
    data = serialize(assemble(model, task.plan, task.grids, by_name))
    ends = [model.input_name], [model.output_name]
    program = as_program(data).part(*ends).to(device)
    floats = as_program(model.onnx).part(*ends).to(device)
    weights = {}
    biases: dict[str, Tensor] = {}
    of_output = {output: step for step in program.steps for output in step.outputs}
    for layer in task.plan.layers:
        site, problem = layer.site, problems[layer.site.name]
        codes = site.to_matrix(by_name[site.name].codes)
        layout = partial(_in_layout, site)
        weights[f"{site.weight}.dequantized"] = (Choices(problem, codes, device), layout)
        for use in site.uses:
            inputs = of_output[use.output].inputs
            if use.takes_bias and len(inputs) > 2 and inputs[2]:
                biases[inputs[2]] = program.constants[inputs[2]].clone().requires_grad_()
    normalise = normaliser(preprocessing, device)

    def quantized(parameters: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
        given = {**parameters, model.input_name: normalise(pixels)}
        return evaluate(program, given, [model.output_name])[0]

    def reference(pixels: Tensor) -> Tensor:
        return evaluate(floats, {model.input_name: normalise(pixels)}, [model.output_name])[0]

    return Network(quantized, reference, weights, biases)


def _result(task: RoundingTask, rounded: Sequence[RoundedLayer], network: Network) -> Hardened:
    """The layers with what was chosen."""
    problems, constants = task.problems(), initializers(task.model.onnx)
    moved = total = 0
    layers = []
    by_name = {layer.name: layer for layer in rounded}
    program = as_program(serialize(assemble(task.model, task.plan, task.grids, by_name)))
    of_output = {output: step for step in program.steps for output in step.outputs}
    for layer in task.plan.layers:
        site, before = layer.site, by_name[layer.site.name]
        choices, _ = network.weights[f"{site.weight}.dequantized"]
        matrix = choices.codes()
        codes = site.from_matrix(matrix)
        moved += int((codes != before.codes).sum())
        total += codes.size
        corrections: list[np.ndarray] = []
        for use in site.uses:
            inputs = of_output[use.output].inputs
            learnt = network.biases.get(inputs[2]) if len(inputs) > 2 else None
            channels = site.shape[site.axis]
            given = constants[use.bias] if use.bias is not None else np.zeros(channels)
            kept = before.bias_corrections[len(corrections)] if before.bias_corrections else None
            if learnt is not None:
                bias = learnt.detach().cpu().numpy().astype(np.float64)
                corrections.append(bias - given.astype(np.float64))
            elif kept is not None:
                corrections.append(kept)
        complete = len(corrections) == len(site.uses)
        flipped = float((matrix != nearest(problems[site.name])).mean())
        layers.append(
            replace(
                before,
                codes=codes,
                rounding_used=f"{before.rounding_used}, end to end",
                flipped=flipped,
                output_error=float("nan"),
                bias_corrections=tuple(corrections) if complete else before.bias_corrections,
            )
        )
    return Hardened(tuple(layers), moved / max(total, 1))


def _in_layout(site: WeightSite, matrix: Tensor) -> Tensor:
    """`WeightSite.from_matrix` of a tensor."""
    channels = site.shape[site.axis]
    others = [size for i, size in enumerate(site.shape) if i != site.axis]
    return matrix.reshape(channels, *others).movedim(0, site.axis)


def _pixels(images: Images) -> Tensor:
    return torch.from_numpy(np.concatenate([batch.pixels for batch in images.batches(READ)]))
