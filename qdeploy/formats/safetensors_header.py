"""The header of a safetensors file: does every byte belong to one tensor, and only one?"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError, foreign_reader
from qdeploy.values import Finding

RULES = {
    "tensor-range": "A tensor's bytes are not where, or not as many as, its header says.",
    "duplicate-tensor": "Several tensors have one name, so readers may take either.",
    "unclaimed-bytes": "The file holds bytes that belong to no tensor.",
    "large-metadata": "A text in the file is far longer than texts about a model are.",
    "unprintable-name": "A name holds characters that do not print.",
}
LARGEST_HEADER_BYTES = 100_000_000  # of the format itself
LARGEST_TEXT_BYTES = 1 << 16
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def findings_in_header(path: Path) -> Iterator[Finding]:
    """Everything that is odd about the header of a safetensors file.

    Raises:
        InputError: there is no header.
    """
    named, behind = _read(path)
    yield from _metadata(named)
    yield from _tensors([pair for pair in named if pair[0] != "__metadata__"], behind)


def tensor_names(path: Path) -> frozenset[str]:
    """Of all tensors that the header names.

    Raises:
        InputError: there is no header.
    """
    return frozenset(name for name, _ in _read(path)[0] if name != "__metadata__")


def _read(path: Path) -> tuple[list[tuple[str, Any]], int]:
    """The entries of the header, and how many bytes follow it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LARGEST_HEADER_BYTES):
            raise InputError(f"model {path}: damaged or truncated: a header of {length} bytes")
        text = file.read(length)
    with foreign_reader(f"model {path}: damaged or truncated"):
        pairs = json.loads(text, object_pairs_hook=list)
        named = [(str(name), value) for name, value in pairs]
    return named, size - 8 - length


def _metadata(named: list[tuple[str, Any]]) -> Iterator[Finding]:
    for name, count in Counter(name for name, _ in named).items():
        if count > 1:
            text = f"{count} tensors are called {name!r}"
            yield Finding("duplicate-tensor", "error", name, text)
        if not name.isprintable():
            text = f"name {name!r} holds characters that do not print"
            yield Finding("unprintable-name", "warning", name, text)
    for name, value in named:
        size = len(json.dumps(value))
        if size > LARGEST_TEXT_BYTES:
            text = f"what the header says about {name!r} has {size} characters"
            yield Finding("large-metadata", "warning", name, text)


def _tensors(named: list[tuple[str, Any]], held: int) -> Iterator[Finding]:
    spans = []
    for name, value in named:
        span = _span(value, held)
        if span is None:
            text = f"tensor {name!r} is not where or not what the header says"
            yield Finding("tensor-range", "error", name, text)
        else:
            spans.append((*span, name))
    bounds = [(0, 0, ""), *sorted(spans), (held, held, "the end")]
    for (_, end, _), (start, _, name) in pairwise(bounds):
        if start < end:
            text = f"tensor {name!r} shares bytes with the one before it"
            yield Finding("tensor-range", "error", name, text)
        elif start > end:
            text = f"{start - end} bytes before {name!r} belong to no tensor"
            yield Finding("unclaimed-bytes", "error", name, text)


def _span(value: Any, held: int) -> tuple[int, int] | None:
    """Where a tensor's bytes begin and end, if its entry is right."""
    try:
        with foreign_reader(""):
            entry = dict(value)
            start, end = (int(at) for at in entry["data_offsets"])
            sizes = [int(size) for size in entry["shape"]]
            bits = BITS[entry["dtype"]] * math.prod(sizes)
    except InputError:
        return None
    right = 0 <= start <= end <= held and min(sizes, default=0) >= 0 and 8 * (end - start) == bits
    return (start, end) if right else None
