"""`qdeploy fleet`."""

from __future__ import annotations

import os
import platform
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qdeploy.api.settings import ARTIFACTS
from qdeploy.cli.groups import option
from qdeploy.cli.leaving import leave_by
from qdeploy.cli.loudness import Loudness, loudness
from qdeploy.cli.options import AsJson
from qdeploy.errors import InputError, UsageError

if TYPE_CHECKING:
    from qdeploy.fleet.document import FleetDocument
    from qdeploy.fleet.drive import State
    from qdeploy.fleet.run import FleetRequest, Planned

WATCH_SECONDS = 1.0
SHOWN_TITLES = 8

Manifest = Annotated[Path, typer.Argument(help="TOML file: models, jobs, limits, executor.")]


def fleet(
    manifest: Manifest,
    out: Annotated[
        Path | None,
        option("--out -o", "Folder of the report; else artifacts/fleet/NAME.", "Output"),
    ] = None,
    reports: Annotated[
        list[Path] | None,
        option(
            "--report",
            "Also write the report here: .html, .json, .xml (JUnit), .sarif or .csv; repeatable.",
            "Output",
        ),
    ] = None,
    since: Annotated[
        Path | None, option("--since", "fleet.json of an earlier run: what has changed.", "Output")
    ] = None,
    executor: Annotated[
        Literal["local", "ray"] | None,
        option("--executor", "In place of the manifest's: local or ray.", "Execution"),
    ] = None,
    workers: Annotated[
        int | None, option("--workers", "Cells at once, at most.", "Execution", at_least=1)
    ] = None,
    share: Annotated[
        str | None,
        option(
            "--share", "Only the I-th of N shares of the cells, as 0/8; no report.", "Execution"
        ),
    ] = None,
    emit: Annotated[
        Literal["slurm", "k8s"] | None,
        option("--emit", "Print a script for a scheduler, and run nothing.", "Execution"),
    ] = None,
    dry_run: Annotated[
        bool, option("--dry-run", "Show the cells and an estimate, and stop.", "Execution")
    ] = False,
    watch: Annotated[
        bool, option("--watch", "Show how far a run of this fleet is, from elsewhere.", "Execution")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Many models, recipes and devices in one command: each once, on processes or a cluster."""
    from qdeploy.cli import console
    from qdeploy.fleet.manifest import load_manifest
    from qdeploy.fleet.run import FleetRequest, plan_fleet, run_fleet, status_place

    place = out if out is not None else ARTIFACTS / "fleet" / load_manifest(manifest).name
    request = FleetRequest(
        manifest=manifest, out=place, reports=tuple(reports or ()), since=since,
        share=_share(share), executor=executor, workers=workers,
    )  # fmt: skip
    if watch:
        _watch(status_place(place, request.share))
        return
    progress = console.TerminalProgress()
    if dry_run or emit is not None:
        _show_planned(plan_fleet(request, progress), request, emit)
        return
    document = run_fleet(request, progress, _Told())
    if as_json:
        from qdeploy.fleet.forms import to_json

        console.show_json(to_json(document))
    else:
        _show(document, request)
    from qdeploy.judging.verdict import Outcome

    leave_by(Outcome(document.outcome))


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal():
        raise UsageError(f"--share {text!r} is not I/N, as 0/8")
    return int(number), int(count)


class _Told:
    """A line for each cell that has ended, and one below it that says how far all are."""

    def __init__(self) -> None:
        from qdeploy.cli.console import err

        self._shown = 0  # records
        self._console = err()
        self._status = self._console.status("") if self._console.is_terminal else None

    def __call__(self, state: State) -> None:
        from qdeploy.disk.printable import printable

        if loudness() is Loudness.QUIET:
            return
        new = list(islice(state.records.values(), self._shown, None)) if state.computed else []
        self._shown = len(state.records)
        for record in new:
            if record.attempts:
                line = f"  {record.outcome.value:<10} {record.title} ({record.seconds:.1f} s)"
                self._console.print(printable(line), style="dim")
        if self._status is not None:
            done, left = len(state.records), state.seconds_left
            self._status.update(_line(done, state.total, state.per_minute, left))
            self._status.start() if state.left else self._status.stop()


def _line(done: int, cells: int, per_minute: float, seconds_left: float | None) -> str:
    left = "" if seconds_left is None else f", {_duration(seconds_left)} left"
    return f"{done}/{cells} cells, {per_minute:.1f} a minute{left}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _show_planned(
    planned: Planned, request: FleetRequest, emit: Literal["slurm", "k8s"] | None
) -> None:
    from qdeploy.cli import console
    from qdeploy.fleet.emit import EMITTERS, Job
    from qdeploy.fleet.run import estimate

    if emit is not None:
        job = Job(planned.spec, request.manifest.absolute(), planned.out, planned.cells)
        console.show_json(EMITTERS[emit](job).encode())
        return
    for cell in planned.cells:
        console.show_text(
            f"{cell.id[:12]}  {cell.title}" + (f": {cell.refused}" if cell.refused else "")
        )
    known = estimate(planned)
    took = "of which nothing is known yet" if known.seconds is None else _duration(known.seconds)
    console.show_text(
        f"{known.cells} cells: {known.done} are done, {known.refused} are refused;"
        f" the others take a worker {took}"
    )


def _show(document: FleetDocument, request: FleetRequest) -> None:
    from qdeploy.cli import console
    from qdeploy.fleet.forms import counts
    from qdeploy.fleet.whole import KNOWN

    told = ", ".join(f"{count} {outcome}" for outcome, count in counts(document))
    bad = [record for record in document.cells if record.outcome not in KNOWN]
    for record in bad[:SHOWN_TITLES]:
        console.show_text(f"  {record.outcome.value}: {record.title}: {record.reason}")
    if len(bad) > SHOWN_TITLES:
        console.show_text(f"  and {len(bad) - SHOWN_TITLES} more")
    console.show_text(f"{document.outcome}: {told}; {document.computed} computed")
    if request.share is None:
        console.show_text(f"report: {request.out / 'fleet.html'}")


def _watch(place: Path) -> None:
    """Show what a fleet says of itself until it has ended."""
    from qdeploy.cli import console
    from qdeploy.fleet.run import read_status

    last = ""
    while True:
        status = read_status(place)
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(status.outcomes.items()))
        line = _line(status.done, status.cells, status.per_minute, status.seconds_left)
        line += f"; {outcomes}" if outcomes else ""
        if line != last:
            console.show_text(line)
            last = line
        if status.finished:
            return
        if not _alive(status.host, status.process):
            raise InputError(f"fleet {status.name}: its run has ended before the last cell")
        time.sleep(WATCH_SECONDS)


def _alive(host: str, process: int) -> bool:
    """On this machine; a run elsewhere is believed to go on."""
    if host != platform.node():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
