"""What a run is asked to do: all that was said, validated, and nothing of what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qdeploy.inputs.sources import Sources
from qdeploy.settings.device import DeviceProfile
from qdeploy.settings.policy import Policy
from qdeploy.settings.recipe import Recipe
from qdeploy.settings.sanitizers import Sanitizer
from qdeploy.settings.waivers import Waiver


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be judged, by what, and on which device."""

    sources: Sources
    policy: Policy
    device: DeviceProfile
    artifacts: Path
    command: str = ""
    reports: tuple[Path, ...] = ()  # where copies of the report go, each in its own format
    run_code_from_model: bool = False
    ended: tuple[Waiver, ...] = ()  # of the policy, which waive nothing any more


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanRequest:
    """A float model that is to be cleaned: how, and where the student goes."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest(Request):
    """The same as `Request` for a file that is still to be made; its policy is the recipe's."""

    recipe: Recipe
    synthetic_calibration: bool = False
    cleaning: CleanRequest | None = None  # how the float model is cleaned first, if it is
