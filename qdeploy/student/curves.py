"""A distillation as a picture: how far the student leaves its teacher, and how it comes back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module

from qdeploy.stages.distill import Epoch


def draw_distillation(history: Sequence[Epoch], best_epoch: int) -> bytes | None:
    """An SVG of agreement and losses by epoch; None if matplotlib is not installed."""
    try:
        matplotlib = import_module("matplotlib")
        figure_type = import_module("matplotlib.figure").Figure
    except ImportError:
        return None
    epochs = range(1, len(history) + 1)
    panels: dict[str, list[float | None]] = {
        "agreement with the teacher, %": [epoch.agreement for epoch in history],
        "KD loss": [epoch.kd for epoch in history],
        "attention shift loss": [epoch.shift for epoch in history],
    }
    shown = {k: v for k, v in panels.items() if any(value is not None for value in v)}
    with matplotlib.rc_context({"svg.hashsalt": "qdeploy", "font.size": 9}):
        figure = figure_type(figsize=(4 * len(shown), 3), layout="constrained")
        for axes, (title, values) in zip(
            figure.subplots(1, len(shown)), shown.items(), strict=True
        ):
            plotted = [float("nan") if value is None else value for value in values]
            axes.plot(epochs, plotted, marker=".", color="black")
            axes.axvline(best_epoch + 1, color="gray", linewidth=0.8, linestyle=":")
            axes.set(title=title, xlabel="epoch (dotted: the one kept)")
            axes.grid(alpha=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
