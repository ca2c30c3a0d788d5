"""Everything the terminal shows. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from qdeploy.cli.loudness import Loudness, loudness
from qdeploy.disk.printable import printable
from qdeploy.report.runtime_rows import runtime_text

if TYPE_CHECKING:
    from qdeploy.core.metrics import Estimate
    from qdeploy.detectors.crowding import WeightScan
    from qdeploy.errors import QdeployError
    from qdeploy.judging.rates import ArmRates
    from qdeploy.provenance.trace import Provenance
    from qdeploy.report.scans import FileScan
    from qdeploy.report.values import Report
    from qdeploy.runs.init import Begun
    from qdeploy.values import Finding, FloatModel, QuantizedModel

T = TypeVar("T")

BAR_COLUMNS = (
    TextColumn("  {task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
    TimeRemainingColumn(),
)  # fmt: skip
OUTCOME_STYLES = {"ACCEPT": "bold green", "REJECT": "bold red", "NO VERDICT": "bold yellow"}
FINDING_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "dim"}
SHOWN_CONVENTIONS = 5


def out() -> Console:
    """Names in a model are chosen by a stranger, so no text is markup."""
    width = None if sys.stdout.isatty() else 110
    return Console(highlight=False, markup=False, emoji=False, width=width)


def err() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


class TerminalProgress:
    """Stages with their times, and a bar for what is under way if somebody is looking."""

    def __init__(self) -> None:
        self._console = err()
        self._bars: Bars | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if loudness() is Loudness.QUIET:
            yield
            return
        began = time.perf_counter()
        if self._console.is_terminal:
            with Bars(*BAR_COLUMNS, console=self._console, transient=True) as self._bars:
                yield
            self._bars = None
        else:
            yield
        self._console.print(Text(f"  {name:<10} {time.perf_counter() - began:6.1f} s", style="dim"))

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        if self._bars is None:
            yield from items
            return
        task = self._bars.add_task(printable(label), total=total)
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            if self._bars is not None:
                self._bars.remove_task(task)

    def note(self, text: str) -> None:
        if loudness() is not Loudness.QUIET:
            self._console.print(Text(f"  {printable(text)}", style="dim"))


def show_error(error: QdeployError) -> None:
    """One line of what is wrong, and what to do about it."""
    console = err()
    console.print(Text.assemble(("error: ", "bold red"), printable(error)))
    if error.hint:
        hint = "\n".join(printable(line) for line in error.hint.split("\n"))  # examples have lines
        console.print(Text.assemble(("hint: ", "bold"), hint))
    if loudness() is Loudness.VERBOSE:
        console.print(
            Text("\n".join(map(printable, "".join(traceback.format_exception(error)).splitlines())))
        )


def show_interrupted() -> None:
    err().print(Text("interrupted; the same command goes on where it stopped", style="yellow"))


def show_json(document: bytes) -> None:
    """A document, and nothing that is for people."""
    sys.stdout.write(document.decode())


def show_report(report: Report, *, as_json: bool = False) -> None:
    """The measured rates side by side, then the verdict and what it rests on."""
    if as_json:
        from qdeploy.report.to_json import to_json

        show_json(to_json(report))
        return
    console, quiet = out(), loudness() is Loudness.QUIET
    if not quiet:
        _show_measured(report, console)
        console.print()
    outcome = report.outcome.value
    console.print(Text.assemble((outcome, OUTCOME_STYLES[outcome]), f"  {_verdict_line(report)}"))
    if report.converted is not None:
        console.print(Text(f"  {report.converted.format}: {printable(report.converted.path)}"))
    for reason in report.reasons:
        console.print(Text(f"  - {printable(reason)}"))
    for step in report.next_steps:
        console.print(Text(f"  next: {printable(step)}"))
    for note in () if quiet else report.notes:
        console.print(Text(f"  note: {printable(note)}", style="dim"))


def _show_measured(report: Report, console: Console) -> None:
    if report.rates:
        console.print(_rates_table(report))
    if report.rates and report.rates[0].top5_accuracy is not None:
        console.print(f"  among the best five: {', '.join(_top5(report))}")
    for other in report.runtimes:
        console.print(f"  {printable(other.runtime)}: {printable(runtime_text(other))}")
    if report.layers:
        console.print(f"  {printable(_layers_line(report))}")
    if report.provenance is not None and not report.layers:
        console.print(f"  {printable(_traced_line(report.provenance))}")
    for found in report.findings:
        if found.level != "note":
            console.print(Text(f"  {found.level}: {printable(_finding_line(found))}"))


def show_scan(one: FileScan) -> None:
    """What was seen in a file, the worst first, and what its weights tell."""
    if one.failed is not None:
        show_error(one.failed)
    if one.failed is not None and not one.seen:
        return
    console = out()
    console.print(Text(printable(one.path), style="bold"))
    for found in one.seen:
        style = FINDING_STYLES[found.level]
        console.print(
            Text.assemble((f"  {found.level:<8}", style), printable(_finding_line(found)))
        )
    if one.crowding is not None:
        _show_crowding(one.crowding)
    elif one.not_scanned is not None:
        console.print(
            f"  weights not compared with a quantizer's cells: {printable(one.not_scanned)}"
        )
    if not one.stands_against and one.failed is None:
        console.print("  nothing stands against it; that is no proof that it is harmless")


def _show_crowding(scan: WeightScan) -> None:
    """The conventions whose cells the weights know best, and what that means."""
    console = out()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("  weights at the cell edges of")
    for column in ("score", "times as many\nas expected", "most crowded layer", "times"):
        table.add_column(column, justify="left" if "layer" in column else "right")
    for found in scan.crowding[:SHOWN_CONVENTIONS]:
        table.add_row(
            f"  {found.convention}", f"{found.score:.1f}", f"{found.whole.ratio:.2f}",
            printable(found.layer), f"{found.worst.ratio:.2f}",
        )  # fmt: skip
    if scan.crowding:
        console.print(table)
    if scan.skipped:
        console.print(
            f"  on a grid already or too small, not looked at: {printable(', '.join(scan.skipped))}"
        )


def _rates_table(report: Report) -> Table:
    from qdeploy.report.values import VARIANT_NAMES

    triggers = list(report.rates[0].attack_success)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    table.add_column("CDA %", justify="right")
    for name in triggers:
        table.add_column(Text(f"ASR %\n{printable(name)}"), justify="right")
    for column in ("agreement\n%", "size\nMB", "batch 1\nms", "", "batch 32\nms", ""):
        table.add_column(column, justify="right", no_wrap=True)
    first = report.rates[0].arm.runtime
    for rates in report.rates:
        variant, runtime = rates.arm.variant, rates.arm.runtime
        main = runtime == first
        table.add_row(
            VARIANT_NAMES[variant] + ("" if main else f", {runtime}"),
            _percent(rates.accuracy),
            *(_attack(rates, name) for name in triggers),
            _agreement(rates),
            _megabytes(report, variant) if main else "",
            *(cell for batch in (1, 32) for cell in _latency(report, variant, batch) if main),
        )
    return table


def _top5(report: Report) -> Iterator[str]:
    """Of every file on the first runtime."""
    from qdeploy.report.values import VARIANT_NAMES

    for rates in report.rates:
        if rates.top5_accuracy is not None and rates.arm.runtime == report.rates[0].arm.runtime:
            yield f"{VARIANT_NAMES[rates.arm.variant]} {_percent(rates.top5_accuracy)} %"


def _agreement(rates: ArmRates) -> str:
    beside = rates.against_float
    return "" if beside is None or rates.arm.variant == "fp32" else f"{beside.agreement.value:.2f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} \N{PLUS-MINUS SIGN}{(estimate.high - estimate.low) / 2:.2f}"


def _attack(rates: ArmRates, trigger: str) -> Text:
    estimate = rates.attack_success[trigger]
    return Text(_percent(estimate), style="red" if estimate.value > 50 else "")


def _megabytes(report: Report, variant: str) -> str:
    size = next(f.size_bytes for f in report.files if f.variant == variant)
    return f"{size / 1e6:.2f}"


def _latency(report: Report, variant: str, batch: int) -> tuple[str, str]:
    """Milliseconds, and how many times as fast as the float model."""
    seconds = {x.variant: x.seconds for x in report.latencies if x.batch == batch}
    if variant not in seconds:
        return "", ""
    times = (
        ""
        if "fp32" not in seconds or variant == "fp32"
        else f"{seconds['fp32'] / seconds[variant]:.1f}x"
    )
    return f"{seconds[variant] * 1e3:.2f}", times


def _layers_line(report: Report) -> str:
    weights = sum(layer.codes.size for layer in report.layers)
    flipped = sum(layer.flipped * layer.codes.size for layer in report.layers) / weights
    methods = ", ".join(sorted({layer.rounding_used for layer in report.layers}))
    left = f", {len(report.left_float)} left float" if report.left_float else ""
    return (
        f"{len(report.layers)} layers, {weights:,} weights rounded by {methods}; "
        f"{100 * flipped:.1f} % of the integers differ from nearest{left}"
    )


def _traced_line(found: Provenance) -> str:
    """How the integers of a file that was made elsewhere relate to the float weights."""
    if found.not_compared is not None:
        return f"not compared with the float model: {printable(found.not_compared)}"
    if not found.layers:
        return "no integers in it"
    return (
        f"{len(found.layers)} layers, {found.weights:,} integers; {100 * found.flipped:.1f} % of"
        " them differ from nearest rounding of the float weights"
    )


def _finding_line(found: Finding) -> str:
    where = f" in {found.where}" if found.where else ""
    return f"{found.rule}{where}: {found.message}"


def _verdict_line(report: Report) -> str:
    missing = "; ".join(report.not_measured)
    said = f"  [not measured: {missing}]" if missing else ""
    return printable(report.output or "") + printable(said)


def show_misfit(unfit: str | None) -> None:
    if unfit is not None:
        out().print(Text(f"  {printable(unfit)}", style="yellow"))


def show_quantized(quantized: QuantizedModel, path: Path) -> None:
    weights = sum(layer.codes.size for layer in quantized.layers)
    console = out()
    console.print(
        f"{printable(path)}: {len(quantized.layers)} layers, {weights:,} weights, "
        f"{len(quantized.onnx) / 1e6:.2f} MB; not judged (qdeploy gate does)"
    )
    for layer in quantized.layers:
        if layer.degraded is not None:
            console.print(
                Text(f"  {printable(layer.name)}: {printable(layer.degraded)}", style="yellow")
            )
    show_misfit(quantized.misfit)
    for left in quantized.left_float:
        console.print(
            Text(f"  {printable(left.name)} stays float: {printable(left.reason)}", style="yellow")
        )


def show_exported(model: FloatModel, path: Path) -> None:
    shape = ", ".join(map(str, model.input_shape))
    out().print(
        f"{printable(path)}: {printable(model.input_name)} (N, {shape}) to "
        f"{printable(model.output_name)} (N, {model.classes}), {len(model.onnx) / 1e6:.2f} MB"
    )


def show_begun(begun: Begun, model: Path) -> None:
    """Where the card is, what in it is a guess, and what can be done next."""
    console = out()
    console.print(printable(begun.path))
    for line in begun.guesses:
        console.print(Text(f"  guessed: {printable(line)}", style="yellow"))
    todo = ["check what is guessed"] if begun.guesses else []
    todo += [] if begun.images else ["name images under [data]"]
    code = f" --arch {printable(begun.architecture)}" if begun.architecture is not None else ""
    console.print(
        f"  {', '.join([*todo, 'then'])}\n  qdeploy sanitize {printable(model)}{code} --bits 8"
    )


def show_pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Two columns: a name and what there is to say about it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(Text(printable(name)), Text(printable(text)))
    out().print(table)


def show_text(text: str) -> None:
    """A text of ours of several lines."""
    out().print(Text("\n".join(printable(line) for line in text.split("\n"))))
