"""Quantize untrusted classifiers without switching on their hidden backdoors."""

import os

__version__ = "0.1.0"

# Libraries that report home by default are told not to before they are loaded: onnxruntime, from
# 1.29 on, sends the names and hashes of models. Who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
