"""The verbs as functions with keywords, for programs, notebooks and the command line.

Errors are `QdeployError`, each with the exit code that the command line leaves with. Nothing here
prints, parses or exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Unpack

from qdeploy.api.requests import (
    any_settings,
    clean_request,
    gate_request,
    given_by,
    quantize_request,
    refuse_lost_models,
    with_private_seed,
)
from qdeploy.api.settings import (
    CleanSettings,
    GateSettings,
    InitSettings,
    ModelSettings,
    PathLike,
    QuantizeSettings,
    SanitizeSettings,
    ScanSettings,
    call_of,
    check_keywords,
)
from qdeploy.formats.folders import model_files
from qdeploy.formats.safetensors_index import model_in
from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.machine import limited_to, require_torch
from qdeploy.progress import SILENT, Progress
from qdeploy.report.from_json import layers_of
from qdeploy.report.scans import FileScan, check_place
from qdeploy.report.values import Report
from qdeploy.runs import sanitize as runs
from qdeploy.runs.gate import Subject
from qdeploy.runs.gate import gate as judge
from qdeploy.runs.init import Begun, begin
from qdeploy.runs.scan import ScanRequest, scan_files, write_scans
from qdeploy.values import FloatModel, QuantizedModel, QuantPlan

if TYPE_CHECKING:
    from qdeploy.runs.clean import Student


class Planned(NamedTuple):
    """What `sanitize` would do, and to what."""

    request: QuantizeRequest
    model: FloatModel
    plan: QuantPlan


def sanitize(
    model: PathLike,
    out: PathLike,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
    **settings: Unpack[SanitizeSettings],
) -> Report:
    """Quantize without switching a backdoor on, measure the written file, and judge it.

    The file is at `out` only if it is accepted; `Report.output` says where it is.

    Args:
        threads: Of onnxruntime and of the rounding; one per core if not given.

    Raises:
        QdeployError: bad input, or something is missing on this machine.
    """
    check_keywords("sanitize", settings, SanitizeSettings)
    settings["command"] = call_of("sanitize", (model, out), settings)
    settings = with_private_seed(Path(model), settings)
    with limited_to(threads):
        request = quantize_request(Path(model), settings, out=Path(out))
        return runs.sanitize(request, Path(out), progress)


def plan(
    model: PathLike,
    out: PathLike,
    *,
    progress: Progress = SILENT,
    **settings: Unpack[SanitizeSettings],
) -> Planned:
    """What `sanitize` would do. Nothing is written, and no image is read.

    Raises:
        QdeployError: as `sanitize`.
    """
    check_keywords("plan", settings, SanitizeSettings)
    request = quantize_request(Path(model), settings, out=Path(out))
    return Planned(request, *runs.make_plan(request, progress))


def quantize(
    model: PathLike,
    out: PathLike,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
    **settings: Unpack[QuantizeSettings],
) -> QuantizedModel:
    """Quantize by any method. Nothing is measured and nothing is judged.

    Raises:
        QdeployError: as `sanitize`.
    """
    check_keywords("quantize", settings, QuantizeSettings)
    said = with_private_seed(Path(model), any_settings(settings))
    with limited_to(threads):
        return runs.quantize(
            quantize_request(Path(model), said, out=Path(out)), Path(out), progress
        )


def gate(
    file: PathLike,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
    **settings: Unpack[GateSettings],
) -> Report:
    """Measure an ONNX file as it is, whoever made it, and judge it by a policy.

    Raises:
        QdeployError: as `sanitize`.
    """
    check_keywords("gate", settings, GateSettings)
    settings["command"] = call_of("gate", (file,), settings)
    made_by = settings.get("made_by")
    known = layers_of(Path(made_by)) if made_by is not None else frozenset()
    subject = Subject(Path(file), "reference" in settings, known)
    with limited_to(threads):
        return judge(gate_request(Path(file), settings), subject, progress)


def scan(
    *files: PathLike, progress: Progress = SILENT, **settings: Unpack[ScanSettings]
) -> tuple[FileScan, ...]:
    """What model files hold, none of them run; one that cannot be read has `failed` set.

    Raises:
        QdeployError: a report cannot be written.
    """
    check_keywords("scan", settings, ScanSettings)
    return tuple(scan_each(files, progress, settings))


def scan_each(
    files: Sequence[PathLike], progress: Progress, settings: ScanSettings
) -> Iterator[FileScan]:
    """What is seen of each file, as soon as it is; the reports are written after the last."""
    paths, reports = list(_models_in(files)), settings.get("reports", ())
    for place in reports:
        check_place(Path(place))
    refuse_lost_models(paths, settings)
    reference = settings.get("reference")
    request_of = partial(quantize_request, settings=any_settings(settings))
    float_model = Path(reference) if reference is not None else None
    scans = []
    for one in scan_files([ScanRequest(path, request_of, float_model) for path in paths], progress):
        scans.append(one)
        yield one
    write_scans(scans, tuple(map(Path, reports)))


def _models_in(files: Sequence[PathLike]) -> Iterator[Path]:
    """The files, and those in folders."""
    for file in map(Path, files):
        if file.is_dir():
            yield from model_files(file) or (file,)  # of which is said that it is no file
        else:
            yield file


def export(
    model: PathLike,
    out: PathLike,
    *,
    progress: Progress = SILENT,
    **settings: Unpack[ModelSettings],
) -> FloatModel:
    """Write the model as a prepared float32 ONNX graph, proved equal to what was loaded.

    Raises:
        QdeployError: as `sanitize`.
    """
    check_keywords("export", settings, ModelSettings)
    request = quantize_request(Path(model), any_settings(settings), out=Path(out))
    return runs.export_file(request, Path(out), progress)


def init(
    model: PathLike,
    out: PathLike | None = None,
    **settings: Unpack[InitSettings],
) -> Begun:
    """Write a first model card: what the file says, what was tried, and guesses that are marked.

    With labelled images in `test`, the normalisation is written down that most are right with.

    Raises:
        QdeployError: there is a card already, or the file takes no images.
    """
    check_keywords("init", settings, InitSettings)
    path = Path(model)
    file = model_in(path) if path.is_dir() else path
    given = given_by(any_settings(settings))
    return begin(file, None if out is None else Path(out), given)


def clean(
    model: PathLike,
    images: PathLike,
    out: PathLike,
    *,
    progress: Progress = SILENT,
    **settings: Unpack[CleanSettings],
) -> Student:
    """Clean a float model: teach a student on unlabelled images what it answers, not how.

    Raises:
        QdeployError: as `sanitize`.
    """
    student = clean_or_assist(model, images, out, progress=progress, **settings)
    assert student is not None  # noqa: S101 - one process alone
    return student


def clean_or_assist(
    model: PathLike,
    images: PathLike,
    out: PathLike,
    *,
    progress: Progress = SILENT,
    **settings: Unpack[CleanSettings],
) -> Student | None:
    """`clean` in one of several processes that compute together; None in all but the main one."""
    require_torch("cleaning a model")
    from qdeploy.runs.clean import assist, make_student
    from qdeploy.training.compute import computing

    check_keywords("clean", settings, CleanSettings)
    settings["command"] = call_of("clean", (model, images, out), settings)
    request = clean_request(Path(model), Path(images), Path(out), settings)
    with computing(request.accelerator) as compute:
        if compute.main:
            return make_student(request, compute, progress)
        assist(request, compute)
        return None
