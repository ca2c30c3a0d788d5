"""Quantize untrusted classifiers without switching on their hidden backdoors.

    import qdeploy

    report = qdeploy.sanitize("model.onnx", "model.int4.onnx", bits=4, policy="demo", seed=1)
    report.outcome                                # Outcome.ACCEPT, REJECT or NO_VERDICT
    [check.name for check in report.checks]       # what was held against what
    qdeploy.gate("model.int4.onnx", reference="model.onnx", policy="demo", threads=1).outcome
    (seen,) = qdeploy.scan("model.onnx")          # nothing of it is run
    seen.findings

The verbs: `init`, `sanitize`, `quantize`, `gate`, `scan`, `export`, `clean`. What they hand back:
`Report` with its `Check`s and `Outcome`, `QuantizedModel`, `FloatModel`, `FileScan`. What they
read, as TOML: `Recipe`, `Policy`, `DeviceProfile`; a `Trigger` is what attack success is measured
with. All errors are `QdeployError`. A report shows itself in a notebook. Where things are:
`docs/architecture.md`.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Before it is loaded: onnxruntime, from 1.29 on, sends the names and hashes of models unless it is
# told not to. Who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from qdeploy.api.verbs import clean, export, gate, init, quantize, sanitize, scan
    from qdeploy.data.triggers import Trigger
    from qdeploy.errors import QdeployError
    from qdeploy.judging.verdict import Check, Outcome
    from qdeploy.report.scans import FileScan
    from qdeploy.report.values import Report
    from qdeploy.settings.device import DeviceProfile
    from qdeploy.settings.policy import Policy
    from qdeploy.settings.recipe import Recipe
    from qdeploy.values import FloatModel, QuantizedModel

__all__ = [
    "Check",
    "DeviceProfile",
    "FileScan",
    "FloatModel",
    "Outcome",
    "Policy",
    "QdeployError",
    "QuantizedModel",
    "Recipe",
    "Report",
    "Trigger",
    "clean",
    "export",
    "gate",
    "init",
    "quantize",
    "sanitize",
    "scan",
]

_VERBS = ("clean", "export", "gate", "init", "quantize", "sanitize", "scan")
_HOMES = {
    **dict.fromkeys(_VERBS, "api.verbs"),
    **dict.fromkeys(("Check", "Outcome"), "judging.verdict"),
    **dict.fromkeys(("FloatModel", "QuantizedModel"), "values"),
    "DeviceProfile": "settings.device",
    "FileScan": "report.scans",
    "Policy": "settings.policy",
    "QdeployError": "errors",
    "Recipe": "settings.recipe",
    "Report": "report.values",
    "Trigger": "data.triggers",
}


def __getattr__(name: str) -> object:
    """What is asked for is imported then: onnxruntime takes a second to load."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
