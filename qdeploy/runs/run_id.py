"""The name of a run's directory: a hash of everything that changes its result."""

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


def facts_id(facts: Mapping[str, Any]) -> str:
    """A hash of what changes the result of a run, of the versions of everything too."""
    everything = {"version": __version__, "packages": installed_versions(), **facts}
    return hashlib.sha256(as_json(everything)).hexdigest()[:12]


def input_facts(sources: Sources) -> Any:
    """How pixels become inputs, and what is said of the model's ends."""
    card = sources.card
    read = card.input.model_dump(mode="json") if card is not None else None
    return {"card": read, "stated": asdict(sources.stated)}


def data_facts(used: Sequence[DataUsed]) -> list[Any]:
    return [(data.role, data.name, data.sha256) for data in used]
