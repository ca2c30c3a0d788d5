"""The verbs as commands: `qdeploy.api.verbs`, with what came of them on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qdeploy.api.settings import ARTIFACTS, SanitizerKind
from qdeploy.cli.groups import given, option, takes
from qdeploy.cli.leaving import leave_by
from qdeploy.cli.options import (
    Arch,
    ArchArgs,
    Artifacts,
    AsJson,
    Calibration,
    CalibrationOptions,
    Device,
    EvidenceOptions,
    File,
    InputShape,
    JudgementOptions,
    Model,
    ModelOptions,
    Models,
    Out,
    OutFile,
    QuantizationOptions,
    Reference,
    Reports,
    Seed,
    Settings,
    TeachingOptions,
    Test,
    TestImages,
    parse_arguments,
    parse_shape,
    place_of,
)
from qdeploy.errors import EXIT_BAD_INPUT

QUANTIZED, EXPORTED = ".quantized.onnx", ".float.onnx"  # what names of files end in


@takes(
    ModelOptions,
    CalibrationOptions,
    EvidenceOptions,
    QuantizationOptions,
    TeachingOptions,
    JudgementOptions,
)
def sanitize(
    model: Model,
    out: OutFile = None,
    sanitizer: Annotated[
        SanitizerKind | None,
        option("--sanitizer", "Clean the float model first, as qdeploy clean does.", "Cleaning"),
    ] = None,
    images: Annotated[
        Path | None,
        option("--images", "Unlabelled, for that; else those for calibration, all.", "Cleaning"),
    ] = None,
    test_images: TestImages = None,
    artifacts: Artifacts = ARTIFACTS,
    dry_run: Annotated[bool, option("--dry-run", "Show the plan and stop.", "Output")] = False,
    as_json: AsJson = False,
    *,
    settings: Settings,
) -> None:
    """Quantize without switching a backdoor on, measure the file, and judge it."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    settings |= given({
        "sanitizer": sanitizer, "images": images, "test_images": test_images,
        "artifacts": artifacts,
    })  # fmt: skip
    progress, out = console.TerminalProgress(), place_of(out, model, QUANTIZED)
    if dry_run:
        from qdeploy.cli.planned import show_plan

        request, float_model, plan = verbs.plan(model, out, progress=progress, **settings)
        show_plan(float_model, plan, request.recipe, request.device)
        return
    report = verbs.sanitize(model, out, progress=progress, **settings)
    console.show_report(report, as_json=as_json)
    leave_by(report.outcome)


@takes(ModelOptions, CalibrationOptions, QuantizationOptions)
def quantize(
    model: Model, out: OutFile = None, artifacts: Artifacts = ARTIFACTS, *, settings: Settings
) -> None:
    """Quantize by any method. Nothing is measured and nothing is judged."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    out = place_of(out, model, QUANTIZED)
    quantized = verbs.quantize(
        model, out, progress=console.TerminalProgress(), artifacts=artifacts, **settings
    )
    console.show_quantized(quantized, out)


@takes(ModelOptions, EvidenceOptions, JudgementOptions)
def gate(
    file: File,
    reference: Reference = None,
    made_by: Annotated[
        Path | None,
        typer.Option(
            "--made-by",
            help="report.json of the run that rounded it: its integers are then explained.",
        ),
    ] = None,
    calibration: Calibration = None,
    test_images: TestImages = None,
    device: Device = None,
    artifacts: Artifacts = ARTIFACTS,
    as_json: AsJson = False,
    *,
    settings: Settings,
) -> None:
    """Measure an ONNX file as it is, whoever made it, and judge it by a policy."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    settings |= given({
        "reference": reference, "made_by": made_by, "test_images": test_images, "device": device,
        "artifacts": artifacts, "calibration": calibration,
    })  # fmt: skip
    report = verbs.gate(file, progress=console.TerminalProgress(), **settings)
    console.show_report(report, as_json=as_json)
    leave_by(report.outcome)


@takes(ModelOptions)
def scan(
    models: Models,
    reference: Reference = None,
    reports: Reports = None,
    as_json: AsJson = False,
    *,
    settings: Settings,
) -> None:
    """Look at model files without running them; exit 3 if something stands against one."""
    from qdeploy.api import verbs
    from qdeploy.cli import console
    from qdeploy.judging.verdict import Outcome
    from qdeploy.report.scans import scans_to_json

    said: Any = settings | given({"reference": reference, "reports": reports})
    scans = []
    for one in verbs.scan_each(models, console.TerminalProgress(), said):
        scans.append(one)
        if not as_json:
            console.show_scan(one)
    if as_json:
        console.show_json(scans_to_json(scans))
    rejected = any(one.stands_against for one in scans)
    if not rejected and any(one.failed is not None for one in scans):
        raise typer.Exit(EXIT_BAD_INPUT)
    leave_by(Outcome.REJECT if rejected else Outcome.ACCEPT)


@takes(ModelOptions)
def export(model: Model, out: OutFile = None, *, settings: Settings) -> None:
    """Write the model as a prepared float32 ONNX graph, proved equal to what was loaded."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    out = place_of(out, model, EXPORTED)
    exported = verbs.export(model, out, progress=console.TerminalProgress(), **settings)
    console.show_exported(exported, out)


def init(
    model: Model,
    out: Annotated[
        Path | None, option("--out", "The card; else NAME.toml beside the model.", "Output")
    ] = None,
    input_shape: InputShape = None,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    calibration: Calibration = None,
    test: Test = None,
) -> None:
    """Write a first model card: what the file says, what was tried, and guesses that are marked."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    said: Any = given({
        "input_shape": parse_shape(input_shape), "arch": arch, "calibration": calibration,
        "arch_args": parse_arguments(arch_args), "test": test,
    })  # fmt: skip
    begun = verbs.init(model, out, **said)
    console.show_begun(begun, model)


@takes(ModelOptions, TeachingOptions)
def clean(
    model: Model,
    out: Out,
    images: Annotated[
        Path,
        option(
            "--images",
            "Folder, zip or npz; labels are not used, and other things may be on them.",
            "Cleaning",
        ),
    ],
    sanitizer: Annotated[
        SanitizerKind,
        Settings,
        option(
            "--sanitizer",
            "Seek triggers and unlearn them, shift attention, distil alone, or forget.",
            "Cleaning",
        ),
    ] = "unlearn",
    seed: Seed = None,
    artifacts: Artifacts = ARTIFACTS,
    *,
    settings: Settings,
) -> None:
    """Clean a float model: teach a student on unlabelled images what it answers, not how."""
    from qdeploy.api import verbs
    from qdeploy.cli import console

    settings |= given({"sanitizer": sanitizer, "seed": seed, "artifacts": artifacts})
    student = verbs.clean_or_assist(
        model, images, out, progress=console.TerminalProgress(), **settings
    )
    if student is not None:
        console.show_pairs(student.lines())
