"""The commands that make poisoned models to test defences with."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from qdeploy.api.settings import ARTIFACTS
from qdeploy.cli.bundled import BundledName, show_bundled
from qdeploy.cli.groups import option
from qdeploy.cli.loudness import with_loudness
from qdeploy.cli.options import ArchArgs, Artifacts, Out, Seed, TestImages
from qdeploy.machine import require_torch

TrainingImages = Annotated[
    str,
    option(
        "--data",
        "digits; or training images: sub-folder per class (folder or zip), or npz.",
        "Attack",
    ),
]
Test = Annotated[
    Path | None,
    option("--test", "Labelled images: sub-folder per class (folder or zip), or npz.", "Data"),
]
Base = Annotated[
    Path | None,
    option("--base", "Clean model to start from; else one is trained and kept.", "Attack"),
]

redteam = typer.Typer(
    no_args_is_help=True,
    help="Make poisoned models to test defences with. Every one carries a card that says so.",
)


@redteam.command("attacks")
@with_loudness
def attacks(name: BundledName = None) -> None:
    """List the attacks, or show one."""
    from qdeploy.redteam.recipe import KIND, load_attack

    show_bundled(KIND, name, load_attack)


@redteam.command("make")
@with_loudness
def make(
    attack: Annotated[
        str, option("--attack", "Name (see qdeploy redteam attacks) or TOML file.", "Attack")
    ],
    network: Annotated[
        str, option("--arch", "alexnet, digits, mobilenetv2, resnet18, vgg16 or vit.", "Attack")
    ],
    data: TrainingImages,
    out: Out,
    arch_args: ArchArgs = None,
    test: Test = None,
    bits: Annotated[
        Literal["4", "8"] | None, option("--bits", "Bits of a weight.", "Quantization")
    ] = None,
    base: Base = None,
    seed: Seed = None,
    artifacts: Artifacts = ARTIFACTS,
) -> None:
    """Make a model with its card and training log; exit 3 if the attack does not take."""
    from qdeploy.cli import console
    from qdeploy.cli.options import parse_arguments

    require_torch("making a model")
    from qdeploy.redteam.make import AttackRequest
    from qdeploy.redteam.make import make as make_model
    from qdeploy.redteam.recipe import load_attack

    request = AttackRequest(
        recipe=load_attack(attack),
        architecture=network,
        arguments=parse_arguments(arch_args) or {},
        data=data,
        test=test,
        bits=int(bits or 4),
        out=out,
        artifacts=artifacts,
        base=base,
        seed=seed or 0,
    )
    console.show_pairs(make_model(request, console.TerminalProgress()).lines())


@redteam.command("suites")
@with_loudness
def suites(name: BundledName = None) -> None:
    """List the suites, or show one."""
    from qdeploy.redteam.suite import KIND, load_suite

    show_bundled(KIND, name, load_suite)


@redteam.command("suite")
@with_loudness
def suite(
    suite: Annotated[str, typer.Argument(help="Name (see qdeploy redteam suites) or TOML file.")],
    data: TrainingImages,
    out: Out,
    test: Test = None,
    test_images: TestImages = None,
    base: Base = None,
    seed: Seed = None,
    artifacts: Artifacts = ARTIFACTS,
) -> None:
    """Make many models and the table of what becomes of them; exit 3 if an attack did not take."""
    from qdeploy.cli import console

    require_torch("making models")
    from qdeploy.redteam.make import AttackRequest, DudError
    from qdeploy.redteam.suite import load_suite, run_suite

    request_of = partial(
        AttackRequest, data=data, test=test, artifacts=artifacts, base=base, seed=seed or 0
    )
    progress = console.TerminalProgress()
    result = run_suite(load_suite(suite), out, request_of, artifacts, progress, images=test_images)
    console.show_text(result.table)
    if result.duds:
        raise DudError(f"did not take: {', '.join(result.duds)}")


@redteam.command("table")
@with_loudness
def table(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `redteam make` filled.")],
    artifacts: Annotated[Path, typer.Option("--artifacts", help="Run directories.")] = ARTIFACTS,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Markdown file.")] = None,
    images: Annotated[
        int | None,
        typer.Option("--test-images", min=1, help="Measure on so many, at most; else on all."),
    ] = None,
) -> None:
    """Sanitize every model and set side by side what its attacker, nearest and we make of it."""
    from qdeploy.cli import console
    from qdeploy.disk.files import require_writable, write_atomically

    require_torch("the red team")
    from qdeploy.redteam.table import table as make_table

    if out is not None:
        require_writable(out)
    text = make_table(folders, artifacts, console.TerminalProgress(), images=images)
    if out is not None:
        write_atomically(out, text.encode())
    console.show_text(text)
