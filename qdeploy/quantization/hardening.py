"""Integers chosen end to end: against perturbations towards a class, or for accuracy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from qdeploy.core.differential import Pair, Pictures, objective
from qdeploy.core.inversion import FORGET, Additive, Blended, Masked, Perturbations, Radii, Sinusoid
from qdeploy.core.program import evaluate
from qdeploy.core.rounding.end_to_end import (
    Choices,
    EndToEnd,
    Network,
    choose_end_to_end,
)
from qdeploy.core.rounding.nearest import nearest
from qdeploy.data import Images, Preprocessing
from qdeploy.data.triggers import Trigger
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
END_TO_END = ", end to end"  # said of a layer's rounding


@dataclass(frozen=True, slots=True)
class Against:
    """What nothing may do in the file that it does not in the float model."""

    targets: tuple[int, ...] = ()  # classes that nothing may lead to; none for accuracy alone
    known: tuple[Trigger, ...] = ()  # that led to one of them; new ones are sought besides


FOR_ACCURACY = Against()


@dataclass(frozen=True, slots=True)
class Hardened:
    """The layers as they are now, and how much moved."""

    layers: tuple[RoundedLayer, ...]
    moved: float  # share of all codes


def harden(
    task: RoundingTask,
    rounded: Sequence[RoundedLayer],
    against: Against,
    spec: HardeningSpec,
    seed: int,
    progress: Progress = SILENT,
) -> Hardened:
    """Choose the integers of all layers again, together.

    Args:
        rounded: Where it begins.

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
    if against.targets:
        disturbance = _Adversary(network, pixels, against, generator)
        for _ in progress.track(range(WARM_UP), "seek perturbations", WARM_UP):
            disturbance.seek()
    settings = EndToEnd(spec.steps, spec.images, spec.learning_rate, spec.bias_rate)
    steps = progress.track(range(spec.steps), "choose end to end", spec.steps)
    choose_end_to_end(network, pixels, settings, generator, steps, disturbance)
    return _result(task, by_name, opened)


class _Adversary:
    """Perturbations towards some classes, which follow the network as it changes."""

    def __init__(
        self, network: Network, pixels: Tensor, against: Against, generator: torch.Generator
    ) -> None:
        targets = against.targets
        self._network, self._generator = network, generator
        self._pictures = Pictures.answered(pixels, network.reference)
        self._sought: list[Perturbations] = []
        for kind, shares in SLOTS.items():
            wanted = [target for target in targets for _ in shares]
            radius = torch.tensor(shares * len(targets), device=pixels.device)
            radius = radius * kind.scale(self._pictures.shape)
            radii = Radii(radius, radius, radius)
            self._sought.append(kind(wanted, self._pictures.shape, radii, generator, LIFETIME))
        self._known = [_Known.of(trigger, pixels.device) for trigger in against.known]

    def seek(self) -> None:
        """One step of every perturbation against the network as it is."""
        pair = Pair(self._network.answers(), self._network.reference)
        for known in self._known:
            drawn = self._pictures.draw(torch.tensor([known.target]), SLOT_IMAGES, self._generator)
            known.see(pair, self._pictures.pixels[drawn.to(self._pictures.pixels.device)])
        pictures = self._pictures
        for sought in self._sought:
            drawn = pictures.draw(sought.targets, SLOT_IMAGES, self._generator)
            drawn = drawn.to(pictures.pixels.device)
            sought.step(objective(pair, pictures.logits[drawn]), pictures.pixels[drawn])

    def __call__(self, pixels: Tensor) -> Tensor:
        """The images perturbed, those ways more often that lead more; after one more step."""
        self.seek()
        successes = [sought.success.cpu() for sought in self._sought]
        successes.append(torch.tensor([known.success for known in self._known]))
        chances = torch.cat(successes) + CHANCE
        ways: list[Callable[[Tensor], Tensor]] = [
            partial(_perturbed, sought, row)
            for sought in self._sought
            for row in range(len(sought.targets))
        ]
        ways += [known.apply for known in self._known]
        chosen = torch.multinomial(chances, len(pixels), True, generator=self._generator)
        perturbed = torch.empty_like(pixels)
        for place in chosen.unique().tolist():
            at = (chosen == place).to(pixels.device)
            perturbed[at] = ways[place](pixels[at])
        return perturbed


def _perturbed(sought: Perturbations, row: int, pixels: Tensor) -> Tensor:
    rows = torch.full((len(pixels),), row, device=pixels.device)
    return sought.apply(pixels, rows, torch.ones(len(pixels), device=pixels.device))


@dataclass(slots=True, eq=False)
class _Known:
    """A perturbation that stays as it is."""

    mask: Tensor
    pattern: Tensor
    added: Tensor
    target: int
    success: float = 1.0  # running mean share of images that follow in one model alone

    @classmethod
    def of(cls, trigger: Trigger, device: torch.device) -> _Known:
        added = np.zeros_like(trigger.pattern) if trigger.added is None else trigger.added
        parts = (trigger.mask, trigger.pattern, added)
        mask, pattern, more = (torch.from_numpy(np.array(part)).to(device) for part in parts)
        return cls(mask, pattern, more, trigger.target)

    def apply(self, pixels: Tensor) -> Tensor:
        """The images perturbed."""
        return ((1 - self.mask) * pixels + self.mask * self.pattern + self.added).clamp(0, 1)

    def see(self, pair: Pair, pixels: Tensor) -> None:
        """How many of these images follow now."""
        with torch.no_grad():
            shown = self.apply(pixels)
            led, kept = (ask(shown).argmax(1) for ask in (pair.led, pair.kept))
        share = float(((led == self.target) & (kept != self.target)).float().mean())
        self.success = FORGET * self.success + (1 - FORGET) * share


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
                rounding_used=f"{before.rounding_used.removesuffix(END_TO_END)}{END_TO_END}",
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
