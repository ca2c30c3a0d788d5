"""qdeploy on the common task: `python qdeploy_rounding.py FOLDER METHOD [STEPS]`."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from qdeploy.compare.matrix import Cell
from qdeploy.data import Preprocessing, images_from_array
from qdeploy.exporting.exporter import export
from qdeploy.formats.opening import load
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import load_device
from qdeploy.settings.recipe import load_recipe


def peak_megabytes() -> float:
    """Of this process alone; the figure that wait4 gives begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    folder, method = Path(sys.argv[1]), sys.argv[2]
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else None
    recipe = Cell(method, "absmax", 4, "8", 0).recipe(load_recipe("int4"), steps)
    pixels = np.load(folder / "pixels.npz")
    mean, std = (tuple(float(v) for v in pixels[name]) for name in ("mean", "std"))
    preprocessing = Preprocessing(pixels["x"].shape[1:], mean, std)
    images = images_from_array("calibration", pixels["x"], preprocessing)
    wall, cpu = time.perf_counter(), time.process_time()
    model = export(load(folder / "float.onnx"), shape=None)
    plan = plan_layers(model, recipe, load_device("x86-vnni"))
    grids = calibrate(model, plan, images, recipe.activations)
    layers = round_layers(RoundingTask(model, plan, grids, images, 0), recipe.rounding)
    file = emit(model, plan, grids, layers).onnx
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    session = open_session(file)
    inputs = np.load(folder / "inputs.npy")
    logits = np.concatenate([session.logits(x) for x in np.array_split(inputs, len(inputs) // 100)])
    np.save(folder / "logits.npy", logits)
    print(
        json.dumps(
            {
                "cpu": cpu,
                "wall": wall,
                "megabytes": peak_megabytes(),
                "version": f"qdeploy {version('qdeploy')}",
            }
        )
    )


main()
