"""The comparison as pictures: what is left of the attack, what quality costs, what was flipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from qdeploy.disk.svg import draw_svg

Records = Sequence[Mapping[str, Any]]
MARKERS = "osD^v<>Phd*X"


def draw_plots(records: Records) -> dict[str, bytes]:
    """SVG pictures by file name; none if matplotlib is not installed."""
    cells = [record for record in records if "grid" in record]
    if not cells:
        return {}
    drawings: dict[str, Callable[..., None]] = {
        "cost.svg": _cost,
        "flipped.svg": _flipped,
    }
    if any(cell["success"] is not None for cell in cells):
        drawings["attack.svg"] = _attack
    drawn = {
        name: draw_svg((9, 4.6), partial(draw, cells=cells)) for name, draw in drawings.items()
    }
    return {name: svg for name, svg in drawn.items() if svg is not None}


def _attack(figure: Any, cells: Records) -> None:
    """CDA against ASR, a point for each cell."""
    axes = figure.subplots()
    shown = [cell for cell in cells if cell["success"] is not None]
    _scatter(axes, shown, "accuracy", "success")
    axes.set(xlabel="CDA, %", ylabel="ASR, %", ylim=(-3, 103))
    axes.axhline(10, color="gray", linewidth=0.8, linestyle=":")
    _legend(figure, axes)


def _cost(figure: Any, cells: Records) -> None:
    """CPU seconds of the rounding against the error of the logits."""
    axes = figure.subplots()
    _scatter(axes, cells, "cpu_seconds", "logit_mse")
    axes.set(xlabel="rounding, CPU seconds", ylabel="logit MSE", xscale="log", yscale="log")
    _legend(figure, axes)


def _flipped(figure: Any, cells: Records) -> None:
    """Share of integers that differ from nearest, by method and layer of the first model."""
    first = [cell for cell in cells if cell["model"] == cells[0]["model"]]
    layers = list(first[0]["layers"])
    methods = _methods(first)
    shares = np.array([
        np.mean([list(cell["layers"].values()) for cell in first if cell["method"] == name], axis=0)
        for name in methods
    ])  # fmt: skip
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=100, cmap="viridis")
    axes.set(title=f"{first[0]['model']}: integers that differ from nearest, %")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    figure.colorbar(image)


def _scatter(axes: Any, cells: Records, x: str, y: str) -> None:
    axes.grid(alpha=0.3)
    for number, name in enumerate(_methods(cells)):
        of_method = [cell for cell in cells if cell["method"] == name]
        axes.scatter(
            [max(cell[x], 1e-3) for cell in of_method],
            [cell[y] for cell in of_method],
            label=name,
            marker=MARKERS[number % len(MARKERS)],
            alpha=0.75,
        )


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)


def _methods(cells: Records) -> list[str]:
    return list(dict.fromkeys(cell["method"] for cell in cells))
