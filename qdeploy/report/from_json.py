"""The layers that a run of this program has rounded, from its report.json."""

from __future__ import annotations

from pathlib import Path

from qdeploy.errors import InputError
from qdeploy.judging.checks import LayerDigest
from qdeploy.report.kept import read_report


def layers_of(path: Path) -> frozenset[LayerDigest]:
    """Digests of the codes and scales of every layer as the run rounded it.

    Raises:
        InputError: it is not the report of a run that rounded a file.
    """
    try:
        report = read_report(path).content
    except InputError as error:
        raise InputError(f"{path} is not the report.json of a run: {error}") from error
    if report.recipe is None or report.provenance is None:
        raise InputError(
            f"{path} is not the report.json of a run that rounded something",
            hint="give the one that qdeploy sanitize wrote",
        )
    return frozenset(
        (layer.codes_sha256, layer.scales_sha256)
        for layer in report.provenance.layers
        if layer.explanation == "as reported"
    )
