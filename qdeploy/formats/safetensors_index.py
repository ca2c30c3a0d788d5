"""Safetensors in several files, as Hugging Face's libraries write them: an index and its shards.

The index is JSON: `weight_map` has the name of every tensor and of the file that holds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qdeploy.disk.files import file_sha256, read_bounded
from qdeploy.errors import InputError, foreign_reader
from qdeploy.formats import safetensors_header
from qdeploy.values import Finding

LARGEST_INDEX_BYTES = 64 << 20
LARGEST_SHARD_BYTES = 16 << 30
NAME, ENDING = "model.safetensors", ".safetensors.index.json"  # as in a folder of such a model
RULES = {"shard-tensors": "A part of the model holds other tensors than its index says."}


def model_in(folder: Path) -> Path:
    """The file of a Hugging Face folder that holds the tensors, or says where they are.

    Raises:
        InputError: there is none, or there are several.
    """
    if (folder / NAME).is_file():
        return folder / NAME
    found = sorted(folder.glob(f"*{ENDING}")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise InputError(
            f"model {folder}: is a folder with {len(found)} models in safetensors",
            hint="name the file; of one in several parts, the one that ends in .index.json",
        )
    return found[0]


def shards(path: Path, data: bytes) -> dict[Path, frozenset[str]]:
    """The files of the index `data` at `path`, with the names of the tensors that each holds.

    Raises:
        InputError: it is no index, or names what does not lie beside it.
    """
    if len(data) > LARGEST_INDEX_BYTES:
        raise InputError(f"model {path}: an index of more than {LARGEST_INDEX_BYTES} bytes")
    with foreign_reader(f"model {path}: damaged index"):
        table = json.loads(data)
        held = dict(table["weight_map"])
    found: dict[Path, set[str]] = {}
    for tensor, name in held.items():
        if not isinstance(name, str) or Path(name).name != name or name in {"", ".", ".."}:
            raise InputError(f"model {path}: tensor {tensor!r} lies in {name!r}, not beside it")
        found.setdefault(path.with_name(name), set()).add(tensor)
    for file in found:
        if not file.is_file() or not _is_beside(file, path):
            raise InputError(f"model {path}: its part {file.name!r} is not beside it")
    return {file: frozenset(names) for file, names in sorted(found.items())}


def findings(path: Path) -> Iterator[Finding]:
    """Everything that is odd about the headers of the parts, and about who holds what."""
    for file, names in shards(path, read_bounded(path, LARGEST_INDEX_BYTES, what="model")).items():
        yield from safetensors_header.findings_in_header(file)
        held = safetensors_header.tensor_names(file)
        for wrong in sorted(held ^ names)[:5]:
            text = (
                f"{file.name} {'holds' if wrong in held else 'lacks'} {wrong!r}, unlike the index"
            )
            yield Finding("shard-tensors", "error", wrong, text)


def load(path: Path, data: bytes) -> tuple[dict[str, Any], bytes]:
    """All tensors, and the digests of the files that they lie in.

    Raises:
        InputError: a part is damaged, or holds other tensors than the index says.
    """
    from qdeploy.formats import torch_files

    tensors: dict[str, Any] = {}
    found = []
    for file, names in shards(path, data).items():
        part = read_bounded(file, LARGEST_SHARD_BYTES, what="model")
        held = torch_files.safetensors(file, part)
        if held.keys() != names:
            raise InputError(f"model {path}: {file.name} holds other tensors than the index says")
        tensors |= held
        found.append(hashlib.sha256(part).digest())
    return tensors, b"".join(found)


def digests(path: Path, data: bytes) -> bytes:
    """The same digests, of parts that are not looked into.

    Raises:
        InputError: it is no index, or a part is missing.
    """
    parts = (file_sha256(file, what="model") for file in shards(path, data))
    return b"".join(map(bytes.fromhex, parts))


def held_elsewhere(path: Path) -> int:
    """How many bytes the parts have."""
    data = read_bounded(path, LARGEST_INDEX_BYTES, what="model")
    return sum(file.stat().st_size for file in shards(path, data))


def _is_beside(file: Path, path: Path) -> bool:
    """Links lead within the model's folder, or as in the cache of Hugging Face to its blobs."""
    folder = path.parent.resolve()
    return file.resolve().parent in {folder, folder.parent.parent / "blobs"}
