"""AIMET's AdaRound on the common task: `python aimet_adaround.py FOLDER ITERATIONS`.

Runs where aimet-onnx is installed. 0 iterations: AIMET's scales with nearest rounding.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import aimet_onnx
import numpy as np
import onnx
from aimet_onnx.quantsim import QuantizationSimModel

BATCH = 32


def peak_megabytes() -> float:
    """Of this process alone; the figure that wait4 gives begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    folder, iterations = Path(sys.argv[1]), int(sys.argv[2])
    calibration, inputs = (np.load(folder / f"{name}.npy") for name in ("calibration", "inputs"))
    model = onnx.load(folder / "float.onnx")
    name = model.graph.input[0].name
    feeds = [{name: x} for x in np.array_split(calibration, len(calibration) // BATCH)]
    wall, cpu = time.perf_counter(), time.process_time()
    sim = QuantizationSimModel(model, param_type=aimet_onnx.int4, activation_type=aimet_onnx.int8)
    if iterations:
        aimet_onnx.apply_adaround(sim, feeds, num_iterations=iterations)
    sim.compute_encodings(feeds)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    parts = np.array_split(inputs, len(inputs) // 100)
    logits = [sim.session.run(None, {name: x})[0] for x in parts]
    np.save(folder / "logits.npy", np.concatenate(logits))
    print(
        json.dumps(
            {
                "cpu": cpu,
                "wall": wall,
                "megabytes": peak_megabytes(),
                "version": f"aimet-onnx {version('aimet-onnx')}",
            }
        )
    )


main()
