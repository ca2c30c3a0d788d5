"""Pictures as SVG, where matplotlib is installed."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import import_module
from typing import Any


def draw_svg(size: tuple[float, float], draw: Callable[[Any], None]) -> bytes | None:
    """What `draw` puts on a figure of `size` inches; None if matplotlib is not installed.

    The same picture is the same bytes: no dates, no random ids.
    """
    try:
        matplotlib = import_module("matplotlib")
        figure_type = import_module("matplotlib.figure").Figure
    except ImportError:
        return None
    with matplotlib.rc_context({"svg.hashsalt": "qdeploy", "font.size": 9}):
        figure = figure_type(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
