"""How many positions of an image rounding has to look at: the error on images it was not fitted to.

    python benchmarks/positions.py MODEL.onnx --images FOLDER_OR_ARCHIVE [--count 1024]

Every layer is rounded by `efrap-descent` at 4 bits on its own input, with more and fewer positions
of each image; its error is that on 2,000 other images, at all their positions, over what 64 leave:
the geometric mean over the layers, and the worst. The last line is what the command itself looks
at. How pixels become inputs is said by the card beside the model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from qdeploy.core.moments import Quadratic
from qdeploy.data import Images
from qdeploy.exporting.exporter import export
from qdeploy.formats.opening import load
from qdeploy.inputs.sources import Given, resolve
from qdeploy.progress import SILENT
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding import one_pass
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import EfrapDescent
from qdeploy.settings.recipe import load_recipe
from qdeploy.values import Stated

POSITIONS = (64, 32, 16, 8, 4)
OTHERS = 2000


class Lab:
    """A model at 4 bits, and the errors of its layers on images that nothing was fitted to."""

    def __init__(self, model: Path, images: Path) -> None:
        sources = resolve(model, Given(calibration=images))
        self.model = export(load(model), stated=Stated())
        found = sources.calibration_images(None, 0)
        assert found is not None
        drawn = np.random.default_rng(0).permutation(len(found))
        self.images, _ = found.only(np.sort(drawn[OTHERS:][:8192])).decoded()
        recipe = load_recipe("int4")
        self.plan = plan_layers(self.model, recipe, load_device("x86-avx2"))
        few = self.images.sample(256, 0)
        self.grids = calibrate(self.model, self.plan, few, recipe.activations)
        others, _ = found.only(np.sort(drawn[:OTHERS])).decoded()
        self.truth = self._truth(others)

    def _truth(self, others: Images) -> dict[str, Quadratic]:
        task, spec = self._task(others), EfrapDescent(positions=1 << 16)
        size = one_pass._images_at_once(task)
        found = one_pass._moments(
            task, spec, list(self.plan.layers), task.problems(), SILENT, size=size
        )
        return {
            name: sum((m.quadratic(centred=True) for m in rest), first.quadratic(centred=True))
            for name, (first, *rest) in found.items()
        }

    def _task(self, images: Images) -> RoundingTask:
        return RoundingTask(self.model, self.plan, self.grids, images, 0)

    def errors(self, count: int, positions: int) -> tuple[np.ndarray, float]:
        """Of every layer, over its output's variance; and the CPU seconds of rounding."""
        task = self._task(self.images.sample(count, 0))
        started, problems = time.process_time(), task.problems()
        rounded = round_layers(task, EfrapDescent(positions=positions))
        took = time.process_time() - started
        found = []
        for layer, chosen in zip(self.plan.layers, rounded, strict=True):
            truth, problem = self.truth[chosen.name], problems[chosen.name]
            codes = layer.site.to_matrix(chosen.codes.astype(np.float32)).astype(np.int32)
            error = truth.error(problem.dequantized(codes)).sum()
            found.append(error / truth.energy.sum())
        return np.array(found), took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1024)
    given = parser.parse_args()
    default = one_pass.LEAST_SAMPLES
    one_pass.LEAST_SAMPLES = 1 << 40  # as many positions as are asked for
    lab = Lab(given.model, given.images)
    base, _ = lab.errors(given.count, POSITIONS[0])
    print(f"{'positions':<12}{'mean':>7}{'worst':>7}{'CPU s':>7}")
    for positions in (*POSITIONS, None):
        if positions is None:
            one_pass.LEAST_SAMPLES = default
        found, took = lab.errors(given.count, positions or POSITIONS[0])
        ratio = found / base
        title = "as chosen" if positions is None else str(positions)
        mean = float(np.exp(np.log(ratio).mean()))
        print(f"{title:<12}{mean:>7.3f}{ratio.max():>7.3f}{took:>7.1f}", flush=True)


if __name__ == "__main__":
    main()
