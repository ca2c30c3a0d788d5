"""All that can be told of a model file without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qdeploy.disk import write_atomically
from qdeploy.errors import NO_MEMORY, InputError, QdeployError
from qdeploy.graph.io import is_quantized, read_single_file
from qdeploy.inputs import Request
from qdeploy.model import Finding, FloatModel, Format
from qdeploy.pipeline import open_source
from qdeploy.progress import Clock, Progress
from qdeploy.report.looks import FORMATS, Look
from qdeploy.scan.fingerprints import scan_weights
from qdeploy.scan.provenance import FEW, Provenance, trace
from qdeploy.scan.static import look
from qdeploy.stages.export import export_unproved
from qdeploy.stages.load import PROGRAMS, sha256, sniff

OF_TENSORS = frozenset({Format.STATE_DICT, Format.SAFETENSORS})


def look_at_each(
    paths: Iterable[Path],
    request_of: Callable[[Path], Request],
    progress: Progress,
    reference: Request | None = None,
) -> Iterator[Look]:
    """What each file holds, and whether its float weights were made for a quantizer.

    A file that cannot be read, or whose card cannot, says so and hides none of the others.

    Args:
        reference: For the float model that the files claim to be the quantized form of.
    """
    for path in paths:
        seen = Look(path, "", (), None, None)
        try:
            for seen in _steps(request_of(path), progress, reference):  # noqa: B007 - the last
                pass
        except QdeployError as error:
            seen = replace(seen, failed=error)
        except MemoryError:
            seen = replace(seen, failed=InputError(f"model {path}: {NO_MEMORY}"))
        yield seen


def _steps(request: Request, progress: Progress, reference: Request | None) -> Iterator[Look]:
    """What is known of a file after each step of looking at it."""
    path, clock = request.sources.model, Clock(progress)
    with clock.stage("look"):
        findings = look(path)
        seen = Look(path, sha256(path), findings, None, _why_not(request, findings))
    yield seen
    if reference is not None and not seen.stands_against:
        source = _unrun(reference, clock)
        with clock.stage("compare"):
            found = _of_provenance(trace(read_single_file(path), source))
            seen = replace(seen, findings=(*found, *seen.findings))
        yield seen
    if seen.not_scanned is None:
        model = _unrun(request, clock)
        with clock.stage("scan"):
            yield replace(seen, scan=scan_weights(model, progress))


def _unrun(request: Request, clock: Clock) -> FloatModel:
    """The weights in a prepared graph; of an ONNX file nothing is run."""
    sources, device = request.sources, request.device
    with clock.stage("load"):
        loaded = open_source(sources, run_code_from_model=False)
    with clock.stage("export"):
        shape, opset, ir_version = sources.shape, device.opset, device.ir_version
        return export_unproved(loaded, shape=shape, opset=opset, ir_version=ir_version)


def write_looks(looks: Sequence[Look], places: Sequence[Path]) -> None:
    """The findings in the format that each file's name asks for."""
    for path in places:
        write_atomically(path, FORMATS[path.suffix.lower()](looks))


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
    kind = sniff(request.sources.model)
    if kind in OF_TENSORS and request.sources.architecture is None:
        return "a state dict needs an architecture: --arch, or a model card"
    if kind in PROGRAMS:
        return f"{PROGRAMS[kind]} is code, which is not run here"
    if kind is Format.ONNX and is_quantized(request.sources.model.read_bytes()):
        return "they are integers already"
    if kind is not Format.ONNX and request.sources.shape is None:
        return "the input shape is not known: --input-shape, or a model card"
    return None
