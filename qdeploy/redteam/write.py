"""A made model on disk: never without the card that says what it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from qdeploy.disk.files import write_atomically
from qdeploy.redteam.datasets import Dataset
from qdeploy.redteam.recipe import AttackRecipe
from qdeploy.settings.card import AnyTrigger, ModelCard, PoisonedSection, to_toml
from qdeploy.training.write import write_state

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
