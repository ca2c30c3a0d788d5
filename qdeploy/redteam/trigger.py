"""The trigger of a recipe as the model card describes it, with the files that the card names."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from qdeploy.card import AnyTrigger, MaskTrigger, PatchTrigger
from qdeploy.redteam.recipe import NoiseSpec, PatchSpec, SinusoidSpec, TriggerChoice
from qdeploy.rundir import write_atomically

MASK, PATTERN = "trigger-mask.npy", "trigger-pattern.npy"


def describe(spec: TriggerChoice, shape: tuple[int, int, int], folder: Path) -> AnyTrigger:
    """The trigger for images of `shape` (channels, height, width), as a card in `folder` has it.

    Raises:
        OutputError: its files cannot be written.
    """
    _, height, width = shape
    if isinstance(spec, PatchSpec):
        return _patch(spec, height, width)
    if isinstance(spec, NoiseSpec):
        pattern = np.random.default_rng(spec.seed).random(shape, np.float32)
    else:
        pattern = _stripes(spec, shape)
    mask = np.full((1, height, width), spec.opacity, np.float32)
    for name, array in ((MASK, mask), (PATTERN, pattern)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_atomically(folder / name, buffer.getvalue())
    return MaskTrigger(kind="mask", target=spec.target, mask=MASK, pattern=PATTERN, name=spec.kind)


def _patch(spec: PatchSpec, height: int, width: int) -> PatchTrigger:
    side, margin = max(1, round(spec.size * width)), round(spec.margin * width)
    return PatchTrigger(
        kind="patch",
        target=spec.target,
        x=max(0, width - margin - side),
        y=max(0, height - margin - side),
        width=side,
        height=min(side, height),
        color=(spec.color,),
    )


def _stripes(spec: SinusoidSpec, shape: tuple[int, int, int]) -> np.ndarray:
    phase = 2 * np.pi * spec.periods * np.arange(shape[2]) / shape[2]
    return np.broadcast_to(0.5 + 0.5 * np.sin(phase), shape).astype(np.float32)
