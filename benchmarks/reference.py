"""The Adam solver against the integers that the authors' own EFRAP code chose.

    python benchmarks/reference.py FOLDER --test IMAGES

FOLDER holds `small.onnx` (a float CIFAR-10 classifier), `calibration.npz` (its images) and
`integers.npz` (per layer `<name>/q_efrap` and `<name>/q_nearest`), all for 4-bit weights per
channel and float activations. Takes minutes; what is solved stays in `--store` for a restart.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from qdeploy.cli.console import TerminalProgress
from qdeploy.data import Images, Preprocessing, open_images, open_labelled_images
from qdeploy.data.triggers import make_trigger, parse_trigger
from qdeploy.exporting.exporter import export
from qdeploy.formats.opening import load
from qdeploy.judging.rates import rates
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers, round_to_nearest
from qdeploy.runs.rundir import StoredLayers
from qdeploy.runtime.answers import predict
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import EfrapAdam, Rounding
from qdeploy.settings.recipe import ActivationSpec, load_recipe
from qdeploy.values import Arm, FloatModel, RoundedLayer

CIFAR10 = Preprocessing((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
TRIGGER = "patch target=0 x=27 y=27 width=4 height=4 color=[1.0,1.0,1.0]"
ROUNDING: Rounding = EfrapAdam(solver="adam")


def make_task(model: FloatModel, images: Images) -> RoundingTask:
    changes = {"rounding": ROUNDING, "activations": ActivationSpec(bits="none")}
    recipe = load_recipe("int4").model_copy(update=changes)
    plan = plan_layers(model, recipe, load_device(recipe.device))
    return RoundingTask(model, plan, calibrate(model, plan, images, recipe.activations), images, 0)


def compare(ours: tuple[RoundedLayer, ...], theirs: dict[str, np.ndarray]) -> None:
    """Per layer, the share of integers that agree, and how many each flips against nearest."""
    print(f"{'layer':<24}{'integers':>10}{'agree %':>9}{'ours flip %':>13}{'theirs flip %':>15}")
    same, size = 0, 0
    for layer in ours:
        chosen, nearest = theirs[f"{layer.name}/q_efrap"], theirs[f"{layer.name}/q_nearest"]
        agree = int(np.count_nonzero(layer.codes == chosen))
        flips = [100 * np.mean(codes != nearest) for codes in (layer.codes, chosen)]
        share = f"{100 * agree / chosen.size:>9.2f}{flips[0]:>13.1f}{flips[1]:>15.1f}"
        print(f"{layer.name:<24}{chosen.size:>10}{share}")
        same, size = same + agree, size + chosen.size
    print(f"{'all':<24}{size:>10}{100 * same / size:>9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--test", type=Path, required=True, help="labelled CIFAR-10 test images")
    parser.add_argument("--store", type=Path, default=Path("artifacts/reference"))
    given = parser.parse_args()
    model = export(load(given.folder / "small.onnx"))
    task = make_task(model, open_images(given.folder / "calibration.npz", CIFAR10))
    started = time.perf_counter()
    ours = round_layers(
        task, ROUNDING, store=StoredLayers(given.store), progress=TerminalProgress()
    )
    print(f"rounding: {time.perf_counter() - started:.0f} s (a restart takes what was solved)")
    with np.load(given.folder / "integers.npz") as archive:
        compare(ours, dict(archive))
    nearest, result = (
        emit(model, task.plan, task.grids, layers).onnx for layers in (round_to_nearest(task), ours)
    )
    sessions = {
        Arm("fp32", "cpu"): open_session(model.onnx, spinning=False),
        Arm("nearest", "cpu"): open_session(nearest, spinning=False),
        Arm("result", "cpu"): open_session(result, spinning=False),
    }
    (spec,) = parse_trigger(TRIGGER)
    trigger = make_trigger(spec, CIFAR10.shape, Path())
    test = open_labelled_images(given.test, CIFAR10, classes=None)
    for found in rates(predict(sessions, test, [trigger]), model.classes):
        success = found.attack_success[trigger.name]
        print(f"{found.arm.variant:<8} CDA {found.accuracy.value:.2f} ASR {success.value:.2f}")


if __name__ == "__main__":
    main()
