"""The command line: parse, call, exit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread, main_thread
from types import FrameType
from typing import Annotated, NoReturn

import typer

from qdeploy import __version__
from qdeploy.api.settings import ARTIFACTS
from qdeploy.cli.bundled import devices, policies, recipes, schema
from qdeploy.cli.comparing import compare
from qdeploy.cli.fleet import fleet
from qdeploy.cli.leaving import leave_by
from qdeploy.cli.loudness import with_loudness
from qdeploy.cli.options import Model
from qdeploy.cli.redteam import redteam
from qdeploy.cli.verbs import clean, export, gate, init, quantize, sanitize, scan
from qdeploy.cli.vouching import attest, track, verify
from qdeploy.errors import EXIT_INTERRUPTED, NO_MEMORY, QdeployError
from qdeploy.machine import require_torch

LATER_SECONDS, LONGEST_WAITS = 0.05, 200  # until an interrupt is tried again

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize an untrusted classifier so that a quantization-conditioned backdoor does not"
    " survive, and prove it on the file itself.",
    epilog="Exit codes: 0 accepted, 1 bug, 2 bad input or usage, 3 rejected, 4 no verdict,"
    " 130 interrupted.",
)

for command in (
    init,
    sanitize,
    quantize,
    gate,
    compare,
    fleet,
    scan,
    export,
    clean,
    attest,
    verify,
    track,
    devices,
    recipes,
    policies,
    schema,
):
    app.command()(with_loudness(command))
app.command("distill", hidden=True, deprecated=True)(with_loudness(clean))


@app.command()
@with_loudness
def info(model: Model) -> None:
    """Say what a model file is: format, ends, weights, operators. Nothing of it is run."""
    from qdeploy.cli import console
    from qdeploy.runs.info import facts

    console.show_pairs(facts(model))


@app.command()
@with_loudness
def doctor() -> None:
    """Say what this machine can do."""
    from qdeploy.cli import console
    from qdeploy.cli.doctor import describe

    console.show_pairs(describe())


app.add_typer(redteam, name="redteam")


@app.command()
@with_loudness
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for model, data and report.")] = (
        ARTIFACTS / "demo"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same model.")] = 0,
) -> None:
    """Plant a backdoor that rounding switches on in a small classifier, then sanitize it."""
    from qdeploy.cli import console

    require_torch("the demo")
    from qdeploy.redteam.demo import run_demo

    report = run_demo(out, seed=seed, progress=console.TerminalProgress())
    console.show_report(report)
    leave_by(report.outcome)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    received: list[int] = []  # signals; a library may turn the interrupt into an error of its own
    left = Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, _interrupt(received, left)) for number in signals}
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
        left.set()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(received: list[int], left: Event) -> Callable[[int, FrameType | None], None]:
    """What is done at a signal: it is kept, and interrupts what runs, if not an import.

    A second one does not wait, and neither does the first beyond a bounded time.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        first = not received
        received.append(number)
        if first and _importing(frame):
            Thread(target=_again, args=(number, left), daemon=True).start()
            return
        raise KeyboardInterrupt

    return interrupt


def _again(number: int, left: Event) -> None:
    """Send a signal once more, as soon as nothing is imported."""
    for _ in range(LONGEST_WAITS):
        if left.wait(LATER_SECONDS):
            return
        if not _importing(sys._current_frames().get(main_thread().ident or 0)):
            break
    os.kill(os.getpid(), number)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: in the middle of that, libraries in C++ abort."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _leave_with(error: QdeployError | MemoryError) -> NoReturn:
    from qdeploy.cli import console

    known = error if isinstance(error, QdeployError) else QdeployError(f"this {NO_MEMORY}")
    console.show_error(known)
    raise SystemExit(known.exit_code) from None


def _leave_interrupted() -> NoReturn:
    from qdeploy.cli import console

    console.show_interrupted()
    raise SystemExit(EXIT_INTERRUPTED) from None


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
