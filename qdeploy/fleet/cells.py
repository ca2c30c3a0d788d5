"""Cells: what a manifest comes to, each one plain command with a name made of its content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError, QdeployError
from qdeploy.fleet.facts import Digests
from qdeploy.fleet.manifest import FleetSpec, JobSpec
from qdeploy.fleet.models import Listed
from qdeploy.fleet.options import checked, filled, located
from qdeploy.fleet.verbs import Asked, members, verb_of
from qdeploy.progress import Progress
from qdeploy.runs.run_id import facts_digest
from qdeploy.settings.device import load_device
from qdeploy.settings.policy import load_policy
from qdeploy.settings.recipe import load_recipe

Axes = tuple[str | None, str | None, str | None]  # recipe, policy, device


@dataclass(frozen=True, slots=True)
class Cell:
    """One command of the fleet."""

    id: str  # of everything that decides what comes of it
    asked: Asked
    refused: str | None = None  # why it cannot even begin
    digests: tuple[str, ...] = ()  # of the model's file, and with its external data


def cells_of(
    spec: FleetSpec, folder: Path, models: tuple[Listed, ...], progress: Progress
) -> tuple[Cell, ...]:
    """Every cell once, in the order of the manifest.

    A model that something is wrong with is a cell that is refused, and ends no other.

    Raises:
        InputError: an option is unknown, or a recipe, policy or device is not valid.
        UsageError: one that is named does not exist.
    """
    asked = [
        one
        for number, job in enumerate(spec.jobs, 1)
        for one in _asked(job, number, folder, models)
    ]
    if not asked:
        raise InputError("fleet manifest: comes to no cell: no model is called as a job asks")
    found: dict[str, Cell] = {}
    with Digests() as digests:
        for one in progress.track(asked, "look at models and data", len(asked)):
            cell = _cell(one, digests)
            found.setdefault(cell.id, cell)
    return tuple(found.values())


def _cell(asked: Asked, digests: Digests) -> Cell:
    try:
        facts = verb_of(asked.verb).facts(asked, digests)
    except QdeployError as error:
        facts = {"refused": [asked.verb, str(asked.model), asked.label]}
        return Cell(facts_digest(facts), asked, str(error))
    model: list[str] = facts.get("file", facts.get("model", []))  # judged, or rounded
    return Cell(facts_digest({"verb": asked.verb, **facts}), asked, digests=tuple(model))


def _asked(job: JobSpec, number: int, folder: Path, models: tuple[Listed, ...]) -> Iterator[Asked]:
    where = f"fleet manifest: jobs[{number}] ({job.verb})"
    axes = list(_axes(job, folder, where))
    if job.suite is not None:
        options = filled(checked(job.verb, job.options, where=where), Path(), folder)
        yield from members(located_toml(job.suite, folder), options, where)
        return
    own = checked(job.verb, job.options, where=where)
    for model in models:
        if not fnmatchcase(model.name, job.models):
            continue
        said = own | checked(job.verb, model.options, where=f"fleet manifest: {model.name}")
        options = filled(said, model.path, folder)
        for recipe, policy, device in axes:
            yield Asked(job.verb, model.path, model.name, options, recipe, policy, device)


def _axes(job: JobSpec, folder: Path, where: str) -> Iterator[Axes]:
    """Each named file is read once, so that a mistake in one is said before any work."""
    takes = verb_of(job.verb).axes
    given: dict[str, tuple[str, ...]] = {
        "recipes": job.recipes, "policies": job.policies, "devices": job.devices,
    }  # fmt: skip
    readers: dict[str, Any] = {
        "recipes": load_recipe, "policies": load_policy, "devices": load_device,
    }  # fmt: skip
    for axis, names in given.items():
        if names and axis not in takes:
            raise InputError(f"{where}: {axis} mean nothing to {job.verb}")
        given[axis] = tuple(located_toml(name, folder) for name in names)
        for name in given[axis]:
            readers[axis](name)
    yield from product(*(names or (None,) for names in given.values()))


def located_toml(name: str, folder: Path) -> str:
    """A file as seen from where the manifest lies; what is bundled keeps its name."""
    return located(name, folder) if name.endswith(".toml") else name
