"""Detectors of backdoors that nobody has named: what they are given, and what they hand back.

A detector is a module here with a function `detect`, and a row in `qdeploy.settings.checks` that
names the module; what it finds is held against that row's limit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from qdeploy.core.metrics import Estimate
from qdeploy.data import Images
from qdeploy.disk.state import private_number
from qdeploy.progress import SILENT, Progress
from qdeploy.settings.checks import ROWS
from qdeploy.values import FloatModel

# Opens an ONNX file on a runtime: what it gives takes images as the model does, and gives logits.
Run = Callable[[bytes], Callable[[np.ndarray], np.ndarray]]


@dataclass(frozen=True, slots=True, eq=False)
class Suspect:
    """What there is to look at; any of it may be missing."""

    float_model: FloatModel | None
    file: bytes | None = None  # the ONNX file that is judged, where it is not still to be made
    images: Images | None = None
    pictures: Images | None = None  # unlabelled, to search with
    run: Run | None = None  # where the file will be executed
    saturating: Run | None = None  # the same where pairs of products saturate; None: they do not
    class_names: tuple[str, ...] = ()
    wanted: frozenset[str] = frozenset()  # checks that the policy sets a limit for
    off: bool = False  # what takes long is not to be done
    seed: int | None = None  # of searches; None: one that nobody else can foresee

    def seed_for(self, search: str, data: bytes) -> int:
        """A seed of this search of this file, and of no other."""
        digest = hashlib.sha256(data).hexdigest()
        if self.seed is None:
            return private_number(search, digest)
        whole = hashlib.sha256(f"{search} {digest} {self.seed}".encode()).digest()
        return int.from_bytes(whole[:4], "big") >> 1


@dataclass(frozen=True, slots=True)
class Detected:
    """What a detector has found."""

    value: float  # to be held against a limit
    subject: str | None = None
    evidence: Any = None  # the detector's own, for the report
    rate: Estimate | None = None  # the value with its interval, where it is a share of images


@dataclass(frozen=True, slots=True)
class NotLookedAt:
    """That a detector could not look, and why."""

    reason: str


Answer = Detected | NotLookedAt


def detect(suspect: Suspect, progress: Progress = SILENT) -> Mapping[str, Answer]:
    """What every detector finds, by the name of its check."""
    found: dict[str, Answer] = {}
    for row in ROWS:
        if row.detector is not None:
            module = import_module(f"qdeploy.detectors.{row.detector}")
            found[row.name] = module.detect(suspect, progress)
    return found
