"""What a run is called: a hash of everything that changes its result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qdeploy import __version__
from qdeploy.inputs.sources import Sources
from qdeploy.machine import installed_versions
from qdeploy.runs.writing import as_json
from qdeploy.values import DataUsed


def facts_digest(facts: Mapping[str, Any]) -> str:
    """The sha256, in hex, of what changes the result of a run, of all versions too."""
    everything = {"version": __version__, "packages": installed_versions(), **facts}
    return hashlib.sha256(as_json(everything)).hexdigest()


def run_id(digest: str) -> str:
    """The name of a run's directory. Somebody can make two runs that share it, not the digest."""
    return digest[:12]


def input_facts(sources: Sources) -> Any:
    """How pixels become inputs, which class a folder's name means, and what is said of the ends."""
    card = sources.card
    read = card.input.model_dump(mode="json") if card is not None else None
    classes = card.model.classes if card is not None else None
    return {"card": read, "classes": classes, "stated": asdict(sources.stated)}


def data_facts(used: Sequence[DataUsed]) -> list[Any]:
    return [(data.role, data.name, data.sha256) for data in used]
