"""`qdeploy compare`."""

from __future__ import annotations

from typing import Annotated, Any

from qdeploy.cli.groups import given, option, takes
from qdeploy.cli.options import (
    Arch,
    ArchArgs,
    Calibration,
    CalibrationImages,
    DataRoots,
    Device,
    EvidenceOptions,
    Models,
    Out,
    Settings,
    TestImages,
    parse_arguments,
)


@takes(EvidenceOptions)
def compare(
    models: Models,
    out: Out,
    methods: Annotated[
        str, option("--methods", "Names separated by commas, or all.", "Comparison")
    ] = "nearest,stochastic,flip,gptq,adaround-descent,brecq-descent,efrap-descent",
    grids: Annotated[
        str,
        option(
            "--grids",
            "absmax, half, minmax, mse; per tensor with tensor- before it; or all.",
            "Comparison",
        ),
    ] = "absmax",
    widths: Annotated[str, option("--bits", "Bits of a weight: 4, 8 or 4,8.", "Comparison")] = "4",
    activation_widths: Annotated[
        str, option("--activation-bits", "8, none or 8,none.", "Comparison")
    ] = "8",
    seeds: Annotated[
        int,
        option("--seeds", "How often, with other images and draws.", "Comparison", at_least=1),
    ] = 1,
    steps: Annotated[
        int | None,
        option("--steps", "Of methods that train; else as published.", "Comparison", at_least=1),
    ] = None,
    calibration: Calibration = None,
    calibration_images: CalibrationImages = None,
    test_images: TestImages = None,
    data_roots: DataRoots = None,
    arch: Arch = None,
    arch_args: ArchArgs = None,
    device: Device = None,
    *,
    settings: Settings,
) -> None:
    """Set rounding methods side by side: every one on every grid, on every model."""
    from qdeploy.api.requests import quantize_request
    from qdeploy.cli import console
    from qdeploy.compare.matrix import parse_matrix
    from qdeploy.compare.run import compare as compare_all

    matrix = parse_matrix(methods, grids, widths, activation_widths, seeds)
    said: Any = settings | given({
        "calibration": calibration, "calibration_images": calibration_images,
        "test_images": test_images, "data_roots": data_roots, "arch": arch,
        "arch_args": parse_arguments(arch_args), "device": device,
    })  # fmt: skip
    requests = [quantize_request(path, said, out=out) for path in models]
    result = compare_all(requests, matrix, out, steps, console.TerminalProgress())
    console.show_text(result.table)
    console.show_pairs(("wrote", str(path)) for path in result.written)
