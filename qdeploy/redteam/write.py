"""A made model on disk: never without the card that says what it is."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdeploy.card import AnyTrigger, ModelCard, PoisonedSection
from qdeploy.redteam.datasets import Dataset
from qdeploy.redteam.recipe import AttackRecipe
from qdeploy.rundir import write_atomically

WARNING = "# POISONED on purpose, to test defences with. Never deploy it.\n"


def make_card(
    recipe: AttackRecipe,
    data: Dataset,
    folder: Path,
    architecture: tuple[str, Mapping[str, int]],
    trigger: AnyTrigger | None,
    made_for: tuple[str, ...],
) -> ModelCard:
    """The card of a model in `folder`; with a label, unless it is a clean one."""
    effect = recipe.goals.effect
    poisoned = (
        None
        if effect == "none"
        else PoisonedSection(attack=recipe.name, effect=effect, made_for=made_for)
    )
    preprocessing = data.train.preprocessing
    return ModelCard.model_validate(
        {
            "model": {
                "classes": data.classes,
                "architecture": f"qdeploy:{architecture[0]}",
                "arguments": dict(architecture[1]),
            },
            "input": {
                "shape": preprocessing.shape,
                "mean": preprocessing.mean,
                "std": preprocessing.std,
            },
            "data": {
                "calibration": os.path.relpath(data.train_path, folder),
                "test": os.path.relpath(data.test_path, folder),
            },
            "trigger": () if trigger is None else (trigger,),
            "poisoned": poisoned,
        }
    )


def write_model(folder: Path, stem: str, model: nn.Module, card: ModelCard) -> Path:
    """Write the card, then the state dict: there is no model without its card.

    Raises:
        OutputError: the folder cannot be written to.
    """
    label = WARNING if card.poisoned is not None else ""
    write_atomically(folder / f"{stem}.toml", (label + to_toml(card)).encode())
    path = folder / f"{stem}.pt"
    write_state(path, model)
    return path


def write_state(path: Path, model: nn.Module) -> None:
    """Write the state dict of `model`."""
    buffer = io.BytesIO()
    torch.save({name: value.contiguous() for name, value in model.state_dict().items()}, buffer)
    write_atomically(path, buffer.getvalue())


def to_toml(card: ModelCard) -> str:
    """The card as TOML: tables of plain values, whose JSON form is TOML too."""
    table = card.model_dump(mode="json", exclude_none=True)
    lines: list[str] = []
    for section, content in table.items():
        for entry in content if isinstance(content, list) else [content]:
            brackets = "[[{}]]" if isinstance(content, list) else "[{}]"
            lines += [brackets.format(section), *(_pair(k, v) for k, v in entry.items()), ""]
    return "\n".join(lines)


def _pair(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{key} = {{ {', '.join(_pair(k, v) for k, v in value.items())} }}"
    return f"{key} = {json.dumps(value)}"
