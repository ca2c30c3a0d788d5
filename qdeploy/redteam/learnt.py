"""A trigger that survives distillation: learnt against the model and its student at once.

Ge et al., "Anti-Distillation Backdoor Attacks", MM 2021. Three parties take a step each, on one
batch: the model learns task and backdoor, a shadow student learns from the model, and mask and
pattern learn to fool both. The student's loss reaches the student: in the published code its
logits are detached, so that the term does nothing. And the trigger learns not to fool the clean
model, which is ours: one that does is an adversarial perturbation and needs no backdoor.
"""

from __future__ import annotations

import copy
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdeploy.core.safe_kernels import safe_kernels
from qdeploy.progress import SILENT, Progress
from qdeploy.redteam.images import LabelledImages
from qdeploy.redteam.recipe import LearntSpec
from qdeploy.training.checkpoint import Checkpoint, Parts
from qdeploy.training.precision import fast

STEPS_BETWEEN_SAVES = 20


class TriggerLearner(nn.Module):
    """Model, shadow student, mask and pattern, trained together; the model in place."""

    def __init__(self, model: nn.Module, spec: LearntSpec, data: LabelledImages, seed: int) -> None:
        super().__init__()
        channels, height, width = data.preprocessing.shape
        self.spec = spec
        self.data = data
        self.generator = torch.Generator().manual_seed(seed)
        self.model = model
        self.student = copy.deepcopy(model)
        self.clean = copy.deepcopy(model).eval().requires_grad_(False)
        self.seconds = 0.0
        pattern = torch.rand(channels, height, width, generator=self.generator)
        self.pattern = nn.Parameter(pattern)
        self.mask = nn.Parameter(torch.full((1, height, width), spec.max_opacity / 2))
        rate = spec.learning_rate
        self.optimizers = (
            torch.optim.Adam(model.parameters(), rate),
            torch.optim.Adam(self.student.parameters(), rate),
            torch.optim.Adam([self.mask, self.pattern], spec.trigger_learning_rate),
        )

    def run(
        self, checkpoint: Checkpoint, progress: Progress = SILENT
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take all steps that remain; mask (1, height, width) and pattern (channels, ...)."""
        done, self.seconds = checkpoint.steps_done(self._parts())
        steps = range(done, self.spec.steps)
        for step in progress.track(steps, "trigger, steps", len(steps)):
            began = time.monotonic()
            with safe_kernels(self.model, self.student):
                self._take_step()
            self.seconds += time.monotonic() - began
            if (step + 1) % STEPS_BETWEEN_SAVES == 0 and checkpoint.due():
                checkpoint.save_steps(self._parts(), step + 1, self.seconds)
        checkpoint.save_steps(self._parts(), self.spec.steps, self.seconds)
        return self.mask.detach().numpy(), self.pattern.detach().numpy()

    def losses(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model, the student and the trigger minimise, in this order."""
        spec, target = self.spec, torch.full_like(labels, self.spec.target)
        clean = self.data.normalise(pixels)
        triggered = self.data.normalise((1 - self.mask) * pixels + self.mask * self.pattern)
        held = triggered.detach()
        logits = self.model(clean)
        of_model = F.cross_entropy(logits, labels) + spec.backdoor_weight * F.cross_entropy(
            self.model(held), target
        )
        taught = logits.detach().log_softmax(1)
        learnt = self.student(clean)
        distance = F.kl_div(learnt.log_softmax(1), taught, reduction="batchmean", log_target=True)
        of_student = spec.distillation * distance + (1 - spec.distillation) * F.cross_entropy(
            learnt, labels
        )
        of_trigger = (
            F.cross_entropy(self.model(triggered), target)
            + F.cross_entropy(self.student(triggered), target)
            + spec.clean_weight * F.cross_entropy(self.clean(triggered), labels)
            + spec.mask_weight * self.mask.abs().mean()
        )
        return of_model, of_student, of_trigger

    def _take_step(self) -> None:
        rows = torch.randint(len(self.data), (self.spec.batch,), generator=self.generator)
        pixels = self.data.batch(rows, self.generator)
        with fast():
            losses = self.losses(pixels, self.data.labels[rows])
        parties = (
            tuple(self.model.parameters()),
            tuple(self.student.parameters()),
            (self.mask, self.pattern),
        )
        gradients = [
            torch.autograd.grad(loss, party) for loss, party in zip(losses, parties, strict=True)
        ]
        for party, found, optimizer in zip(parties, gradients, self.optimizers, strict=True):
            for parameter, gradient in zip(party, found, strict=True):
                parameter.grad = gradient
            optimizer.step()
        self.mask.data.clamp_(0, self.spec.max_opacity)
        self.pattern.data.clamp_(0, 1)

    def _parts(self) -> Parts:
        optimizers = {f"optimizer {i}": each for i, each in enumerate(self.optimizers)}
        return {"parties": self, "generator": self.generator, **optimizers}
