"""Quantize untrusted classifiers without switching on their hidden backdoors."""

import os

__version__ = "0.1.0"

# Before it is loaded: onnxruntime, from 1.29 on, sends the names and hashes of models unless it is
# told not to. Who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
