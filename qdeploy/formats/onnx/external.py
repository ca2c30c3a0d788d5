"""Tensors that a model keeps in other files: where they point to, before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import onnx
from onnx.external_data_helper import load_external_data_for_tensor

from qdeploy.errors import foreign_reader
from qdeploy.formats.onnx.tensors import all_tensors, is_external, stored_bytes
from qdeploy.values import Finding

RULES = {
    "external-path": "External data lies outside of the model's own folder, or nowhere.",
    "external-range": "External data claims bytes that its file does not have, or far too many.",
    "external-overlap": "Several tensors share bytes of external data.",
}
ALWAYS_ALLOWED_BYTES = (1 << 31) - 1  # whoever shares the bytes of a file
LARGEST_TOTAL_BYTES = 16 << 30


@dataclass(frozen=True, slots=True)
class _Range:
    tensor: str
    location: str
    start: int
    end: int


def external_data(proto: onnx.ModelProto, path: Path) -> Iterator[Finding]:
    """What is wrong with the places that a model at `path` says its tensors lie at.

    Links are followed first: a file counts as inside of the folder if its content is.
    """
    folder = path.resolve().parent
    ranges = []
    for tensor in filter(is_external, all_tensors(proto)):
        found = _range(tensor, folder)
        if isinstance(found, Finding):
            yield found
        else:
            ranges.append(found)
    total, most = _total(ranges), _most(ranges, folder)
    if total > most:
        yield Finding(
            "external-range", "error", "",
            f"external data claims {total} bytes together, more than {most}",
        )  # fmt: skip
    ordered = sorted(ranges, key=lambda r: (r.location, r.start, r.end))
    for one, other in pairwise(ordered):
        if one.location == other.location and other.start < min(one.end, other.end):
            yield Finding(
                "external-overlap", "warning", other.tensor,
                f"tensor {other.tensor!r} shares bytes of {other.location!r} with {one.tensor!r}",
            )  # fmt: skip


def external_bytes(proto: onnx.ModelProto, path: Path) -> int:
    """How many bytes of other files are the model's; 0 if one of them is not where it should be."""
    folder = path.resolve().parent
    ranges = [_range(tensor, folder) for tensor in all_tensors(proto) if is_external(tensor)]
    found = [one for one in ranges if isinstance(one, _Range)]
    total = _total(found)
    return total if len(found) == len(ranges) and total <= _most(found, folder) else 0


def _total(ranges: Sequence[_Range]) -> int:
    return sum(one.end - one.start for one in ranges)


def _most(ranges: Sequence[_Range], folder: Path) -> int:
    """What they may claim together: 2 GiB, or all that the files have, if that is more."""
    files = {(folder / one.location).resolve() for one in ranges}
    held = sum(file.stat().st_size for file in files)
    return min(max(ALWAYS_ALLOWED_BYTES, held), LARGEST_TOTAL_BYTES)


def load_external(proto: onnx.ModelProto, path: Path) -> None:
    """Read the external data of a model in which `external_data` finds no error.

    Raises:
        InputError: it cannot be read.
    """
    folder = str(path.resolve().parent)
    with foreign_reader(f"model {path}: external data"):
        for tensor in filter(is_external, all_tensors(proto)):
            load_external_data_for_tensor(tensor, folder)
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]


def _range(tensor: onnx.TensorProto, folder: Path) -> _Range | Finding:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, name = entries.get("location", ""), tensor.name
    try:
        file = (folder / location).resolve()
        inside = bool(location) and file.is_relative_to(folder) and not Path(location).is_absolute()
    except (OSError, ValueError, RuntimeError):
        inside = False  # a zero byte, or links in a circle
    if not inside:
        complaint = f"tensor {name!r} points outside of its folder: {location!r}"
        return Finding("external-path", "error", name, complaint)
    if not file.is_file():
        complaint = f"external data {location!r} of tensor {name!r}: no such file"
        return Finding("external-path", "error", name, complaint)
    size = file.stat().st_size
    try:
        start = int(entries.get("offset", "0"))
        end = start + int(entries["length"]) if "length" in entries else size
    except ValueError as error:
        complaint = f"external data {location!r} of tensor {name!r}: {error}"
        return Finding("external-range", "error", name, complaint)
    if not 0 <= start <= end <= size:
        complaint = (
            f"tensor {name!r} claims bytes {start} to {end} of {location!r}, which has {size}"
        )
        return Finding("external-range", "error", name, complaint)
    due = stored_bytes(tensor)
    if due is not None and end - start != due:  # before anybody makes room for it
        complaint = f"tensor {name!r} of {due} bytes claims {end - start} of {location!r}"
        return Finding("external-range", "error", name, complaint)
    return _Range(name, location, start, end)
