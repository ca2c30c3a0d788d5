"""What is to be compared: one cell for each grid, method, bit width, activations and seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, cast

from qdeploy.errors import UsageError
from qdeploy.settings.methods import METHODS, Trained, full_name, method
from qdeploy.settings.recipe import ActivationSpec, Recipe, WeightGridSpec, WeightRange

WHOLE = "tensor-"
RANGES = ("absmax", "half", "minmax", "mse")
GRID_NAMES = (*RANGES, *(WHOLE + name for name in RANGES))

FASTEST = 1e-2  # learning rate of a shortened training

ActivationBits = Literal["8", "none"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One way of quantizing a model."""

    method: str
    grid: str
    bits: int
    activations: ActivationBits
    seed: int

    def recipe(self, base: Recipe, steps: int | None) -> Recipe:
        """`base` with what this cell says.

        Args:
            steps: Optimizer steps of the methods that train, their learning rate raised
                accordingly; None for as published.
        """
        rounding = method(self.method)
        if steps is not None and isinstance(rounding, Trained):
            changed = {"steps": steps, "learning_rate": learning_rate(rounding, steps)}
            rounding = rounding.model_copy(update=changed)
        activations = ActivationSpec(bits=8 if self.activations == "8" else "none")
        changes: dict[str, Any] = {
            "bits": self.bits,
            "seed": self.seed,
            "rounding": rounding,
            "weights": grid(self.grid),
            "activations": activations,
        }
        return base.model_copy(update=changes)

    @property
    def runs(self) -> bool:
        """Whether integer kernels can hold the grid: they take one zero point for all channels."""
        return not (self.grid == "minmax" and self.activations == "8")


def learning_rate(rounding: Trained, steps: int) -> float:
    """Of the method with fewer steps: each is as much larger, within what Adam can bear."""
    most = max(rounding.learning_rate, FASTEST)
    return min(rounding.learning_rate * rounding.steps / steps, most)


def grid(name: str) -> WeightGridSpec:
    """The grid of that name: a range per channel, or `tensor-` and a range.

    Raises:
        UsageError: there is no such grid.
    """
    if name not in GRID_NAMES:
        raise UsageError(f"there is no grid {name!r}", hint=f"have {', '.join(GRID_NAMES)}")
    chosen = cast("WeightRange", name.removeprefix(WHOLE))
    return WeightGridSpec(range=chosen, per="tensor" if name.startswith(WHOLE) else "channel")


@dataclass(frozen=True, slots=True)
class Matrix:
    """The values that are combined."""

    methods: tuple[str, ...]
    grids: tuple[str, ...]
    bits: tuple[int, ...]
    activations: tuple[ActivationBits, ...]
    seeds: int

    def cells(self) -> Iterator[Cell]:
        """All that can run, cheap methods first. What does not depend on a seed has one."""
        order = list(METHODS)
        methods = sorted(
            self.methods, key=lambda name: (_trains(name), order.index(full_name(name)))
        )
        combinations = product(self.activations, self.bits, self.grids, methods, range(self.seeds))
        for activations, bits, of_grid, name, seed in combinations:
            cell = Cell(full_name(name), of_grid, bits, activations, seed)
            row = method(name)
            fixed = row.needs == "nothing" and not row.draws and activations == "none"
            if cell.runs and not (fixed and seed):
                yield cell


def parse_matrix(methods: str, grids: str, bits: str, activations: str, seeds: int) -> Matrix:
    """The matrix that comma-separated lists describe; `all` stands for every method or grid.

    Raises:
        UsageError: an entry is unknown.
    """
    chosen = tuple(METHODS) if methods == "all" else _split(methods)
    on_grids = GRID_NAMES if grids == "all" else _split(grids)
    for name in chosen:
        method(name)
    for name in on_grids:
        grid(name)
    widths = tuple(int(width) for width in _among(bits, ("4", "8"), "--bits"))
    kinds = _among(activations, ("8", "none"), "--activation-bits")
    return Matrix(chosen, on_grids, widths, cast("tuple[ActivationBits, ...]", kinds), seeds)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _among(text: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    values = _split(text)
    unknown = [value for value in values if value not in known]
    if unknown or not values:
        raise UsageError(
            f"{option} {text!r} is not a list of {', '.join(known)}", hint="separate by commas"
        )
    return values


def _trains(name: str) -> bool:
    return method(name).needs == "gradients"
