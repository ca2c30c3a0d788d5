"""Cells: what a manifest comes to, each one plain command with a name made of its content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from qdeploy.errors import InputError, QdeployError, first_line
from qdeploy.fleet.facts import Digests, Input
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
    title: str  # what tells it from its neighbours
    refused: str | None = None  # why it cannot even begin
    digests: tuple[str, ...] = ()  # of the model's file, and with its external data
    inputs: tuple[Input, ...] = ()  # files that it was called by


def cells_of(
    spec: FleetSpec, folder: Path, models: tuple[Listed, ...], progress: Progress
) -> tuple[Cell, ...]:
    """The cells, in the order of the manifest; two may be the same command.

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
    with Digests() as digests:
        tracked = progress.track(asked, "look at models and data", len(asked))
        return tuple(_told_apart(_cell(one, digests) for one in tracked))


def _told_apart(cells: Iterable[Cell]) -> Iterator[Cell]:
    """With a number in the titles of those that would be called alike."""
    seen: Counter[str] = Counter()
    for cell in cells:
        seen[cell.title] += 1
        number = seen[cell.title]
        yield cell if number == 1 else replace(cell, title=f"{cell.title} ({number})")


def _cell(asked: Asked, digests: Digests) -> Cell:
    try:
        for named in filter(None, (asked.recipe, asked.policy, asked.device)):
            if named.endswith(".toml"):
                digests.of(Path(named))  # what they say counts as it is understood
        facts = verb_of(asked.verb).facts(asked, digests)
    except (QdeployError, OSError, ValueError, RuntimeError) as error:
        digests.taken()
        facts = {"refused": [asked.verb, repr(asked.model), asked.title]}
        return Cell(facts_digest(facts), asked, asked.title, first_line(error))
    model: list[str] = facts.get("file", facts.get("model", []))  # judged, or rounded
    digest = facts_digest({"verb": asked.verb, **facts})
    inputs = digests.taken()
    return Cell(digest, asked, asked.title, digests=tuple(model), inputs=inputs)


def _asked(job: JobSpec, number: int, folder: Path, models: tuple[Listed, ...]) -> Iterator[Asked]:
    where = f"fleet manifest: jobs[{number}] ({job.verb})"
    axes = list(_axes(job, folder, where))
    if job.suite is not None:
        options = filled(checked(job.verb, job.options, where=where), Path(), folder)
        yield from members(located_toml(job.suite, folder), options, where)
        return
    own = checked(job.verb, job.options, where=where)
    chosen = [model for model in models if fnmatchcase(model.name, job.models)]
    if not chosen:
        raise InputError(f"{where}: models {job.models!r}: no model of the fleet is called so")
    for model in chosen:
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
