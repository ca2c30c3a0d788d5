"""The command line: parse, call, exit."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from qdeploy import __version__
from qdeploy.cli.bundled import BundledName, show_bundled
from qdeploy.cli.redteam import redteam
from qdeploy.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, NO_MEMORY, QdeployError
from qdeploy.options import (
    ARTIFACTS,
    ATTESTATION,
    CALIBRATION,
    CLEANING,
    DISTILLATION,
    EVIDENCE,
    MATRIX,
    METHOD,
    MODEL,
    RECIPE,
    TRACKING,
    VERIFICATION,
    Options,
    takes,
)

if TYPE_CHECKING:
    from qdeploy.judging.verdict import Outcome

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
    *CLEANING,
    "policy",
    "report",
    "artifacts",
    "dry_run",
)
def sanitize(options: Options) -> None:
    """Quantize without switching a backdoor on, measure the file, and judge it."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    if options.dry_run:
        request, model, plan = verbs.plan(options, console.TerminalProgress())
        console.show_plan(model, plan, request.recipe, request.device)
        return
    report = verbs.sanitize(options, console.TerminalProgress())
    console.show_report(report)
    _exit(report.outcome)


@app.command()
@takes("model", "out", *MODEL, *CALIBRATION, *RECIPE, *METHOD, "artifacts")
def quantize(options: Options) -> None:
    """Quantize by any method. Nothing is measured and nothing is judged."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    request, quantized = verbs.quantize(options, console.TerminalProgress())
    console.show_quantized(quantized, options.out, request.device)


@app.command()
@takes(
    "file",
    "reference",
    "policy",
    "made_by",
    *MODEL,
    *EVIDENCE,
    "test_images",
    "device",
    "report",
    "artifacts",
)
def gate(options: Options) -> None:
    """Measure an ONNX file as it is, whoever made it, and judge it by a policy."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    report = verbs.gate(options, console.TerminalProgress())
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
    "data_root",
    "arch",
    "arch_args",
    "device",
)
def compare(options: Options) -> None:
    """Set rounding methods side by side: every one on every grid, on every model."""
    from dataclasses import replace

    from qdeploy.cli import console
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
@takes("models", "reference", *MODEL, "report")
def scan(options: Options) -> None:
    """Look at model files without running them; exit 3 if something stands against one."""
    from qdeploy.api import verbs
    from qdeploy.cli import console
    from qdeploy.judging.verdict import Outcome

    looks = []
    for look in verbs.scan(options, console.TerminalProgress()):
        looks.append(look)
        console.show_look(look)
    rejected = any(look.stands_against for look in looks)
    if not rejected and any(look.failed is not None for look in looks):
        raise typer.Exit(EXIT_BAD_INPUT)
    _exit(Outcome.REJECT if rejected else Outcome.ACCEPT)


@app.command()
@takes("model", "out", *MODEL)
def export(options: Options) -> None:
    """Write the model as a prepared float32 ONNX graph, proved equal to what was loaded."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    exported = verbs.export(options, console.TerminalProgress())
    console.show_exported(exported, options.out)


@app.command()
@takes("model", "out", *DISTILLATION, *MODEL, "artifacts")
def distill(options: Options) -> None:
    """Clean a float model: teach a student on unlabelled images what it answers, not how."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    student = verbs.clean(options, console.TerminalProgress())
    if student is not None:
        console.show_pairs(student.lines())


@app.command()
@takes(*ATTESTATION)
def attest(options: Options) -> None:
    """Sign what the report says of a file: an in-toto statement in a DSSE envelope."""
    from datetime import UTC, datetime, timedelta

    from qdeploy.attest.keys import PASSWORD_VARIABLE
    from qdeploy.attest.sign import attest as attest_file
    from qdeploy.cli import console

    made = attest_file(
        options.file,
        options.judged_by,
        options.key,
        options.envelope,
        password=os.environ.get(PASSWORD_VARIABLE),
        expires=datetime.now(UTC).date() + timedelta(days=options.days),
    )
    console.show_attestation(made)


@app.command()
@takes(*VERIFICATION)
def verify(options: Options) -> None:
    """Accept a file by its attestation; exit 3 unless a trusted key signed that it is accepted."""
    from datetime import UTC, datetime

    from qdeploy.attest.verify import verify as verify_file
    from qdeploy.cli import console
    from qdeploy.judging.verdict import Outcome

    verification = verify_file(
        options.file,
        options.attestation,
        options.trusted_keys or (),
        options.expected_report,
        today=datetime.now(UTC).date(),
    )
    console.show_verification(verification)
    _exit(Outcome.ACCEPT if verification.verified else Outcome.REJECT)


@app.command()
@takes(*TRACKING)
def track(options: Options) -> None:
    """Log a run in MLflow: settings, measurements, verdict and files."""
    from qdeploy.cli import console
    from qdeploy.tracking.track import Place
    from qdeploy.tracking.track import track as track_run

    place = Place(
        options.tracking_uri,
        options.experiment,
        options.registered_model,
        options.model_version,
    )
    console.show_pairs(track_run(options.run, place).lines())


@app.command()
def devices(name: BundledName = None) -> None:
    """List the device profiles, or show one."""
    from qdeploy.settings.device import load_device

    show_bundled("devices", name, load_device)


@app.command()
def recipes(name: BundledName = None) -> None:
    """List the recipes, or show one."""
    from qdeploy.settings.recipe import load_recipe

    show_bundled("recipes", name, load_recipe)


@app.command()
def policies(name: BundledName = None) -> None:
    """List the policies, or show one."""
    from qdeploy.settings.policy import KIND, load_policy

    show_bundled(KIND, name, load_policy)


@app.command()
def doctor() -> None:
    """Say what this machine can do."""
    from qdeploy.cli import console
    from qdeploy.cli.doctor import describe

    console.show_pairs(describe())


app.add_typer(redteam, name="redteam")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for model, data and report.")] = (
        ARTIFACTS / "demo"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same model.")] = 0,
) -> None:
    """Plant a backdoor that rounding switches on in a small classifier, then sanitize it."""
    from qdeploy.cli import console
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
    except (QdeployError, MemoryError) as error:
        if received:
            _leave_interrupted()
        _leave_with(error)
    except SystemExit as leaving:
        if leaving.code == EXIT_INTERRUPTED:
            _leave_interrupted()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave_with(error: QdeployError | MemoryError) -> NoReturn:
    from qdeploy.cli import console

    known = error if isinstance(error, QdeployError) else QdeployError(f"this {NO_MEMORY}")
    console.show_error(known)
    raise SystemExit(known.exit_code) from None


def _leave_interrupted() -> NoReturn:
    from qdeploy.cli import console

    console.show_interrupted()
    raise SystemExit(EXIT_INTERRUPTED) from None


def _exit(outcome: Outcome) -> None:
    from qdeploy.judging.verdict import EXIT_CODE

    raise typer.Exit(EXIT_CODE[outcome])


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
