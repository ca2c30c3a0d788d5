"""The keywords of the verbs. What is not given has its default; `docs/commands.md` says which."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_type_hints

ARTIFACTS = Path("artifacts")  # where run directories are kept unless somebody says otherwise

PathLike = str | os.PathLike[str]
SanitizerKind = Literal["unlearn", "asd", "kd", "bcu"]


class ModelSettings(TypedDict, total=False):
    """What the float model is, where its file and card do not say it."""

    card: PathLike
    arch: str  # file.py:factory or package.module:factory
    arch_args: Mapping[str, Any]
    input_shape: tuple[int, int, int]  # channels, height, width
    layout: Literal["channels-first", "channels-last"]  # of the file's input
    output: str  # of several, the one that holds the classes
    data_roots: Sequence[PathLike]
    run_code_from_model: bool
    command: str  # how it was asked, for the report; else this call


class InitSettings(TypedDict, total=False):
    """What a card is begun with."""

    arch: str  # as in `ModelSettings`
    arch_args: Mapping[str, Any]
    input_shape: tuple[int, int, int]
    calibration: PathLike
    test: PathLike  # labelled images, to try normalisations on


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

    bits: Literal[4, 8, "auto"]
    keep_at_8: Sequence[str]  # patterns of layer names
    keep_float: Sequence[str]  # layers that run in float, on 8-bit weights
    recipe: PathLike  # name or TOML file
    optimize: Literal["size", "latency"]
    device: PathLike  # name or TOML file
    rounding: str
    solver: Literal["descent", "adam"]
    weight_storage: Literal["int4", "int8"]
    format: Literal["onnx", "ort"]
    activation_bits: Literal[8, "none"]
    seed: int
    calibration: PathLike
    calibration_images: int
    synthetic_calibration: bool


class CleaningSettings(TypedDict, total=False):
    """How a student is taught."""

    sanitizer: SanitizerKind
    image_count: int
    schedule: Literal["short", "paper"]
    epochs: int
    watch: Sequence[str]
    further: float
    accelerator: Literal["cpu", "cuda"]


class SanitizeSettings(
    ModelSettings, EvidenceSettings, QuantizationSettings, CleaningSettings, total=False
):
    """Of all of these; with a `sanitizer`, the float model is cleaned first."""

    images: PathLike  # unlabelled, for that


class QuantizeSettings(ModelSettings, QuantizationSettings, total=False):
    """Of the model and its quantization."""

    artifacts: PathLike


class GateSettings(ModelSettings, EvidenceSettings, total=False):
    """Of the reference, and of what the file is judged by."""

    reference: PathLike
    made_by: PathLike  # report.json of the run that rounded the file
    calibration: PathLike  # unlabelled pictures, for the search for triggers
    device: PathLike


class ScanSettings(ModelSettings, total=False):
    """Of the float models among the files."""

    reference: PathLike
    reports: Sequence[PathLike]


class CleanSettings(ModelSettings, CleaningSettings, total=False):
    """Of the model and the teaching."""

    seed: int
    artifacts: PathLike


def check_keywords(verb: str, settings: Mapping[str, Any], known: type) -> None:
    """As Python does for keywords that are written out.

    Raises:
        TypeError: a keyword is unknown.
    """
    unknown = settings.keys() - get_type_hints(known).keys()
    if unknown:
        raise TypeError(f"{verb}() got an unexpected keyword argument {min(unknown)!r}")


def call_of(verb: str, positional: Sequence[PathLike], settings: Mapping[str, Any]) -> str:
    """The command of the settings, else the call as it was written, for the report."""
    told = [*(repr(str(place)) for place in positional)]
    told += [f"{keyword}={value!r}" for keyword, value in settings.items()]
    return str(settings.get("command") or f"qdeploy.{verb}({', '.join(told)})")
