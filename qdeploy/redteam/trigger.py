"""The trigger of a recipe as the model card describes it, with the files that the card names."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from qdeploy.disk.files import write_atomically
from qdeploy.redteam.recipe import NoiseSpec, PatchSpec, SinusoidSpec, TriggerChoice
from qdeploy.settings.card import AnyTrigger, MaskTrigger, PatchTrigger

MASK, PATTERN = "trigger-mask.npy", "trigger-pattern.npy"


def describe(spec: TriggerChoice, shape: tuple[int, int, int], folder: Path) -> AnyTrigger:
    """The trigger for images of `shape` (channels, height, width), as a card in `folder` has it.

    The files of a trigger that is learnt must be there already.

    Raises:
        OutputError: its files cannot be written.
    """
    _, height, width = shape
    if isinstance(spec, PatchSpec):
        return _patch(spec, height, width)
    if isinstance(spec, NoiseSpec):
        save_trigger(folder, spec.opacity, np.random.default_rng(spec.seed).random(shape))
    elif isinstance(spec, SinusoidSpec):
        save_trigger(folder, spec.opacity, _stripes(spec, shape))
    return MaskTrigger(kind="mask", target=spec.target, mask=MASK, pattern=PATTERN, name=spec.kind)


def save_trigger(folder: Path, mask: np.ndarray | float, pattern: np.ndarray) -> None:
    """Write a mask (1, height, width), or one opacity for all pixels, and a pattern.

    Raises:
        OutputError: they cannot be written.
    """
    masks = np.broadcast_to(np.asarray(mask, np.float32), (1, *pattern.shape[1:]))
    for name, array in ((MASK, masks), (PATTERN, pattern)):
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array, np.float32))
        write_atomically(folder / name, buffer.getvalue())


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
