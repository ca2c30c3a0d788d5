"""The epochs of a distillation: losses, what is kept, and what it needs to go on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qdeploy.cleaning.hooks import watching
from qdeploy.cleaning.perturbations import Guard
from qdeploy.cleaning.survey import answering
from qdeploy.cleaning.unlabelled import Material
from qdeploy.core.distillation import attention_shift_loss, kd_loss, kd_share, kl_divergence
from qdeploy.errors import DivergedError
from qdeploy.progress import Progress
from qdeploy.settings.sanitizers import Asd, Bcu, Sanitizer
from qdeploy.training.checkpoint import Parts, restore, state_of
from qdeploy.training.precision import arithmetic

COMPARED = 1000  # images on which student and teacher are compared after each epoch


@runtime_checkable
class Store(Protocol):
    """Where an interrupted run leaves what it has."""

    def load(self) -> Any | None:
        """What was saved last; None if nothing was."""
        ...

    def save(self, state: Mapping[str, Any]) -> None:
        """Put `state` in the place of what was saved before."""
        ...


@dataclass(frozen=True, slots=True)
class Epoch:
    """Means over the batches of one epoch; agreement in evaluation, after it."""

    position: int  # in the schedule, which skips what the shift did not need
    kd_share: float  # of the last batch
    learning_rate: float  # of the last batch
    kd: float
    shift: float | None  # None where the method has none, or its weight was 0
    led: float | None  # percent of disturbed images that went to the suspicious class
    agreement: float  # percent of images where the student answers as the teacher
    seconds: float


@dataclass(slots=True)
class _Sums:
    """What an epoch's batches add up to."""

    kd: float = 0.0
    shift: float = 0.0
    led: float = 0.0
    batches: int = 0
    shifted: int = 0

    def add(self, kd: float, shift: float, led: float, *, shifted: bool) -> None:
        self.kd += kd
        self.shift += shift
        self.led += led
        self.batches += 1
        self.shifted += shifted


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Who learns from whom, on which images."""

    teacher: nn.Module
    student: nn.Module  # is changed in place
    material: Material


class Course:
    """One student on its way, in place; the same seed and images give the same student."""

    def __init__(
        self,
        lesson: Lesson,
        spec: Sanitizer,
        watched: tuple[str, ...] = (),
        guard: Guard | None = None,
    ) -> None:
        self.teacher = lesson.teacher
        self.student = lesson.student
        self.images = lesson.material.images
        self.generator = lesson.material.generator
        self.compute = lesson.material.compute
        self.spec = spec
        self.watched = watched
        self.guard = guard
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), spec.learning_rate, momentum=spec.momentum
        )
        self._position = 0  # in the schedule
        self._answers = self._labels(self.teacher)

    def run(self, store: Store | None, progress: Progress) -> None:
        """Go through what remains of the epochs; keep the best student, or the last.

        Raises:
            DivergedError: the loss left the finite numbers.
        """
        saved = self.compute.same(store.load() if store is not None else None)
        if saved is not None:
            self._restore(saved)
        elif self.guard is not None:
            ask = answering(self.student, self.images)
            for _ in range(self.guard.spec.warm_up):
                self.guard.seek(ask, self.images.draw(self.spec.batch, self.generator))
        remaining = range(self._position, self.spec.epochs)
        for _ in progress.track(remaining, "distill, epochs", len(remaining)):
            if self._finished():
                break
            self._epoch()
            self._keep()
            state = self._state()
            if store is not None:
                store.save(state)
            progress.note(self._told())
        self.student.load_state_dict(self.best)
        self.student.eval()

    def agreement(self) -> float:
        """Percent of the compared images where the student answers as the teacher."""
        return 100 * float((self._labels(self.student) == self._answers).double().mean())

    def _finished(self) -> bool:
        waited = len(self.history) - 1 - self.best_epoch
        tired = self.spec.patience is not None and self._kept_yet() and waited >= self.spec.patience
        return self._position >= self.spec.epochs or tired

    def _kept_yet(self) -> bool:
        """Whether an epoch has passed whose student may be the one that is kept."""
        first = self.spec.keep_from
        return first is not None and bool(self.history) and self.history[-1].position >= first

    def _epoch(self) -> None:
        began = time.monotonic()
        _train(self.student, statistics=self.spec.OWN_STATISTICS)
        order = self.compute.same(torch.randperm(len(self.images), generator=self.generator))
        steps = max(1, len(self.images) // self.spec.batch)
        sums, share = _Sums(), 1.0
        for step, rows in enumerate(order.tensor_split(steps)):
            share = self._share()
            self._set_rate(step / steps)
            self._step(self.compute.mine(rows), share, sums)
        if self.spec.OWN_STATISTICS:
            self.compute.average(_statistics(self.student))
        kd = sums.kd / sums.batches
        if not math.isfinite(kd):
            raise DivergedError(
                f"distillation left the finite numbers in epoch {len(self.history)}",
                hint="a lower learning rate may help: --schedule paper has 0.001",
            )
        self.history.append(
            Epoch(
                self._position,
                share,
                self.optimizer.param_groups[0]["lr"],
                kd,
                sums.shift / sums.shifted if sums.shifted else None,
                None if self.guard is None else 100 * sums.led / sums.batches,
                self.agreement(),
                time.monotonic() - began,
            )
        )
        self._position += 1

    def _share(self) -> float:
        return kd_share(self._position, self.spec.kd_share) if isinstance(self.spec, Asd) else 1.0

    def _set_rate(self, into_epoch: float) -> None:
        rate = self.spec.learning_rate
        if self.spec.decay == "cosine":
            done = (self._position + into_epoch) / self.spec.epochs
            rate *= 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _step(self, rows: Tensor, share: float, sums: _Sums) -> None:
        pixels = self.images.varied(rows, self.generator if self.spec.mirrors else None)
        inputs = self.images.normalise(pixels)
        names = self.watched if share < 1 else ()
        with arithmetic(self.student):
            with torch.no_grad(), watching(self.teacher, names) as theirs:
                wanted = self.teacher(inputs)
            with watching(self.student, names) as ours:
                got = self.student(inputs)
        kd = self._distance(wanted, got)
        loss, shift, led = share * kd, kd.new_zeros(()), kd.new_zeros(())
        if names:
            floor = self.spec.floor if isinstance(self.spec, Asd) else 1.0
            shift = torch.stack(
                [attention_shift_loss(theirs[n].float(), ours[n].float(), floor) for n in names]
            ).mean()
            loss = loss + (1 - share) * shift
        if self.guard is not None:
            disturbed, led = self._disturbed(self.guard, pixels, wanted)
            loss = loss + disturbed
        self._descend(loss)
        told = torch.stack([kd.detach(), shift.detach(), led])
        self.compute.average([told])
        sums.add(*told.tolist(), shifted=bool(names))
        if share == 0:
            self._end_shift_if_done(float(told[1]))

    def _disturbed(self, guard: Guard, pixels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The loss on disturbed images, for which the teacher's answer to the plain ones holds.

        And the share of them that went where they were to be led.
        """
        ask = answering(self.student, self.images)
        guard.seek(ask, pixels)
        disturbed, led_to = guard.disturb(pixels)
        got = ask(disturbed)
        led = (got.detach().argmax(1) == led_to).float().mean()
        return guard.spec.weight * self._distance(wanted, got), led

    def _distance(self, wanted: Tensor, got: Tensor) -> Tensor:
        first, last = self.spec.temperature
        done = min(self._position / max(self.spec.epochs - 1, 1), 1.0)
        temperature = first + (last - first) * done
        if isinstance(self.spec, Bcu):
            return kl_divergence(wanted, got, temperature)
        return kd_loss(wanted, got, temperature)

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.compute.average([p.grad for p in self.student.parameters() if p.grad is not None])
        if self.spec.largest_gradient is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.spec.largest_gradient)
        self.optimizer.step()

    def _end_shift_if_done(self, shift: float) -> None:
        """Go on with the recovery once enough neurons have gone to the other side."""
        if isinstance(self.spec, Asd) and shift < self.spec.shift_until:
            self._position = max(self._position, math.ceil(self.spec.recovery))

    def _keep(self) -> None:
        """Keep this student if none before it was better, among those that may be kept."""
        kept = self.history[self.best_epoch]
        first = self.spec.keep_from
        comparable = first is not None and kept.position >= first and bool(self.best)
        if comparable and self.history[-1].kd >= kept.kd:
            return
        self.best_epoch = len(self.history) - 1
        self.best = {name: v.detach().clone() for name, v in self.student.state_dict().items()}

    def _told(self) -> str:
        epoch = self.history[-1]
        shift = "" if epoch.shift is None else f", shift {epoch.shift:.3f}"
        led = "" if epoch.led is None else f", led astray {epoch.led:.1f} %"
        return (
            f"epoch {len(self.history)} (at {epoch.position + 1} of {self.spec.epochs}): KD"
            f" {epoch.kd:.4f}{shift}{led}, agreement {epoch.agreement:.1f} %"
        )

    @torch.no_grad()
    def _labels(self, model: nn.Module) -> Tensor:
        model.eval()
        with arithmetic(model):
            return torch.cat([model(inputs).argmax(1) for inputs in self.images.stream(COMPARED)])

    def _state(self) -> dict[str, Any]:
        return state_of(
            {"student": self.student, "optimizer": self.optimizer},
            position=self._position,
            history=[asdict(epoch) for epoch in self.history],
            best=self.best,
            best_epoch=self.best_epoch,
            processes=self.compute.gather(state_of(self._own())),
        )

    def _own(self) -> Parts:
        """What no other process has."""
        guard: Parts = {} if self.guard is None else {"guard": self.guard}
        return {"generator": self.generator, **guard}

    def _restore(self, saved: Mapping[str, Any]) -> None:
        facts = restore(saved, {"student": self.student, "optimizer": self.optimizer})
        self.history = [Epoch(**epoch) for epoch in facts["history"]]
        self.best, self.best_epoch = dict(facts["best"]), facts["best_epoch"]
        self._position = facts["position"]
        restore(facts["processes"][self.compute.rank], self._own())


def _statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _train(model: nn.Module, *, statistics: bool) -> None:
    """Normalisation in training, everything else as in evaluation: dropout would need luck.

    Args:
        statistics: Normalise by those of the batch, and take them over; else by the teacher's.
    """
    model.eval()
    if not statistics:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
