"""What is to be distilled, with which images and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qdeploy.inputs.sources import Sources
from qdeploy.settings.sanitizers import Sanitizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentOrder:
    """Everything that `distill` needs to know, validated before any work."""

    sources: Sources
    spec: Sanitizer
    images: Path  # unlabelled; labels are not looked at
    image_count: int | None  # at most; None for all
    seed: int
    out: Path
    artifacts: Path
    accelerator: str = "cpu"  # where to train
    command: str = ""
    run_code_from_model: bool = False
