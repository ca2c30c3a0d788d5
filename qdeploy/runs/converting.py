"""The file in the format that its device takes, beside the ONNX file that it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qdeploy.errors import InputError
from qdeploy.runtime.ort_format import as_ort, required_operators
from qdeploy.settings.device import DeviceProfile
from qdeploy.values import Converted

ORT, CONFIG = ".ort", ".required_operators.config"


@dataclass(frozen=True, slots=True)
class Beside:
    """What lies beside an ONNX file."""

    files: Mapping[Path, bytes] = field(default_factory=dict)
    converted: Converted | None = None


def places_beside(place: Path) -> tuple[Path, ...]:
    """Where `beside` may write."""
    return tuple(place.with_name(place.stem + suffix) for suffix in (ORT, CONFIG))


def beside(data: bytes, place: Path, device: DeviceProfile) -> Beside:
    """What the device takes in place of the file at `place`; nothing where that is the file itself.

    A file that cannot be converted has been measured as one that does not run there.
    """
    if device.format == "onnx":
        return Beside()
    places = places_beside(place)
    try:
        converted = as_ort(data)
    except InputError:
        return Beside()
    sha256 = hashlib.sha256(converted).hexdigest()
    files = {places[0]: converted, places[1]: required_operators(converted)}
    return Beside(files, Converted("ORT format", str(places[0]), sha256, len(converted)))
