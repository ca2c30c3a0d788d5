"""Lists and shows what comes along: TOML files, and the schemas of what is written."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qdeploy.redteam.recipe import AttackRecipe
    from qdeploy.redteam.suite import SuiteSpec
    from qdeploy.settings.device import DeviceProfile
    from qdeploy.settings.policy import Policy
    from qdeploy.settings.recipe import Recipe

BundledName = Annotated[str | None, typer.Argument(help="Show this one.")]


def show_bundled(
    kind: str,
    name: str | None,
    load: Callable[[str], DeviceProfile | Recipe | Policy | AttackRecipe | SuiteSpec],
) -> None:
    """All of a kind with their descriptions, or the text of one."""
    from qdeploy.cli import console
    from qdeploy.settings.schema import bundled, find_bundled

    if name is not None:
        load(name)  # an error where it is not valid
        console.show_text(find_bundled(kind, name).read_text("utf-8"))
    else:
        console.show_pairs((key, load(key).description) for key in bundled(kind))


class Document(Enum):
    """What is written as JSON."""

    REPORT = "report"
    SCAN = "scan"


def schema(
    document: Annotated[Document, typer.Argument(help="Of which document.")] = Document.REPORT,
) -> None:
    """Print the JSON schema of report.json, or of what `scan --report` writes."""
    import json

    from qdeploy.report.document import DOCUMENTS, json_schema

    typer.echo(json.dumps(json_schema(DOCUMENTS[document.value]), indent=2))


def devices(name: BundledName = None) -> None:
    """List the device profiles, or show one."""
    from qdeploy.settings.device import load_device

    show_bundled("devices", name, load_device)


def recipes(name: BundledName = None) -> None:
    """List the recipes, or show one."""
    from qdeploy.settings.recipe import load_recipe

    show_bundled("recipes", name, load_recipe)


def policies(name: BundledName = None) -> None:
    """List the policies, or show one."""
    from qdeploy.settings.policy import KIND, load_policy

    show_bundled(KIND, name, load_policy)
