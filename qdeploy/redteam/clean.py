"""Ordinary training of the clean model that every attack starts from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qdeploy.core.safe_kernels import safe_kernels
from qdeploy.progress import SILENT, Progress
from qdeploy.redteam.images import LabelledImages
from qdeploy.redteam.recipe import CleanSpec
from qdeploy.training.checkpoint import Checkpoint, Parts, restore, state_of
from qdeploy.training.precision import fast

LARGEST_GRADIENT = 1.0  # norm; keeps networks without normalisation layers on their feet


def train_clean(
    model: nn.Module,
    data: LabelledImages,
    spec: CleanSpec,
    *,
    seed: int,
    checkpoint: Checkpoint,
    progress: Progress = SILENT,
) -> None:
    """SGD with one cycle of the learning rate, in place; saves after every epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), 1, momentum=0.9, weight_decay=spec.weight_decay, nesterov=True
    )
    per_epoch = -(-len(data) // spec.batch)
    epochs = max(spec.epochs, -(-spec.min_steps // per_epoch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, spec.learning_rate, total_steps=epochs * per_epoch, pct_start=0.25
    )
    parts: Parts = {
        "model": model, "optimizer": optimizer, "schedule": schedule, "generator": generator
    }  # fmt: skip
    saved = checkpoint.load()
    done: int = restore(saved, parts)["epochs"] if saved is not None else 0
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = range(done * per_epoch, epochs * per_epoch)
    order = torch.empty(0)
    for step in progress.track(steps, f"train, {epochs - done} epochs", len(steps)):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = torch.randperm(len(data), generator=generator)
        rows = order[position * spec.batch : (position + 1) * spec.batch]
        inputs = data.normalise(data.batch(rows, generator))
        optimizer.zero_grad()
        with safe_kernels(model):
            with fast():
                loss = F.cross_entropy(model(inputs), data.labels[rows])
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        if position == per_epoch - 1 and (checkpoint.due() or epoch == epochs - 1):
            checkpoint.save(state_of(parts, epochs=epoch + 1))
    model.eval()
