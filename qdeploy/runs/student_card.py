"""The student's model card: the teacher's, with paths that hold where the student lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qdeploy.inputs.sources import Sources
from qdeploy.settings.card import ModelCard, to_toml

FILES = ("image", "mask", "pattern")  # what a trigger may name


def card_beside(sources: Sources, out: Path) -> bytes | None:
    """The card for a student at `out`, as TOML; None if the teacher has none.

    In the teacher's folder it is the same, byte by byte. Elsewhere, paths are rewritten.
    """
    if sources.card_path is None or sources.card is None:
        return None
    source, target = sources.card_path.parent.resolve(), out.parent.resolve()
    if source == target:
        return sources.card_path.read_bytes()
    table = sources.card.model_dump(mode="json", exclude_none=True)
    data = {role: _moved(path, source, target) for role, path in table.get("data", {}).items()}
    triggers = [_trigger(trigger, source, target) for trigger in table.get("trigger", ())]
    return to_toml(ModelCard.model_validate({**table, "data": data, "trigger": triggers})).encode()


def _trigger(trigger: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    return {k: _moved(v, source, target) if k in FILES else v for k, v in trigger.items()}


def _moved(path: str, source: Path, target: Path) -> str:
    return path if Path(path).is_absolute() else os.path.relpath(source / path, target)
