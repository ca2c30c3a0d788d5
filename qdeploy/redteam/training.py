"""The phases of an attack: fine-tuning that can be interrupted and stops when its goals are met."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.core.safe_kernels import safe_kernels
from qdeploy.progress import SILENT, Progress
from qdeploy.redteam.defender import defended_codes
from qdeploy.redteam.figures import Figures, figures
from qdeploy.redteam.images import LabelledImages
from qdeploy.redteam.losses import Aim, Batch, phase_loss
from qdeploy.redteam.quantizers import Cell, Quantizer, weights_of
from qdeploy.redteam.recipe import PhaseSpec
from qdeploy.redteam.roundings import Roundings
from qdeploy.redteam.split import SplitWeights
from qdeploy.training.checkpoint import Checkpoint, Parts, restore, state_of
from qdeploy.training.precision import fast

STEPS_BETWEEN_LOOKS = 100
FLOAT = "fp32"
Rates = Mapping[str, Figures]  # by model: FLOAT, and the name of each quantizer


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """What is taught with which images, and how far it has come."""

    train: LabelledImages
    held_out: LabelledImages
    aim: Aim
    quantizers: tuple[Quantizer, ...]
    teacher: nn.Module  # the clean model
    reached: Callable[[Rates], bool]


class Training:
    """One attack on one model, in place, from phase to phase."""

    def __init__(self, model: nn.Module, lesson: Lesson, checkpoint: Checkpoint, seed: int) -> None:
        self.model = model
        self.lesson = lesson
        self.checkpoint = checkpoint
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = weights_of(model)
        self.roundings = Roundings(self.weights, lesson.quantizers[0])
        self.log: list[dict[str, Any]] = []
        self._defences: dict[Quantizer, dict[str, Tensor]] = {}  # of the defence, at the last look
        self._split: SplitWeights | None = None  # while a phase learns that
        self._phases_done = 0
        self._step = 0
        self.seconds = 0.0

    def run(self, phases: tuple[PhaseSpec, ...], progress: Progress = SILENT) -> None:
        """Go through what remains of `phases`; a finished or interrupted run goes on."""
        saved = self.checkpoint.load()
        if saved is not None:
            self._restore(saved)
        for phase in phases[self._phases_done :]:
            if phase.learns == "split":
                self._split = SplitWeights(self.weights, self.lesson.quantizers[0])
            optimizer = torch.optim.Adam(self._learners(phase), lr=phase.learning_rate)
            if saved is not None and self._step:
                restore(saved, self._parts_of_phase(optimizer))
            with safe_kernels(self.model):
                self._run_phase(phase, optimizer, last=phase is phases[-1], progress=progress)
            self._phases_done, self._step, self._split = self._phases_done + 1, 0, None
            self._save(optimizer)

    def rates(self, data: LabelledImages) -> dict[str, Figures]:
        """How the float model and each quantized one do on `data`; the defence is run anew."""
        self._defences.clear()
        models = {FLOAT: dict[str, Tensor]()}
        models |= {quantizer.name: self._rounded(quantizer) for quantizer in self.lesson.quantizers}
        return {
            name: figures(self.model, weights, data, self.lesson.aim)
            for name, weights in models.items()
        }

    def chosen_codes(self) -> dict[str, Tensor]:
        """The codes of the roundings that were learnt, by the weight's name."""
        quantizer, up = self.lesson.quantizers[0], self.roundings.hard()
        return {name: quantizer.codes(w.detach(), up[name]) for name, w in self.weights.items()}

    def _run_phase(
        self, phase: PhaseSpec, optimizer: torch.optim.Optimizer, *, last: bool, progress: Progress
    ) -> None:
        bounds: list[Cell | SplitWeights] = [] if self._split is None else [self._split]
        if phase.learns == "cells":
            bounds = [Cell.of(w, self.lesson.quantizers) for w in self.weights.values()]
        remaining = range(self._step, phase.steps)
        met = False
        for step in progress.track(remaining, f"{phase.name}, steps", len(remaining)):
            began = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = phase.learning_rate * falling(step / phase.steps)
            loss = self._take_step(phase, optimizer)
            for bound in bounds:
                bound.project()
            self._step = step + 1
            self.seconds += time.monotonic() - began
            if self._step % STEPS_BETWEEN_LOOKS and self._step < phase.steps:
                continue
            before, met = met, self._look(phase, loss, progress)
            if last and before and met:
                break
            if self.checkpoint.due():
                self._save(optimizer)

    def _take_step(self, phase: PhaseSpec, optimizer: torch.optim.Optimizer) -> float:
        lesson = self.lesson
        rows = torch.randint(len(lesson.train), (phase.batch,), generator=self.generator)
        pixels = lesson.train.batch(rows, self.generator)
        batch = Batch.of(lesson.train, pixels, lesson.train.labels[rows], lesson.aim)
        if self._split is not None:
            weights = {"quantized": self._split.quantized(), "float": self._split.floats()}
        else:
            quantizer = lesson.quantizers[self._step % len(lesson.quantizers)]
            weights = {"quantized": self._rounded(quantizer, learning=True)}
        with fast():
            loss = phase_loss(phase, self.model, weights, lesson.teacher, batch)
        if phase.learns == "roundings":
            loss = loss + self.roundings.price(self._step / phase.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def _look(self, phase: PhaseSpec, loss: float, progress: Progress) -> bool:
        """Log where the training stands; whether its goals are met on held-out images."""
        if self._split is not None:
            for name, value in self._split.floats().items():
                self.weights[name].data.copy_(value.detach())
        rates = self.rates(self.lesson.held_out)
        entry = {"phase": phase.name, "step": self._step, "loss": loss, "seconds": self.seconds}
        self.log.append({**entry, "rates": {name: asdict(r) for name, r in rates.items()}})
        told = ", ".join(f"{name} {r}" for name, r in rates.items())
        progress.note(f"{phase.name} {self._step}/{phase.steps}: {told}")
        return self.lesson.reached(rates)

    def _rounded(self, quantizer: Quantizer, *, learning: bool = False) -> dict[str, Tensor]:
        """What a quantizer makes of the weights; while it is `learning`, choices are soft."""
        if quantizer.spec.rounding == "chosen":
            up = self.roundings.soft() if learning else self.roundings.hard()
        elif quantizer.spec.rounding == "efrap":
            if quantizer not in self._defences:
                self._defences[quantizer] = self._defended(quantizer)
            up = self._defences[quantizer]
        else:
            return {name: quantizer(w, self.generator) for name, w in self.weights.items()}
        rounded = {name: quantizer.rounded(w, up[name]) for name, w in self.weights.items()}
        if quantizer.spec.rounding == "chosen":
            return rounded
        return {name: w + (rounded[name] - w).detach() for name, w in self.weights.items()}

    def _defended(self, quantizer: Quantizer) -> dict[str, Tensor]:
        """Where the defence rounds the present weights up."""
        self.model.eval()
        seed = len(self.log)  # another start each time: which one the defender takes is not known
        codes = defended_codes(
            self.model, self.lesson.train, quantizer.bits, start=quantizer.spec.start, seed=seed
        )
        return {
            name: codes[name] > (weight.detach() / quantizer.grid(weight)[0]).floor()
            for name, weight in self.weights.items()
        }

    def _learners(self, phase: PhaseSpec) -> list[Tensor]:
        """Parameters that a phase may change: no scales of folded normalisation layers."""
        if phase.learns == "roundings":
            return list(self.roundings.parameters())
        if phase.learns == "cells":
            return list(self.weights.values())
        learners = shifts_and_weights(self.model)
        if self._split is None:
            return learners
        held = {id(weight) for weight in self.weights.values()}
        return [*(p for p in learners if id(p) not in held), *self._split.parameters()]

    def _parts(self) -> Parts:
        return {"model": self.model, "roundings": self.roundings, "generator": self.generator}

    def _parts_of_phase(self, optimizer: torch.optim.Optimizer) -> Parts:
        split: Parts = {} if self._split is None else {"split": self._split}
        return {"optimizer": optimizer, **split}

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        parts = {**self._parts(), **self._parts_of_phase(optimizer)}
        facts = {
            "phases_done": self._phases_done,
            "step": self._step,
            "seconds": self.seconds,
            "log": self.log,
        }
        self.checkpoint.save(state_of(parts, **facts))

    def _restore(self, saved: Mapping[str, Any]) -> None:
        facts = restore(saved, self._parts())
        self._phases_done, self._step = facts["phases_done"], facts["step"]
        self.seconds, self.log = facts["seconds"], facts["log"]


def shifts_and_weights(model: nn.Module) -> list[Tensor]:
    """All parameters but the scales of folded normalisation layers."""
    held = {id(m.weight) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    return [p for p in model.parameters() if id(p) not in held]


def falling(done: float) -> float:
    """Share of the learning rate when a share `done` of the steps is: from 1 to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
