"""The command line: parse, call, exit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from qdeploy import __version__
from qdeploy.errors import EXIT_INTERRUPTED, QdeployError
from qdeploy.options import (
    ARTIFACTS,
    CALIBRATION,
    EVIDENCE,
    MATRIX,
    METHOD,
    MODEL,
    RECIPE,
    Options,
    takes,
)

if TYPE_CHECKING:
    from qdeploy.device import DeviceProfile
    from qdeploy.recipe import Recipe
    from qdeploy.redteam.recipe import AttackRecipe
    from qdeploy.redteam.suite import SuiteSpec
    from qdeploy.verdict import Outcome

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize an untrusted classifier so that a quantization-conditioned backdoor does not"
    " survive, and prove it on the file itself.",
    epilog="Exit codes: 0 accepted, 1 bug, 2 bad input or usage, 3 rejected, 4 no verdict,"
    " 130 interrupted.",
)


@app.command()
@takes(
    "model",
    "out",
    *MODEL,
    *CALIBRATION,
    *EVIDENCE,
    *RECIPE,
    *METHOD,
    "report",
    "artifacts",
    "dry_run",
)
def sanitize(options: Options) -> None:
    """Quantize without switching a backdoor on, measure the file, and judge it."""
    from qdeploy import console, pipeline
    from qdeploy.request import make_request, with_private_seed

    request = make_request(with_private_seed(options))
    progress = console.TerminalProgress()
    if options.dry_run:
        model, plan = pipeline.make_plan(request, progress)
        console.show_plan(model, plan, request.recipe, request.device)
        return
    report = pipeline.sanitize(request, options.out, progress)
    console.show_report(report)
    _exit(report.outcome)


@app.command()
@takes("model", "out", *MODEL, *CALIBRATION, *RECIPE, *METHOD, "artifacts")
def quantize(options: Options) -> None:
    """Quantize by any method. Nothing is measured and nothing is judged."""
    from qdeploy import console, pipeline
    from qdeploy.request import make_request, with_private_seed

    request = make_request(with_private_seed(options))
    quantized = pipeline.quantize(request, options.out, console.TerminalProgress())
    console.show_quantized(quantized, options.out)


@app.command()
@takes("quantized", "reference", *MODEL, *EVIDENCE, *RECIPE, "report")
def validate(options: Options) -> None:
    """Measure a quantized file, whoever made it, against its float model, and judge it."""
    from dataclasses import replace

    from qdeploy import console, pipeline
    from qdeploy.request import make_request

    request = make_request(replace(options, model=options.reference))
    report = pipeline.judge_file(request, options.quantized, console.TerminalProgress())
    console.show_report(report)
    _exit(report.outcome)


@app.command()
@takes(
    "models",
    "out",
    *MATRIX,
    *CALIBRATION[:2],
    *EVIDENCE,
    "test_images",
    "arch",
    "arch_args",
    "device",
)
def compare(options: Options) -> None:
    """Set rounding methods side by side: every one on every grid, on every model."""
    from dataclasses import replace

    from qdeploy import console
    from qdeploy.compare.matrix import parse_matrix
    from qdeploy.compare.run import compare as compare_all
    from qdeploy.request import make_request

    matrix = parse_matrix(
        options.methods, options.grids, options.widths, options.activation_widths, options.seeds
    )
    requests = [make_request(replace(options, model=path)) for path in options.models or ()]
    progress = console.TerminalProgress()
    result = compare_all(requests, matrix, options.out, options.steps, progress)
    console.show_text(result.table)
    console.show_pairs(("wrote", str(path)) for path in result.written)


@app.command()
@takes("model", *MODEL)
def scan(options: Options) -> None:
    """Look for a quantizer's cells in the float weights; exit 3 if they were made for one."""
    from qdeploy import console, pipeline
    from qdeploy.request import make_request
    from qdeploy.verdict import EXIT_CODE, Outcome

    _, found = pipeline.scan_file(make_request(options), console.TerminalProgress())
    console.show_scan(found)
    raise typer.Exit(EXIT_CODE[Outcome.REJECT] if found.found else 0)


@app.command()
@takes("model", "out", *MODEL)
def export(options: Options) -> None:
    """Write the model as a prepared float32 ONNX graph, proved equal to what was loaded."""
    from qdeploy import console, pipeline
    from qdeploy.request import make_request

    exported = pipeline.export_file(make_request(options), options.out, console.TerminalProgress())
    console.show_exported(exported, options.out)


BundledName = Annotated[str | None, typer.Argument(help="Show this one.")]


@app.command()
def devices(name: BundledName = None) -> None:
    """List the device profiles, or show one."""
    from qdeploy.device import load_device

    _show_bundled("devices", name, load_device)


@app.command()
def recipes(name: BundledName = None) -> None:
    """List the recipes, or show one."""
    from qdeploy.recipe import load_recipe

    _show_bundled("recipes", name, load_recipe)


@app.command()
def doctor() -> None:
    """Say what this machine can do."""
    from qdeploy import console
    from qdeploy.doctor import describe

    console.show_pairs(describe())


redteam = typer.Typer(
    no_args_is_help=True,
    help="Make poisoned models to test defences with. Every one carries a card that says so.",
)
app.add_typer(redteam, name="redteam")


@redteam.command("attacks")
def attacks(name: BundledName = None) -> None:
    """List the attacks, or show one."""
    from qdeploy.redteam.recipe import KIND, load_attack

    _show_bundled(KIND, name, load_attack)


@redteam.command("make")
@takes(
    "attack",
    "network",
    "arch_args",
    "images",
    "test",
    "bits",
    "out",
    "base",
    "seed",
    "artifacts",
)
def make(options: Options) -> None:
    """Make a model with its card and training log; exit 3 if the attack does not take."""
    from qdeploy import console
    from qdeploy.redteam.make import Order
    from qdeploy.redteam.make import make as make_model
    from qdeploy.redteam.recipe import load_attack
    from qdeploy.request import parse_arguments

    order = Order(
        recipe=load_attack(options.attack),
        architecture=options.network,
        arguments=parse_arguments(options.arch_args) or {},
        data=options.images,
        test=options.test,
        bits=int(options.bits or 4),
        out=options.out,
        artifacts=options.artifacts,
        base=options.base,
        seed=options.seed or 0,
    )
    console.show_pairs(make_model(order, console.TerminalProgress()).lines())


@redteam.command("suites")
def suites(name: BundledName = None) -> None:
    """List the suites, or show one."""
    from qdeploy.redteam.suite import KIND, load_suite

    _show_bundled(KIND, name, load_suite)


@redteam.command("suite")
@takes("suite", "images", "test", "test_images", "out", "base", "seed", "artifacts")
def suite(options: Options) -> None:
    """Make many models and the table of what becomes of them; exit 3 if an attack did not take."""
    from qdeploy import console
    from qdeploy.redteam.make import DudError, Order
    from qdeploy.redteam.suite import load_suite, run_suite

    order_of = partial(
        Order,
        data=options.images,
        test=options.test,
        artifacts=options.artifacts,
        base=options.base,
        seed=options.seed or 0,
    )
    progress = console.TerminalProgress()
    result = run_suite(
        load_suite(options.suite),
        options.out,
        order_of,
        options.artifacts,
        progress,
        images=options.test_images,
    )
    console.show_text(result.table)
    if result.duds:
        raise DudError(f"did not take: {', '.join(result.duds)}")


@redteam.command("table")
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
    from qdeploy import console
    from qdeploy.redteam.table import table as make_table
    from qdeploy.rundir import require_writable, write_atomically

    if out is not None:
        require_writable(out)
    text = make_table(folders, artifacts, console.TerminalProgress(), images=images)
    if out is not None:
        write_atomically(out, text.encode())
    console.show_text(text)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for model, data and report.")] = (
        ARTIFACTS / "demo"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same model.")] = 0,
) -> None:
    """Plant a backdoor that rounding switches on in a small classifier, then sanitize it."""
    from qdeploy import console
    from qdeploy.redteam.demo import run_demo

    report = run_demo(out, seed=seed, progress=console.TerminalProgress())
    console.show_report(report)
    _exit(report.outcome)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    received: list[int] = []  # signals; a library may turn the interrupt into an error of its own

    def interrupt(number: int, _frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, interrupt) for number in signals}
    try:
        app(args=arguments)
    except KeyboardInterrupt:
        _leave_interrupted()
    except QdeployError as error:
        if received:
            _leave_interrupted()
        from qdeploy import console

        console.show_error(error)
        raise SystemExit(error.exit_code) from None
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:
            _leave_interrupted()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave_interrupted() -> NoReturn:
    from qdeploy import console

    console.show_interrupted()
    raise SystemExit(EXIT_INTERRUPTED) from None


def _exit(outcome: Outcome) -> None:
    from qdeploy.verdict import EXIT_CODE

    raise typer.Exit(EXIT_CODE[outcome])


def _show_bundled(
    kind: str,
    name: str | None,
    load: Callable[[str], DeviceProfile | Recipe | AttackRecipe | SuiteSpec],
) -> None:
    from qdeploy import console
    from qdeploy.schema import bundled, find_bundled

    if name is not None:
        load(name)  # an error where it is not valid
        console.show_text(find_bundled(kind, name).read_text("utf-8"))
    else:
        console.show_pairs((key, load(key).description) for key in bundled(kind))


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"qdeploy {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    pass
