"""All that can be told of a model file without running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from qdeploy.disk import write_atomically
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


def look_at(request: Request, progress: Progress, reference: Request | None = None) -> Look:
    """What the file holds, and whether its float weights were made for a quantizer.

    Args:
        reference: For the float model that the file claims to be the quantized form of.

    Raises:
        InputError: the file, or the reference, cannot be read.
    """
    path, clock = request.sources.model, Clock(progress)
    with clock.stage("look"):
        findings = look(path)
        why_not = _why_not(request, findings)
    if reference is not None and not any(finding.level == "error" for finding in findings):
        source = _unrun(reference, clock)
        with clock.stage("compare"):
            findings = (*_of_provenance(trace(read_single_file(path), source)), *findings)
    if why_not is not None:
        return Look(path, sha256(path), findings, None, why_not)
    model = _unrun(request, clock)
    with clock.stage("scan"):
        return Look(path, sha256(path), findings, scan_weights(model, progress), None)


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
