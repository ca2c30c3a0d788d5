"""Detectors of backdoors that nobody has named: what they are given, and what they hand back.

A detector is a module here with a function `detect`, and a row in `qdeploy.settings.checks` that
names the module; what it finds is held against that row's limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qdeploy.data import Images
from qdeploy.progress import SILENT, Progress
from qdeploy.settings.checks import ROWS
from qdeploy.values import FloatModel


@dataclass(frozen=True, slots=True, eq=False)
class Suspect:
    """What there is to look at; any of it may be missing."""

    float_model: FloatModel | None
    file: bytes | None = None  # the ONNX file that is judged, where it is not still to be made
    images: Images | None = None


@dataclass(frozen=True, slots=True)
class Detected:
    """What a detector has found."""

    value: float  # to be held against a limit
    subject: str | None = None
    evidence: Any = None  # the detector's own, for the report


def detect(suspect: Suspect, progress: Progress = SILENT) -> Mapping[str, Detected]:
    """What every detector finds, by the name of its check; nothing where it could not look."""
    found: dict[str, Detected] = {}
    for row in ROWS:
        if row.detector is not None:
            module = import_module(f"qdeploy.detectors.{row.detector}")
            detected = module.detect(suspect, progress)
            if detected is not None:
                found[row.name] = detected
    return found
