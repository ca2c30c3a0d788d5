"""onnxruntime.quantization on the common task: `python onnxruntime_static.py FOLDER`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

BATCH = 32


class Reader(CalibrationDataReader):
    """The calibration inputs, batch by batch."""

    def __init__(self, inputs: np.ndarray, name: str) -> None:
        self._feeds = iter([{name: x} for x in np.array_split(inputs, len(inputs) // BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def peak_megabytes() -> float:
    """Of this process alone; the figure that wait4 gives begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    folder = Path(sys.argv[1])
    calibration, inputs = (np.load(folder / f"{name}.npy") for name in ("calibration", "inputs"))
    name = ort.InferenceSession(folder / "float.onnx").get_inputs()[0].name
    wall, cpu = time.perf_counter(), time.process_time()
    quantize_static(
        folder / "float.onnx",
        folder / "onnxruntime.onnx",
        Reader(calibration, name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt4,
        activation_type=QuantType.QUInt8,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    session = ort.InferenceSession(folder / "onnxruntime.onnx")
    parts = np.array_split(inputs, len(inputs) // 100)
    np.save(folder / "logits.npy", np.concatenate([session.run(None, {name: x})[0] for x in parts]))
    print(
        json.dumps(
            {
                "cpu": cpu,
                "wall": wall,
                "megabytes": peak_megabytes(),
                "version": f"onnxruntime {ort.__version__}",
            }
        )
    )


main()
