"""A distillation as a picture: what was found, how far the student leaves, how it comes back."""

from __future__ import annotations

from typing import Any

from qdeploy.cleaning.distil import Distilled, Reach
from qdeploy.disk.svg import draw_svg


def draw_distillation(result: Distilled) -> bytes | None:
    """An SVG of agreement and losses by epoch, and of the survey; None without matplotlib."""
    panels: dict[str, list[float | None]] = {
        "agreement with the teacher, %": [epoch.agreement for epoch in result.history],
        "KD loss": [epoch.kd for epoch in result.history],
        "attention shift loss": [epoch.shift for epoch in result.history],
        "disturbed images led astray, %": [epoch.led for epoch in result.history],
    }
    shown = {k: v for k, v in panels.items() if any(value is not None for value in v)}
    surveyed = result.surveyed
    kinds = () if surveyed is None else zip(surveyed.teacher, surveyed.student, strict=True)
    count = len(shown) + (0 if surveyed is None else len(surveyed.teacher))

    def draw(figure: Any) -> None:
        axes = list(figure.subplots(1, count, squeeze=False)[0])
        for place, (before, after) in zip(axes, kinds, strict=False):
            _draw_reach(place, before, after)
        for place, (title, values) in zip(axes[count - len(shown) :], shown.items(), strict=True):
            plotted = [float("nan") if value is None else value for value in values]
            place.plot(range(1, len(values) + 1), plotted, marker=".", color="black")
            place.axvline(result.best_epoch + 1, color="gray", linewidth=0.8, linestyle=":")
            place.set(title=title, xlabel="epoch (dotted: the one kept)")
            place.xaxis.get_major_locator().set_params(integer=True)
            place.grid(alpha=0.3)

    return draw_svg((4 * count, 3), draw)


def _draw_reach(axes: Any, before: Reach, after: Reach) -> None:
    """What it takes to lead images to each class: a short bar is a shortcut."""
    places = range(len(before.radii))
    axes.bar([c - 0.2 for c in places], before.radii, 0.4, color="black", label="teacher")
    axes.bar([c + 0.2 for c in places], after.radii, 0.4, color="silver", label="student")
    axes.set(title=f"least {before.kind} perturbation", xlabel="class", ylabel=before.unit)
    axes.legend(frameon=False)
