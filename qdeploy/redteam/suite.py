"""A suite: many attacks at several bit widths on one architecture, made and then compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qdeploy.disk.files import make_folder, require_writable, write_atomically
from qdeploy.progress import Progress
from qdeploy.redteam.datasets import open_dataset
from qdeploy.redteam.make import DUD, LOG, MODEL, AttackRequest, DudError, make
from qdeploy.redteam.recipe import load_attack
from qdeploy.redteam.table import table
from qdeploy.settings.schema import Spec, find_bundled, load_toml

KIND = "recipes/suites"
TABLE = "table.md"


class MemberSpec(Spec):
    """One attack, made once for each bit width."""

    attack: str
    bits: tuple[Literal[4, 8], ...] = Field(min_length=1, description="What a table can show.")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="Made once with each; none: with that of the command."
    )
    architecture: str | None = Field(None, description="Another than the suite's.")
    arguments: Mapping[str, Annotated[int, Field(gt=0)]] = Field(
        {}, description="Of the factory, in place of the suite's."
    )


class SuiteSpec(Spec):
    """The whole file."""

    schema_version: Literal[1]
    name: str
    description: str
    architecture: str
    arguments: Mapping[str, Annotated[int, Field(gt=0)]] = {}
    members: tuple[MemberSpec, ...] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """What came of a suite."""

    table: str  # Markdown, the duds below it
    duds: tuple[str, ...]  # names


def load_suite(name_or_path: str) -> SuiteSpec:
    """The suite of that name, or in that file.

    Raises:
        UsageError: there is no such suite.
        InputError: the file does not fit the format.
    """
    return load_toml(find_bundled(KIND, name_or_path), SuiteSpec, what="suite")


def run_suite(
    suite: SuiteSpec,
    out: Path,
    request_of: Callable[..., AttackRequest],
    artifacts: Path,
    progress: Progress,
    *,
    images: int | None = None,
) -> SuiteResult:
    """Make every member that is not in `out` yet, in a folder of its own, and the table of all.

    Args:
        request_of: Makes a request of what members differ in; it knows what they share.
        images: How many test images the table is measured on, at most; None for all.

    Raises:
        UsageError: a member's attack is unknown, or there are no test images.
        InputError: a recipe, the base or an image is not valid.
        OutputError: a folder cannot be written to.
    """
    requests = list(_requests(suite, out, request_of))
    make_folder(out)
    require_writable(out / TABLE)
    data = None
    for number, request in enumerate(requests, 1):
        about = f"{number}/{len(requests)} {request.out.name}"
        if _goals_missed(request) is not None:
            progress.note(f"{about}: is there")
            continue
        progress.note(about)
        data = data or open_dataset(request.data, request.test, out, progress)
        try:
            make(request, progress, data)
        except DudError as error:
            progress.note(f"{about}: {error}")
    missed = {request.out: _goals_missed(request) or [] for request in requests}
    took = [folder for folder, goals in missed.items() if not goals]
    duds = {folder.name: goals for folder, goals in missed.items() if goals}
    text = table(took, artifacts, progress, images=images)
    text += "".join(f"\nNot taken: {name}: {'; '.join(goals)}\n" for name, goals in duds.items())
    write_atomically(out / TABLE, text.encode())
    return SuiteResult(text, tuple(duds))


def _requests(
    suite: SuiteSpec, out: Path, request_of: Callable[..., AttackRequest]
) -> Iterator[AttackRequest]:
    for name, member in named_members(suite):
        said = {**member, "recipe": load_attack(member["attack"]), "out": out / name}
        said["architecture"], said["arguments"] = said.pop("arch"), said.pop("arch_args")
        del said["attack"]
        yield request_of(**said)


def named_members(suite: SuiteSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every model of the suite: its name, and the options of `redteam make` that differ.

    Raises:
        UsageError: a member's attack is unknown.
        InputError: a recipe is not valid.
    """
    for member in suite.members:
        architecture = member.architecture or suite.architecture
        arguments = member.arguments or suite.arguments
        parts = [load_attack(member.attack).name]
        if member.architecture is not None or member.arguments:
            parts += [architecture, *(f"{key}{value}" for key, value in arguments.items())]
        for bits, seed in product(member.bits, member.seeds or (None,)):
            name = "-".join([*parts, str(bits), *([] if seed is None else [f"s{seed}"])])
            said = {"attack": member.attack, "arch": architecture, "arch_args": arguments}
            yield name, {**said, "bits": bits, **({} if seed is None else {"seed": seed})}


def _goals_missed(request: AttackRequest) -> list[str] | None:
    """What the model in the folder missed; None if there is none that was asked for like this."""
    try:
        log = json.loads((request.out / LOG).read_text("utf-8"))
        missed: list[str] = log["goals_missed"]
        asked, found = (_decisive(facts) for facts in (request.facts, log))
        (wanted, arguments), (network, given) = asked["architecture"], found["architecture"]
        same = wanted == network and arguments.items() <= given.items()  # it also has defaults
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    same &= {**asked, "architecture": None} == {**found, "architecture": None}
    there = (request.out / f"{DUD if missed else MODEL}.pt").is_file()
    return missed if same and there else None


def _decisive(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a request; how clean models are trained is none where one was given."""
    kept = {key: facts[key] for key in ("recipe", "architecture", "bits", "seed", "data", "base")}
    if kept["base"] is not None:
        kept["recipe"] = {key: v for key, v in kept["recipe"].items() if key != "clean"}
    return kept
