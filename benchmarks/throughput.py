"""How fast the quantized files run: ResNet-18 for 32x32 images, random weights, on the CPU.

    python benchmarks/throughput.py --widths 16 32 64 --threads 1

The files take turns, one session open at a time; the figure is the float file's median time over
the other's median time in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from statistics import median

import numpy as np
import onnxruntime
import torch

from qdeploy.architectures import ResNet18
from qdeploy.data import Preprocessing, images_from_array
from qdeploy.exporting.exporter import export
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_to_nearest
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import Nearest
from qdeploy.settings.recipe import load_recipe
from qdeploy.values import Loaded, Origin, Stated

SHAPE = (3, 32, 32)
BATCHES = (1, 32)
FILES = {  # name -> recipe, device
    "int8": ("int8", "x86-vnni"),
    "int4 in int8": ("int4", "x86-vnni"),
    "true int4": ("int4", "compact"),
}


def make_files(width: int) -> dict[str, bytes]:
    """The float file and the quantized ones. How the weights were rounded does not change speed."""
    torch.manual_seed(0)
    module = ResNet18(width).eval()
    model = export(Loaded(Origin("", "", ""), module, "module"), stated=Stated(SHAPE))
    pixels = np.random.default_rng(0).integers(0, 256, (64, *SHAPE), dtype=np.uint8)
    images = images_from_array("noise", pixels, Preprocessing(SHAPE, (0.5,) * 3, (0.25,) * 3))
    files = {"float32": model.onnx}
    for name, (recipe_name, device) in FILES.items():
        recipe = load_recipe(recipe_name).model_copy(update={"rounding": Nearest()})
        plan = plan_layers(model, recipe, load_device(device))
        grids = calibrate(model, plan, images, recipe.activations)
        rounded = round_to_nearest(RoundingTask(model, plan, grids, images, 0))
        files[name] = emit(model, plan, grids, rounded).onnx
    return files


def seconds_per_run(
    files: dict[str, bytes], threads: int, turns: int
) -> dict[tuple[str, int], float]:
    """Median over all turns of every file at every batch size."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(turns):
        for name, data in files.items():
            session = open_session(data, threads=threads)
            for batch in BATCHES:
                x = np.random.default_rng(0).normal(size=(batch, *SHAPE)).astype(np.float32)
                session.logits(x)
                for _ in range(4 + 60 // batch):
                    started = time.perf_counter()
                    session.logits(x)
                    times[name, batch].append(time.perf_counter() - started)
    return {key: median(values) for key, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    print(f"onnxruntime {onnxruntime.__version__}; times as fast as the float32 file, median\n")
    columns = "".join(f"{f'batch {b}':>12}" for b in BATCHES)
    print(f"{'width':>5} {'threads':>7}  {'file':<14}{'MB':>7}{columns}")
    for width in options.widths:
        files = make_files(width)
        for threads in options.threads:
            seconds = seconds_per_run(files, threads, options.turns)
            for name, data in files.items():
                ratios = (seconds["float32", b] / seconds[name, b] for b in BATCHES)
                figures = "".join(f"{f'{ratio:.2f}x':>12}" for ratio in ratios)
                print(f"{width:>5} {threads:>7}  {name:<14}{len(data) / 1e6:>7.2f}{figures}")


if __name__ == "__main__":
    main()
