"""Clean a float model by teaching a student what it answers, and not how it gets there."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from qdeploy.cleaning.batch_norm import revive
from qdeploy.cleaning.hooks import watched_layers
from qdeploy.cleaning.perturbations import Guard
from qdeploy.cleaning.reinitialise import forget, forgetting
from qdeploy.cleaning.survey import survey
from qdeploy.cleaning.trainer import Course, Epoch, Lesson, Store
from qdeploy.cleaning.unlabelled import Material, read_images
from qdeploy.core.reach import Reach, suspects
from qdeploy.core.safe_kernels import safe_kernels
from qdeploy.data import Images
from qdeploy.errors import PlanError, UsageError
from qdeploy.progress import SILENT, Progress
from qdeploy.settings.sanitizers import Asd, Bcu, Sanitizer, Unlearn
from qdeploy.training.compute import ALONE, Compute
from qdeploy.values import Content, Loaded

__all__ = ["Distilled", "Epoch", "Reach", "Setting", "Store", "Surveyed", "distill"]

STATISTICS = 1000  # images from which folded normalisation layers get their statistics


@dataclass(frozen=True, slots=True)
class Surveyed:
    """How easily images are led to each class, of the teacher and of the student."""

    teacher: tuple[Reach, ...]
    student: tuple[Reach, ...]
    suspects: tuple[int, ...]  # classes of the teacher that are reached too easily
    remaining: tuple[int, ...]  # of the student


@dataclass(frozen=True, slots=True, eq=False)
class Distilled:
    """A student, and how it came about."""

    module: nn.Module  # of the teacher's architecture, in eval mode
    history: tuple[Epoch, ...]  # empty where no class is suspicious: it is the teacher
    watched: tuple[str, ...]  # empty for methods that look at answers only
    best_epoch: int  # index in the history of the student that was kept
    surveyed: Surveyed | None  # of the method that seeks triggers
    agreement: float  # percent of (at most 1,000 of) the images on which it answers as the teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a distillation is carried out."""

    seed: int
    compute: Compute = ALONE  # of several processes each distils, and each gets the student
    store: Store | None = None  # where an interrupted run has left what it had; of the main process
    progress: Progress = SILENT


def distill(loaded: Loaded, images: Images, spec: Sanitizer, setting: Setting) -> Distilled:
    """A student of `loaded` that has seen neither its trigger nor any label.

    Args:
        images: Unlabelled; they need not be of the model's task.

    Raises:
        PlanError: the model is of a form whose gradients or inner layers cannot be had.
        UsageError: a pattern in `spec.watch` matches no layer, or there are too many processes.
        InputError: an image is damaged or of the wrong size.
        DivergedError: the loss left the finite numbers.
    """
    _check_sizes(images, spec, setting.compute)
    teacher = _teacher(loaded, spec)
    with safe_kernels(teacher):
        return _taught(teacher, loaded.kind, images, spec, setting)


def _taught(
    teacher: nn.Module, kind: Content, images: Images, spec: Sanitizer, setting: Setting
) -> Distilled:
    compute = setting.compute
    watched = watched_layers(teacher, spec.watch, spec.deepest) if isinstance(spec, Asd) else ()
    generator = compute.generator(setting.seed)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    unlabelled = read_images(images, setting.progress)
    if not isinstance(spec, Unlearn) and kind != "script":
        revive(student, unlabelled.stream(STATISTICS))
    if isinstance(spec, Bcu):
        forget(student, forgetting(student, spec), generator)
    student.to(compute.device)
    compute.spread(student)
    if compute.device.type != "cpu":
        teacher = copy.deepcopy(teacher).to(compute.device)  # the caller's stays where it is
    material = Material(unlabelled.to(compute.device), generator, compute)
    lesson = Lesson(teacher, student, material)
    if isinstance(spec, Unlearn):
        return _unlearn(lesson, spec, setting)
    course = Course(lesson, spec, watched)
    course.run(setting.store, setting.progress)
    history = tuple(course.history)
    agreement = course.agreement()
    return Distilled(student.cpu(), history, watched, course.best_epoch, None, agreement)


def _unlearn(lesson: Lesson, spec: Unlearn, setting: Setting) -> Distilled:
    """Where no class is suspicious, the student is the teacher."""
    student, material, progress = lesson.student, lesson.material, setting.progress
    before = survey(lesson.teacher, material, spec, progress)
    found = suspects(before, spec.suspicious)
    if not found:
        progress.note("no class is reached too easily: nothing to unlearn")
        return Distilled(student.cpu(), (), (), 0, Surveyed(before, before, (), ()), 100.0)
    progress.note(f"reached too easily: {', '.join(f'class {c}' for c in found)}")
    steps = max(1, len(material.images) // spec.batch)
    epochs = max(spec.epochs, math.ceil(spec.least_steps / steps))
    spec = spec.model_copy(update={"epochs": epochs})
    guard = Guard(before, found, material.images, spec, material.generator)
    course = Course(lesson, spec, guard=guard)
    course.run(setting.store, setting.progress)
    _extrapolate(lesson.teacher, student, spec.further)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    after = survey(student, material, spec, progress)
    surveyed = Surveyed(before, after, found, suspects(after, spec.suspicious))
    history = tuple(course.history)
    agreement = course.agreement()
    return Distilled(student.cpu(), history, (), course.best_epoch, surveyed, agreement)


@torch.no_grad()
def _extrapolate(teacher: nn.Module, student: nn.Module, factor: float) -> None:
    """Put the student where it would be, had it gone `factor` times as far from the teacher.

    A direction in weight space that unlearns something does so beyond its end, too (Ilharco et
    al., Editing Models with Task Arithmetic, ICLR 2023).
    """
    for start, end in zip(teacher.parameters(), student.parameters(), strict=True):
        end.copy_(torch.lerp(start, end, factor))


def _check_sizes(images: Images, spec: Sanitizer, compute: Compute) -> None:
    """Every process needs two images of each batch, or normalisation has no statistics."""
    smallest = min(len(images), spec.batch) // compute.world
    if compute.world > 1 and smallest < 2:
        raise UsageError(
            f"{compute.world} processes: too many for batches of {min(len(images), spec.batch)}",
            hint="start fewer, or give more images",
        )


def _teacher(loaded: Loaded, spec: Sanitizer) -> nn.Module:
    """The model as a module through which gradients flow.

    Raises:
        PlanError: it is none, or `spec` needs layers that it does not show.
    """
    hint = "give the state dict that it was made from, with --arch or a model card"
    model = loaded.content
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"model {loaded.origin.path}: {loaded.origin.format} cannot be trained", hint=hint
        )
    if loaded.kind == "script" and isinstance(spec, Asd | Bcu):
        raise PlanError(
            f"model {loaded.origin.path}: {spec.kind} needs the inner layers, which"
            " TorchScript does not show",
            hint=f"{hint}, or use --sanitizer unlearn",
        )
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise PlanError(
            f"model {loaded.origin.path}: has no weights that can be trained", hint=hint
        )
    if loaded.kind == "script":
        return model.eval()
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
