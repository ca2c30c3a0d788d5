"""The verbs as functions with keywords, for programs and notebooks.

Every keyword is an option of the command line; what is not given has its default there, and
`docs/commands.md` says what each means. Paths may be text. Errors are `QdeployError`, each with the
exit code that the command line would leave with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_type_hints

from qdeploy.api import verbs
from qdeploy.machine import limited_to
from qdeploy.options import ARTIFACTS, Options
from qdeploy.progress import SILENT, Progress
from qdeploy.report.scans import Look
from qdeploy.report.values import Report
from qdeploy.values import FloatModel, QuantizedModel

if TYPE_CHECKING:
    from qdeploy.runs.clean import Student

PathLike = str | os.PathLike[str]


class ModelSettings(TypedDict, total=False):
    """What the float model is, where its file and card do not say it."""

    card: PathLike
    arch: str  # file.py:factory or package.module:factory
    arch_args: Mapping[str, int | float | bool]
    input_shape: tuple[int, int, int]  # channels, height, width
    data_roots: Sequence[PathLike]
    run_code_from_model: bool


class EvidenceSettings(TypedDict, total=False):
    """What a file is judged by."""

    policy: PathLike  # name or TOML file
    test: PathLike
    test_images: int
    triggers: Sequence[PathLike]  # TOML files, or 'patch target=0 x=27 ...'
    reports: Sequence[PathLike]  # .html, .json, .xml, .sarif or .md
    artifacts: PathLike


class QuantizationSettings(TypedDict, total=False):
    """How the integers are chosen, and what they are fitted to."""

    bits: Literal[4, 8]
    recipe: PathLike  # name or TOML file
    device: PathLike  # name or TOML file
    rounding: str
    solver: Literal["descent", "adam"]
    weight_storage: Literal["int4", "int8"]
    activation_bits: Literal[8, "none"]
    seed: int
    calibration: PathLike
    calibration_images: int
    synthetic_calibration: bool


class CleaningSettings(TypedDict, total=False):
    """How a student is taught."""

    image_count: int
    schedule: Literal["short", "paper"]
    epochs: int
    watch: Sequence[str]
    further: float
    accelerator: Literal["cpu", "cuda"]


class SanitizeSettings(
    ModelSettings, EvidenceSettings, QuantizationSettings, CleaningSettings, total=False
):
    """Of all of these."""

    sanitizer: Literal["unlearn", "asd", "kd", "bcu"]  # clean the float model first
    images: PathLike  # unlabelled, for that


class QuantizeSettings(ModelSettings, QuantizationSettings, total=False):
    """Of the model and its quantization."""

    artifacts: PathLike


class GateSettings(ModelSettings, EvidenceSettings, total=False):
    """Of the reference, and of what the file is judged by."""

    reference: PathLike
    made_by: PathLike  # report.json of the run that rounded the file
    device: PathLike


class ScanSettings(ModelSettings, total=False):
    """Of the float models among the files."""

    reference: PathLike
    reports: Sequence[PathLike]


class CleanSettings(ModelSettings, CleaningSettings, total=False):
    """Of the model and the teaching."""

    sanitizer: Literal["unlearn", "asd", "kd", "bcu"]
    seed: int
    artifacts: PathLike


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
    asked = _options("sanitize", (model, out), settings, model=Path(model), out=Path(out))
    with limited_to(threads):
        return verbs.sanitize(asked, progress)


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
    asked = _options("quantize", (model, out), settings, model=Path(model), out=Path(out))
    with limited_to(threads):
        return verbs.quantize(asked, progress)[1]


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
    with limited_to(threads):
        return verbs.gate(_options("gate", (file,), settings, file=Path(file)), progress)


def scan(
    *files: PathLike, progress: Progress = SILENT, **settings: Unpack[ScanSettings]
) -> tuple[Look, ...]:
    """What model files hold, none of them run; one that cannot be read says so in `Look.failed`.

    Raises:
        QdeployError: a report cannot be written.
    """
    asked = _options("scan", files, settings, models=[Path(file) for file in files])
    return tuple(verbs.scan(asked, progress))


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
    asked = _options("export", (model, out), settings, model=Path(model), out=Path(out))
    return verbs.export(asked, progress)


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
    asked = _options(
        "clean", (model, images, out), settings,
        model=Path(model), out=Path(out), unlabelled=Path(images),
    )  # fmt: skip
    student = verbs.clean(asked, progress)
    assert student is not None  # noqa: S101 - one process alone
    return student


def _unchanged(value: object) -> object:
    return value


def _shape(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))


def _paths(paths: Sequence[PathLike]) -> list[Path]:
    return [Path(path) for path in paths]


def _texts(texts: Sequence[PathLike]) -> list[str]:
    return [str(text) for text in texts]


def _arguments(arguments: Mapping[str, object]) -> list[str]:
    return [f"{name}={str(value).lower()}" for name, value in arguments.items()]


# How a keyword is called among the options, and how its value is said there.
OPTIONS: Mapping[str, tuple[str, Callable[[Any], object]]] = {
    **{n: (n, Path) for n in ("card", "test", "calibration", "artifacts", "reference", "made_by")},
    **{n: (n, str) for n in ("bits", "activation_bits", "policy", "recipe", "device")},
    "arch_args": ("arch_args", _arguments),
    "data_roots": ("data_root", _paths),
    "images": ("cleaning_images", Path),
    "input_shape": ("input_shape", _shape),
    "reports": ("report", _paths),
    "triggers": ("trigger", _texts),
    "watch": ("watch", _texts),
}


KNOWN: Mapping[str, Any] = {
    "sanitize": SanitizeSettings, "quantize": QuantizeSettings, "gate": GateSettings,
    "scan": ScanSettings, "export": ModelSettings, "clean": CleanSettings,
}  # fmt: skip


def _options(
    verb: str, positional: Sequence[object], settings: Mapping[str, Any], **fixed: Any
) -> Options:
    """The settings as options of the command line."""
    unknown = settings.keys() - get_type_hints(KNOWN[verb]).keys()
    if unknown:
        raise TypeError(f"{verb}() got an unexpected keyword argument {min(unknown)!r}")
    said: dict[str, Any] = {"artifacts": ARTIFACTS, **fixed}
    for keyword, value in settings.items():
        name, as_said = OPTIONS.get(keyword, (keyword, _unchanged))
        said[name] = as_said(value)
    if verb == "sanitize" and "sanitizer" in said:
        said["clean_with"] = said.pop("sanitizer")
    told = [*map(repr, map(str, positional)), *(f"{k}={v!r}" for k, v in settings.items())]
    return Options(**said, command=f"qdeploy.{verb}({', '.join(told)})")
