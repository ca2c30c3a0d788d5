"""All that can be told of a model file without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qdeploy.detectors.crowding import scan_weights
from qdeploy.disk.files import write_atomically
from qdeploy.errors import NO_MEMORY, InputError, QdeployError
from qdeploy.exporting.exporter import export_unproved
from qdeploy.formats.onnx.reading import is_quantized, read_single_file
from qdeploy.formats.opening import bytes_elsewhere, sha256, sniff
from qdeploy.formats.static import findings_in
from qdeploy.graph.ends import as_classifier_bytes
from qdeploy.inputs.requests import Request
from qdeploy.machine import has_torch
from qdeploy.progress import Progress
from qdeploy.provenance.trace import FEW, Provenance, trace
from qdeploy.report.scans import FORMATS, FileScan
from qdeploy.runs.confined import Confined, Limits, allow
from qdeploy.runs.opening import open_scanned, open_source
from qdeploy.values import Finding, FloatModel, Loaded

CPU_SECONDS = 10
BYTES_PER_SECOND = 10_000_000
MEMORY_BYTES, MEMORY_FACTOR = 2_000_000_000, 6


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """A file that is to be looked at."""

    path: Path
    request_of: Callable[[Path], Request]  # reads the card too, which is the stranger's as well
    reference: Path | None = None  # the float model that it claims to be the quantized form of


def scan_files(requests: Sequence[ScanRequest], progress: Progress) -> Iterator[FileScan]:
    """What each file holds, and whether its float weights were made for a quantizer.

    Each is looked at in a process of its own kind, with limits of time and memory: one that cannot
    be read, or whose card cannot, that takes too much or ends the process says so, and hides none
    of the others.
    """
    for sight in progress.track(requests, "files", len(requests)):
        try:
            yield _CONFINED.do(sight, _limits(sight), what=f"model {sight.path}")
        except QdeployError as error:
            yield FileScan(sight.path, "", (), None, None, failed=error)


def scan_one(sight: ScanRequest) -> FileScan:
    """The same of one file, in this process and without limits."""
    seen = FileScan(sight.path, "", (), None, None)
    try:
        for seen in _steps(sight):  # noqa: B007 - the last
            pass
    except QdeployError as error:
        return replace(seen, failed=error)
    except MemoryError:
        return replace(seen, failed=InputError(f"model {sight.path}: {NO_MEMORY}"))
    return seen


_CONFINED = Confined(scan_one)


def _limits(sight: ScanRequest) -> Limits:
    """Large files may take more."""
    held = sum(p.stat().st_size for p in (sight.path, sight.reference) if p and p.is_file())
    more = _in_proportion(held)
    return Limits(CPU_SECONDS + more.seconds, MEMORY_BYTES + more.memory_bytes)


def _in_proportion(held: int) -> Limits:
    return Limits(held // BYTES_PER_SECOND, MEMORY_FACTOR * held)


def _steps(sight: ScanRequest) -> Iterator[FileScan]:
    """What is known of a file after each step of looking at it."""
    for named in filter(None, (sight.path, sight.reference)):
        allow(_in_proportion(bytes_elsewhere(named)))
    path, request = sight.path, sight.request_of(sight.path)
    digest, findings = sha256(path), findings_in(path)
    seen = FileScan(path, digest, findings, None, _why_not(request, findings))
    yield seen
    if sight.reference is not None and not seen.stands_against:
        reference = sight.request_of(sight.reference)
        source = _unrun(reference, open_source(reference.sources, run_code_from_model=False))
        data = as_classifier_bytes(read_single_file(path), request.sources.stated, where=str(path))
        found = _of_provenance(trace(data, source))
        seen = replace(seen, findings=(*found, *seen.findings))
        yield seen
    if seen.not_scanned is None:
        opened = open_scanned(request.sources, digest, run_code_from_model=False)
        yield replace(seen, crowding=scan_weights(_unrun(request, opened)))


def _unrun(request: Request, loaded: Loaded) -> FloatModel:
    """The weights in a prepared graph; of an ONNX file nothing is run."""
    stated, device = request.sources.stated, request.device
    opset, ir_version = device.opset, device.ir_version
    return export_unproved(loaded, stated=stated, opset=opset, ir_version=ir_version)


def write_scans(scans: Sequence[FileScan], places: Sequence[Path]) -> None:
    """The findings in the format that each file's name asks for."""
    for path in places:
        write_atomically(path, FORMATS[path.suffix.lower()](scans))


def _of_provenance(found: Provenance) -> Iterator[Finding]:
    """What a file has in common with its float model, as findings."""
    if found.not_compared is not None:
        yield Finding("not-compared", "warning", "", found.not_compared)
    yield from found.differences
    for layer in found.layers:
        if layer.changed:
            text = f"a weight lies {layer.steps:.1f} steps from the float model's"
            yield Finding("weights-changed", "warning", layer.name, text)
        if layer.flipped >= FEW:
            text = f"{100 * layer.flipped:.1f} % of the integers are not rounded to nearest"
            yield Finding("not-nearest", "note", layer.name, text)


def _why_not(request: Request, findings: tuple[Finding, ...]) -> str | None:
    """Why the weights cannot be compared with cells; None if they can."""
    if any(finding.level == "error" for finding in findings):
        return "the file is not one to be opened"
    sources = request.sources
    row = sniff(sources.model)
    if row.content == "onnx":
        quantized = is_quantized(sources.model.read_bytes())
        return "they are integers already" if quantized else None
    reasons = {
        f"{row.program} is code, which is not run here": row.program is not None,
        "torch, which opens it, is not installed": not has_torch(),
        "a state dict needs an architecture: --arch, or a model card": (
            row.tensors_alone and sources.architecture is None
        ),
        "the input shape is not known: --input-shape, or a model card": sources.stated.shape
        is None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
