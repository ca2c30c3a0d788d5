"""One opening for every verb: scanned first, then loaded, then exported."""

from __future__ import annotations

from qdeploy.exporting.exporter import export
from qdeploy.formats.opening import load, sha256
from qdeploy.formats.static import refuse_hostile
from qdeploy.inputs.lacking import require_all
from qdeploy.inputs.requests import Request
from qdeploy.inputs.sources import Sources
from qdeploy.progress import Clock
from qdeploy.settings.device import DeviceProfile
from qdeploy.values import Architecture, FloatModel, Loaded


def open_model(request: Request, clock: Clock, *, images: bool = True) -> tuple[Loaded, FloatModel]:
    """The model file as it is, and as a prepared ONNX graph.

    Args:
        images: Whether any will be looked at; then they must be known before it is loaded.

    Raises:
        UsageError: something is not known of the model or of its images.
        InputError: it is one to be refused, or was exchanged between looking and loading.
    """
    sources, device, run_code = request.sources, request.device, request.run_code_from_model
    with clock.stage("load"):
        digest = _scanned(sources, run_code_from_model=run_code)
        require_all(request, images=images)
        loaded = open_scanned(sources, digest, run_code_from_model=run_code)
    with clock.stage("export"):
        return loaded, exported(loaded, sources, device)


def open_source(sources: Sources, *, run_code_from_model: bool) -> Loaded:
    """The model file as it is.

    Raises:
        InputError: it is one to be refused, or was exchanged between looking and loading.
    """
    digest = _scanned(sources, run_code_from_model=run_code_from_model)
    return open_scanned(sources, digest, run_code_from_model=run_code_from_model)


def _scanned(sources: Sources, *, run_code_from_model: bool) -> str:
    """The digest of a file that no rule refuses."""
    digest = sha256(sources.model)
    refuse_hostile(sources.model, run_code_from_model=run_code_from_model)
    return digest


def open_scanned(sources: Sources, digest: str, *, run_code_from_model: bool) -> Loaded:
    """The same of a file that had this digest when the scan found no error in it."""
    architecture = Architecture(*sources.architecture) if sources.architecture else None
    return load(
        sources.model, architecture, run_code_from_model=run_code_from_model, scanned_digest=digest
    )


def exported(loaded: Loaded, sources: Sources, device: DeviceProfile) -> FloatModel:
    stated, opset = sources.stated, device.opset
    return export(loaded, stated=stated, opset=opset, ir_version=device.ir_version)
