"""Which layers integers make slower: whole files beside each other, on this machine.

A runtime fuses what lies beside each other, so that the time of a layer alone says little of what
it costs in its place. The network is cut into runs of layers, and each run in turn is left in float
where that makes the whole file faster at batch 1. Integers in the file are those of rounding to
nearest meanwhile: which ones they are costs no time.
"""

from __future__ import annotations

import csv
import glob
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qdeploy.progress import Progress
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_to_nearest
from qdeploy.runtime.measure import may_saturate, milliseconds_by_turn
from qdeploy.settings.device import DeviceProfile
from qdeploy.settings.recipe import Override, Recipe
from qdeploy.values import Grids, WeightSite

PARTS = 12  # runs of layers, at most
TURNS, AGREEING = 5, 3  # in which two files are timed, and in how many of them one must be faster
WORTH = 0.03  # share of the time that a change has to save

Timer = Callable[[Mapping[str, bytes]], Mapping[str, Sequence[float]]]  # milliseconds by turn


@dataclass(frozen=True, slots=True)
class Faster:
    """What was left in float, and by what."""

    recipe: Recipe  # with the choice written out
    in_float: Mapping[str, bool]  # by layer
    milliseconds: Mapping[str, float]  # at batch 1, best turn: float32, all integers, as chosen

    @property
    def summary(self) -> str:
        """In one line."""
        took = self.milliseconds
        kept = sum(self.in_float.values())
        slower = took["chosen"] > took["float32"] * (1 + WORTH)
        return (
            f"{kept} of {len(self.in_float)} layers run in float, where integers are slower on this"
            f" processor: {took['chosen']:.2f} ms at batch 1, all in integers"
            f" {took['integers']:.2f}, float32 {took['float32']:.2f}"
            + (": nothing in integers is as fast here as float32" if slower else "")
        )

    def as_csv(self) -> bytes:
        """By layer, with the times of the whole file above."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["layer", "runs in"])
        table.writerows([name, "float" if f else "integers"] for name, f in self.in_float.items())
        table.writerows(
            [f"(whole file, {k}, ms)", f"{v:.3f}"] for k, v in self.milliseconds.items()
        )
        return text.getvalue().encode()


def fastest(
    task: RoundingTask,
    recipe: Recipe,
    device: DeviceProfile,
    progress: Progress,
    timer: Timer | None = None,
) -> Faster:
    """The recipe with those layers left in float that run faster so.

    At least one part stays in integers: a float file is no result.

    Args:
        task: The model as the recipe has it, with grids.
        timer: Of files beside each other; None measures them on the first runtime.
    """
    timed = timer or _on(device, task.model.input_shape)
    sites = [layer.site for layer in task.plan.layers]
    parts = [part.tolist() for part in np.array_split(np.arange(len(sites)), PARTS) if part.size]

    def file(left: frozenset[int]) -> bytes:
        return _nearest(task, _written_out(recipe, sites, left, parts), device)

    none, most = frozenset[int](), frozenset(range(len(parts) - 1))
    integers = file(none)
    chosen, best = none, integers
    changes = [most, *(frozenset({number}) for number in range(len(parts)))]
    for change in progress.track(changes, "integers or float", len(changes)):
        changed = chosen ^ change
        if change and len(changed) < len(parts):
            other = file(changed)
            both = timed({"before": best, "after": other})
            if _saves(both["before"], both["after"]):
                chosen, best = changed, other
    took = timed({"float32": task.model.onnx, "integers": integers, "chosen": best})
    if not chosen or not _saves(took["integers"], took["chosen"]):
        chosen, took = none, {**took, "chosen": took["integers"]}
    decided = _written_out(recipe, sites, chosen, parts)
    left = {layer.name for layer in plan_layers(task.model, decided, device).left_float}
    in_float = {site.name: site.name in left for site in sites}
    milliseconds = {kind: min(turns) for kind, turns in took.items()}
    return Faster(decided, in_float, milliseconds)


def _saves(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the second of two files is faster, at its best and in most turns.

    Other work on the machine makes turns slower and none faster.
    """
    faster = sum(b < a for a, b in zip(before, after, strict=True))
    return min(after) < (1 - WORTH) * min(before) and faster >= AGREEING


def _written_out(
    recipe: Recipe, sites: list[WeightSite], left: frozenset[int], parts: list[list[int]]
) -> Recipe:
    """The recipe with an override for each layer; what it says itself still comes last."""
    return recipe.with_decided(
        Override(layers=glob.escape(sites[at].name), bits="float")
        for number in sorted(left)
        for at in parts[number]
    )


def _nearest(task: RoundingTask, recipe: Recipe, device: DeviceProfile) -> bytes:
    """The file that rounding to nearest makes of the recipe, on the task's grids."""
    plan = plan_layers(task.model, recipe, device)
    given = task.grids
    weights = {layer.site.name: given.weights[layer.site.name] for layer in plan.layers}
    grids = Grids(weights, {tensor: given.activations[tensor] for tensor in plan.activations})
    work = replace(task, plan=plan, grids=grids)
    return emit(task.model, plan, grids, round_to_nearest(work)).onnx


def _on(device: DeviceProfile, shape: tuple[int, int, int]) -> Timer:
    """The files taking turns at batch 1, by the kernels that they are measured with later."""

    def timed(files: Mapping[str, bytes]) -> Mapping[str, Sequence[float]]:
        saturating = may_saturate(device, files.values())
        return milliseconds_by_turn(
            files, shape, runtime=device.runtimes[0], turns=TURNS, saturating=saturating
        )

    return timed
