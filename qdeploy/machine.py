"""The libraries that a result depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir", "onnxscript", "torch", "numpy")


EXTRAS = {
    "scan": ("fickling",),
    "attest": ("securesystemslib",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "demo": ("scikit-learn",),
    "plots": ("matplotlib",),
}  # by any of which an extra is there


def installed_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions by name of what is installed; onnxruntime comes under either of its names."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
