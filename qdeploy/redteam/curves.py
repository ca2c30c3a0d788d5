"""A training as a picture: how the float model and the quantized ones drift apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdeploy.disk.svg import draw_svg

RATES = (("accuracy", "CDA, %"), ("class_accuracy", "target class, %"), ("success", "ASR, %"))


def draw_curves(log: Sequence[Mapping[str, Any]]) -> bytes | None:
    """An SVG of the rates in a training log over its steps; None if matplotlib is not installed."""
    shown = [(key, label) for key, label in RATES if log[-1]["rates"]["fp32"][key] is not None]
    steps, boundaries = _steps(log)

    def draw(figure: Any) -> None:
        for axes, (key, label) in zip(figure.subplots(1, len(shown)), shown, strict=True):
            for model in log[-1]["rates"]:
                values = [entry["rates"][model][key] for entry in log]
                style = {"color": "black", "linewidth": 2} if model == "fp32" else {}
                axes.plot(steps, values, label=model, **style)
            for boundary in boundaries:
                axes.axvline(boundary, color="gray", linewidth=0.8, linestyle=":")
            axes.set(title=label, xlabel="step", ylim=(-2, 102))
            axes.grid(alpha=0.3)
        lines, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=7)

    return draw_svg((4 * len(shown), 3.4), draw)


def _steps(log: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Steps counted through all phases, and where one phase ends and the next begins."""
    steps: list[int] = []
    boundaries: list[int] = []
    offset = 0
    for previous, entry in zip([None, *log], log, strict=False):
        if previous is not None and previous["phase"] != entry["phase"]:
            offset += previous["step"]
            boundaries.append(offset)
        steps.append(offset + entry["step"])
    return steps, boundaries
